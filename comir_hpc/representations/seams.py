"""Measure how visible the borders are along which a volume was put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from comir_hpc.space.grid import Box, Triple
from comir_hpc.volumes.volume import Volume

_PLANES = 6  # borders that are measured along each axis, for each kind
_PERIODS = 3  # periods on each side of a border that it is compared with
_FLAT = 0.1  # share of the mean jump below which a place is flat, so that nothing is compared there
_SIDE = 256  # largest side, in voxels, of the plane that is read at a border


def seam_figure(
    volume: Volume,
    borders: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]],
    period_zyx: Triple = (1, 1, 1),
) -> dict[str, float | None]:
    """Compare the mean jump between neighbouring voxels across borders with the jump between neighbours near them.

    Only a few planes are read, spread over the part that is not zero. A network that reduces its maps 8-fold leaves a
    pattern of 8 voxels, and windows lie on the same grid. So a border is compared with planes that lie one to three
    whole periods before and behind it.

    Parameters
    ----------
    volume : Volume
        Volume that was put together from pieces.
    borders : mapping
        Positions of the borders along z, y, x, for each kind of border. A border at p lies between voxels p - 1 and p.
    period_zyx : three int
        Period, in voxels, of patterns that are no seams: `Network.total_stride_zyx`.

    Returns
    -------
    dict
        Ratio for each kind of border, about 1 where no border is visible. It is None where there is no border, or
        nothing near it.
    """
    filled = _filled(volume)
    return {kind: _ratio(volume, filled, positions, period_zyx) for kind, positions in borders.items()}


def _filled(volume: Volume) -> Box:
    """Find the box of all voxels that are not zero on the coarsest level; the whole volume if there are none."""
    coarse = volume.read(level=volume.num_levels - 1).any(axis=0)
    if not coarse.any():
        return volume.grid.box
    ends = [(int(found.min()), int(found.max()) + 1) for found in np.nonzero(coarse)]
    sides = zip(ends, volume.grid.shape_zyx, coarse.shape, strict=True)
    z, y, x = ((a * n // m, -(-b * n // m)) for (a, b), n, m in sides)
    return Box((z[0], y[0], x[0]), (z[1], y[1], x[1]))


def _ratio(
    volume: Volume, filled: Box, positions: Sequence[Sequence[int]], period_zyx: Triple
) -> float | None:
    across, near = [np.zeros(0)], [np.zeros(0)]
    for axis, borders in enumerate(positions):
        reach = _PERIODS * period_zyx[axis]
        inside = [p for p in borders if filled.start[axis] + reach < p < filled.stop[axis] - reach]
        for p in inside[:: max(1, -(-len(inside) // _PLANES))]:
            values = volume.read(_around(filled, axis, p, reach)).astype(np.float64)
            jumps = np.moveaxis(np.abs(np.diff(values, axis=axis + 1)), axis + 1, 0)[:: period_zyx[axis]]
            across.append(jumps[_PERIODS].ravel())
            near.append(np.delete(jumps, _PERIODS, axis=0).mean(axis=0).ravel())
    jump, beside = np.concatenate(across), np.concatenate(near)
    if not beside.any():
        return None
    # Windows without specimen are left out, and the background there is exactly zero. Where it begins there is a step,
    # which is no seam in the specimen: places with little variation nearby do not count.
    varied = beside > _FLAT * beside.mean()
    return float(jump[varied].sum() / beside[varied].sum())


def _around(filled: Box, axis: int, position: int, reach: int) -> Box:
    """Find the box with the voxels up to `reach` away from a border on both sides, in the middle of `filled`."""
    start = [max(a, (a + b - _SIDE) // 2) for a, b in zip(filled.start, filled.stop, strict=True)]
    stop = [min(b, a + _SIDE) for a, b in zip(start, filled.stop, strict=True)]
    start[axis], stop[axis] = position - reach - 1, position + reach + 1
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
