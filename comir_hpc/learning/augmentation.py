"""Vary the intensities of a patch: normalise, sample between voxels, change contrast, bias and noise.

Axes: c channels, z y x space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from comir_hpc.volumes.volume import Intensity


@dataclass(frozen=True)
class IntensityChange:
    """How the intensities of one patch of one modality are varied.

    It is drawn with the sample, from its seed and number alone. So a patch that is made again is changed in the same
    way.

    Attributes
    ----------
    gamma : float
        Exponent of the brightness, which is scaled to the clipped range before.
    gain : float
        Factor of the brightness.
    shift : float
        Constant that is added, in standard deviations of the volume's foreground.
    noise : float
        Standard deviation of white noise that is added, in standard deviations of the volume's foreground.
    bias_zyx : (3,)
        Logarithm of the gain at one edge of the patch against its centre, along each axis.
    noise_seed : int
        Seed of the noise.
    """

    gamma: float
    gain: float
    shift: float
    noise: float
    bias_zyx: tuple[float, float, float]
    noise_seed: int

    @classmethod
    def plain(cls, noise_seed: int) -> IntensityChange:
        """Make a change that leaves the intensities as they are."""
        return cls(1.0, 1.0, 0.0, 0.0, (0.0, 0.0, 0.0), noise_seed)


@dataclass(frozen=True)
class Scale:
    """Numbers that normalise every channel, as tensors (c, 1, 1, 1) on a device.

    `low`, `high`, `mean` and `std` are in the volume's own unit. `air`, `span` and `threshold` are in normalised units:
    the value of air, the length of the clipped range, and where the foreground begins.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor
    air: Tensor
    span: Tensor
    threshold: Tensor

    @classmethod
    def from_intensities(cls, intensities: Sequence[Intensity], device: torch.device) -> Scale:
        """Put the numbers of every channel on a device, as (c, 1, 1, 1) float32."""
        columns = [(i.low, i.high, i.mean, i.std, i.foreground_above) for i in intensities]
        low, high, mean, std, above = (
            torch.tensor(row, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
            for row in zip(*columns, strict=True)
        )
        # A channel may be constant in one volume: its span must not divide by zero.
        span = ((high - low) / std).clamp_min(1e-6)
        return cls(low, high, mean, std, air=(low - mean) / std, span=span, threshold=(above - mean) / std)


def interpolate(values: Tensor, where: Tensor, scale: Scale) -> Tensor:
    """Sample normalised voxels (c, Z, Y, X) at `where` (z, y, x, 3) trilinearly; beyond the edge the last voxel counts.

    Positions are those of torch's grid_sample: (x, y, z), -1 and 1 at the outer edges.
    """
    source = (values.float().clamp(scale.low, scale.high) - scale.mean) / scale.std
    return F.grid_sample(
        source[None], where[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]


def vary(image: Tensor, offsets: Tensor, change: IntensityChange, scale: Scale) -> Tensor:
    """Vary the intensities of a normalised patch (c, z, y, x): gamma, smooth bias and gain, then shift and noise.

    Gamma, bias and gain act on the brightness above air, so that air stays as dark as it is.
    """
    if change == IntensityChange.plain(change.noise_seed):
        return image  # to the bit: the arithmetic below would round, and clip what is darker than air
    slopes = (b / max(1.0, (n - 1) / 2) for b, n in zip(change.bias_zyx, image.shape[1:], strict=True))
    # Clamped, since a patch's corners add up the gains of three axes.
    field = sum((offsets[..., axis] * slope for axis, slope in enumerate(slopes)), torch.zeros(()))
    gain = field.clamp(-1, 1).exp() * change.gain
    bright = ((image - scale.air) / scale.span).clamp(0, 1).pow(change.gamma) * scale.span * gain
    # A generator of its own, so that the noise does not depend on what was drawn before.
    generator = torch.Generator(image.device).manual_seed(change.noise_seed)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return bright + (scale.air + change.shift) + change.noise * noise
