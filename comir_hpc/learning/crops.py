"""Cut maps into sub-crops around displaced centres, as views where possible, with one gradient for all of them.

Shapes: N samples, L channels, p sub-crops along an axis, V voxels of a sub-crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comir_hpc.errors import ConfigError
from comir_hpc.learning.critics import Maps

ShiftZYX = tuple[int, int, int]


def require_room(shape_zyx: Sequence[int], margin_zyx: Sequence[int], pieces: int) -> None:
    """Refuse patches that are too small for the largest displacement to either side and the sub-crops.

    Parameters
    ----------
    shape_zyx : three int
        Voxels of a patch.
    margin_zyx : three int
        Largest displacement along each axis, in voxels.
    pieces : int
        Number of sub-crops along each axis; an axis of a single voxel always has one.

    Raises
    ------
    ConfigError
        If less than one voxel is left for each sub-crop along an axis.
    """
    for side, margin in zip(shape_zyx, margin_zyx, strict=True):
        if side - 2 * margin < (pieces if side > 1 else 1):
            raise ConfigError(
                f"displacements of up to {tuple(margin_zyx)} voxels (z, y, x) to either side and {pieces} sub-crops "
                f"an axis do not fit into patches of {tuple(shape_zyx)} voxels; use larger patches, smaller "
                "displacement_voxels or fewer subcrops"
            )


def crop(maps: Maps, shifts_zyx: Sequence[ShiftZYX], margin: Sequence[int], pieces: int) -> list[Maps]:
    """Cut maps into flat sub-crops, once for each shift of the centre.

    Parameters
    ----------
    maps : Maps
        Maps (N, L, Z, Y, X), with masks (N, 1, Z, Y, X) or without.
    shifts_zyx : sequence of (dz, dy, dx), voxels
        Displacements of the centre of the cropped box, at most as large as the margin.
    margin : three int
        Voxels that are left off on either side along z, y, x, so that the boxes of all shifts have one size.
    pieces : int
        Number of sub-crops along an axis, p; `require_room` says whether they fit. Voxels that are left over by the
        division are dropped at the end. An axis of one voxel stays whole.

    Returns
    -------
    list of Maps
        Flat sub-crops (N p^3, L, V) for each shift, in the maps' dtype.
    """
    starts = [[m + s for m, s in zip(margin, shift, strict=True)] for shift in shifts_zyx]
    views = [partial(_view, start=start, margin=margin, pieces=pieces) for start in starts]
    values = _Crops.apply(maps.values, views)  # type: ignore[no-untyped-call]
    valid = [None] * len(values) if maps.valid is None else [_flat(view(maps.valid)) for view in views]
    return [Maps(*one) for one in zip(values, valid, strict=True)]


def _view(maps: Tensor, start: Sequence[int], margin: Sequence[int], pieces: int) -> Tensor:
    """View maps (N, C, Z, Y, X) from a corner on as sub-crops (N, pz, py, px, C, z, y, x), without a copy."""
    for number, (side, m, first) in enumerate(zip(maps.shape[-3:], margin, start, strict=True)):
        parts = pieces if side > 1 else 1
        size = (side - 2 * m) // parts
        axis = 2 + 2 * number  # each space axis before this one has become two
        maps = maps.narrow(axis, first, parts * size).unflatten(axis, (parts, size))  # type: ignore[no-untyped-call]
    # Samples and pieces first, then channels, then voxels: what follows may flatten each group into one axis.
    return maps.permute(0, 2, 4, 6, 1, 3, 5, 7)


def _flat(view: Tensor) -> Tensor:
    return view.flatten(-3).flatten(0, 3)


class _Crops(torch.autograd.Function):
    """Make flat crops by many views of the same maps; each costs one copy, and one addition in the gradient."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, views: Sequence[Callable[[Tensor], Tensor]]) -> tuple[Tensor, ...]:
        ctx.views, ctx.shape = views, maps.shape
        return tuple(_flat(view(maps)) for view in views)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # When the first view covers the whole map it overwrites everything, and no zeros are needed.
        covered = grads[0].numel() == math.prod(ctx.shape)
        total = (torch.empty if covered else torch.zeros)(
            ctx.shape, dtype=grads[0].dtype, device=grads[0].device
        )
        for number, (view, grad) in enumerate(zip(ctx.views, grads, strict=True)):
            place = view(total)
            if number:
                place += grad.reshape(place.shape)
            else:
                place.copy_(grad.reshape(place.shape))
        return total, None
