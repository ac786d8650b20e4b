"""Define what every encoder promises, and the U shape (down, across, up) that all of ours have.

Axes: B batch, C input channels, L latent channels, Z Y X space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comir_hpc.errors import ConfigError
from comir_hpc.networks.layers import ConvBlock, ConvMaker, kernel_radius
from comir_hpc.networks.norms import NormMaker
from comir_hpc.networks.planning import Triple, receptive_halo, total_stride
from comir_hpc.networks.recompute import Parts, Stage, recomputed
from comir_hpc.networks.resampling import Resample
from comir_hpc.space.groups import Group


class Network(nn.Module):
    """An encoder: an image of C channels in, an image-like representation of L channels out, voxel for voxel.

    Attributes
    ----------
    in_channels, latent_channels : int
        Numbers of image channels C and latent channels L.
    total_stride_zyx : three int
        Factor by which the network reduces its maps, along (z, y, x). Sides of the input must be multiples of it.
        Windows that start at multiples of it pool the same voxels together as the whole volume does.
    receptive_halo_zyx : three int
        Distance in voxels along (z, y, x) of the farthest input voxel that an output voxel depends on. A window with
        this much around its core gives the same values in the core as the whole volume.
    """

    in_channels: int
    latent_channels: int
    total_stride_zyx: Triple
    receptive_halo_zyx: Triple

    def forward(self, x_BCZYX: Tensor) -> Tensor:
        """Encode a batch.

        Parameters
        ----------
        x_BCZYX : (B, C, Z, Y, X) float
            Normalised intensities of the images.

        Returns
        -------
        (B, L, Z, Y, X) float32, of any sign and scale.

        Raises
        ------
        ConfigError
            If the channels or the shape do not fit.
        """
        if x_BCZYX.ndim != 5 or x_BCZYX.shape[1] != self.in_channels:
            raise ConfigError(
                f"the network got an array of shape {tuple(x_BCZYX.shape)}; expected (batch, "
                f"{self.in_channels} channel(s), z, y, x)"
            )
        z, y, x = x_BCZYX.shape[2:]
        self.require_shape((z, y, x))
        # Float32 under autocast, too: critics and windows add up many of these values.
        return self._encode(x_BCZYX.contiguous(memory_format=torch.channels_last_3d)).float()

    def _encode(self, x_BCZYX: Tensor) -> Tensor:
        raise NotImplementedError

    def require_shape(self, shape_zyx: Triple) -> None:
        """Refuse an input shape (z, y, x) that the network cannot halve as often as it needs to.

        Raises
        ------
        ConfigError
            If a side is no positive multiple of `total_stride_zyx`.
        """
        stride = self.total_stride_zyx
        if any(side < 1 or side % step for side, step in zip(shape_zyx, stride, strict=True)):
            raise ConfigError(
                f"{shape_zyx} voxels (z, y, x) do not fit the network, which reduces them {stride}-fold; choose "
                f"sides that are multiples of {stride}"
            )

    def require_group(self, group: Group) -> None:
        """Refuse a group that exchanges axes which this network pools or filters differently.

        Raises
        ------
        ConfigError
            If the reduction or the reach differs between such axes. No training can then make the network follow the
            group.
        """
        group.require_invariant(self.total_stride_zyx, "the network's reduction")
        group.require_invariant(self.receptive_halo_zyx, "the network's reach")


class Decoder(nn.Module):
    """One step up: narrow or upsample the coarse map, join the skip, and apply a block.

    Parameters
    ----------
    up : Module
        Layers that prepare the coarser level's map.
    block : Module
        Layers that take the skip and the prepared map and join them. They also upsample the prepared map if `up` has
        not done so.
    """

    def __init__(self, up: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.up = up
        self.block = block

    def forward(self, coarse: Parts, skip: Parts) -> Parts:
        """Join maps (B, ., Z/f, Y/f, X/f) and (B, ., Z, Y, X) to (B, ., Z, Y, X)."""
        result: Parts = self.block(*skip, self.up(*coarse))
        return result


class Hourglass(Network):
    """A U-shaped encoder made of given parts; stride and halo are worked out from them.

    Parameters
    ----------
    in_channels, latent_channels : int
        Numbers of image channels C and latent channels L.
    encoders : sequence of Module
        Blocks on the way down, one for each level, finest first.
    downs, decoders : sequences of Module
        Parts between each two levels, finest first. `downs` reduce a map by `pooling`, and the decoders enlarge it
        again.
    head : Module
        Pointwise layer from the last map to L channels.
    pooling : sequence of triples
        Pooling factors (z, y, x) between the levels.
    linear : bool
        Whether upsampling is linear (otherwise it takes the nearest voxel).
    checkpoint_levels : int
        How many of the finest levels recompute their activations in the backward pass. Most memory lies there.
    checkpoint_blocks : bool
        Whether these levels recompute whole blocks, and within them every `Stage`. False recomputes the stages alone,
        which repeats no convolution and suits dense blocks.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        latent_channels: int,
        encoders: Sequence[nn.Module],
        downs: Sequence[nn.Module],
        decoders: Sequence[Decoder],
        head: nn.Module,
        pooling: Sequence[Triple],
        linear: bool = True,
        checkpoint_levels: int = 0,
        checkpoint_blocks: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= checkpoint_levels <= len(encoders):
            raise ConfigError(
                f"checkpoint_levels is {checkpoint_levels}; the network has {len(encoders)} levels"
            )
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.checkpoint_levels = checkpoint_levels if checkpoint_blocks else 0
        self.encoders = nn.ModuleList(encoders)
        self.downs = nn.ModuleList(downs)
        self.decoders = nn.ModuleList(decoders)
        self.head = head
        self.total_stride_zyx = total_stride(pooling)
        z, y, x = (
            receptive_halo(
                [kernel_radius(encoder, axis) for encoder in encoders],
                [kernel_radius(decoder.block, axis) for decoder in decoders],
                [kernel_radius(decoder.up, axis) for decoder in decoders],
                [factors[axis] for factors in pooling],
                linear=linear,
            )
            for axis in range(3)
        )
        self.receptive_halo_zyx = (z, y, x)
        # The head works at full resolution, so that it forgets with the finest level.
        # The deepest level is not in the loop: its maps are the smallest, and recomputing them saves next to nothing.
        for level, blocks in enumerate(zip(encoders, downs, decoders, strict=False)):
            self._forget([*blocks, head] if level == 0 else blocks, level < checkpoint_levels)
        # torch's stub lacks this overload.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @staticmethod
    def _forget(blocks: Sequence[nn.Module], forget: bool) -> None:
        for block in blocks:
            for stage in block.modules():
                if isinstance(stage, Stage):
                    stage.recompute = forget

    def _encode(self, x_BCZYX: Tensor) -> Tensor:
        parts: Parts = (x_BCZYX,)
        skips: list[Parts] = []
        for level, (encoder, down) in enumerate(zip(self.encoders, self.downs, strict=False)):
            skips.append(self._run(level, encoder, *parts))
            parts = (down(*skips[-1]),)
        parts = self._run(len(skips), self.encoders[-1], *parts)
        # Each skip is taken off the list, so that nothing here holds its memory longer than needed.
        for level in reversed(range(len(skips))):
            parts = self._run(level, self.decoders[level], parts, skips.pop())
        result: Tensor = self.head(*parts)
        return result

    def _run(self, level: int, block: nn.Module, *inputs: Any) -> Parts:
        result: Parts = recomputed(block, *inputs) if level < self.checkpoint_levels else block(*inputs)
        return result


def conv_hourglass(
    *,
    in_channels: int,
    latent_channels: int,
    widths: Sequence[int],
    kernel_zyx: Triple,
    pooling: Sequence[Triple],
    convs_per_level: int | Sequence[int],
    residual: bool,
    checkpoint_levels: int,
    first: ConvMaker,
    conv: ConvMaker,
    norm: NormMaker,
    head: nn.Module,
    copies: int = 1,
) -> Hourglass:
    """Assemble the U-Net of `unet` and of `gunet`, which differ in their convolutions only.

    The coarse map is narrowed to the finer level's width *before* it is upsampled: it has an eighth of the voxels
    then.

    Parameters
    ----------
    widths : sequence of int
        Channels (of one copy) of each level, finest first.
    convs_per_level : int or sequence of int
        Number of convolutions in a block, finest first. The last number counts for all coarser levels.
    kernel_zyx, residual, conv, norm
        The same arguments that `ConvBlock` takes.
    first : callable
        Function that makes the convolution that reads the image.
    head, pooling, checkpoint_levels, in_channels, latent_channels
        The same arguments that `Hourglass` takes.
    copies : int
        Number of group elements that the maps hold, 1 without a group.

    Raises
    ------
    ConfigError
        If widths and pooling do not fit each other.
    """
    counts = _convs_of_levels(widths, pooling, convs_per_level)

    def block(channels: int, level: int, **more: Any) -> ConvBlock:
        return ConvBlock(
            channels, widths[level], kernel_zyx, counts[level],
            conv=conv, norm=norm, residual=residual, copies=copies, **more,
        )  # fmt: skip

    # Only the first convolution is made by `first`: it reads an image, all others read feature maps.
    encoders = [block(in_channels, 0, first=first)]
    encoders.extend(block(widths[level], level + 1) for level in range(len(pooling)))
    decoders = []
    for level, factors in enumerate(pooling):
        narrow = Stage(conv(widths[level + 1], widths[level], (1, 1, 1)), norm(widths[level]))
        grow = Resample(factors, "linear")
        decoders.append(Decoder(narrow, block(2 * widths[level], level, grow=grow)))
    return Hourglass(
        in_channels=in_channels,
        latent_channels=latent_channels,
        encoders=encoders,
        downs=[Resample(factors, "mean") for factors in pooling],
        decoders=decoders,
        head=head,
        pooling=pooling,
        checkpoint_levels=checkpoint_levels,
    )


def _convs_of_levels(
    widths: Sequence[int], pooling: Sequence[Triple], convs_per_level: int | Sequence[int]
) -> list[int]:
    """Return the number of convolutions of each level, once widths, pooling and numbers are found to fit."""
    if len(widths) < 2 or len(pooling) != len(widths) - 1 or min(widths) < 1:
        raise ConfigError(
            f"widths {tuple(widths)} need 2 levels or more, positive numbers and {len(widths) - 1} pooling steps "
            f"between them; got {len(pooling)}"
        )
    given = [convs_per_level] if isinstance(convs_per_level, int) else list(convs_per_level)
    if not 1 <= len(given) <= len(widths):
        raise ConfigError(f"convs_per_level {tuple(given)} does not match the {len(widths)} levels of widths")
    return given + [given[-1]] * (len(widths) - len(given))
