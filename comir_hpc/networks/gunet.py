"""`gunet`: a U-Net that is exactly equivariant under a group of grid rotations, by its weights.

Feature maps are functions F(g, v) on group and space; a rotation h acts on them by (T_h F)(g, v) = F(h^-1 g, h^-1 v).
Every layer commutes with that action: lifting and group convolutions (Cohen and Welling 2016; in 3D Winkels and
Cohen 2018), whose rotated filters are permutations of the taps of one base filter because the group maps the voxel
grid onto itself; norms shared among the group's elements; mean pooling and linear upsampling; and a mean over the
group at the end.

Axes: B batch, C channels or fields, G group elements, Z Y X space, T taps of a kernel, O output fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from comir_hpc.networks.borders import Padding
from comir_hpc.networks.hourglass import Hourglass, conv_hourglass
from comir_hpc.networks.layers import correlate, same_conv, tap_permutations
from comir_hpc.networks.norms import Norm, norm_maker
from comir_hpc.networks.planning import Triple, plan_kernel, plan_pooling, require_choice
from comir_hpc.networks.recompute import Stage, split_copies
from comir_hpc.space.groups import Group, rotation_group


class LiftingConv(nn.Module):
    """Carry an image to functions on the group: one base filter is correlated in all its orientations.

    ``out[g] = sum_u w(g^-1 u) x(v + u)``: (B, C, Z, Y, X) to (B, G*O, Z, Y, X), the group outermost.

    Parameters
    ----------
    in_channels, out_fields : int
        Numbers of image channels C and of output fields O.
    kernel_zyx : three int
        Sides of the kernel in voxels, odd, and equal along axes that the group exchanges.
    group : Group
        Rotations of the grid under which the layer is equivariant.
    padding : str
        What the convolution sees beyond the border: ``zeros``, ``replicate`` or ``reflect`` (`same_conv`).
    """

    taps: Tensor

    def __init__(
        self, in_channels: int, out_fields: int, kernel_zyx: Triple, group: Group, padding: Padding = "zeros"
    ) -> None:
        super().__init__()
        require_choice(padding, Padding, "padding")
        self.kernel_size = kernel_zyx
        self.padding = padding
        self.weight = nn.Parameter(torch.empty(out_fields, in_channels, *kernel_zyx))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.register_buffer("taps", tap_permutations(group, kernel_zyx), persistent=False)

    def filters(self) -> Tensor:
        """Return the base filter in all its orientations, (G*O, C, kz, ky, kx)."""
        # A rotated filter holds the same weights at other places, so that each orientation is one gather of taps.
        rows = self.weight.flatten(2).permute(2, 0, 1)
        turned_GTOC = rows.index_select(0, self.taps.flatten()).view(*self.taps.shape, *rows.shape[1:])
        return turned_GTOC.permute(0, 2, 3, 1).reshape(-1, rows.shape[2], *self.kernel_size)

    def forward(self, x_BCZYX: Tensor) -> Tensor:
        """Correlate (B, C, Z, Y, X) with every orientation."""
        return correlate((x_BCZYX,), self.filters(), self.kernel_size, self.padding)


class GroupConv(nn.Module):
    """Carry functions on the group to functions on the group; the base filter has a tap for every element and offset.

    ``out[g](v) = sum_h sum_u w(g^-1 h, g^-1 u) F(h, v + u)``: (B, G*C, Z, Y, X) to (B, G*O, Z, Y, X).

    Parameters
    ----------
    in_fields, out_fields : int
        Numbers of input fields C and output fields O.
    kernel_zyx, group, padding
        The same arguments that `LiftingConv` takes.
    """

    sources: Tensor

    def __init__(
        self, in_fields: int, out_fields: int, kernel_zyx: Triple, group: Group, padding: Padding = "zeros"
    ) -> None:
        super().__init__()
        require_choice(padding, Padding, "padding")
        self.kernel_size = kernel_zyx
        self.padding = padding
        self.order = len(group)
        self.weight = nn.Parameter(torch.empty(out_fields, in_fields, self.order, *kernel_zyx))
        # Seen as (O, C, G * taps): all taps of all elements add up in one output, so all count in the fan-in.
        nn.init.kaiming_normal_(self.weight.flatten(2), nonlinearity="relu")
        taps = tap_permutations(group, kernel_zyx)
        # The number of g^-1 h for every g and h: which of the filter's elements stands there in orientation g.
        relative = torch.from_numpy(group.table[group.inverses])
        sources_GGT = relative[:, :, None] * taps.shape[1] + taps[:, None, :]
        # Not in the state: it follows from group and kernel, and weights of before stay readable.
        self.register_buffer("sources", sources_GGT, persistent=False)

    def filters(self) -> Tensor:
        """Return the layer as a bank of ordinary filters, (G*O, G*C, kz, ky, kx)."""
        # Whole rows of O*C weights are gathered, so that the backward pass adds up contiguous memory.
        rows = self.weight.flatten(2).permute(2, 0, 1)
        turned = rows.index_select(0, self.sources.flatten())
        turned_GGTOC = turned.view(*self.sources.shape, *rows.shape[1:])
        return turned_GGTOC.permute(0, 3, 1, 4, 2).reshape(-1, self.order * rows.shape[2], *self.kernel_size)

    def forward(self, x_BCZYX: Tensor) -> Tensor:
        """Correlate (B, G*C, Z, Y, X) with the bank."""
        return correlate((x_BCZYX,), self.filters(), self.kernel_size, self.padding)


class GroupMean(nn.Module):
    """Average over the group, (B, G*C, Z, Y, X) to (B, C, Z, Y, X), which makes scalars that turn with the image."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x_BCZYX: Tensor) -> Tensor:
        """Average the orientations."""
        return split_copies(x_BCZYX, self.order).mean(-2).permute(0, 4, 1, 2, 3)


def gunet(
    *,
    in_channels: int,
    latent_channels: int,
    group: str = "O",
    widths: Sequence[int] = (16, 32, 64, 64),
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    convs_per_level: int | Sequence[int] = (1, 2),
    norm: Norm = "batch",
    padding: Padding = "zeros",
    residual: bool = False,
    planar: bool = False,
    checkpoint_levels: int = 0,
) -> Hourglass:
    """Build a U-Net whose representation turns exactly with the image.

    Parameters
    ----------
    in_channels, latent_channels : int
        Channels of the image and of the representation.
    group : str
        Name of the group: ``O``, ``D4`` or ``D2``, or ``C4`` for single slices (`groups.rotation_group`).
    widths : sequence of int
        Channels of each level, finest first, as for `unet`. The G orientations of the group share them: a level has
        ceil(width / G) fields, hence never fewer channels than asked for.
    spacing_zyx, convs_per_level, norm, padding, residual, planar, checkpoint_levels
        They mean what they mean for `unet`, and are checked in the same way.

    Raises
    ------
    ConfigError
        If the group exchanges axes that are pooled differently.
    """
    turns = rotation_group(group)
    kernel, pooling = plan_kernel(planar), plan_pooling(spacing_zyx, len(widths), planar=planar)
    for factors in pooling:
        turns.require_invariant(factors, f"the pooling for voxels of {tuple(spacing_zyx)}")
    fields = [math.ceil(width / len(turns)) for width in widths]
    # Fewer fields than latent channels would make these multiples of each other.
    fields[0] = max(fields[0], latent_channels)
    out = same_conv(fields[0], latent_channels, (1, 1, 1), nonlinearity="linear")

    def lift(channels: int, out: int, kernel_zyx: Triple) -> nn.Module:
        return LiftingConv(channels, out, kernel_zyx, turns, padding)

    def conv(channels: int, out: int, kernel_zyx: Triple) -> nn.Module:
        return GroupConv(channels, out, kernel_zyx, turns, padding)

    return conv_hourglass(
        in_channels=in_channels,
        latent_channels=latent_channels,
        widths=fields,
        kernel_zyx=kernel,
        pooling=pooling,
        convs_per_level=convs_per_level,
        residual=residual,
        checkpoint_levels=checkpoint_levels,
        first=lift,
        conv=conv,
        norm=norm_maker(norm, copies=len(turns)),
        head=Stage(GroupMean(len(turns)), out),
        copies=len(turns),
    )
