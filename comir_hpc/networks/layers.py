"""Make the layers that the networks share: convolutions, and blocks of them.

Nothing here takes a statistic over space at inference, so that a voxel's output does not depend on the window
it was computed in. Tensors are kept in channels_last_3d, which CPUs with bf16 dot products and GPUs with tensor
cores prefer; every layer is correct in any layout.

Axes: B batch, C channels, G group elements, Z Y X space. A feature map of a group network has G*C channels, the
group outermost, so that in channels_last_3d its fields are views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comir_hpc.errors import ConfigError
from comir_hpc.networks.borders import Padding, pad_border
from comir_hpc.networks.norms import NormMaker
from comir_hpc.networks.planning import Triple, require_choice
from comir_hpc.networks.recompute import Parts, Stage, merge_channels
from comir_hpc.space.groups import Group

ConvMaker = Callable[[int, int, Triple], nn.Module]
"""Makes a convolution from input channels, output channels and kernel size (z, y, x)."""

_POINT: Triple = (1, 1, 1)
_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def mix_channels(x_BCZYX: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Pointwise convolution as a matrix product: (B, C, Z, Y, X) and (O, C, 1, 1, 1) to (B, O, Z, Y, X).

    On CPU in fp32, torch has no kernel for it in channels_last_3d: it would copy the map and return another layout.
    """
    if _inferring_on_cpu(x_BCZYX) and torch.is_autocast_enabled("cpu"):
        # In bf16 torch has such a kernel. It is twice as fast as a product with few columns.
        return F.conv3d(x_BCZYX, weight, bias)
    return F.linear(x_BCZYX.permute(0, 2, 3, 4, 1), weight.flatten(1), bias).permute(0, 4, 1, 2, 3)


def correlate(
    parts_BCZYX: Parts, filters: Tensor, kernel_zyx: Triple, padding: Padding, bias: Tensor | None = None
) -> Tensor:
    """Correlate (B, C, Z, Y, X), possibly in parts, with filters (O, C, kz, ky, kx), and add the bias (O,).

    The shape is kept; `same_conv` says what padding is.
    """
    if max(kernel_zyx) == 1:
        return mix_channels(merge_channels(parts_BCZYX), filters, bias)
    if padding == "zeros":
        return _convolve(merge_channels(parts_BCZYX), filters, bias, [size // 2 for size in kernel_zyx])
    return _convolve(pad_border(parts_BCZYX, kernel_zyx, padding), filters, bias, [0, 0, 0])


def _convolve(x_BCZYX: Tensor, filters: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    fp32 = x_BCZYX.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if fp32 and len(x_BCZYX) == 1 and _inferring_on_cpu(x_BCZYX):
        # If such a map is small, torch uses a kernel of its own. That one is up to ten times slower than oneDNN's, and
        # returns another layout. So oneDNN's is called by name.
        return torch.mkldnn_convolution(x_BCZYX, filters, bias, padding, [1, 1, 1], [1, 1, 1], 1)
    return F.conv3d(x_BCZYX, filters, bias, padding=padding)


def _inferring_on_cpu(x: Tensor) -> bool:
    # A trace also runs on other devices.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return x.device.type == "cpu" and not torch.is_grad_enabled() and _ONEDNN and not tracing


def tap_permutations(group: Group, kernel_zyx: Triple) -> Tensor:
    """Find where each tap of a rotated filter comes from: (G, T) int64, ``[g, u]`` is the number of the tap g^-1 u.

    Parameters
    ----------
    group : Group
        Rotations of the grid.
    kernel_zyx : three int
        Sides of the kernel in voxels, odd, and equal along axes that the group exchanges. Taps are numbered in C
        order.

    Raises
    ------
    ConfigError
        If the group does not map the kernel onto itself.
    """
    group.require_invariant(kernel_zyx, "the kernel size")
    centre = np.array(kernel_zyx) // 2
    taps = np.stack(np.unravel_index(np.arange(math.prod(kernel_zyx)), kernel_zyx), axis=-1) - centre
    # A row vector times g equals the transpose of g times a column vector, and the transpose of g is its inverse.
    sources = taps @ group.matrices + centre
    return torch.from_numpy(np.ravel_multi_index(tuple(np.moveaxis(sources, -1, 0)), kernel_zyx))


class PaddedConv(nn.Conv3d):
    """A convolution that continues the map beyond its border by other values than zeros.

    Parameters
    ----------
    in_channels, out_channels, kernel_zyx, padding, bias
        The same arguments that `same_conv` takes.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_zyx: Triple, padding: Padding, bias: bool
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_zyx, bias=bias)
        self.border: Padding = padding
        self.joins = True

    def forward(self, input: Tensor, *others: Tensor) -> Tensor:
        """(B, C, Z, Y, X), possibly in parts, to (B, O, Z, Y, X)."""
        kernel = (self.kernel_size[0], self.kernel_size[1], self.kernel_size[2])
        return correlate((input, *others), self.weight, kernel, self.border, self.bias)


class SymmetricConv(nn.Module):
    """A convolution that commutes with a group, because taps that the group exchanges share one weight.

    There is one weight for each orbit of taps: ``w(g^-1 u) = w(u)``. Hence ``conv(T_g x) = T_g conv(x)`` for every g,
    before training and after it. This is the group convolution (Cohen and Welling 2016) between fields of the trivial
    representation. It costs no more than a plain convolution.

    Parameters
    ----------
    in_channels, out_channels, kernel_zyx, padding
        The same arguments that `same_conv` takes.
    group : Group
        Rotations of the grid, which must map the kernel onto itself.
    """

    orbits: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_zyx: Triple,
        group: Group,
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        require_choice(padding, Padding, "padding")
        self.kernel_size = kernel_zyx
        self.padding = padding
        self.joins = True
        # Taps of one orbit have the same images under the group: the smallest number among them names the orbit.
        first = tap_permutations(group, kernel_zyx).amin(dim=0)
        orbit = torch.from_numpy(np.unique(first.numpy(), return_inverse=True)[1])
        sizes = orbit.bincount()
        # Every orbit contributes the same variance, and all together that of He et al. 2015.
        spread = (2 / (in_channels * len(sizes) * sizes)).sqrt()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, len(sizes)) * spread)
        self.register_buffer("orbits", F.one_hot(orbit).T.float(), persistent=False)

    def kernel(self) -> Tensor:
        """Return the filters with every tap at its place, (O, C, kz, ky, kx)."""
        # A matrix product, whose gradient is a matrix product too; the gradient of indexing would add up tap by tap.
        # Channels come last in memory, as in the maps, since the convolution would copy the maps otherwise.
        taps_OTC = self.orbits.T @ self.weight.transpose(1, 2)
        return taps_OTC.view(len(taps_OTC), *self.kernel_size, -1).permute(0, 4, 1, 2, 3)

    def forward(self, *parts_BCZYX: Tensor) -> Tensor:
        """(B, C, Z, Y, X), possibly in parts, to (B, O, Z, Y, X)."""
        return correlate(parts_BCZYX, self.kernel(), self.kernel_size, self.padding)


class PointConv(nn.Conv3d):
    """A convolution with a kernel of one voxel."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, Z, Y, X) to (B, O, Z, Y, X)."""
        return mix_channels(input, self.weight, self.bias)


def same_conv(
    in_channels: int,
    out_channels: int,
    kernel_zyx: Triple,
    padding: Padding = "zeros",
    *,
    bias: bool = False,
    nonlinearity: Literal["relu", "linear"] = "relu",
) -> nn.Conv3d:
    """Make a convolution that keeps the shape, with weights that keep the variance (He et al. 2015).

    Parameters
    ----------
    in_channels, out_channels : int
        Channels before and after.
    kernel_zyx : three int
        Sides of the kernel in voxels, each of them odd.
    padding : str
        What the convolution sees beyond the border: zeros (``zeros``), copies of the border voxel (``replicate``), or
        the mirror image (``reflect``). All of them commute with the grid's rotations.
    bias : bool
        Whether a constant is added to each output channel. Before a norm it has no effect.
    nonlinearity : str
        Activation that the next layer applies; the weights are scaled to keep the variance through it.
    """
    require_choice(padding, Padding, "padding")
    conv: nn.Conv3d
    if max(kernel_zyx) == 1:
        conv = PointConv(in_channels, out_channels, kernel_zyx, bias=bias)
    elif padding == "zeros":
        radii = (kernel_zyx[0] // 2, kernel_zyx[1] // 2, kernel_zyx[2] // 2)
        conv = nn.Conv3d(in_channels, out_channels, kernel_zyx, padding=radii, bias=bias)
    else:
        conv = PaddedConv(in_channels, out_channels, kernel_zyx, padding, bias)
    nn.init.kaiming_normal_(conv.weight, nonlinearity=nonlinearity)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def kernel_radius(module: nn.Module, axis: int) -> int:
    """Add up the kernel radii of all convolutions in a module, in voxels along one axis: the reach of the chain."""
    sizes = (getattr(layer, "kernel_size", None) for layer in module.modules())
    return sum(size[axis] // 2 for size in sizes if isinstance(size, tuple))


class ConvBlock(nn.Module):
    """Convolutions, each followed by a norm and ReLU.

    A residual block adds its input before the last ReLU.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels (of one copy) before and after.
    kernel_zyx : three int
        Sides of every convolution's kernel in voxels.
    num_convs : int
        How many convolutions the block has.
    conv, norm : callables
        Functions that make the layers, so that a group network uses the same block.
    first : callable
        Function that makes the first convolution and the shortcut; `conv` when not given.
    residual : bool
        Whether the block's input is added, through a pointwise convolution where the channels differ.
    copies, grow
        The same arguments that `Stage` takes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_zyx: Triple,
        num_convs: int,
        *,
        conv: ConvMaker,
        norm: NormMaker,
        first: ConvMaker | None = None,
        residual: bool = False,
        copies: int = 1,
        grow: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_convs < 1:
            raise ConfigError(f"convs_per_level is {num_convs}; expected 1 or more")
        entry = first or conv
        stages = [Stage(entry(in_channels, out_channels, kernel_zyx), copies=copies, grow=grow)]
        stages.extend(
            Stage(norm(out_channels), conv(out_channels, out_channels, kernel_zyx))
            for _ in range(num_convs - 1)
        )
        stages.append(Stage(norm(out_channels, relu=not residual)))
        self.stages = nn.ModuleList(stages)
        self.shortcut: Stage | None = None
        if residual:
            # An image is never added as it is: `first` carries it to feature maps, on which a group may act.
            same = first is None and in_channels == out_channels
            point = nn.Identity() if same else entry(in_channels, out_channels, _POINT)
            self.shortcut = Stage(point, copies=copies, grow=grow)

    def forward(self, *parts_BCZYX: Tensor) -> Parts:
        """(B, in, Z, Y, X), possibly in parts, to (B, out, Z, Y, X)."""
        first, *others = self.stages
        y: Tensor = first(*parts_BCZYX)
        for stage in others:
            y = stage(y)
        return (y if self.shortcut is None else F.relu_(y + self.shortcut(*parts_BCZYX)),)
