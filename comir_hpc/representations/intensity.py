"""Intensities as they are, compared by mutual information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from comir_hpc.representations.features import Features
from comir_hpc.representations.isotropic import cut_grid, on_cubic_voxels, pieces
from comir_hpc.representations.measures import INFORMATION, Measure
from comir_hpc.representations.protocol import Array, Representation
from comir_hpc.space.grid import Grid


@dataclass(frozen=True, eq=False)
class Intensity(Representation):
    """Normalised intensities of the first channel; thick slices are interpolated first (`isotropic`)."""

    measure: ClassVar[Measure] = INFORMATION
    origin: ClassVar[str] = "intensity"
    noun: ClassVar[str] = "intensities"
    pictured: ClassVar[bool] = False
    checked_described: ClassVar[bool] = True

    def values(self, level: int, image: Array) -> Array:
        """Take the image as the only channel."""
        del level
        return image[None]

    def features(self, level: int) -> tuple[Features, Array]:
        """Make the features to compare, on nearly cubic voxels, and show the same."""
        features, image = super().features(level)
        if not self.interpolated(level):
            return features, image
        features = on_cubic_voxels(features)
        return features, features.values[0]

    def represented(self, image: Array, mask: NDArray[np.bool_], grid: Grid) -> Features | None:
        """Take another image as the only channel."""
        return Features(image[None], mask, grid)

    def grid(self, level: int) -> Grid:
        """Give the grid of the features: that of the level, with its thick slices cut."""
        grid = self.compared.level_grid(level)
        return cut_grid(grid) if self.interpolated(level) else grid

    def interpolated(self, level: int) -> bool:
        """Say whether a level has thick slices."""
        return pieces(self.compared.level_grid(level)) != (1, 1, 1)

    def notes(self, level: int) -> list[str]:
        """Say what is assumed about the volume, and that its slices are interpolated."""
        notes = super().notes(level)
        if self.interpolated(level):
            grid = self.compared.level_grid(level)
            notes.append(
                f"{self.volume.path}: voxels of {_in_mm(grid)} mm are compared on {_in_mm(cut_grid(grid))} mm, by "
                "splines along the thick axes; what is thinner than a slice is not in the data"
            )
        return notes


def _in_mm(grid: Grid) -> str:
    return " x ".join(f"{s:.4g}" for s in grid.spacing_mm)
