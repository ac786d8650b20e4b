"""Interpolate maps of a volume at many places, in 0.4 of the time that torch takes in three dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from comir_hpc.representations.criteria import Array32
from comir_hpc.space.grid import FloatArray, Triple


@dataclass(frozen=True, eq=False)
class Lookup:
    """Maps (M, z, y, x) as one picture, their slices below each other.

    torch looks many places of a picture up at once, but those of a volume one by one. So two look-ups, one in either
    neighbouring slice, take 0.4 of the time of one in the volume. A float32 counts the lines of the whole picture: in
    maps of 80^3 a place is off by 0.0001 voxels on average and 0.0007 at most, in maps of 194^3 by 0.0007 and 0.006.

    Attributes
    ----------
    rows : (1, M, Z * Y, X) tensor
        The slices, with what is added: one more slice at the end, so that there is always a next one; and a slice and a
        line of zeros on either side where maps fade out.
    shape : (Z, Y, X)
        Shape of the maps with what is added.
    beyond : "zeros" or "border"
        What lies beyond the grid.
    """

    rows: torch.Tensor
    shape: Triple
    beyond: Literal["zeros", "border"]

    @classmethod
    def of(cls, maps: Array32, beyond: Literal["zeros", "border"] = "zeros") -> Lookup:
        """Prepare maps (M, z, y, x)."""
        if beyond == "zeros":
            maps = np.pad(maps, ((0, 0), (1, 2), (1, 1), (0, 0)))
        else:
            maps = np.pad(maps, ((0, 0), (0, 1), (0, 0), (0, 0)), mode="edge")
        count, z, y, x = maps.shape
        return cls(torch.from_numpy(maps.reshape(1, count, z * y, x)), (z, y, x), beyond)

    def at(self, points: Array32, linear: FloatArray, offset: FloatArray) -> Array32:
        """Interpolate all maps linearly where points are sent.

        Parameters
        ----------
        points : (3, P) float32
            Points as (z, y, x), in any unit.
        linear, offset : (3, 3) and (3,)
            ``linear @ points + offset`` are the places, in voxels of the maps, from the centre of the first one.

        Returns
        -------
        (M, P) float32
            Values; beyond the grid 0 or those of its border, as `beyond` says.
        """
        slices, lines, columns = self.shape
        added = 1 if self.beyond == "zeros" else 0
        # grid_sample wants x first. With align_corners, -1 and 1 are the centres of the outer pixels.
        scale = np.array([1, 1, 2 / max(columns - 1, 1)])
        place: Array32 = (scale[:, None] * linear).astype(np.float32) @ points
        place += (scale * offset + [added, added, -1])[:, None].astype(np.float32)
        z, y, x = place
        above = np.clip(z, 0, slices - 2, out=z)
        below = np.floor(z)
        above -= below
        line = np.clip(y, 0, lines - 1, out=y)
        below *= np.float32(lines)
        line += below
        step = np.float32(2 / (slices * lines - 1))
        line *= step
        line -= 1
        grid = np.empty((1, 2, len(x), 2), dtype=np.float32)
        grid[..., 0] = x
        grid[0, 0, :, 1] = line
        line += step * np.float32(lines)
        grid[0, 1, :, 1] = line
        found = torch.nn.functional.grid_sample(
            self.rows, torch.from_numpy(grid), mode="bilinear", padding_mode=self.beyond, align_corners=True
        )
        here, next_one = found[0].numpy().swapaxes(0, 1)
        next_one -= here
        next_one *= above
        next_one += here
        return np.asarray(next_one)
