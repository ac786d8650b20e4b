"""`unet`: a 3D U-Net that does not shift: mean pooling, trilinear upsampling, no strided convolution.

After Cicek et al. 2016 (3D U-Net), with the anti-aliasing that Zhang 2019 argues for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from comir_hpc.networks.hourglass import Hourglass, conv_hourglass
from comir_hpc.networks.layers import Norm, Padding, norm_maker, same_conv
from comir_hpc.networks.planning import Triple, plan_kernel, plan_pooling
from comir_hpc.networks.recompute import Stage


def unet(
    *,
    in_channels: int,
    latent_channels: int,
    widths: Sequence[int] = (16, 32, 64, 64),
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    convs_per_level: int | Sequence[int] = (1, 2),
    norm: Norm = "batch",
    padding: Padding = "zeros",
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
        Voxel spacing, any one unit: decides which axes are pooled (`plan_pooling`).
    convs_per_level : int or sequence of int
        Convolutions in each block, finest first; the last number counts for all coarser levels.
    norm : str
        ``batch`` or ``channel``.
    padding : str
        ``zeros``, ``replicate`` or ``reflect``: what convolutions see beyond the border.
    residual : bool
        Add each block's input to its output.
    planar : bool
        Single slices: kernels of one voxel along z and no pooling there (the 2D method).
    checkpoint_levels : int
        Finest levels whose activations are recomputed in the backward pass.
    """

    def conv(inputs: int, outputs: int, kernel_zyx: Triple) -> nn.Module:
        return same_conv(inputs, outputs, kernel_zyx, padding)

    return conv_hourglass(
        in_channels=in_channels,
        latent_channels=latent_channels,
        widths=widths,
        kernel_zyx=plan_kernel(planar),
        pooling=plan_pooling(spacing_zyx, len(widths), planar=planar),
        convs_per_level=convs_per_level,
        residual=residual,
        checkpoint_levels=checkpoint_levels,
        first=conv,
        conv=conv,
        norm=norm_maker(norm),
        head=Stage(same_conv(widths[0], latent_channels, (1, 1, 1), nonlinearity="linear")),
    )
