"""What a trained pair of encoders can do, in figures and pictures: made on training volumes, compared against later.

`register` holds the agreement it finds against these: a pair of volumes that is aligned and resembles the training
data must come near them. Axes: n patches, l latent channels, z y x space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comir_hpc.diagnostics import agreement, effective_rank, equivariance_errors, foreground_agreement
from comir_hpc.patches import REFERENCE, PatchSampler, specimen_mask

Encode = Callable[[int, Tensor], Tensor]
"""Modality number and images (n, c, z, y, x) to maps (n, l, z, y, x), in eval mode, without gradient."""

_PATCHES = 24
_TURNED = 4  # patches on which equivariance is measured: each costs an encoding a group element
_SHIFTS = (1, 2, 4, 8)


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
        ``mismatched`` mean and ``mismatched_p95`` of patches of different places; ``shifted``: mean agreement when one
        side is so many voxels off; for each modality ``equivariance``, mean and largest error over the group,
        ``effective_rank`` and ``deviation``.
    """
    draws = [sampler.draw(0, index, stream=REFERENCE) for index in range(_PATCHES)]
    batch = sampler.resample(draws, [sampler.read(d) for d in draws], device)
    maps = [encode(number, images) for number, images in enumerate(batch.images)]
    table = agreement(maps[0], maps[1], batch.valid)
    aligned = table.diagonal()
    apart = table[~torch.from_numpy(sampler.ignore(draws)).to(device)]
    specimen = batch.valid & specimen_mask(batch.above[0]) & specimen_mask(batch.above[1])
    figures: dict[str, Any] = {
        "patches": _PATCHES,
        "agreement": _number(aligned.mean()),
        "agreement_p5": _number(aligned.quantile(0.05)),
        "agreement_pooled": round(foreground_agreement(maps[0], maps[1], specimen), 4),
        "mismatched": _number(apart.mean()) if len(apart) else None,
        "mismatched_p95": _number(apart.quantile(0.95)) if len(apart) else None,
        "shifted": {str(s): _shifted_agreement(encode, sampler, maps[0], s, device) for s in _SHIFTS},
    }
    for key in ("equivariance", "effective_rank", "deviation"):
        figures[key] = {}
    for number, name in enumerate(modalities):

        def one(images: Tensor, number: int = number) -> Tensor:
            return encode(number, images)

        errors = equivariance_errors(one, batch.images[number][:_TURNED], sampler.group)
        figures["equivariance"][name] = {
            "mean": round(float(errors.mean()), 4),
            "max": round(float(errors.max()), 4),
        }
        figures["effective_rank"][name] = round(effective_rank(maps[number]), 3)
        figures["deviation"][name] = _number(maps[number].std())
    return figures


def _shifted_agreement(
    encode: Encode, sampler: PatchSampler, maps: Tensor, shift: int, device: torch.device
) -> float:
    """Mean agreement when the second modality's patches are taken `shift` voxels off, along each axis in turn."""
    draws = [sampler.draw(0, index, stream=REFERENCE) for index in range(_PATCHES)]
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


def _number(value: Tensor) -> float:
    return round(float(value), 4)


def draw_picture(
    path: Path, images: Sequence[Tensor], maps: Sequence[Tensor], modalities: Sequence[str], title: str
) -> None:
    """Write a PNG of middle slices: a row a modality and one for its representation, a column a patch.

    Parameters
    ----------
    images, maps : sequences of M tensors (n, c, z, y, x) and (n, l, z, y, x)
        Group elements undone; the first channel of each is drawn, the representations of all modalities on one grey
        scale so that they can be compared.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(6, len(images[0]))
    rows = [(name, _slices(one, columns)) for name, one in zip(modalities, images, strict=True)]
    seen = [_slices(one, columns) for one in maps]
    low, high = np.percentile(np.stack(seen), (1, 99))
    rows += [(f"{name}: representation", one) for name, one in zip(modalities, seen, strict=True)]
    figure = Figure(figsize=(1.5 * columns, 1.6 * len(rows)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, slices) in enumerate(rows):
        limits = {"vmin": low, "vmax": high} if row >= len(modalities) else {}
        for column in range(columns):
            place = axes[row, column]
            place.imshow(slices[column], cmap="gray", **limits)
            place.set_xticks([])
            place.set_yticks([])
        axes[row, 0].set_title(name, loc="left", fontsize=8)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    spare = path.with_name(f".{path.name}.part")
    figure.savefig(spare, format="png")
    spare.replace(path)


def _slices(tensor: Tensor, count: int) -> np.ndarray[Any, Any]:
    middle = tensor[:count, 0, tensor.shape[2] // 2]
    return middle.detach().float().cpu().numpy()
