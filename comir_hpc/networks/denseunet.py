"""`denseunet`: the densely connected U-Net ("tiramisu") of CoMIR, in 3D.

Structure after Jegou et al. 2017 (The One Hundred Layers Tiramisu) and the two configurations published with CoMIR
(Pielawski, Wetzer et al., NeurIPS 2020): six levels for the histology data, three for the aerial images. Single
slices (`planar`) give the 2D network with the same number of parameters. Written from the description; by default
pooling and upsampling are anti-aliased, which the published network's are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from comir_hpc.errors import ConfigError
from comir_hpc.networks.borders import Padding
from comir_hpc.networks.hourglass import Decoder, Hourglass
from comir_hpc.networks.layers import same_conv
from comir_hpc.networks.norms import Norm, NormMaker, norm_maker
from comir_hpc.networks.planning import Triple, plan_kernel, plan_pooling
from comir_hpc.networks.recompute import Parts, Stage
from comir_hpc.networks.resampling import Resample

Configuration = Literal["three-level", "six-level"]


@dataclass(frozen=True)
class Tiramisu:
    """Sizes of a densely connected U-Net.

    Parameters
    ----------
    stem : int
        Channels of the first convolution.
    layers : tuple of int
        Dense layers of each level, finest first, the same going down and up.
    bottom : int
        Dense layers of the coarsest level.
    compression : float
        Share of the channels that a transition down keeps.
    dropout : float
        Share of the activations dropped in training.
    growth : int
        Channels that each dense layer adds.
    """

    stem: int
    layers: tuple[int, ...]
    bottom: int
    compression: float
    dropout: float
    growth: int = 12


PUBLISHED: dict[str, Tiramisu] = {
    "three-level": Tiramisu(stem=16, layers=(2, 2, 2), bottom=3, compression=1.0, dropout=0.0),
    "six-level": Tiramisu(stem=32, layers=(4,) * 6, bottom=4, compression=0.75, dropout=0.2),
}


class DenseBlock(nn.Module):
    """Dense layers, each fed with the input and all layers before it.

    Parameters
    ----------
    layers : sequence of Module
        The dense layers in order. Each is a norm, ReLU, convolution and dropout, and adds channels.
    keep_input : bool
        Whether the output includes the block's input beside the new channels. Going up it does not, except at
        full resolution (Jegou et al., section 3.2).
    """

    def __init__(self, layers: Sequence[nn.Module], *, keep_input: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.keep_input = keep_input

    def forward(self, *parts_BCZYX: Tensor) -> Parts:
        """(B, C, Z, Y, X), possibly in parts, to (B, [C +] layers * growth, Z, Y, X)."""
        maps = list(parts_BCZYX)
        for layer in self.layers:
            maps.append(layer(*maps))
        return tuple(maps if self.keep_input else maps[len(parts_BCZYX) :])


def denseunet(
    *,
    in_channels: int,
    latent_channels: int,
    configuration: Configuration = "three-level",
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    norm: Norm = "batch",
    padding: Padding = "zeros",
    antialiased: bool = True,
    planar: bool = False,
    checkpoint_levels: int = 0,
) -> Hourglass:
    """Build one of CoMIR's two published networks.

    Parameters
    ----------
    in_channels, latent_channels : int
        Channels of the image and of the representation.
    configuration : str
        ``three-level`` (halved 3 times) or ``six-level`` (6 times: sides must be multiples of 64).
    antialiased : bool
        Whether to use mean pooling and trilinear upsampling. False gives the published max pooling and nearest
        upsampling.
    spacing_zyx, norm, padding, planar, checkpoint_levels
        They mean what they mean for `unet`. The published networks have the norm ``batch`` and the padding ``zeros``.

    Raises
    ------
    ConfigError
        If the configuration is unknown.
    """
    if configuration not in PUBLISHED:
        raise ConfigError(
            f"configuration is {configuration!r}; expected one of {', '.join(get_args(Configuration))}"
        )
    return _assemble(
        PUBLISHED[configuration],
        in_channels=in_channels,
        latent_channels=latent_channels,
        parts=_Parts(plan_kernel(planar), padding, norm_maker(norm), antialiased),
        pooling=plan_pooling(spacing_zyx, len(PUBLISHED[configuration].layers) + 1, planar=planar),
        checkpoint_levels=checkpoint_levels,
    )


@dataclass(frozen=True)
class _Parts:
    """Make the pieces of one network."""

    kernel_zyx: Triple
    padding: Padding
    norm: NormMaker
    antialiased: bool

    def conv(self, channels: int, out: int) -> nn.Conv3d:
        # With a bias: the norm stands before the convolution, where it cannot do the work of one.
        return same_conv(channels, out, self.kernel_zyx, self.padding, bias=True)

    def dense(self, channels: int, count: int, sizes: Tiramisu, *, keep_input: bool) -> DenseBlock:
        layers = []
        for number in range(count):
            inputs = channels + number * sizes.growth
            drop = [nn.Dropout(sizes.dropout)] if sizes.dropout else []
            layers.append(Stage(self.norm(inputs), self.conv(inputs, sizes.growth), *drop))
        return DenseBlock(layers, keep_input=keep_input)

    def down(self, channels: int, out: int, sizes: Tiramisu, factors: Triple) -> Stage:
        point = same_conv(channels, out, (1, 1, 1), bias=True)
        drop = [nn.Dropout3d(sizes.dropout)] if sizes.dropout else []
        pool = Resample(factors, "mean" if self.antialiased else "max")
        return Stage(self.norm(channels), point, *drop, pool)

    def up(self, channels: int, factors: Triple) -> Stage:
        grow = Resample(factors, "linear" if self.antialiased else "nearest")
        return Stage(grow, self.conv(channels, channels), nn.ReLU(inplace=True))


def _assemble(
    sizes: Tiramisu,
    *,
    in_channels: int,
    latent_channels: int,
    parts: _Parts,
    pooling: Sequence[Triple],
    checkpoint_levels: int,
) -> Hourglass:
    channels = sizes.stem
    encoders: list[nn.Module] = []
    downs, skips = [], []
    for count, factors in zip(sizes.layers, pooling, strict=True):
        encoders.append(parts.dense(channels, count, sizes, keep_input=True))
        skips.append(channels + count * sizes.growth)
        channels = int(skips[-1] * sizes.compression)
        downs.append(parts.down(skips[-1], channels, sizes, factors))
    # The first convolution has no norm before it: the image is normalised by the volume's statistics already.
    encoders[0] = nn.Sequential(parts.conv(in_channels, sizes.stem), encoders[0])
    encoders.append(parts.dense(channels, sizes.bottom, sizes, keep_input=False))

    decoders: list[Decoder] = []
    # On the way up a block gives only its new channels (but at full resolution), so that they do not grow by levels.
    coarse = sizes.bottom * sizes.growth
    for level in reversed(range(len(sizes.layers))):
        joined = skips[level] + coarse
        block = parts.dense(joined, sizes.layers[level], sizes, keep_input=level == 0)
        # Made from the coarsest on, since each needs the channels below it, and kept the finest first.
        decoders.insert(0, Decoder(parts.up(coarse, pooling[level]), block))
        coarse = sizes.layers[level] * sizes.growth
    return Hourglass(
        in_channels=in_channels,
        latent_channels=latent_channels,
        encoders=encoders,
        downs=downs,
        decoders=decoders,
        head=Stage(same_conv(joined + coarse, latent_channels, (1, 1, 1), nonlinearity="linear")),
        pooling=pooling,
        linear=parts.antialiased,
        checkpoint_levels=checkpoint_levels,
        checkpoint_blocks=False,
    )
