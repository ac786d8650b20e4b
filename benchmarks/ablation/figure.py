"""Draw the ablation: one line a row, a dot a training seed.

python benchmarks/ablation/figure.py benchmarks/ablation/ablation.csv benchmarks/ablation/ablation.png
"""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (
    ("displaced: error (voxels; more than 10 at 10)", ("tre_voxels_1", "tre_voxels_2"), 10.0),
    ("aligned: bias (voxels)", ("bias_voxels",), None),
    ("equivariance error, worst of O (exact at 1e-4)", ("e_t1w", "e_t2w"), 10.0),
    ("agreement", ("agreement",), None),
)
FLOOR = 1e-4  # exact equivariance is 1e-13: drawn at the left edge


def main(table: Path, picture: Path) -> None:
    """Read the CSV, write the PNG."""
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["row"] for row in rows))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 0.34 * len(names) + 1.2), sharey=True)
    for axis, (title, columns, most) in zip(axes, PANELS, strict=True):
        for row in rows:
            for column in columns:
                if row[column]:
                    value = max(float(row[column]), FLOOR) if column.startswith("e_") else float(row[column])
                    axis.plot(
                        min(value, most or value), names.index(row["row"]), "o", ms=5, alpha=0.7, mec="none",
                        color=("#2266aa", "#cc6611", "#558833")[int(row["train_seed"])],
                    )  # fmt: skip
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        if most:
            axis.set_xscale("log")
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
