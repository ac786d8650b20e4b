"""Draw aligned patches of several modalities: which ones, from where in the volumes, and how they are varied.

Everything random about a sample is one `Draw`. It depends only on the seed, the step and the sample's number in the
step. So any number of ranks sees the same batch, and a resumed run needs to know nothing but its step. A draw holds
one affine map from patch to volume for all modalities. A turned and scaled patch is therefore interpolated once, from
the box of voxels under it, and has no empty corners inside the volume. Volumes on grids of their own are looked up
there (`views`).

Reading is separate from resampling: reader processes fetch boxes, and the device turns and varies them.

Axes: n samples, c channels, z y x space. Patch offsets and volume positions are (z, y, x) in voxels of the specimen's
grid, which is the chosen pyramid level of the first modality.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from comir_hpc.config.train import SamplingSettings
from comir_hpc.learning.augmentation import IntensityChange, Scale, interpolate, vary
from comir_hpc.learning.specimens import Specimen, patch_centres, patch_places
from comir_hpc.space.grid import Box, FloatArray, Triple
from comir_hpc.space.groups import Group
from comir_hpc.space.rotations import random_rotation, rotation_by

TRAINING, REFERENCE = 0, 1
"""Numbers of two streams of random numbers, so that training never sees the samples of the other stream."""

# Strengths of the augmentations when `sampling.intensity` is 1; they are proportional to it.
_GAMMA, _CONTRAST, _BRIGHTNESS, _BIAS, _NOISE = 1.5, 1.0, 1.0, 0.7, 0.5


@dataclass(frozen=True, eq=False)
class Draw:
    """Everything random about one sample. No voxel is read to make it.

    Attributes
    ----------
    pair : int
        Number of the training pair, hence of its specimen.
    centre_zyx : (3,) float64
        Position of the patch's centre in the volume, in voxels.
    matrix : (3, 3) float64
        Linear map from an offset from the patch's centre to an offset in the volume, both in voxels (z, y, x). It
        holds rotation, scale and mirror, which are meant in physical space.
    elements : (M,) int64
        Number of the group element that each modality's input is turned by. They are drawn independently.
    changes : tuple of M IntensityChange
        How the intensities of each modality are varied.
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
        Normalised intensities, of the same region of the specimen in every modality.
    valid : bool tensor (n, 1, z, y, x)
        True where a voxel lies inside the volumes of all modalities.
    above : tuple of M bool tensors (n, 1, z, y, x)
        True where any channel is above the modality's foreground threshold, before intensities are varied.
    elements : (M, n) int64
        Numbers of the group elements by which each modality's samples are to be turned.
    """

    images: tuple[Tensor, ...]
    valid: Tensor
    above: tuple[Tensor, ...]
    elements: NDArray[np.int64]


class PatchSampler:
    """Draw samples, read the boxes under them, and resample these on a device.

    Parameters
    ----------
    specimens : sequence of Specimen
        The specimen of each training pair.
    settings : SamplingSettings
        Size of the patches, and how they are chosen and varied.
    group : Group
        Rotations whose elements are drawn independently for every sample and modality.
    seed : int
        Seed of all random numbers.
    augment : bool
        Whether patches are varied. False leaves out rotation, scale, mirror, intensity changes and group elements, to
        measure on clean patches.

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
        self._places = [patch_places(specimen, settings) for specimen in specimens]
        self._scales: dict[tuple[int, int, torch.device], Scale] = {}

    @property
    def cached(self) -> bool:
        """Whether the volumes are held in memory."""
        return self.specimens[0].cached

    def clean(self) -> PatchSampler:
        """Return a sampler of the same specimens whose patches are not varied and lie on the voxel grid."""
        return PatchSampler(self.specimens, self.settings, self.group, self.seed, augment=False)

    # ------------------------------------------------------------------ drawing

    def draw(self, step: int, index: int, *, stream: int = TRAINING) -> Draw:
        """Draw sample `index` of optimiser step `step`; it is the same on every rank and in every process."""
        # Philox is counter-based: the seed decides on all numbers, and no state has to be kept or saved.
        entropy = np.random.SeedSequence([self.seed % 2**64, stream, step, index])
        rng = np.random.Generator(np.random.Philox(entropy))
        pair = int(rng.integers(len(self.specimens)))
        specimen, places = self.specimens[pair], self._places[pair]
        share, shape = specimen.share, np.asarray(specimen.grid.shape_zyx)
        place = np.unravel_index(int(places[rng.integers(len(places))]), share.values.shape)
        centre = share.first_zyx + (np.asarray(place) + rng.uniform(-0.5, 0.5, 3)) * share.step_zyx
        centre = np.clip(centre, *patch_centres(self.settings, shape))
        matrix, on_grid = self._draw_matrix(rng, np.asarray(specimen.grid.spacing_mm))
        half = (np.asarray(self.settings.patch) - 1) / 2
        # Such a patch lies on voxel centres, where nothing is interpolated: the networks also see sharp images.
        snapped = on_grid | (np.asarray(self.settings.patch) == 1)
        centre = np.where(snapped, np.rint(centre - half) + half, centre)
        elements = rng.integers(len(self.group), size=len(specimen.volumes))
        changes = tuple(self._draw_change(rng) for _ in specimen.volumes)
        return Draw(pair, centre, matrix, elements * self.augment, changes)

    def _draw_matrix(self, rng: np.random.Generator, spacing_zyx: FloatArray) -> tuple[FloatArray, bool]:
        """Draw rotation, scale and mirror as a map of voxel offsets, and whether it keeps to the voxel grid."""
        settings = self.settings
        planar = settings.patch[0] == 1
        # Random numbers are drawn also where they are not used, so that switching off one variation leaves the others.
        rotation = rotation_by("z", rng.uniform(0, 360)) if planar else random_rotation(rng)
        physical = rotation * math.exp(rng.uniform(-1, 1) * math.log1p(settings.scale))
        on_grid = rng.random() >= settings.rotate or not self.augment
        if on_grid:
            physical = np.eye(3)
        if rng.random() < 0.5 and settings.mirror and self.augment:
            physical = physical * np.array([1.0, 1.0, -1.0])
        # Offsets are in voxels, but rotations are meant in space: convert to millimetres, turn, and convert back.
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

    def moved(self, draw: Draw, axis: int, shift: int) -> Draw:
        """Return a draw that lies `shift` voxels along an axis from the given one, for all modalities.

        The patch moves towards the volume's middle, so that it does not lose specimen.
        """
        offset = np.zeros(3)
        shape = np.asarray(self.specimens[draw.pair].grid.shape_zyx)
        offset[axis] = shift
        offset *= np.where(draw.centre_zyx > shape / 2, -1, 1)
        return replace(draw, centre_zyx=draw.centre_zyx + offset)

    def ignore(self, draws: Sequence[Draw]) -> NDArray[np.bool_]:
        """Find which samples are too near each other in one specimen to be negatives, bool (n, n), diagonal True.

        Distances are measured in sides of a patch along each axis.
        """
        centres = np.stack([d.centre_zyx for d in draws]) / np.asarray(self.settings.patch)
        pairs = np.asarray([d.pair for d in draws])
        distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        near = (distance < self.settings.ignore_radius) | np.eye(len(draws), dtype=bool)
        return np.asarray(near & (pairs[:, None] == pairs[None]), dtype=np.bool_)

    def inside(self, draw: Draw) -> bool:
        """Say whether every voxel of the patch lies inside the volumes of all modalities."""
        corners = self._corners(draw)
        return all(bool(view.inside(corners).all()) for view in self.specimens[draw.pair].views)

    # ------------------------------------------------------------------ reading

    def box(self, draw: Draw, modality: int = 0) -> Box:
        """Find the box of a modality's grid that interpolation at the patch's voxels needs; it is never empty."""
        return self.specimens[draw.pair].views[modality].box(self._corners(draw))

    def _corners(self, draw: Draw) -> FloatArray:
        half = (np.asarray(self.settings.patch) - 1) / 2
        signs = np.stack(np.meshgrid(*([(-1, 1)] * 3), indexing="ij"), axis=-1).reshape(-1, 3)
        corners: FloatArray = (signs * half) @ draw.matrix.T + draw.centre_zyx
        return corners

    def read(self, draw: Draw) -> list[Tensor]:
        """Read the source voxels of a draw from every modality, (c, z, y, x) each, in the volumes' own dtypes."""
        specimen = self.specimens[draw.pair]
        values = specimen.read([self.box(draw, modality) for modality in range(len(specimen.views))])
        # torch knows only the machine's own byte order.
        return [
            torch.from_numpy(np.ascontiguousarray(v.astype(v.dtype.newbyteorder("="), copy=False)))
            for v in values
        ]

    # ------------------------------------------------------------------ resampling

    def resample(
        self, draws: Sequence[Draw], sources: Sequence[Sequence[Tensor]], device: torch.device
    ) -> PatchBatch:
        """Make the patches of several draws from the boxes read for them, normalised and varied, on a device."""
        offsets = _offsets(self.settings.patch, device)
        first = self._positions(draws, 0, offsets)
        everywhere, images, above = first[1], [], []
        for modality in range(len(draws[0].changes)):
            shared = all(self.specimens[draw.pair].views[modality].shared for draw in draws)
            where, valid = first if shared else self._positions(draws, modality, offsets)
            everywhere = everywhere if shared else everywhere & valid
            patches, masks = [], []
            for number, draw in enumerate(draws):
                scale = self._scale(draw.pair, modality, device)
                patch = interpolate(sources[number][modality].to(device), where[number], scale)
                # Beyond the volume there is air, not the border voxel that interpolation holds there.
                patch = torch.where(valid[number], patch, scale.air)
                masks.append((patch > scale.threshold).any(dim=0, keepdim=True))
                patches.append(vary(patch, offsets, draw.changes[modality], scale))
            images.append(torch.stack(patches))
            above.append(torch.stack(masks))
        elements = np.stack([draw.elements for draw in draws], axis=1)
        return PatchBatch(tuple(images), everywhere, tuple(above), elements)

    def _positions(self, draws: Sequence[Draw], modality: int, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Find where to sample a modality's boxes, (n, z, y, x, 3), and what lies in its volume, (n, 1, z, y, x)."""
        tables = torch.from_numpy(np.stack([self._table(d, modality) for d in draws])).to(offsets.device)
        points = (offsets @ tables[:, None, None, :3]) + tables[:, 3, None, None, None]
        low, high = tables[:, 4, None, None, None], tables[:, 5, None, None, None]
        valid = ((points >= low) & (points <= high)).all(dim=-1).unsqueeze(1)
        # grid_sample wants positions as (x, y, z), where -1 and 1 are the outer edges of the box's end voxels.
        return ((2 * points + 1) / tables[:, 6, None, None, None] - 1).flip(-1), valid

    def _table(self, draw: Draw, modality: int) -> NDArray[np.float32]:
        """Collect the numbers of a draw that the device needs for a modality, (7, 3) float32.

        The rows are the matrix (transposed, three rows), the centre, the lower and upper edge of the volume, and the
        shape of the box. Positions are relative to the box, so that float32 is precise enough in a volume of any size.
        """
        view, box = self.specimens[draw.pair].views[modality], self.box(draw, modality)
        matrix = draw.matrix if view.linear is None else view.linear @ draw.matrix
        low = -0.5 - np.asarray(box.start)
        high = low + np.asarray(view.grid.shape_zyx)
        rows = [*matrix.T, view.places(draw.centre_zyx) - np.asarray(box.start), low, high, box.shape]
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


def _offsets(patch_zyx: Triple, device: torch.device) -> Tensor:
    """List the voxels' offsets from the patch's centre, (z, y, x, 3) float32, in voxels."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in patch_zyx]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def specimen_mask(above: Tensor) -> Tensor:
    """Mark where most of the 5 x 5 x 5 neighbours are above the threshold, bool like `above` (n, 1, z, y, x).

    Single voxels of noise in the air are above the threshold, and dark structure leaves holes in the specimen. Both
    disappear. `register` makes its masks in the same way.
    """
    share = above.float()
    for axis, length in enumerate(above.shape[2:]):
        # torch cannot average over more voxels than there are. So the reach is smaller in thin patches, and one voxel
        # in a single slice; it stays odd, to be centred.
        reach = min(5, length - 1 + length % 2)
        size = [reach if axis == other else 1 for other in range(3)]
        share = F.avg_pool3d(share, size, stride=1, padding=[n // 2 for n in size], count_include_pad=False)
    return share > 0.5


# ---------------------------------------------------------------------- feeding
