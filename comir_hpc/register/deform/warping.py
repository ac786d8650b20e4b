"""Look values up between voxels, and integrate a velocity field to the displacement that it leads to.

Arrays are (c, z, y, x). Displacements and velocities are (3, z, y, x), in voxels of their own lattice along z, y, x.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from comir_hpc.space.grid import Grid

Array = NDArray[np.float32]

_STEP_VOX = 0.25  # longest step of the integration, in voxels of the lattice


def sample(values: Array, index_zyx: Array, *, outside: str = "border") -> Array:
    """Interpolate values (c, z, y, x) linearly at continuous indices (3, ...); returns (c, ...).

    `outside` says what lies beyond the last voxel: its value ("border"), or nothing ("zeros").
    """
    shape = values.shape[1:]
    place = torch.from_numpy(np.ascontiguousarray(index_zyx.reshape(3, -1), dtype=np.float32))
    # Torch wants x, y, z, from -1 at the first voxel's centre to 1 at the last one's.
    scale = torch.tensor([2 / max(n - 1, 1) for n in shape], dtype=torch.float32)[:, None]
    place = (place * scale - 1).flip(0).T.reshape(1, 1, 1, -1, 3)
    found = functional.grid_sample(
        torch.from_numpy(np.ascontiguousarray(values))[None],
        place,
        mode="bilinear",
        padding_mode=outside,
        align_corners=True,
    )
    return np.asarray(found.reshape(len(values), *index_zyx.shape[1:]).numpy(), dtype=np.float32)


def indices(shape_zyx: tuple[int, ...]) -> Array:
    """Return the index (3, z, y, x) of every voxel."""
    return np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape_zyx], indexing="ij"))


def exponential(velocity: Array) -> Array:
    """Return the displacement (3, z, y, x) that a stationary velocity leads to, by scaling and squaring.

    The displacement of ``-velocity`` belongs to the inverse map.
    """
    longest = float(np.sqrt((velocity.astype(np.float64) ** 2).sum(axis=0)).max())
    count = max(0, math.ceil(math.log2(longest / _STEP_VOX))) if longest > 0 else 0
    moved = (velocity / np.float32(2**count)).astype(np.float32)
    place = indices(velocity.shape[1:])
    for _ in range(count):
        moved = moved + sample(moved, place + moved)
    return moved


def carried(field: Array, source: Grid, target: Grid, *, outside: str = "border") -> Array:
    """Interpolate a field (c, z, y, x) of one grid on another one with the same axes; for `outside` see `sample`."""
    linear = np.linalg.inv(source.matrix_mm) @ target.matrix_mm
    scale, offset = np.diag(linear)[:3], linear[:3, 3]
    axes = [o + s * np.arange(n) for s, o, n in zip(scale, offset, target.shape_zyx, strict=True)]
    return sample(field, np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32), outside=outside)


def pooled(values: Array, factor: int) -> Array:
    """Average (c, z, y, x) over blocks of `factor` voxels; a partial block at the end counts as one."""
    if factor == 1:
        return values
    found = functional.avg_pool3d(
        torch.from_numpy(np.ascontiguousarray(values))[None], factor, ceil_mode=True
    )
    return np.asarray(found[0].numpy(), dtype=np.float32)
