"""Draw the README's picture from a finished demo.

    python docs/pictures/before_after.py DEMO docs/pictures/before-after.png

Two slices of T1w with lines of T2w on top, as the scanner gave it and as the registration put it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import ndimage

PLANES = ("axial", "sagittal")


def main(demo: Path, out: Path) -> None:
    """Read the panels of the demo's registration and draw them."""
    with np.load(demo / "registration" / "panels.npz") as arrays:
        panels = {key: arrays[key] for key in arrays.files}
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 7.6), facecolor="black")
    for row, plane in zip(axes, PLANES, strict=True):
        fixed = panels[f"{plane}_fixed"]
        for axis, when in zip(row, ("before", "after"), strict=True):
            # Rows of the array run from the feet to the head, or from the front to the back.
            lower = plane != "axial"
            # Voxels that the moving volume does not cover are NaN.
            moving = panels[f"{plane}_{when}"].astype(float)
            moving = ndimage.gaussian_filter(np.nan_to_num(moving, nan=np.nanmin(moving)), 0.8)
            axis.imshow(fixed, cmap="gray", origin="lower" if lower else "upper")
            levels = np.percentile(moving[moving > moving.mean()], (25, 85))
            axis.contour(moving, levels=np.unique(levels), colors=["#e69f00", "#56b4e9"], linewidths=0.7)
            axis.set_axis_off()
    for axis, words in zip(axes[0], ("as the scanner gave it", "registered"), strict=True):
        axis.set_title(words, color="white", fontsize=11)
    figure.tight_layout(pad=0.4)
    figure.savefig(out, dpi=110, facecolor="black")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
