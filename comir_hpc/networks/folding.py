"""Fold batch norms into the convolutions before them.

In evaluation mode a batch norm multiplies each channel by a constant and adds another one. The convolution before it
can do the same with other weights and a bias. Inference then saves one pass over the map for every norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from comir_hpc.networks.borders import Padding
from comir_hpc.networks.layers import ConvBlock, PaddedConv, SymmetricConv, correlate
from comir_hpc.networks.norms import BatchNormRelu
from comir_hpc.networks.planning import Triple
from comir_hpc.networks.recompute import Stage


class FoldedConv(nn.Module):
    """A convolution whose filters and bias also do the work of the batch norm after it.

    Parameters
    ----------
    filters : (O, C, kz, ky, kx)
        All taps of the filters, each at its place also where several share one weight.
    bias : (O,)
        Constant that is added to each output channel.
    padding : str
        What the convolution sees beyond the border: ``zeros``, ``replicate`` or ``reflect`` (`same_conv`).
    """

    filters: Tensor
    bias: Tensor

    def __init__(self, filters: Tensor, bias: Tensor, padding: Padding) -> None:
        super().__init__()
        kz, ky, kx = filters.shape[2:]
        self.kernel_size: Triple = (kz, ky, kx)
        self.padding: Padding = padding
        self.joins = True
        # Buffers move to the device with the network, and no optimiser sees them.
        self.register_buffer("filters", filters.contiguous(memory_format=torch.channels_last_3d))
        self.register_buffer("bias", bias)

    def forward(self, *parts_BCZYX: Tensor) -> Tensor:
        """(B, C, Z, Y, X), possibly in parts, to (B, O, Z, Y, X)."""
        return correlate(parts_BCZYX, self.filters, self.kernel_size, self.padding, self.bias)


@torch.no_grad()
def fold_norms(network: nn.Module) -> None:
    """Fold every batch norm that follows a plain convolution into that convolution, in place.

    It is for evaluation only: the running statistics become constants. The output stays the same apart from rounding.
    Group convolutions and norms over channels are left as they are.
    """
    for module in network.modules():
        if isinstance(module, ConvBlock):
            _fold_chain([stage.layers for stage in module.stages if isinstance(stage, Stage)])
        elif isinstance(module, nn.Sequential):
            _fold_chain([module])


def _fold_chain(rows: Sequence[nn.Sequential]) -> None:
    """Fold norms within layers that are applied one after the other, row by row."""
    places = [(row, number) for row in rows for number in range(len(row))]
    for (before, i), (after, j) in pairwise(places):
        norm = after[j]
        if isinstance(norm, BatchNormRelu) and norm.copies == 1:
            folded = _fold(before[i], norm.norm)
            if folded is not None:
                before[i] = folded
                after[j] = nn.ReLU(inplace=True) if norm.relu else nn.Identity()


def _fold(conv: nn.Module, norm: nn.BatchNorm3d) -> FoldedConv | None:
    own: Tensor | None = None
    padding: Padding
    if isinstance(conv, SymmetricConv):
        filters, padding = conv.kernel(), conv.padding
    elif isinstance(conv, nn.Conv3d):
        filters, own = conv.weight, conv.bias
        padding = conv.border if isinstance(conv, PaddedConv) else "zeros"
    else:
        return None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # norm(conv(x) + own) = scale * conv(x) + (norm.bias - scale * (running_mean - own)): a convolution and a bias.
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    mean = norm.running_mean if own is None else norm.running_mean - own
    return FoldedConv(filters * scale[:, None, None, None, None], norm.bias - mean * scale, padding)
