"""Spoil a volume as scanners do: noise, bias, thick slices, a third cut off, padding.

Everything is drawn from one generator, so that every method meets the same voxels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from comir_hpc.data.embedded import degrade
from comir_hpc.space.grid import MM_PER_UNIT, Grid

Volume = tuple[NDArray[np.float32], Grid]
Spoil = Callable[[NDArray[np.float32], Grid, NDArray[np.bool_], np.random.Generator], Volume]

NOISE = 0.05
"""Standard deviation of the noise, as a share of the brightest values."""
BIAS = 0.4
"""Largest natural logarithm of the smooth factor."""
THICK = 4
"""Number of voxels along z that are averaged into one slice."""
CROPPED = 1 / 3
"""Share of the specimen's extent, along one axis, that is cut off."""


def spoiled(
    kind: str,
    values: NDArray[np.float32],
    grid: Grid,
    specimen: NDArray[np.bool_],
    rng: np.random.Generator,
) -> Volume:
    """Return the voxels and the grid of a degraded volume.

    Parameters
    ----------
    kind : str
        One of ``DEGRADATIONS`` (`comir_hpc.config.words`).
    values : (z, y, x) float32
        Voxels.
    specimen : (z, y, x) bool
        Where the specimen is.
    """
    return _KINDS[kind](values, grid, specimen, rng)


def _none(
    values: NDArray[np.float32], grid: Grid, specimen: NDArray[np.bool_], rng: np.random.Generator
) -> Volume:
    del specimen, rng
    return values, grid


def _noise(
    values: NDArray[np.float32], grid: Grid, specimen: NDArray[np.bool_], rng: np.random.Generator
) -> Volume:
    del specimen
    return degrade(values, rng, bias=0, noise=NOISE), grid


def _bias(
    values: NDArray[np.float32], grid: Grid, specimen: NDArray[np.bool_], rng: np.random.Generator
) -> Volume:
    del specimen
    return degrade(values, rng, bias=BIAS, noise=0), grid


def _thick(
    values: NDArray[np.float32], grid: Grid, specimen: NDArray[np.bool_], rng: np.random.Generator
) -> Volume:
    """Average slices along z; what is left over at the end is dropped."""
    del specimen, rng
    z, y, x = values.shape
    count = z // THICK
    thick = values[: count * THICK].reshape(count, THICK, y, x).mean(axis=1, dtype=np.float64)
    # A thick slice lies in the middle of those that it is made of, so the first one moves.
    origin = grid.world_mm(((THICK - 1) / 2, 0.0, 0.0)) / MM_PER_UNIT[grid.unit]
    spacing = (grid.spacing_zyx[0] * THICK, *grid.spacing_zyx[1:])
    return thick.astype(np.float32), Grid(
        (count, y, x), spacing, tuple(origin.tolist()), grid.direction, grid.unit
    )


def _cropped(
    values: NDArray[np.float32], grid: Grid, specimen: NDArray[np.bool_], rng: np.random.Generator
) -> Volume:
    """End the volume in the middle of the specimen, at either end of any axis."""
    axis, low = int(rng.integers(3)), bool(rng.integers(2))
    other = tuple(a for a in range(3) if a != axis)
    inside = np.flatnonzero(specimen.any(axis=other))
    first, last = int(inside[0]), int(inside[-1])
    cut = round(CROPPED * (last - first + 1))
    start, stop = (first + cut, values.shape[axis]) if low else (0, last + 1 - cut)
    kept = tuple(slice(start, stop) if a == axis else slice(None) for a in range(3))
    corner = [float(start) if a == axis else 0.0 for a in range(3)]
    left = np.ascontiguousarray(values[kept])
    z, y, x = left.shape
    # What is left stays where it was in the world, so that the known answer still holds.
    origin = grid.world_mm(corner) / MM_PER_UNIT[grid.unit]
    return left, Grid((z, y, x), grid.spacing_zyx, tuple(origin.tolist()), grid.direction, grid.unit)


def _padded(
    values: NDArray[np.float32], grid: Grid, specimen: NDArray[np.bool_], rng: np.random.Generator
) -> Volume:
    """Fill what lies outside a cylinder along z with a value far below all others, as CT scanners do."""
    del specimen, rng
    _, y, x = values.shape
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in (y, x))
    outside = np.hypot(rows[:, None] / (y / 2), columns[None, :] / (x / 2)) > 1
    low, high = float(values.min()), float(values.max())
    return np.where(outside, np.float32(low - 2 * (high - low)), values), grid


_KINDS: dict[str, Spoil] = {
    "none": _none,
    "noise": _noise,
    "bias": _bias,
    "thick": _thick,
    "cropped": _cropped,
    "padded": _padded,
}
