"""Aligned patches of several modalities: which ones, from where in the volumes, and how they are varied.

Everything random about a sample is one `Draw`, and that depends on the seed, the step and the sample's number in
the step only: any number of ranks sees the same batch, and a resumed run needs to know nothing but its step. A
draw names one affine map from patch to volume for all modalities, so that a turned and scaled patch is
interpolated once, from the box of voxels under it, and has no empty corners inside the volume.

Reading is separate from resampling: reader processes fetch boxes, the device turns and varies them.

Axes: n samples, c channels, z y x space. Patch offsets and volume positions are (z, y, x) in voxels of the chosen
pyramid level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from comir_hpc.augmentation import IntensityChange, Scale, interpolate, vary
from comir_hpc.config import SamplingSettings
from comir_hpc.errors import ConfigError
from comir_hpc.geometry import Box, FloatArray, Triple
from comir_hpc.groups import Group
from comir_hpc.rotations import random_rotation, rotation_by
from comir_hpc.specimens import Specimen

TRAINING, REFERENCE = 0, 1
"""Streams of random numbers: the samples of one are never those of the other."""

# The strengths of the augmentations in proportion to `sampling.intensity`.
_GAMMA, _CONTRAST, _BRIGHTNESS, _BIAS, _NOISE = 1.5, 1.0, 1.0, 0.7, 0.5


@dataclass(frozen=True, eq=False)
class Draw:
    """Everything random about one sample; nothing is read for it.

    Attributes
    ----------
    pair : int
        Which specimen.
    centre_zyx : (3,) float64
        Position in the volume of the patch's centre.
    matrix : (3, 3) float64
        Maps an offset from the patch's centre to an offset in the volume, in voxels: rotation, scale and mirror in
        physical space.
    elements : (M,) int64
        Group element that each modality's input is turned by, independently.
    changes : tuple of M IntensityChange
        Intensity changes of each modality.
    """

    pair: int
    centre_zyx: FloatArray
    matrix: FloatArray
    elements: NDArray[np.int64]
    changes: tuple[IntensityChange, ...]


@dataclass(frozen=True, eq=False)
class PatchBatch:
    """Patches on the device, before any group element is applied.

    Attributes
    ----------
    images : tuple of M float32 tensors (n, c, z, y, x)
        Normalised intensities, the same specimen region in every modality.
    valid : bool tensor (n, 1, z, y, x)
        True inside the volume.
    above : tuple of M bool tensors (n, 1, z, y, x)
        True where a channel exceeds the modality's foreground threshold, before intensities are varied.
    elements : (M, n) int64
        Group elements to turn each modality's samples by.
    """

    images: tuple[Tensor, ...]
    valid: Tensor
    above: tuple[Tensor, ...]
    elements: NDArray[np.int64]


class PatchSampler:
    """Draws samples, reads the boxes under them and resamples these on a device.

    Parameters
    ----------
    specimens : sequence of Specimen
        One a training pair.
    settings : SamplingSettings
    group : Group
        Its elements are drawn independently for every sample and modality.
    seed : int
    augment : bool
        Off: no rotation, scale, mirror, intensity change or group element; for figures on clean patches.

    Raises
    ------
    ConfigError
        If no patch of a specimen meets the foreground quota.
    """

    def __init__(
        self,
        specimens: Sequence[Specimen],
        settings: SamplingSettings,
        group: Group,
        seed: int,
        *,
        augment: bool = True,
    ) -> None:
        self.specimens = tuple(specimens)
        self.settings = settings
        self.group = group
        self.seed = seed
        self.augment = augment
        self._places = [_places(specimen, settings) for specimen in specimens]
        self._scales: dict[tuple[int, int, torch.device], Scale] = {}

    # ------------------------------------------------------------------ drawing

    def draw(self, step: int, index: int, *, stream: int = TRAINING) -> Draw:
        """Sample `index` of optimiser step `step`; the same whenever and wherever it is asked for."""
        entropy = np.random.SeedSequence([self.seed % 2**64, stream, step, index])
        rng = np.random.Generator(np.random.Philox(entropy))
        pair = int(rng.integers(len(self.specimens)))
        specimen, places = self.specimens[pair], self._places[pair]
        share, shape = specimen.share, np.asarray(specimen.grid.shape_zyx)
        place = np.unravel_index(int(places[rng.integers(len(places))]), share.values.shape)
        centre = share.first_zyx + (np.asarray(place) + rng.uniform(-0.5, 0.5, 3)) * share.step_zyx
        centre = np.clip(centre, -0.5, shape - 0.5)
        matrix, on_grid = self._draw_matrix(rng, np.asarray(specimen.grid.spacing_mm))
        half = (np.asarray(self.settings.patch) - 1) / 2
        # On voxel centres nothing is interpolated: the networks also see the image as sharp as it is.
        snapped = on_grid | (np.asarray(self.settings.patch) == 1)
        centre = np.where(snapped, np.rint(centre - half) + half, centre)
        elements = rng.integers(len(self.group), size=len(specimen.volumes))
        changes = tuple(self._draw_change(rng) for _ in specimen.volumes)
        return Draw(pair, centre, matrix, elements * self.augment, changes)

    def _draw_matrix(self, rng: np.random.Generator, spacing_zyx: FloatArray) -> tuple[FloatArray, bool]:
        """Rotation, scale and mirror as a map of voxel offsets, and whether it keeps to the voxel grid."""
        settings = self.settings
        planar = settings.patch[0] == 1
        rotation = rotation_by("z", rng.uniform(0, 360)) if planar else random_rotation(rng)
        physical = rotation * math.exp(rng.uniform(-1, 1) * math.log1p(settings.scale))
        on_grid = rng.random() >= settings.rotate or not self.augment
        if on_grid:
            physical = np.eye(3)
        if rng.random() < 0.5 and settings.mirror and self.augment:
            physical = physical * np.array([1.0, 1.0, -1.0])
        # Offsets are voxels: to millimetres, turn, and back.
        return physical * spacing_zyx / spacing_zyx[:, None], on_grid

    def _draw_change(self, rng: np.random.Generator) -> IntensityChange:
        strength = self.settings.intensity * self.augment
        gamma, gain, shift, noise = rng.uniform((-1, -1, -1, 0), 1) * strength
        bias = rng.standard_normal(3) * strength * _BIAS
        z, y, x = np.clip(bias, -1, 1).tolist()
        return IntensityChange(
            gamma=math.exp(gamma * _GAMMA),
            gain=math.exp(gain * _CONTRAST),
            shift=shift * _BRIGHTNESS,
            noise=noise * _NOISE,
            bias_zyx=(z, y, x),
            noise_seed=int(rng.integers(2**63)),
        )

    def ignore(self, draws: Sequence[Draw]) -> NDArray[np.bool_]:
        """Which samples are too near each other in one specimen to be negatives, (n, n) with a true diagonal.

        Distances are measured in patch sides along each axis, hence in physical units.
        """
        centres = np.stack([d.centre_zyx for d in draws]) / np.asarray(self.settings.patch)
        pairs = np.asarray([d.pair for d in draws])
        distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        near = (distance < self.settings.ignore_radius) | np.eye(len(draws), dtype=bool)
        return np.asarray(near & (pairs[:, None] == pairs[None]), dtype=np.bool_)

    def inside(self, draw: Draw) -> bool:
        """Whether every voxel of the patch lies inside the volume."""
        corners = self._corners(draw)
        shape = np.asarray(self.specimens[draw.pair].grid.shape_zyx)
        return bool((corners >= -0.5).all() and (corners <= shape - 0.5).all())

    # ------------------------------------------------------------------ reading

    def box(self, draw: Draw) -> Box:
        """Voxels of the volume that interpolation at the patch's voxels needs; never empty."""
        corners = self._corners(draw)
        start = np.floor(corners.min(axis=0)).astype(int)
        stop = np.floor(corners.max(axis=0)).astype(int) + 2
        wanted = Box(_triple(start), _triple(stop))
        return wanted.intersect(self.specimens[draw.pair].grid.box)

    def _corners(self, draw: Draw) -> FloatArray:
        half = (np.asarray(self.settings.patch) - 1) / 2
        signs = np.stack(np.meshgrid(*([(-1, 1)] * 3), indexing="ij"), axis=-1).reshape(-1, 3)
        corners: FloatArray = (signs * half) @ draw.matrix.T + draw.centre_zyx
        return corners

    def read(self, draw: Draw) -> list[Tensor]:
        """Source voxels of a draw from every modality, (c, z, y, x) each, in the volumes' own dtypes."""
        values = self.specimens[draw.pair].read(self.box(draw))
        # Torch knows the machine's own byte order only.
        return [
            torch.from_numpy(np.ascontiguousarray(v.astype(v.dtype.newbyteorder("="), copy=False)))
            for v in values
        ]

    # ------------------------------------------------------------------ resampling

    def resample(
        self, draws: Sequence[Draw], sources: Sequence[Sequence[Tensor]], device: torch.device
    ) -> PatchBatch:
        """Patches of several draws from the boxes read for them, normalised and varied, on a device."""
        offsets = _offsets(self.settings.patch, device)
        tables = torch.from_numpy(np.stack([self._table(d) for d in draws])).to(device)
        points = (offsets @ tables[:, None, None, :3]) + tables[:, 3, None, None, None]
        low, high = tables[:, 4, None, None, None], tables[:, 5, None, None, None]
        valid = ((points >= low) & (points <= high)).all(dim=-1).unsqueeze(1)
        # grid_sample wants (x, y, z) with the outer edges of the box's end voxels at -1 and 1.
        where = ((2 * points + 1) / tables[:, 6, None, None, None] - 1).flip(-1)
        images, above = [], []
        for modality in range(len(draws[0].changes)):
            patches, masks = [], []
            for number, draw in enumerate(draws):
                scale = self._scale(draw.pair, modality, device)
                patch = interpolate(sources[number][modality].to(device), where[number], scale)
                patch = torch.where(valid[number], patch, scale.air)
                masks.append((patch > scale.threshold).any(dim=0, keepdim=True))
                patches.append(vary(patch, offsets, draw.changes[modality], scale))
            images.append(torch.stack(patches))
            above.append(torch.stack(masks))
        elements = np.stack([draw.elements for draw in draws], axis=1)
        return PatchBatch(tuple(images), valid, tuple(above), elements)

    def _table(self, draw: Draw) -> NDArray[np.float32]:
        """Matrix (transposed), centre, lower and upper edge of the volume and shape of the box, (7, 3).

        Positions are relative to the box, which keeps their precision in float32 in any volume.
        """
        box = self.box(draw)
        low = -0.5 - np.asarray(box.start)
        high = low + np.asarray(self.specimens[draw.pair].grid.shape_zyx)
        rows = [*draw.matrix.T, draw.centre_zyx - np.asarray(box.start), low, high, box.shape]
        return np.asarray(rows, dtype=np.float32)

    def _scale(self, pair: int, modality: int, device: torch.device) -> Scale:
        key = (pair, modality, device)
        if key not in self._scales:
            self._scales[key] = Scale.from_intensities(self.specimens[pair].intensities[modality], device)
        return self._scales[key]

    def batch(
        self, step: int, indices: Iterable[int], device: torch.device, *, stream: int = TRAINING
    ) -> PatchBatch:
        """Draw, read and resample samples of one step in this process."""
        draws = [self.draw(step, index, stream=stream) for index in indices]
        return self.resample(draws, [self.read(d) for d in draws], device)


def _places(specimen: Specimen, settings: SamplingSettings) -> NDArray[np.int64]:
    """Lattice points (flat numbers) whose patch meets the foreground quota."""
    places = np.flatnonzero(
        specimen.share.values >= max(settings.foreground, float(np.finfo(np.float32).tiny))
    )
    if not len(places):
        best = float(specimen.share.values.max())
        raise ConfigError(
            f"no patch of {settings.patch} voxels (z, y, x) in {specimen.volumes[0].path} holds "
            f"{settings.foreground:.0%} specimen: the fullest one holds {best:.1%}; lower sampling.foreground "
            "or use a smaller sampling.patch"
        )
    return places


def _triple(values: NDArray[Any]) -> Triple:
    z, y, x = (int(v) for v in values)
    return z, y, x


def _offsets(patch_zyx: Triple, device: torch.device) -> Tensor:
    """Voxel offsets from the patch's centre, (z, y, x, 3) float32."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in patch_zyx]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def specimen_mask(above: Tensor) -> Tensor:
    """Where most of the 5 x 5 x 5 neighbours are above the threshold, bool like `above` (n, 1, z, y, x).

    Noise in the air leaves single voxels above it, and dark structure leaves holes; `register` masks volumes alike.
    """
    share = above.float()
    for axis, length in enumerate(above.shape[2:]):
        # Torch averages over no more voxels than there are: fewer in thin patches, one in a single slice.
        reach = min(5, length - 1 + length % 2)
        size = [reach if axis == other else 1 for other in range(3)]
        share = F.avg_pool3d(share, size, stride=1, padding=[n // 2 for n in size], count_include_pad=False)
    return share > 0.5


# ---------------------------------------------------------------------- feeding
