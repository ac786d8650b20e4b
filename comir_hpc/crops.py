"""Sub-crops of maps around displaced centres, as views where they can be, with one gradient for all of them.

Shapes: N samples, L channels, p sub-crops an axis, V voxels of a sub-crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comir_hpc.critics import Maps
from comir_hpc.errors import ConfigError

ShiftZYX = tuple[int, int, int]


def require_room(shape_zyx: Sequence[int], margin_zyx: Sequence[int], pieces: int) -> None:
    """Refuse patches that are too small for the largest displacement to either side and the sub-crops.

    Parameters
    ----------
    shape_zyx : three int
        Voxels of a patch.
    margin_zyx : three int
        Voxels of the largest displacement along each axis.
    pieces : int
        Sub-crops an axis; one along an axis of a single voxel.

    Raises
    ------
    ConfigError
        If less than a voxel a sub-crop is left along an axis.
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
        (N, L, Z, Y, X), and masks (N, 1, Z, Y, X) or none.
    shifts_zyx : sequence of (dz, dy, dx), voxels
        Where the centre of the cropped box is moved to, at most by the margin.
    margin : three int
        Voxels left off to either side along z, y, x, so that boxes of all shifts are of one size.
    pieces : int
        Sub-crops an axis, p; `require_room` says whether they fit. Voxels that do not divide are left off at the
        end; an axis of one voxel stays whole.

    Returns
    -------
    list of Maps
        (N p^3, L, V) for each shift, in the maps' dtype.
    """
    starts = [[m + s for m, s in zip(margin, shift, strict=True)] for shift in shifts_zyx]
    views = [partial(_view, start=start, margin=margin, pieces=pieces) for start in starts]
    values = _Crops.apply(maps.values, views)  # type: ignore[no-untyped-call]
    valid = [None] * len(values) if maps.valid is None else [_flat(view(maps.valid)) for view in views]
    return [Maps(*one) for one in zip(values, valid, strict=True)]


def _view(maps: Tensor, start: Sequence[int], margin: Sequence[int], pieces: int) -> Tensor:
    """Sub-crops (N, pz, py, px, C, z, y, x) of (N, C, Z, Y, X) from a corner on, without a copy."""
    for number, (side, m, first) in enumerate(zip(maps.shape[-3:], margin, start, strict=True)):
        parts = pieces if side > 1 else 1
        size = (side - 2 * m) // parts
        axis = 2 + 2 * number  # of the axes before it, each is two by now
        maps = maps.narrow(axis, first, parts * size).unflatten(axis, (parts, size))  # type: ignore[no-untyped-call]
    return maps.permute(0, 2, 4, 6, 1, 3, 5, 7)


def _flat(view: Tensor) -> Tensor:
    return view.flatten(-3).flatten(0, 3)


class _Crops(torch.autograd.Function):
    """Flat crops by many views of the same maps; one copy each, and one addition each in the gradient."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, views: Sequence[Callable[[Tensor], Tensor]]) -> tuple[Tensor, ...]:
        ctx.views, ctx.shape = views, maps.shape
        return tuple(_flat(view(maps)) for view in views)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
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
