"""Middle slices of a volume in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.runs.html import table
from comir_hpc.runs.pictures import PLANES, isotropic, oriented, row_html, shaded, spacing_mm
from comir_hpc.space.grid import Grid

_LONGEST = 220  # pixels of a picture's longer side


def volume_html(title: str, rows: Mapping[str, object], path: Path) -> str:
    """Give a table and the middle slices of a volume on disk, from its finest level that is small enough to read.

    Nothing is drawn of a file that is no store, of a store that is not complete, and where no level is small.
    """
    from comir_hpc.volumes.volume import Volume

    pictures = ""
    if path.is_dir():
        try:
            volume = Volume.open(path)
            small = [n for n in range(volume.num_levels) if max(volume.level_grid(n).shape_zyx) <= _LONGEST]
            if small:
                pictures = slices_html(volume.read(level=small[0]), volume.level_grid(small[0]))
        except VolumeError as error:
            rows = {**rows, "pictures": f"none: {error}"}
    return table(title, {**rows, "path": path}) + pictures


def slices_html(values: NDArray[Any], grid: Grid) -> str:
    """Give the middle slices of (z, y, x) or (c, z, y, x) values as pictures; of several channels the first."""
    first = values[0] if values.ndim == 4 else values
    panels: dict[str, NDArray[np.float32]] = {}
    for axis, name in enumerate(["slice"] if grid.planar else ["axial", "coronal", "sagittal"]):
        panels[f"{name}_fixed"] = np.take(first, first.shape[axis] // 2, axis=axis).astype(np.float32)
        spacing = [s for other, s in enumerate(grid.spacing_mm) if other != axis]
        panels[f"{name}_spacing_mm"] = np.asarray(spacing, dtype=np.float32)
    direction = np.asarray(grid.direction, dtype=np.float64)
    names = [name for name in PLANES if f"{name}_fixed" in panels]
    shades = shaded({name: oriented(panels, name, direction) for name in names})
    pictures = [isotropic(shades[name, "fixed"], spacing_mm(panels, name), _LONGEST) for name in names]
    return row_html(pictures, [f"{PLANES[name]}, middle" for name in names], _LONGEST)
