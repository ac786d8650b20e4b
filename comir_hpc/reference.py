"""Figures of encoders on clean patches of their training volumes: watched while they learn, held against later.

`train` logs a few of them as it goes and writes all into model.json when it is done, where `register` looks up the
agreement that aligned volumes should come near; `evaluate` measures them for any checkpoint. Patches are whole, with
the padding that training sees at their borders. Axes: n patches, l latent channels, z y x space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comir_hpc.diagnostics import equivariance_errors
from comir_hpc.groups import Group
from comir_hpc.patches import REFERENCE, PatchSampler, specimen_mask
from comir_hpc.quality import agreement, effective_rank, foreground_agreement, retrieval

Encode = Callable[[int, Tensor], Tensor]
"""Modality number and images (n, c, z, y, x) to maps (n, l, z, y, x), in eval mode, without gradient."""

NUM_PATCHES = 24
"""Patches that the figures at the end of a training are taken from; they are encoded in one batch."""
_TURNED = 4  # patches on which equivariance is measured: each costs an encoding a group element
_SHIFTS = (1, 2, 4, 8)
_WATCHED = 4  # patches that are looked at during training
_ELEMENTS = 3  # rotations that are tried on them


def reference_figures(
    encode: Encode, sampler: PatchSampler, modalities: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Figures on clean patches of the training volumes, JSON-ready.

    Parameters
    ----------
    sampler : PatchSampler
        With `augment` off: patches on the voxel grid, drawn from a stream that training does not use.

    Returns
    -------
    dict
        ``agreement`` mean and ``agreement_p5`` over aligned patches of the first two modalities, and
        ``agreement_pooled`` over all their specimen voxels together, which is how `register` measures it;
        ``mismatched`` mean and ``mismatched_p95`` of patches of different places; ``retrieval``, share of patches that
        find their partner among all; ``shifted``: mean agreement when one side is so many voxels off; for each
        modality ``equivariance``, mean and largest error over the group, ``effective_rank`` and ``deviation``.
    """
    draws = [sampler.draw(0, index, stream=REFERENCE) for index in range(NUM_PATCHES)]
    batch = sampler.resample(draws, [sampler.read(d) for d in draws], device)
    maps = [encode(number, images) for number, images in enumerate(batch.images)]
    table = agreement(maps[0], maps[1], batch.valid)
    aligned = table.diagonal()
    near = torch.from_numpy(sampler.ignore(draws)).to(device)
    apart = table[~near]
    specimen = batch.valid & specimen_mask(batch.above[0]) & specimen_mask(batch.above[1])
    figures: dict[str, Any] = {
        "patches": NUM_PATCHES,
        "agreement": _number(aligned.mean()),
        "agreement_p5": _number(aligned.quantile(0.05)),
        "agreement_pooled": _number(foreground_agreement(maps[0], maps[1], specimen)),
        "mismatched": _number(apart.mean()) if len(apart) else None,
        "mismatched_p95": _number(apart.quantile(0.95)) if len(apart) else None,
        "retrieval": _number(retrieval(table, near)),
        "shifted": {str(s): _shifted_agreement(encode, sampler, maps[0], s, device) for s in _SHIFTS},
    }
    for key in ("equivariance", "effective_rank", "deviation"):
        figures[key] = {}
    for number, name in enumerate(modalities):
        errors = equivariance_errors(_of(encode, number), batch.images[number][:_TURNED], sampler.group)
        figures["equivariance"][name] = {
            "mean": _number(errors.mean()),
            "max": _number(errors.max()),
        }
        figures["effective_rank"][name] = _number(effective_rank(maps[number]))
        figures["deviation"][name] = _number(maps[number].std())
    return figures


def _shifted_agreement(
    encode: Encode, sampler: PatchSampler, maps: Tensor, shift: int, device: torch.device
) -> float | None:
    """Mean agreement when the second modality's patches are taken `shift` voxels off, along each axis in turn."""
    draws = [sampler.draw(0, index, stream=REFERENCE) for index in range(NUM_PATCHES)]
    patch = np.asarray(sampler.settings.patch)
    axes = np.flatnonzero(patch > 1)
    moved = []
    for index, draw in enumerate(draws):
        offset = np.zeros(3)
        offset[axes[index % len(axes)]] = shift
        shape = np.asarray(sampler.specimens[draw.pair].grid.shape_zyx)
        # Towards the volume's middle, so that the shifted patch holds as much specimen.
        offset *= np.where(draw.centre_zyx > shape / 2, -1, 1)
        moved.append(dataclasses.replace(draw, centre_zyx=draw.centre_zyx + offset))
    batch = sampler.resample(moved, [sampler.read(d) for d in moved], device)
    return _number(agreement(maps, encode(1, batch.images[1]), batch.valid).diagonal().mean())


class Watch:
    """The same few clean patches, looked at now and then during training: figures that can be compared over steps.

    Parameters
    ----------
    sampler : PatchSampler
        Of the training; what it does to patches is left out here.
    """

    def __init__(self, sampler: PatchSampler, device: torch.device) -> None:
        clean = PatchSampler(sampler.specimens, sampler.settings, sampler.group, sampler.seed, augment=False)
        batch = clean.batch(0, range(_WATCHED), device, stream=REFERENCE)
        self._images, self._valid = batch.images, batch.valid
        group = sampler.group
        others = group.matrices[1:]
        chosen = np.unique(np.linspace(0, len(others) - 1, min(_ELEMENTS, len(others))).round().astype(int))
        self._turns = Group(group.name, others[chosen])

    def figures(self, encode: Encode) -> dict[str, float]:
        """Figures of the encoders as they are now.

        Returns
        -------
        dict
            ``model_agreement``: mean correlation of aligned maps of the first two modalities;
            ``model_equivariance_error``: the largest of all modalities and of a few rotations of the group, absent if
            it has none; ``model_effective_rank``: the smallest of all modalities.
        """
        maps = [encode(number, images) for number, images in enumerate(self._images)]
        found = {
            "model_agreement": float(agreement(maps[0], maps[1], self._valid).diagonal().mean()),
            "model_effective_rank": min(effective_rank(one) for one in maps),
        }
        if len(self._turns):
            errors = [
                equivariance_errors(_of(encode, number), images, self._turns)
                for number, images in enumerate(self._images)
            ]
            found["model_equivariance_error"] = float(np.max(errors))
        return found


def _of(encode: Encode, number: int) -> Callable[[Tensor], Tensor]:
    """The encoder of one modality."""
    return lambda images: encode(number, images)


def _number(value: Tensor | np.floating[Any] | float) -> float | None:
    """Five significant digits: a fixed number of decimals would make 0 of an error of 1e-6."""
    number = float(value)
    return float(f"{number:.5g}") if np.isfinite(number) else None
