"""The contrastive loss: negatives, bounds and activation decay, as pure functions of tensors.

Nothing here knows of ranks, devices or networks: the caller gathers the maps of all ranks, with gradient, and
says which rows are its own. How alike two maps are is `critics`. Derivations: docs/theory.md, sections 4, 6 and 7.

Shapes: M modalities, N samples (of all ranks, after sub-cropping), n of them local, P = M (M - 1) ordered pairs of
modalities, K displacements, L latent channels, V voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from comir_hpc.config import LossSettings
from comir_hpc.critics import CRITICS, exact, require_known, require_shapes
from comir_hpc.crops import ShiftZYX, require_room
from comir_hpc.errors import ConfigError
from comir_hpc.pairs import NO_NEGATIVES, PairScores, score_pairs

BOUNDS = ("infonce", "jsd", "nwj")

# The exponential of more overflows float32; a critic bounded by 1 reaches 1 / temperature.
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class LossParts:
    """The loss and what it is made of: scalars on the maps' device, all but `loss` without gradient.

    The mean over ranks of equal size is the value over all samples.
    """

    loss: Tensor
    """Contrastive loss plus activation decay: what is minimised."""
    contrastive: Tensor
    """Mean loss of an anchor under the chosen bound."""
    decay: Tensor
    """Weighted activation decay."""
    bound: Tensor
    """Nats of mutual information (infonce: at most ln 2 too many; nwj) or of Jensen-Shannon divergence (jsd)."""
    ceiling: Tensor
    """Largest value that `bound` can take: mean ln(1 + negatives), the critic's largest score, or ln 2."""
    retrieval: Tensor
    """Share of anchors whose partner scores higher than every negative."""
    num_negatives: Tensor
    """Mean number of negatives of an anchor."""
    positive: Tensor
    """Mean score of aligned partners, without temperature."""
    negative: Tensor
    """Mean score of negatives, without temperature."""
    used: Tensor
    """Share of anchors that share enough valid voxels with their partner and have a negative."""

    def numbers(self) -> dict[str, float]:
        """Return all parts as plain numbers by name, for a log; waits for the device."""
        return {field.name: float(getattr(self, field.name).detach()) for field in fields(self)}


def check(settings: LossSettings, num_samples: int, patch_zyx: Sequence[int]) -> None:
    """Refuse settings that leave nothing to contrast; to be called before any data is read.

    Parameters
    ----------
    settings : LossSettings
    num_samples : int
        Aligned patches in one step, over all ranks.
    patch_zyx : three int
        Voxels of a representation patch.

    Raises
    ------
    ConfigError
        If an anchor has no negative, displacements or sub-crops do not fit into the patch, or the temperature
        makes the NWJ bound overflow.
    """
    require_known("critic", settings.critic, CRITICS)
    require_known("bound", settings.bound, BOUNDS)
    shortest, longest = settings.displacement_voxels
    if shortest > longest:
        raise ConfigError(f"displacement_voxels is ({shortest}, {longest}); expected the smaller one first")
    reach = longest if settings.displacement_negatives else 0
    require_room(patch_zyx, [reach if side > 1 else 0 for side in patch_zyx], settings.subcrops)
    pieces = settings.subcrops ** sum(side > 1 for side in patch_zyx)
    if num_samples * pieces < 2 and not settings.displacement_negatives:
        raise ConfigError(NO_NEGATIVES)
    if settings.bound == "nwj" and settings.critic != "mse" and settings.temperature * _LARGEST_EXPONENT < 1:
        raise ConfigError(
            f"temperature {settings.temperature} lets scores reach {1 / settings.temperature:.0f}, whose "
            f"exponential overflows in the nwj bound; use {1 / _LARGEST_EXPONENT} or more, or bound infonce"
        )


def draw_shifts(
    rng: np.random.Generator, settings: LossSettings, patch_zyx: Sequence[int]
) -> tuple[ShiftZYX, ...]:
    """Draw the displacements of one step: distinct, in any direction, of evenly spread length, in opposite pairs.

    A displacement and its opposite together pull the optimum to neither side: without the opposite, a step's shifts
    would favour an offset of the two representations, which is a bias of the registration.

    Parameters
    ----------
    rng : numpy Generator
        Seeded alike on all ranks, so that their losses are those of one.
    settings : LossSettings
        `displacement_negatives` of them, `displacement_voxels` long (Euclidean).
    patch_zyx : three int
        Axes of a single voxel are not displaced (2D).

    Returns
    -------
    tuple of (dz, dy, dx), voxels

    Raises
    ------
    ConfigError
        If fewer than that many shifts have such a length.
    """
    shortest, longest = settings.displacement_voxels
    count = settings.displacement_negatives
    if not count:
        return ()
    ranges = [np.arange(-longest, longest + 1) if side > 1 else np.zeros(1, int) for side in patch_zyx]
    vectors = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, 3)
    vectors = vectors[len(vectors) // 2 :]  # in order, so this half holds one of each opposite pair
    lengths = np.linalg.norm(vectors, axis=1)
    keep = (lengths >= shortest) & (lengths <= longest)
    if 2 * keep.sum() < count:
        raise ConfigError(
            f"{count} displacement_negatives were asked for, but only {2 * keep.sum()} shifts "
            f"are {shortest} to {longest} voxels long; ask for fewer, or widen displacement_voxels"
        )
    # There are about r^(d-1) lattice vectors of length r.
    weights = np.where(keep, np.maximum(lengths, 1) ** (1.0 - sum(side > 1 for side in patch_zyx)), 0.0)
    chosen = vectors[rng.choice(len(vectors), -(-count // 2), replace=False, p=weights / weights.sum())]
    both = np.stack([chosen, -chosen], axis=1).reshape(-1, 3)[:count]
    return tuple((int(z), int(y), int(x)) for z, y, x in both)


def contrastive_loss(
    maps: Sequence[Tensor],
    settings: LossSettings,
    *,
    masks: Sequence[Tensor] | None = None,
    ignore: Tensor | None = None,
    shifts_zyx: Sequence[ShiftZYX] = (),
    rows: tuple[int, int] | None = None,
) -> LossParts:
    """Contrast each sample's map with its partner in every other modality, against all other maps of the two.

    For an ordered pair of modalities the anchor is sample i's map in the first, the positive its map in the
    second, and the negatives are the other samples' maps in both, 2N - 2 of them; `shifts_zyx` adds the positive
    itself, displaced, K more. The loss is the mean over anchors and ordered pairs of modalities.

    Parameters
    ----------
    maps : M >= 2 tensors (N, L, Z, Y, X)
        Representations of N aligned samples, of all ranks; every group element undone.
    settings : LossSettings
        `displacement_negatives` and `displacement_voxels` act through `draw_shifts` only.
    masks : M bool tensors (N, 1, Z, Y, X), optional
        True where a voxel is valid, group elements undone; every sum is restricted to jointly valid voxels. An
        anchor that has less than `min_overlap` of its voxels in common with its partner is left out, and so is a
        negative that has less in common with the anchor.
    ignore : bool (N, N), optional
        True where two samples overlap in the specimen, and are no negatives of each other. An anchor without any
        negative contributes nothing (`LossParts.used` shows it).
    shifts_zyx : sequence of (dz, dy, dx), voxels
        From `draw_shifts`. Every map is cropped by the largest shift along each axis, so that aligned and
        displaced crops are of one size.
    rows : (start, stop), optional
        Samples whose anchors are scored here; all by default. The mean over K equal ranges, of the loss and of
        its gradient, is that of all samples.

    Returns
    -------
    LossParts

    Raises
    ------
    ConfigError
        If shapes disagree, there are no negatives, or the masks leave no anchor. It depends on the maps of all
        ranks only, so that all ranks raise it or none.

    Notes
    -----
    InfoNCE: van den Oord et al. 2018 (arXiv 1807.03748). JSD: Hjelm et al. 2019 (arXiv 1808.06670), after Nowozin
    et al. 2016 (arXiv 1606.00709). NWJ: Nguyen, Wainwright and Jordan 2010 (arXiv 0809.0853).
    """
    require_known("bound", settings.bound, BOUNDS)
    require_shapes(maps, masks)
    if len(maps) < 2 or any(len(one) != len(maps[0]) for one in maps):
        raise ConfigError(
            f"maps of shapes {[tuple(one.shape) for one in maps]}; expected two or more modalities of one shape"
        )
    rows = rows or (0, len(maps[0]))
    if not 0 <= rows[0] < rows[1] <= len(maps[0]):
        raise ConfigError(f"rows {rows} of {len(maps[0])} samples; expected start < stop within them")
    with torch.autocast(maps[0].device.type, enabled=False):
        scores = score_pairs(maps, settings, masks, ignore, shifts_zyx, rows)
        decay = activation_decay(maps, settings, masks=masks, rows=rows)
        return _parts(scores, settings, decay)


def activation_decay(
    maps: Sequence[Tensor],
    settings: LossSettings,
    *,
    masks: Sequence[Tensor] | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """``decay_l1`` times mean |z| plus ``decay_l2`` times mean z^2, over valid voxels, channels and modalities.

    Parameters are those of `contrastive_loss`; the result is a scalar with gradient.
    """
    start, stop = rows or (0, len(maps[0]))
    total = exact(maps[0]).new_zeros(())
    if not settings.decay_l1 and not settings.decay_l2:
        return total
    for number, one in enumerate(maps):
        local = exact(one[start:stop])
        if masks is not None:
            local = local.masked_fill(~masks[number][start:stop], 0)
        if settings.decay_l1:
            total = total + settings.decay_l1 * local.abs().sum()
        if settings.decay_l2:
            total = total + settings.decay_l2 * local.square().sum()
    # Counted over all samples, not the local ones, so that ranks with fewer valid voxels weigh less.
    if masks is None:
        count = total.new_tensor(float(sum(one.numel() for one in maps)))
    else:
        count = torch.stack([mask.sum() for mask in masks]).sum().clamp_min(1) * maps[0].shape[1]
    return total / count * (len(maps[0]) / (stop - start))


def _parts(scores: PairScores, settings: LossSettings, decay: Tensor) -> LossParts:
    def mean(values: Tensor) -> Tensor:
        return torch.where(scores.usable, values, 0).sum() * scores.share

    contrastive = mean(_anchor_loss(scores, settings))
    loss = contrastive + decay
    with torch.no_grad():
        count = scores.eligible.sum(dim=-1).to(contrastive.dtype)
        negatives = scores.negative.masked_fill(~scores.eligible, 0).sum(dim=-1) / count.clamp_min(1)
        best = scores.negative.masked_fill(~scores.eligible, -math.inf).amax(dim=-1)
        bound, ceiling = _bound(contrastive.detach(), mean(count.log1p()), settings)
        return LossParts(
            loss=loss,
            contrastive=contrastive.detach(),
            decay=decay.detach(),
            bound=bound,
            ceiling=ceiling,
            retrieval=mean((scores.positive > best).to(contrastive.dtype)),
            num_negatives=mean(count),
            positive=mean(scores.positive),
            negative=mean(negatives),
            used=scores.usable.to(contrastive.dtype).mean(),
        )


def _anchor_loss(scores: PairScores, settings: LossSettings) -> Tensor:
    """Loss of each anchor, (P, n); finite, with finite gradient, for unusable anchors too."""
    positive = scores.positive / settings.temperature
    # A row without negatives would be all -inf, whose gradient is NaN even where it is not used.
    eligible = scores.eligible | ~scores.eligible.any(dim=-1, keepdim=True)
    negative = (scores.negative / settings.temperature).masked_fill(~eligible, -math.inf)
    count = eligible.sum(dim=-1).to(positive.dtype)
    if settings.bound == "infonce":
        return torch.logsumexp(torch.cat([positive[..., None], negative], dim=-1), dim=-1) - positive
    if settings.bound == "jsd":
        return F.softplus(-positive) + F.softplus(negative).sum(dim=-1) / count
    return torch.exp(torch.logsumexp(negative, dim=-1) - count.log() - 1) - positive


def _bound(contrastive: Tensor, log_candidates: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Value of the bound that the loss stands for, and the largest it can take."""
    if settings.bound == "infonce":
        return log_candidates - contrastive, log_candidates
    if settings.bound == "jsd":
        return math.log(2) - contrastive / 2, torch.full_like(contrastive, math.log(2))
    largest = 0.0 if settings.critic == "mse" else 1 / settings.temperature
    return -contrastive, torch.full_like(contrastive, largest)
