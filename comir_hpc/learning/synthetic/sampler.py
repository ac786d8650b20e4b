"""Sample made-up pairs of patches, step by step, as `PatchSampler` samples real ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comir_hpc.config.train import SamplingSettings, SyntheticSettings
from comir_hpc.learning.patches import TRAINING, PatchBatch
from comir_hpc.learning.synthetic.anatomies import draw_anatomy
from comir_hpc.learning.synthetic.contrasts import brightness, curved, normalised, spoiled
from comir_hpc.learning.synthetic.fields import Floats, patch_points, turned
from comir_hpc.learning.synthetic.textures import load_textures
from comir_hpc.space.groups import Group

# Sizes of a voxel for made-up anatomies, whose kinds have structures of many sizes of their own.
_MADE_SCALE = (0.6, 1.6)


@dataclass(frozen=True, eq=False)
class MadeDraw:
    """Everything random about one made-up pair; nothing is computed to make it.

    Attributes
    ----------
    seed : tuple of int
        Entropy of the pair's own random numbers.
    elements : (M,) int64
        Number of the group element that each view's input is turned by.
    shift_zyx : three int
        Voxels by which the second view is moved against the first.
    """

    seed: tuple[int, ...]
    elements: NDArray[np.int64]
    shift_zyx: tuple[int, int, int] = (0, 0, 0)


class MadeSampler:
    """Draw made-up pairs, and compute them where reader processes read boxes of real ones.

    Parameters
    ----------
    synthetic : SyntheticSettings
        What the pairs are made of.
    sampling : SamplingSettings
        Size of the patches.
    group : Group
        Rotations whose elements are drawn independently for every pair and view.
    views : int
        Number of views of each anatomy, one for each modality of the training.
    seed : int
        Seed of all random numbers.
    augment : bool
        Whether group elements are drawn. Without them a measurement sees the pairs as they are.
    """

    def __init__(
        self,
        synthetic: SyntheticSettings,
        sampling: SamplingSettings,
        group: Group,
        views: int,
        seed: int,
        *,
        augment: bool = True,
    ) -> None:
        self.synthetic, self.settings, self.group = synthetic, sampling, group
        self.views, self.seed, self.augment = views, seed, augment

    cached = False  # making a pair takes longer than reading one, so other processes may do it ahead

    def clean(self) -> MadeSampler:
        """Return the sampler of the same pairs without group elements."""
        return MadeSampler(self.synthetic, self.settings, self.group, self.views, self.seed, augment=False)

    def draw(self, step: int, index: int, *, stream: int = TRAINING) -> MadeDraw:
        """Draw sample `index` of optimiser step `step`; it is the same on every rank and in every process."""
        seed = (self.seed % 2**64, stream, step, index)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        elements = rng.integers(len(self.group), size=self.views)
        return MadeDraw(seed, elements * self.augment)

    def moved(self, draw: MadeDraw, axis: int, shift: int) -> MadeDraw:
        """Return the draw with its second view moved by some voxels along an axis."""
        z, y, x = (shift if axis == other else 0 for other in range(3))
        return dataclasses.replace(draw, shift_zyx=(z, y, x))

    def inside(self, draw: MadeDraw) -> bool:
        """Say that every voxel of the patch is known."""
        del draw
        return True

    def ignore(self, draws: Sequence[MadeDraw]) -> NDArray[np.bool_]:
        """Find which samples are no negatives of each other, bool (n, n): each only of itself."""
        return np.eye(len(draws), dtype=np.bool_)

    def read(self, draw: MadeDraw) -> list[Tensor]:
        """Make the views of a draw, (1, z, y, x) float32 each, and its air (1, z, y, x) bool at the end."""
        # A stream of its own: the group elements were drawn from the seed as it is.
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((*draw.seed, 1))))
        make = self._real if rng.random() < self.synthetic.real else self._made
        views, air = make(rng)
        if any(draw.shift_zyx):
            # Nothing lies beyond a patch that was made up, so what leaves it on one side comes back on the other.
            views[1] = np.roll(views[1], draw.shift_zyx, axis=(0, 1, 2))
        arrays = [*(view.astype(np.float32) for view in views), air]
        return [torch.from_numpy(np.ascontiguousarray(one))[None] for one in arrays]

    def _made(self, rng: np.random.Generator) -> tuple[list[Floats], NDArray[np.bool_]]:
        """Show a random anatomy in random contrasts."""
        points = patch_points(self.settings.patch)
        anatomy = draw_anatomy(rng, self.settings.patch, _scale(rng, _MADE_SCALE))
        images = [brightness(rng, anatomy, points) for _ in range(self.views)]
        return [normalised(rng, spoiled(rng, one, points)) for one in images], anatomy.air

    def _real(self, rng: np.random.Generator) -> tuple[list[Floats], NDArray[np.bool_]]:
        """Show a part of a real specimen through random curves."""
        textures = load_textures(self.synthetic.volumes)
        texture = textures[int(rng.integers(len(textures)))]
        points = patch_points(self.settings.patch)
        scale = _scale(rng, self.synthetic.scale)
        where = turned(rng, points, scale, bend=rng.uniform(0, 1.5))
        values = texture.sample(where, texture.centre(rng, scale), scale)
        chosen = rng.integers(texture.count, size=self.views)
        images = [curved(rng, values[one]) for one in chosen]
        return [normalised(rng, spoiled(rng, one, points)) for one in images], values.max(axis=0) < 0.02

    def resample(
        self, draws: Sequence[MadeDraw], sources: Sequence[Sequence[Tensor]], device: torch.device
    ) -> PatchBatch:
        """Put what `read` made together, on a device."""
        images = tuple(torch.stack([one[view] for one in sources]).to(device) for view in range(self.views))
        specimen = ~torch.stack([one[-1] for one in sources]).to(device)
        elements = np.stack([draw.elements for draw in draws], axis=1)
        return PatchBatch(images, torch.ones_like(specimen), (specimen,) * self.views, elements)

    def batch(
        self, step: int, indices: Iterable[int], device: torch.device, *, stream: int = TRAINING
    ) -> PatchBatch:
        """Draw and make samples of one step in this process."""
        draws = [self.draw(step, index, stream=stream) for index in indices]
        return self.resample(draws, [self.read(draw) for draw in draws], device)


def _scale(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    """Draw the size of a voxel between two bounds, with equal chances for equal ratios."""
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))
