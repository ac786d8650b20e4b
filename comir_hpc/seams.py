"""How visible the borders are along which a volume was put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from comir_hpc.geometry import Box, Triple
from comir_hpc.volume import Volume

_PLANES = 6  # looked at along each axis and for each kind of border
_SIDE = 256  # voxels of a plane looked at along each side


def seam_figure(
    volume: Volume, borders: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
) -> dict[str, float | None]:
    """Mean jump between neighbouring voxels across borders, over that between neighbours right beside them.

    A few planes spread over the volume are read, not all of it.

    Parameters
    ----------
    borders : mapping
        For each kind of border its positions along z, y, x: a border at p lies between voxels p - 1 and p.

    Returns
    -------
    dict
        For each kind the ratio, about 1 where no border is visible; None where there is no border or nothing beside it.
    """
    return {kind: _ratio(volume, positions) for kind, positions in borders.items()}


def _ratio(volume: Volume, positions: Sequence[Sequence[int]]) -> float | None:
    across = beside = 0.0
    for axis, borders in enumerate(positions):
        inside = [p for p in borders if 2 <= p <= volume.grid.shape_zyx[axis] - 2]
        for p in inside[:: max(1, -(-len(inside) // _PLANES))]:
            values = volume.read(_around(volume.grid.shape_zyx, axis, p)).astype(np.float64)
            before, jump, after = np.moveaxis(np.abs(np.diff(values, axis=axis + 1)), axis + 1, 0)
            across += float(jump.mean())
            beside += float(before.mean() + after.mean()) / 2
    return across / beside if beside > 0 else None


def _around(shape: Triple, axis: int, position: int) -> Box:
    """Two voxels on each side of a border, in the middle of the volume."""
    start = [max(0, (n - _SIDE) // 2) for n in shape]
    stop = [min(n, a + _SIDE) for n, a in zip(shape, start, strict=True)]
    start[axis], stop[axis] = position - 2, position + 2
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
