"""Draw made-up pairs, as the general model sees them in its training: two views of each, a slice through the middle.

python docs/pictures/made_pairs.py configs/general.yaml docs/pictures/made-pairs.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from comir_hpc.config.files import load
from comir_hpc.config.train import TrainSettings
from comir_hpc.learning.synthetic.sampler import MadeSampler
from comir_hpc.space.groups import rotation_group

ROWS, COLUMNS, STEP = 4, 8, 1


def main(config: Path, out: Path) -> None:
    """Draw `ROWS` times `COLUMNS` pairs."""
    settings = load(TrainSettings, config)
    assert settings.synthetic is not None
    sampler = MadeSampler(settings.synthetic, settings.sampling, rotation_group("O"), 2, settings.seed)
    figure, axes = plt.subplots(ROWS, 2 * COLUMNS, figsize=(2 * COLUMNS * 0.75, ROWS * 0.8))
    for number in range(ROWS * COLUMNS):
        row, column = divmod(number, COLUMNS)
        for view in range(2):
            image = sampler.read(sampler.draw(STEP, number))[view][0]
            axis = axes[row, 2 * column + view]
            axis.imshow(image[len(image) // 2], cmap="gray", interpolation="nearest")
            axis.set_axis_off()
    # The two views of a pair touch, and pairs are apart.
    figure.subplots_adjust(left=0.005, right=0.995, top=0.99, bottom=0.01, wspace=0.04, hspace=0.08)
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
