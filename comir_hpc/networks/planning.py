"""Plan a U-shaped network: which axes to pool, and how far an output voxel sees. Pure integers, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

from comir_hpc.errors import ConfigError

Triple = tuple[int, int, int]

# Let an axis be r times coarser than the finest one. Pooling doubles the finest spacing. If the axis is pooled as
# well, it stays r times coarser. If it is left alone, the other one becomes 2 / r times coarser. So pooling both is
# nearer to a cube while r < 2 / r.
_POOLED_RATIO = math.sqrt(2)


def plan_pooling(
    spacing_zyx: Sequence[float], num_levels: int, *, planar: bool = False
) -> tuple[Triple, ...]:
    """Choose, level by level, the axes that are halved, so that deep voxels come as near to cubes as they can.

    An axis is pooled only while its spacing is within a factor sqrt(2) of the finest one; thick slices wait until
    the fine axes have caught up.

    Parameters
    ----------
    spacing_zyx : three float
        Distance between voxels, in any one unit.
    num_levels : int
        Number of resolution levels, the full one included.
    planar : bool
        Whether these are single slices, whose z axis is never pooled.

    Returns
    -------
    num_levels - 1 triples of 1 or 2: the factor (z, y, x) between a level and the next coarser one.

    Raises
    ------
    ConfigError
        If the spacing is not three positive numbers, or there are fewer than two levels.

    Examples
    --------
    >>> plan_pooling((5.0, 1.0, 1.0), 4)
    ((1, 2, 2), (1, 2, 2), (2, 2, 2))
    """
    if len(spacing_zyx) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing_zyx):
        raise ConfigError(f"spacing is {tuple(spacing_zyx)}; expected three positive numbers (z, y, x)")
    if num_levels < 2:
        raise ConfigError(f"{num_levels} resolution level(s) asked for; a U-shaped network needs 2 or more")
    spacing = [float(step) for step in spacing_zyx]
    if planar:
        # An endlessly thick slice never comes within reach of the finest spacing.
        spacing[0] = math.inf
    plan = []
    for _ in range(num_levels - 1):
        finest = min(spacing)
        factors = [2 if step < finest * _POOLED_RATIO else 1 for step in spacing]
        spacing = [step * factor for step, factor in zip(spacing, factors, strict=True)]
        plan.append((factors[0], factors[1], factors[2]))
    return tuple(plan)


def plan_kernel(planar: bool) -> Triple:
    """Choose the kernel size (z, y, x): 3 along every axis, or 1 along z for single slices (the 2D method)."""
    return (1, 3, 3) if planar else (3, 3, 3)


def total_stride(pooling: Sequence[Triple]) -> Triple:
    """Multiply the pooling factors of all levels, (z, y, x): input sides must be multiples of the product."""
    z, y, x = (math.prod(factors[axis] for factors in pooling) for axis in range(3))
    return z, y, x


def receptive_halo(
    encoder_radii: Sequence[int],
    decoder_radii: Sequence[int],
    up_radii: Sequence[int],
    factors: Sequence[int],
    *,
    linear: bool = True,
) -> int:
    """Find the farthest input voxel, along one axis, on which any output voxel of a U-shaped network depends.

    The interval of voxels that an output needs is carried backwards through every layer. This is done for each
    position within one total stride, because pooling windows and interpolation weights depend on the position. Both
    paths are followed: over the skip, and through the coarser level.

    Parameters
    ----------
    encoder_radii, decoder_radii : sequences of int
        Summed kernel radii of each level's block, finest first; one decoder fewer than encoders.
    up_radii : sequence of int
        Summed radii of the kernels applied right after upsampling to each level, before the skip joins.
    factors : sequence of int
        Pooling factor (1 or 2) from each level to the next coarser one.
    linear : bool
        Whether upsampling is linear and reads two coarse voxels; otherwise it reads the nearest one.

    Returns
    -------
    int
        Distance in voxels of the input.
    """

    def below(level: int, first: int, last: int) -> tuple[int, int]:
        first, last = first - encoder_radii[level], last + encoder_radii[level]
        if level == 0:
            return first, last
        factor = factors[level - 1]
        # A pooled voxel stands for `factor` finer ones, the last of which is at its end.
        return below(level - 1, first * factor, last * factor + factor - 1)

    def coarse(level: int, first: int, last: int) -> tuple[int, int]:
        first, last = first - up_radii[level], last + up_radii[level]
        if factors[level] == 1:
            return first, last
        # Fine voxel j lies at (j - 0.5) / 2 of the coarse axis: even ones between j/2 - 1 and j/2, odd ones
        # between (j - 1)/2 and (j + 1)/2.
        return ((first + 1) // 2 - 1, (last + 1) // 2) if linear else (first // 2, last // 2)

    def needed(level: int, first: int, last: int) -> tuple[int, int]:
        if level == len(factors):
            return below(level, first, last)
        first, last = first - decoder_radii[level], last + decoder_radii[level]
        skip = below(level, first, last)
        deep = needed(level + 1, *coarse(level, first, last))
        return min(skip[0], deep[0]), max(skip[1], deep[1])

    halo = 0
    # The pattern of windows and weights repeats after one total stride.
    for position in range(math.prod(factors)):
        first, last = needed(0, position, position)
        halo = max(halo, position - first, last - position)
    return halo


def require_choice(value: str, choices: Any, label: str) -> None:
    """Refuse a word that is not one of a Literal's values, with a ConfigError that names them."""
    known = get_args(choices)
    if value not in known:
        raise ConfigError(f"{label} is {value!r}; expected one of {', '.join(known)}")
