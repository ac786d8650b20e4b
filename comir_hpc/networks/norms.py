"""Normalise feature maps without a statistic over space at inference; each norm is followed by its activation.

Axes: B batch, C channels, G group elements, Z Y X space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comir_hpc.networks.planning import require_choice
from comir_hpc.networks.recompute import join_copies, split_copies

Norm = Literal["batch", "channel"]


NormMaker = Callable[..., nn.Module]
"""Makes a norm from the number of channels; ``relu=False`` leaves the activation out."""


class BatchNormRelu(nn.Module):
    """BatchNorm over (B, Z, Y, X) and the group's copies, then ReLU; running statistics at inference.

    Parameters
    ----------
    num_channels : int
        Number of channels C of one copy.
    copies : int
        Number of group elements G. Statistics and weights are shared among them, which keeps the layer equivariant.
    relu : bool
        Whether the activation is applied. It works in place, so that only its result is kept for the backward pass.
    """

    def __init__(self, num_channels: int, copies: int = 1, *, relu: bool = True) -> None:
        super().__init__()
        self.copies = copies
        self.relu = relu
        self.norm = nn.BatchNorm3d(num_channels)

    def forward(self, x_BCZYX: Tensor) -> Tensor:
        """Normalise (B, G*C, Z, Y, X)."""
        x_BZYXGC = split_copies(x_BCZYX, self.copies)
        # The copies are put beside x, so that BatchNorm treats them as more voxels and shares its statistics among
        # them. In channels_last_3d this is a view.
        y: Tensor = self.norm(x_BZYXGC.flatten(3, 4).permute(0, 4, 1, 2, 3))
        y_BZYXC = (F.relu_(y) if self.relu else y).permute(0, 2, 3, 4, 1)
        return join_copies(y_BZYXC.reshape(x_BZYXGC.shape))


class ChannelNormRelu(nn.Module):
    """Zero mean and unit variance over the channels of each voxel (and the group's copies), then ReLU.

    Layer normalisation as in ConvNeXt (Liu et al. 2022): no statistic over space or batch, the same in training
    and at inference.

    Parameters
    ----------
    num_channels, copies, relu
        The same arguments that `BatchNormRelu` takes.
    """

    def __init__(self, num_channels: int, copies: int = 1, *, relu: bool = True) -> None:
        super().__init__()
        self.copies = copies
        self.relu = relu
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x_BCZYX: Tensor) -> Tensor:
        """Normalise (B, G*C, Z, Y, X)."""
        x_BZYXC = x_BCZYX.permute(0, 2, 3, 4, 1)
        weight, bias = (part.repeat(self.copies).to(x_BCZYX.dtype) for part in (self.weight, self.bias))
        # CUDA autocast would return fp32 here, which doubles the memory. The kernel sums in fp32 in any case.
        with torch.autocast(x_BCZYX.device.type, enabled=False):
            y = F.layer_norm(x_BZYXC, x_BZYXC.shape[-1:], weight, bias)
        y = F.relu_(y) if self.relu else y
        return y.permute(0, 4, 1, 2, 3)


def norm_maker(norm: Norm, copies: int = 1) -> NormMaker:
    """Choose a norm by name: ``batch`` or ``channel``, shared among `copies` group elements."""
    require_choice(norm, Norm, "norm")
    chosen: type[nn.Module] = {"batch": BatchNormRelu, "channel": ChannelNormRelu}[norm]

    def make(num_channels: int, *, relu: bool = True) -> nn.Module:
        return chosen(num_channels, copies, relu=relu)

    return make
