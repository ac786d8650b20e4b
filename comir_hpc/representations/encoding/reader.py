"""Read boxes of a volume as a network's input: normalised, with padding as background.

Axes: c image channels, z y x space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from comir_hpc.representations.encoding.grid import Array
from comir_hpc.space.grid import Box, Grid
from comir_hpc.volumes.resampled import Resampled

if TYPE_CHECKING:
    from comir_hpc.volumes.volume import Intensity, Volume


class NormalisedReader:
    """Read boxes of one grid as network input, normalised by the volume's statistics; padding is background.

    Parameters
    ----------
    volume : Volume
        Volume to read from. It must have intensity statistics.
    place : int or Grid
        Pyramid level to read from, or the grid to see the volume on.

    Attributes
    ----------
    seen : Resampled
        The volume on that grid.
    """

    def __init__(self, volume: Volume, place: int | Grid) -> None:
        self.volume, self.seen = volume, Resampled(volume, place)
        self._intensities = [volume.intensity(c) for c in range(volume.num_channels)]

    def __call__(self, box: Box) -> Array:
        """Read the normalised values (c, z, y, x) of a box inside the grid."""
        values = self.seen.read(box)
        result = np.empty(values.shape, dtype=np.float32)
        for c, z in np.ndindex(
            *values.shape[:2]
        ):  # a slice at a time: nothing else of the size of the box is held
            result[c, z] = self._intensities[c].normalise(values[c, z])
        return result

    @property
    def background(self) -> Array:
        """Largest normalised value that is background, for each channel, (c,)."""
        return np.array([_largest_background(i) for i in self._intensities], dtype=np.float32)


def _largest_background(intensity: Intensity) -> float:
    # Values below `low` are clipped to it, so that background reaches up to `low` at least.
    return float(intensity.normalise(np.array([max(intensity.foreground_above, intensity.low)]))[0])
