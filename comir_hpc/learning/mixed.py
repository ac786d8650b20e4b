"""Mix real and made-up samples in one step, so that a specialist does not forget what the general model knew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comir_hpc.config.train import SamplingSettings
from comir_hpc.learning.patches import TRAINING, Draw, PatchBatch, PatchSampler
from comir_hpc.learning.synthetic.sampler import MadeDraw, MadeSampler
from comir_hpc.space.groups import Group


class MixedSampler:
    """Give real samples and, as a share of every step, made-up ones.

    Parameters
    ----------
    real : PatchSampler
        Samples of the aligned pairs. All measurements are made on these.
    made : MadeSampler
        Made-up samples with as many views as there are modalities.
    share : float
        Share of the samples that are made up, from 0 to 1.
    """

    def __init__(self, real: PatchSampler, made: MadeSampler, share: float) -> None:
        self.real, self.made, self.share = real, made, share

    @property
    def settings(self) -> SamplingSettings:
        """Settings of the real samples."""
        return self.real.settings

    @property
    def group(self) -> Group:
        """Group of the real samples."""
        return self.real.group

    @property
    def cached(self) -> bool:
        """Whether the real samples are in memory, so that no process has to read ahead."""
        return self.real.cached

    def clean(self) -> PatchSampler:
        """Return the sampler of real, unvaried samples."""
        return self.real.clean()

    def draw(self, step: int, index: int, *, stream: int = TRAINING) -> Draw | MadeDraw:
        """Draw a sample. Which ones are made up depends on their numbers, the same share in every step."""
        # Evenly spread over the numbers, so that every rank has its part of both.
        made = int((index + 1) * self.share) > int(index * self.share)
        source: PatchSampler | MadeSampler = self.made if made else self.real
        return source.draw(step, index, stream=stream)

    def moved(self, draw: Draw, axis: int, shift: int) -> Draw:
        """Move the second modality of a real draw."""
        return self.real.moved(draw, axis, shift)

    def inside(self, draw: Draw | MadeDraw) -> bool:
        """Say whether every voxel of the patch is known."""
        return isinstance(draw, MadeDraw) or self.real.inside(draw)

    def ignore(self, draws: Sequence[Draw | MadeDraw]) -> NDArray[np.bool_]:
        """Find which samples are no negatives of each other: real ones that are near each other."""
        # Made-up samples have no place in any specimen, so they are near nobody but themselves.
        near = np.eye(len(draws), dtype=np.bool_)
        real = [n for n, draw in enumerate(draws) if isinstance(draw, Draw)]
        if real:
            found = self.real.ignore([draw for draw in draws if isinstance(draw, Draw)])
            near[np.ix_(real, real)] = found
        return near

    def read(self, draw: Draw | MadeDraw) -> list[Tensor]:
        """Read or make the voxels of a draw."""
        return self.made.read(draw) if isinstance(draw, MadeDraw) else self.real.read(draw)

    def resample(
        self,
        draws: Sequence[Draw | MadeDraw],
        sources: Sequence[Sequence[Tensor]],
        device: torch.device,
    ) -> PatchBatch:
        """Make the patches of both kinds, in the order of the draws."""
        made = [n for n, draw in enumerate(draws) if isinstance(draw, MadeDraw)]
        real = [n for n, draw in enumerate(draws) if isinstance(draw, Draw)]
        parts = []
        if real:
            real_draws = [draw for draw in draws if isinstance(draw, Draw)]
            parts.append(self.real.resample(real_draws, [sources[n] for n in real], device))
        if made:
            made_draws = [draw for draw in draws if isinstance(draw, MadeDraw)]
            parts.append(self.made.resample(made_draws, [sources[n] for n in made], device))
        # Where each sample stands among the real ones followed by the made-up ones.
        back = torch.from_numpy(np.argsort(real + made)).to(device)
        return PatchBatch(
            images=tuple(torch.cat(some)[back] for some in zip(*(p.images for p in parts), strict=True)),
            valid=torch.cat([p.valid for p in parts])[back],
            above=tuple(torch.cat(some)[back] for some in zip(*(p.above for p in parts), strict=True)),
            elements=np.concatenate([p.elements for p in parts], axis=1)[:, np.argsort(real + made)],
        )

    def batch(
        self, step: int, indices: Iterable[int], device: torch.device, *, stream: int = TRAINING
    ) -> PatchBatch:
        """Draw, read and resample samples of one step in this process."""
        draws = [self.draw(step, index, stream=stream) for index in indices]
        return self.resample(draws, [self.read(draw) for draw in draws], device)
