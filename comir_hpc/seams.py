"""How visible the borders are along which a volume was put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from comir_hpc.geometry import Box, Triple
from comir_hpc.volume import Volume

_PLANES = 6  # looked at along each axis and for each kind of border
_PERIODS = 3  # compared with, on each side of a border
_FLAT = 0.1  # of the mean jump: where less is near, nothing is compared
_SIDE = 256  # voxels of a plane looked at along each side


def seam_figure(
    volume: Volume,
    borders: Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]],
    period_zyx: Triple = (1, 1, 1),
) -> dict[str, float | None]:
    """Mean jump between neighbouring voxels across borders, over that between neighbours near them.

    A few planes spread over what is not zero are read, not all of it. A network that reduces its maps 8-fold has a
    pattern of 8 voxels, and windows lie on that grid: what is compared lies one to three whole periods before and
    behind a border.

    Parameters
    ----------
    borders : mapping
        For each kind of border its positions along z, y, x: a border at p lies between voxels p - 1 and p.
    period_zyx : three int
        Period of patterns that are no seams, voxels: `Network.total_stride_zyx`.

    Returns
    -------
    dict
        For each kind the ratio, about 1 where no border is visible; None where there is no border or nothing near it.
    """
    filled = _filled(volume)
    return {kind: _ratio(volume, filled, positions, period_zyx) for kind, positions in borders.items()}


def _filled(volume: Volume) -> Box:
    """The box of all voxels that are not zero on the coarsest level; the whole volume if there are none."""
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
    # Where windows without specimen are left out, the flat background ends in a step, which is no seam in a specimen.
    varied = beside > _FLAT * beside.mean()
    return float(jump[varied].sum() / beside[varied].sum())


def _around(filled: Box, axis: int, position: int, reach: int) -> Box:
    """The voxels on both sides of a border and of others up to `reach` away, in the middle of `filled`."""
    start = [max(a, (a + b - _SIDE) // 2) for a, b in zip(filled.start, filled.stop, strict=True)]
    stop = [min(b, a + _SIDE) for a, b in zip(start, filled.stop, strict=True)]
    start[axis], stop[axis] = position - reach - 1, position + reach + 1
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
