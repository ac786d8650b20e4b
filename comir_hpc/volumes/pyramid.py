"""Plan the coarser levels of a volume, and compute their voxels from the finer ones. Pure numpy."""

from __future__ import annotations

import itertools
import math
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.space.grid import Grid, Triple

_SMALLEST_LEVEL = 32  # a level with at most this many voxels along its longest side is the last one


def planned_levels(grid: Grid) -> list[Triple]:
    """Plan the levels of a pyramid: the factors (z, y, x) of each against level 0, the first of them (1, 1, 1).

    From level to level the finest axis is halved, and with it each axis that is less than sqrt(2) times coarser. Thick
    slices are left alone until the voxels are about isotropic.
    """
    factors: list[Triple] = [(1, 1, 1)]
    shape, spacing = np.asarray(grid.shape_zyx), np.asarray(grid.spacing_zyx)
    while (-(-shape // np.asarray(factors[-1]))).max() > _SMALLEST_LEVEL:
        last = np.asarray(factors[-1])
        now, long = spacing * last, -(-shape // last) > 1
        # An axis of one voxel cannot be halved. If it is the finest one, it must not hold back the others.
        halve = long & (now <= now[long].min() * math.sqrt(2))
        factors.append(_triple_of(last * np.where(halve, 2, 1)))
    return factors


def downsample(values: NDArray[Any], step_zyx: Triple, *, labels: bool = False) -> NDArray[Any]:
    """Reduce (c, z, y, x) by whole factors to means, or for labels to the most frequent value; the dtype stays.

    Means of integers are exact before they are rounded (a half goes to the even neighbour). Among labels that are
    equally frequent, the first in the order z, y, x is taken. A partial block at the end is filled with its last voxel.
    """
    pad = [(0, 0)] + [(0, -n % s) for n, s in zip(values.shape[1:], step_zyx, strict=True)]
    padded = np.pad(values, pad, mode="edge") if any(p != (0, 0) for p in pad) else values
    return _mode(padded, step_zyx) if labels else _mean(padded, step_zyx)


def _mean(values: NDArray[Any], step_zyx: Triple) -> NDArray[Any]:
    shape = [n // s for n, s in zip(values.shape[1:], step_zyx, strict=True)]
    coarse = np.empty((len(values), *shape), dtype=values.dtype)
    of_slab = (
        _mean_of_integers if values.dtype.kind in "iu" and values.dtype.itemsize < 8 else _mean_of_floats
    )
    for c, z in np.ndindex(*coarse.shape[:2]):  # what a slice becomes stays in the cache
        coarse[c, z] = of_slab(values[c, z * step_zyx[0] : (z + 1) * step_zyx[0]], step_zyx)
    return coarse


def _mean_of_integers(slab: NDArray[Any], step_zyx: Triple) -> NDArray[Any]:
    """Take the mean (y, x) of a slab (step, y, x) of integers; a half is rounded to the even neighbour."""
    # Sums of integers are exact in any order. z comes first, because whole planes are added fastest.
    total: NDArray[Any] = slab[0].astype(np.int32 if slab.dtype.itemsize < 4 else np.int64)
    for plane in slab[1:]:
        total += plane
    total = reduce(np.add, (total[k :: step_zyx[1]] for k in range(step_zyx[1])))
    total = reduce(np.add, (total[:, k :: step_zyx[2]] for k in range(step_zyx[2])))
    number = math.prod(step_zyx)
    # For powers of two a shift divides exactly: adding half less one, and the lowest kept bit, rounds halves to even.
    bits = number.bit_length() - 1
    if number == 1 << bits:
        return (total + (number // 2 - 1) + ((total >> bits) & 1)) >> bits if bits else total
    rounded: NDArray[Any] = np.rint(total / number)
    return rounded


def _mean_of_floats(slab: NDArray[Any], step_zyx: Triple) -> NDArray[Any]:
    """Take the mean (y, x) of a slab (step, y, x) of floats: along x first, then y, then z.

    The order is fixed, so that the rounding does not depend on how the volume is cut into blocks.
    """
    kind, size = slab.dtype.kind, slab.dtype.itemsize
    exact = np.dtype(np.float64 if kind in "iu" else np.float32 if size == 2 else slab.dtype)
    total = slab
    for axis in (2, 1, 0):
        step, before = step_zyx[axis], (slice(None),) * axis
        parts = [total[(*before, slice(k, None, step))] for k in range(step)]
        for part in parts[1:]:
            parts[0] = np.add(parts[0], part, dtype=exact)
        total = parts[0]
    mean: NDArray[Any] = total[0] / math.prod(step_zyx)
    if kind not in "iu":
        return mean
    # The largest integers of 64 bits have no float64 of their own: the next one is beyond the type, and wraps around.
    largest = np.nextafter(float(np.iinfo(slab.dtype).max), 0)
    rounded: NDArray[Any] = np.minimum(np.rint(mean), largest)
    return rounded


def _mode(values: NDArray[Any], step_zyx: Triple) -> NDArray[Any]:
    starts = itertools.product(*map(range, step_zyx))
    parts = [values[:, z :: step_zyx[0], y :: step_zyx[1], x :: step_zyx[2]] for z, y, x in starts]
    commonest, most = parts[0].copy(), np.zeros(parts[0].shape, dtype=np.int16)
    for candidate in parts:
        count = np.zeros(most.shape, dtype=np.int16)
        for other in parts:
            count += candidate == other
        np.copyto(commonest, candidate, where=count > most)
        np.maximum(most, count, out=most)
    return commonest


def _triple_of(values: NDArray[Any]) -> Triple:
    z, y, x = values.tolist()
    return int(z), int(y), int(x)
