"""Predict the memory of a block: what is held depends on the block, and not on the volume."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from comir_hpc.host.launch import DTYPES
from comir_hpc.networks import predict_encoding
from comir_hpc.register.blockwise.layout import Layout
from comir_hpc.register.blockwise.sides import MASK_VOXELS, Side

if TYPE_CHECKING:
    from comir_hpc.register.blockwise.opened import Opened

_LIBRARY_BYTES = 128 << 20  # loaded for the first block, and heaps of what computes it
_STEP_BYTES = 320  # of each fixed voxel in a step of a deformation: places, slopes, pull, stiffness
_MASK_BYTES = 40  # of each voxel of the level on which the specimen is found, while it is found
_WINDOW = (
    3.4  # memory of a window that is encoded, over that of its tensors between layers, as `infer` measured it
)
_KEPT_BYTES = 40 << 20  # of windows that are kept for the next row
_BLEND_BYTES = 160  # of each lattice point around a block while its inverse is found
_BLEND_ROOM = 16  # lattice points around a block, at most


def block_bytes(opened: Opened) -> int:
    """Predict the bytes that solving the largest block takes."""
    layout, channels = opened.layout, opened.fixed.num_channels
    fixed = math.prod(layout.largest())
    middle = len(layout.plan) // 2
    seen = layout.grid.crop(layout.seen(middle))
    there = opened.solver.moving_box(0, seen)
    moving = max(there.size, 1) * fixed / max(1, math.prod(seen.shape_zyx))
    moving = min(moving, math.prod(opened.moving.grid(0).shape_zyx))
    # All levels are held: an eighth of the finest, and an eighth of that.
    held = 8 / 7 * channels * 4 * (fixed + moving)
    step = fixed * (_STEP_BYTES + 16 * channels)
    read = 8 * moving  # stored values, and those of the working grid
    mask = _MASK_BYTES * min(MASK_VOXELS, math.prod(opened.fixed.volume.grid.shape_zyx))
    return math.ceil(_LIBRARY_BYTES + held + max(step, read + _encoding_bytes(opened.fixed)) + mask)


def blend_bytes(layout: Layout) -> int:
    """Predict the bytes that blending the largest block takes."""
    sides = [
        min(c + 2 * _BLEND_ROOM, n)
        for c, n in zip(layout.plan.core_zyx, layout.lattice.shape_zyx, strict=True)
    ]
    return _LIBRARY_BYTES + _BLEND_BYTES * math.prod(sides)


def _encoding_bytes(side: Side) -> float:
    encoder = side.encoder
    if encoder is None or encoder.device.type != "cpu":
        return 0.0
    window = encoder.windows(side.grid(0).shape_zyx).window_zyx
    tensors = predict_encoding(encoder.network, window, DTYPES[encoder.precision])
    return _KEPT_BYTES + _WINDOW * torch.get_num_threads() * tensors
