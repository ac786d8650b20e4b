"""`Sampler`: what a training asks of whatever gives it patches, real or made up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comir_hpc.config.train import SamplingSettings
from comir_hpc.learning.patches import PatchBatch
from comir_hpc.space.groups import Group

Draw = Any
"""Everything random about one sample, without its voxels. Each sampler has a type of its own."""


class Sampler(Protocol):
    """Draw samples, read or make their voxels in any process, and put them together on a device.

    A draw depends only on the seed, the step and the sample's number. So any number of ranks sees the same batch, and a
    resumed run needs to know nothing but its step.
    """

    @property
    def settings(self) -> SamplingSettings:
        """Size of the patches, and how they are chosen and varied."""

    @property
    def group(self) -> Group:
        """Rotations whose elements are drawn for every sample and modality."""

    @property
    def cached(self) -> bool:
        """Whether samples are at hand at once, so that no other process need read ahead."""

    def clean(self) -> Sampler:
        """Return a sampler of the same places without any variation, to measure on."""

    def draw(self, step: int, index: int, *, stream: int = 0) -> Draw:
        """Draw sample `index` of optimiser step `step`, of one stream of random numbers."""

    def moved(self, draw: Draw, axis: int, shift: int) -> Draw:
        """Return a draw whose second modality lies `shift` voxels along an axis (0, 1, 2) from the given draw's."""

    def inside(self, draw: Draw) -> bool:
        """Say whether every voxel of the patch is known."""

    def ignore(self, draws: Sequence[Draw]) -> NDArray[np.bool_]:
        """Find which samples are no negatives of each other, bool (n, n), diagonal True."""

    def read(self, draw: Draw) -> list[Tensor]:
        """Read or make the voxels of a draw, on the CPU."""

    def resample(
        self, draws: Sequence[Draw], sources: Sequence[Sequence[Tensor]], device: torch.device
    ) -> PatchBatch:
        """Make patches of several draws, from what `read` gave for them, on a device."""

    def batch(
        self, step: int, indices: Iterable[int], device: torch.device, *, stream: int = 0
    ) -> PatchBatch:
        """Draw, read and resample samples of one step in this process."""
