"""`unet`: a 3D U-Net whose output is not shifted against its input.

It uses mean pooling, trilinear upsampling and no strided convolution.
After Cicek et al. 2016 (3D U-Net), with the anti-aliasing that Zhang 2019 argues for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from comir_hpc.networks.borders import Padding
from comir_hpc.networks.hourglass import Hourglass, conv_hourglass
from comir_hpc.networks.layers import SymmetricConv, same_conv
from comir_hpc.networks.norms import Norm, norm_maker
from comir_hpc.networks.planning import Triple, plan_kernel, plan_pooling, require_choice
from comir_hpc.networks.recompute import Stage
from comir_hpc.space.groups import rotation_group

Kernels = Literal["symmetric", "free"]


def unet(
    *,
    in_channels: int,
    latent_channels: int,
    widths: Sequence[int] = (16, 32, 64, 64),
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    convs_per_level: int | Sequence[int] = (1, 2),
    norm: Norm = "batch",
    padding: Padding = "zeros",
    kernels: Kernels = "symmetric",
    group: str = "trivial",
    residual: bool = False,
    planar: bool = False,
    checkpoint_levels: int = 0,
) -> Hourglass:
    """Build a U-Net, plain or residual.

    Parameters
    ----------
    in_channels, latent_channels : int
        Channels of the image and of the representation.
    widths : sequence of int
        Channels of each resolution level, finest first.
    spacing_zyx : three float
        Voxel spacing in any one unit. It decides which axes are pooled (`plan_pooling`).
    convs_per_level : int or sequence of int
        Number of convolutions in each block, finest first. The last number counts for all coarser levels.
    norm : str
        Kind of norm: ``batch`` or ``channel``.
    padding : str
        What convolutions see beyond the border: ``zeros``, ``replicate`` or ``reflect``.
    kernels : str
        With ``symmetric``, taps that `group` exchanges share one weight. The network is then exactly equivariant under
        the group, and costs as much as a plain one. With ``free``, equivariance is left to the loss.
    group : str
        Name of a group of grid rotations (`groups.rotation_group`). Only symmetric kernels use it.
    residual : bool
        Whether each block's input is added to its output.
    planar : bool
        Whether the network works on single slices: kernels of one voxel along z, and no pooling there (the 2D method).
    checkpoint_levels : int
        How many of the finest levels recompute their activations in the backward pass.

    Raises
    ------
    ConfigError
        If symmetric kernels are asked for and the group exchanges axes that are pooled differently.
    """
    require_choice(kernels, Kernels, "kernels")
    turns = rotation_group(group)
    shared = kernels == "symmetric" and len(turns) > 1
    pooling = plan_pooling(spacing_zyx, len(widths), planar=planar)
    if shared:
        # An axis that is halved and one that is not look alike to the kernels, but not to what comes after them.
        for factors in pooling:
            turns.require_invariant(factors, f"the pooling for voxels of {tuple(spacing_zyx)}")

    def conv(inputs: int, outputs: int, kernel_zyx: Triple) -> nn.Module:
        # A kernel of one voxel is the same in every orientation: there is nothing to share.
        if shared and max(kernel_zyx) > 1:
            return SymmetricConv(inputs, outputs, kernel_zyx, turns, padding)
        return same_conv(inputs, outputs, kernel_zyx, padding)

    # Linear and without a norm: the representation may have any sign and scale, which the critic then judges.
    head = Stage(same_conv(widths[0], latent_channels, (1, 1, 1), nonlinearity="linear"))
    return conv_hourglass(
        in_channels=in_channels, latent_channels=latent_channels, widths=widths, kernel_zyx=plan_kernel(planar),
        pooling=pooling, convs_per_level=convs_per_level, residual=residual, checkpoint_levels=checkpoint_levels,
        first=conv, conv=conv, norm=norm_maker(norm), head=head,
    )  # fmt: skip
