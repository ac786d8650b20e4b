"""Pad feature maps beyond their border, and join several maps in the same copy.

Axes: B batch, C channels, Z Y X space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from comir_hpc.errors import ConfigError
from comir_hpc.networks.planning import Triple
from comir_hpc.networks.recompute import merge_channels

Padding = Literal["zeros", "replicate", "reflect"]


def pad_border(parts_BCZYX: Sequence[Tensor], kernel_zyx: Triple, padding: Padding) -> Tensor:
    """Concatenate maps along the channels and continue them beyond the border by the kernel's radius.

    Parameters
    ----------
    parts_BCZYX : sequence of (B, ., Z, Y, X)
        Feature maps that differ in the number of channels only.
    kernel_zyx : three int
        Sides of the kernel in voxels, each of them odd.
    padding : str
        What is put there: copies of the border voxel (``replicate``), or the mirror image (``reflect``).

    Raises
    ------
    ConfigError
        If a side is too short to be mirrored.
    """
    radii = (kernel_zyx[0] // 2, kernel_zyx[1] // 2, kernel_zyx[2] // 2)
    # Under autocast the skip and the map from below may have two types. Joining them first makes them one.
    # TorchScript has no functions of ours: it gets torch's own padding, which gives the same.
    if padding == "replicate" and len({part.dtype for part in parts_BCZYX}) == 1 and not _scripted():
        padded: Tensor = _Replicated.apply(radii, *parts_BCZYX)  # type: ignore[no-untyped-call]
        return padded
    x_BCZYX = merge_channels(parts_BCZYX)
    sides = tuple(x_BCZYX.shape[2:])
    if padding == "reflect" and any(side <= radius for side, radius in zip(sides, radii, strict=True)):
        raise ConfigError(
            f"padding is reflect, but a coarse level has only {sides} voxels (z, y, x) to mirror; use larger "
            "patches, or padding replicate"
        )
    # CPU autocast would turn the map into fp32.
    with torch.autocast(x_BCZYX.device.type, enabled=False):
        return F.pad(x_BCZYX, _both_ends(radii), mode=padding)


class _Replicated(torch.autograd.Function):
    """Join and pad maps in one copy.

    torch's own padding keeps the whole map for its backward pass, although the gradient needs only the shapes.
    """

    @staticmethod
    def forward(ctx: Any, radii: Triple, *parts_BCZYX: Tensor) -> Tensor:
        first = parts_BCZYX[0]
        ctx.radii, ctx.sides = radii, first.shape[2:]
        ctx.channels = [part.shape[1] for part in parts_BCZYX]
        axes = list(zip((2, 3, 4), radii, ctx.sides, strict=True))
        padded = torch.empty(
            (len(first), sum(ctx.channels), *(side + 2 * radius for _, radius, side in axes)),
            dtype=first.dtype,
            device=first.device,
            memory_format=torch.channels_last_3d,
        )
        inside = _inside(padded, radii, ctx.sides)
        for place, part in zip(inside.split_with_sizes(ctx.channels, dim=1), parts_BCZYX, strict=True):
            place.copy_(part)
        # One axis after the other: a later axis copies what the earlier ones have filled in, corners included.
        for dim, radius, side in axes:
            if radius:
                padded.narrow(dim, 0, radius).copy_(padded.narrow(dim, radius, 1))
                padded.narrow(dim, radius + side, radius).copy_(padded.narrow(dim, radius + side - 1, 1))
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCZYX: Tensor) -> tuple[Tensor | None, ...]:
        grad_BCZYX = grad_BCZYX.contiguous(memory_format=torch.channels_last_3d)
        # torch reads only shape and layout of this argument, and returns the gradient in that layout. A view of the
        # gradient has the right one; with another layout the result would be copied.
        like = _inside(grad_BCZYX, ctx.radii, ctx.sides)
        folded: Tensor = torch.ops.aten.replication_pad3d_backward(grad_BCZYX, like, _both_ends(ctx.radii))
        return None, *folded.split_with_sizes(ctx.channels, dim=1)


def _scripted() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _inside(padded_BCZYX: Tensor, radii: Sequence[int], sides: Sequence[int]) -> Tensor:
    for dim, radius, side in zip((2, 3, 4), radii, sides, strict=True):
        padded_BCZYX = padded_BCZYX.narrow(dim, radius, side)
    return padded_BCZYX


def _both_ends(radii: Triple) -> list[int]:
    return [radius for radius in reversed(radii) for _ in range(2)]
