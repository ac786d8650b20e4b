"""Measure encoders on clean patches of their training volumes.

`train` logs a few of these numbers while it runs, and writes all of them into model.json when it is done. There
`register` looks up the agreement that aligned volumes should come near. `evaluate` measures them for any checkpoint.
Patches are used whole, with the padding that training sees at their borders.

Axes: n patches, l latent channels, z y x space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from comir_hpc.learning.patches import REFERENCE, specimen_mask
from comir_hpc.representations.equivariance import equivariance_errors
from comir_hpc.representations.quality import agreement, effective_rank, foreground_agreement, retrieval
from comir_hpc.space.groups import Group

if TYPE_CHECKING:
    from comir_hpc.learning.sampler import Sampler

Encode = Callable[[int, Tensor], Tensor]
"""From modality number and images (n, c, z, y, x) to maps (n, l, z, y, x), in evaluation mode, without gradient."""

NUM_PATCHES = 24
"""Number of patches that the metrics at the end of a training are taken from. They are encoded in one batch."""
_TURNED = 4  # patches on which equivariance is measured; each costs one encoding for every group element
_SHIFTS = (1, 2, 4, 8)  # voxels
_WATCHED = 4  # patches that are measured again and again during training
_ELEMENTS = 3  # rotations that are tried on them


def reference_metrics(
    encode: Encode, sampler: Sampler, modalities: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Measure agreement, retrieval and equivariance on clean patches of the training volumes.

    Parameters
    ----------
    encode : callable
        The encoders, as `Encode` describes.
    sampler : Sampler
        Sampler without variations (`Sampler.clean`). Its patches are drawn from a stream of random numbers
        that training does not use.
    modalities : sequence of str
        Names of the modalities, in the order of their numbers.
    device : torch device
        Where the encoders are.

    Returns
    -------
    dict
        Numbers ready for JSON. For aligned patches of the first two modalities: ``agreement`` is the mean correlation,
        ``agreement_p5`` its 5th percentile, and ``agreement_pooled`` the correlation over all their specimen voxels
        together, which is how `register` measures it. For patches of different places: ``mismatched`` is the mean and
        ``mismatched_p95`` the 95th percentile. ``retrieval`` is the share of patches that find their partner among all.
        ``shifted`` is the mean agreement when one side is moved by that many voxels. For each modality:
        ``equivariance`` is the mean and the largest error over the group, then ``effective_rank`` and ``deviation``.
    """
    draws = [sampler.draw(0, index, stream=REFERENCE) for index in range(NUM_PATCHES)]
    batch = sampler.resample(draws, [sampler.read(d) for d in draws], device)
    maps = [encode(number, images) for number, images in enumerate(batch.images)]
    table = agreement(maps[0], maps[1], batch.valid)
    aligned = table.diagonal()
    # Patches near each other show the same structure: as pairs of different places they would look too much alike.
    near = torch.from_numpy(sampler.ignore(draws)).to(device)
    apart = table[~near]
    specimen = batch.valid & specimen_mask(batch.above[0]) & specimen_mask(batch.above[1])
    metrics: dict[str, Any] = {
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
        metrics[key] = {}
    for number, name in enumerate(modalities):
        errors = equivariance_errors(_of(encode, number), batch.images[number][:_TURNED], sampler.group)
        metrics["equivariance"][name] = {
            "mean": _number(errors.mean()),
            "max": _number(errors.max()),
        }
        metrics["effective_rank"][name] = _number(effective_rank(maps[number]))
        metrics["deviation"][name] = _number(maps[number].std())
    return metrics


def _shifted_agreement(
    encode: Encode, sampler: Sampler, maps: Tensor, shift: int, device: torch.device
) -> float | None:
    """Measure the mean agreement when the second modality's patches are moved `shift` voxels, along one axis each."""
    draws = [sampler.draw(0, index, stream=REFERENCE) for index in range(NUM_PATCHES)]
    patch = np.asarray(sampler.settings.patch)
    axes = np.flatnonzero(patch > 1)
    moved = [sampler.moved(draw, int(axes[index % len(axes)]), shift) for index, draw in enumerate(draws)]
    batch = sampler.resample(moved, [sampler.read(d) for d in moved], device)
    return _number(agreement(maps, encode(1, batch.images[1]), batch.valid).diagonal().mean())


class Watch:
    """Measure the encoders on the same few clean patches again and again, so that numbers can be compared over steps.

    Parameters
    ----------
    sampler : Sampler
        Sampler of the training. Its specimens are used, but patches are not varied.
    device : torch device
        Where the encoders are.
    """

    def __init__(self, sampler: Sampler, device: torch.device) -> None:
        batch = sampler.clean().batch(0, range(_WATCHED), device, stream=REFERENCE)
        self._images, self._valid = batch.images, batch.valid
        group = sampler.group
        others = group.matrices[1:]
        chosen = np.unique(np.linspace(0, len(others) - 1, min(_ELEMENTS, len(others))).round().astype(int))
        self._turns = Group(group.name, others[chosen])

    def metrics(self, encode: Encode) -> dict[str, float]:
        """Measure the encoders as they are now.

        Returns
        -------
        dict
            ``model_agreement`` is the mean correlation of aligned maps of the first two modalities.
            ``model_equivariance_error`` is the largest error of all modalities and of a few rotations of the group; it
            is absent if the group has none. ``model_effective_rank`` is the smallest rank of all modalities.
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
    """Make a function of the encoder of one modality."""
    return lambda images: encode(number, images)


def _number(value: Tensor | np.floating[Any] | float) -> float | None:
    """Round to five significant digits; a fixed number of decimals would make 0 of an error of 1e-6."""
    number = float(value)
    return float(f"{number:.5g}") if np.isfinite(number) else None
