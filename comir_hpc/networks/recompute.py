"""Let parts of a network forget their activations, and compute them again in the backward pass.

Axes: B batch, C channels, G group elements, Z Y X space. A feature map of a group network has G*C channels, the
group outermost, so that in channels_last_3d its fields are views.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Parts = tuple[Tensor, ...]
"""Feature maps (B, ., Z, Y, X) that together are one, concatenated only where they are used: a copy less to keep."""


def split_copies(x_BCZYX: Tensor, copies: int) -> Tensor:
    """Show (B, G*C, Z, Y, X) as (B, Z, Y, X, G, C)."""
    B, C, Z, Y, X = x_BCZYX.shape
    return x_BCZYX.permute(0, 2, 3, 4, 1).reshape(B, Z, Y, X, copies, C // copies)


def join_copies(x_BZYXGC: Tensor) -> Tensor:
    """Undo `split_copies`: (B, G*C, Z, Y, X)."""
    return x_BZYXGC.flatten(4, 5).permute(0, 4, 1, 2, 3)


def merge_channels(parts: Sequence[Tensor], copies: int = 1) -> Tensor:
    """Concatenate feature maps (B, G*C_i, Z, Y, X) along C, copy by copy: (B, G*sum(C_i), Z, Y, X)."""
    if len(parts) == 1:
        return parts[0]
    if copies == 1:
        return torch.cat(list(parts), dim=1)
    return join_copies(torch.cat([split_copies(part, copies) for part in parts], dim=-1))


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Hold BatchNorm's running statistics still, because a recomputed forward pass would count its batch twice."""
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    kept = [(layer, layer.momentum, layer.num_batches_tracked) for layer in norms]
    try:
        for layer in norms:
            # A momentum of 0 leaves the statistics as they are, and without a counter no batch is counted.
            layer.momentum, layer.num_batches_tracked = 0.0, None
        yield
    finally:
        for layer, momentum, tracked in kept:
            layer.momentum, layer.num_batches_tracked = momentum, tracked


def recomputed(module: nn.Module, *inputs: Any) -> Any:
    """Call a module and keep only its inputs; what lies between is computed again in the backward pass.

    The output, the gradients and the running statistics are those of a plain call.
    """
    # Non-reentrant, because the first block's input is the image. It needs no gradient, and reentrant checkpointing
    # would then give the weights of that block none, without a word.
    if not torch.is_grad_enabled():
        return module(*inputs)
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        # Only dropout draws random numbers; to save and restore their state costs time on a GPU.
        preserve_rng_state=any(isinstance(layer, nn.Dropout | nn.Dropout3d) for layer in module.modules()),
        context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(module)),
    )


class Stage(nn.Module):
    """Layers in a row that can forget their activations.

    With `recompute` on, only the inputs are kept for the backward pass. There the layers are computed again up to the
    last convolution's input, which is all that its gradient needs. So a stage that ends in a convolution forgets
    concatenation, upsampling, norm and activation, and repeats no convolution. For dense blocks this is the
    memory-efficient form of Pleiss et al. 2017.

    Parameters
    ----------
    *layers : Module
        The layers, in the order in which they are applied.
    copies : int
        Number of group elements that the maps hold, 1 without a group.
    grow : Module, optional
        Upsampling that is applied to the last of several inputs, before they are concatenated.
    """

    def __init__(self, *layers: nn.Module, copies: int = 1, grow: nn.Module | None = None) -> None:
        super().__init__()
        self.recompute = False
        self.layers = _Merged(*layers, copies=copies, grow=grow)

    def forward(self, *parts_BCZYX: Tensor) -> Tensor:
        """Concatenate the parts (B, ., Z, Y, X) along the channels and apply the layers."""
        result: Tensor = (
            recomputed(self.layers, *parts_BCZYX) if self.recompute else self.layers(*parts_BCZYX)
        )
        return result


class _Merged(nn.Sequential):
    """Join the parts and apply the layers.

    A first layer that has the mark `joins` gets the parts as they are, since it joins them while it pads (one copy
    instead of two).
    """

    def __init__(self, *layers: nn.Module, copies: int, grow: nn.Module | None) -> None:
        super().__init__(*layers)
        self.copies = copies
        # In a list, which hides it from nn.Sequential: it is no layer of the row.
        self.grow = [grow] if grow is not None else []

    def forward(self, *parts_BCZYX: Tensor) -> Tensor:
        first, *rest = self
        x_BCZYX = self._joined(first, *parts_BCZYX)
        for layer in rest:
            x_BCZYX = layer(x_BCZYX)
        return x_BCZYX

    def _joined(self, first: nn.Module, *parts_BCZYX: Tensor) -> Tensor:
        *others, last = parts_BCZYX
        for grow in self.grow:
            last = grow(last)
        joins = self.copies == 1 and getattr(first, "joins", False)
        y: Tensor = first(*others, last) if joins else first(merge_channels([*others, last], self.copies))
        return y
