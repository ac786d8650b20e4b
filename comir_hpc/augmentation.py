"""Vary the intensities of a patch: normalise, sample between voxels, change contrast, bias and noise.

Axes: c channels, z y x space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from comir_hpc.volume import Intensity


@dataclass(frozen=True)
class IntensityChange:
    """How the intensities of one patch of one modality are varied; in units of the volume's standard deviation.

    Attributes
    ----------
    gamma, gain, shift, noise : float
        Exponent on the clipped range, factor, added constant, standard deviation of white noise.
    bias_zyx : (3,)
        Logarithmic gain at one edge of the patch against its centre, along each axis.
    noise_seed : int
        Of the noise.
    """

    gamma: float
    gain: float
    shift: float
    noise: float
    bias_zyx: tuple[float, float, float]
    noise_seed: int

    @classmethod
    def plain(cls, noise_seed: int) -> IntensityChange:
        """Leave the intensities as they are."""
        return cls(1.0, 1.0, 0.0, 0.0, (0.0, 0.0, 0.0), noise_seed)


@dataclass(frozen=True)
class Scale:
    """Normalisation of every channel on a device, (c, 1, 1, 1) each; the last three are in normalised units."""

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
    """Trilinear samples of normalised voxels (c, Z, Y, X) at `where` (z, y, x, 3), edge voxels held."""
    source = (values.float().clamp(scale.low, scale.high) - scale.mean) / scale.std
    return F.grid_sample(
        source[None], where[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]


def vary(image: Tensor, offsets: Tensor, change: IntensityChange, scale: Scale) -> Tensor:
    """Gamma on the clipped range, smooth bias and contrast about air, brightness, noise; (c, z, y, x)."""
    if change == IntensityChange.plain(change.noise_seed):
        return image
    slopes = (b / max(1.0, (n - 1) / 2) for b, n in zip(change.bias_zyx, image.shape[1:], strict=True))
    field = sum((offsets[..., axis] * slope for axis, slope in enumerate(slopes)), torch.zeros(()))
    gain = field.clamp(-1, 1).exp() * change.gain
    bright = ((image - scale.air) / scale.span).clamp(0, 1).pow(change.gamma) * scale.span * gain
    generator = torch.Generator(image.device).manual_seed(change.noise_seed)
    noise = torch.randn(image.shape, generator=generator, device=image.device)
    return bright + (scale.air + change.shift) + change.noise * noise
