"""Compute the contrastive loss: negatives, bounds and activation decay, as pure functions of tensors.

Nothing here knows of ranks, devices or networks. The caller gathers the maps of all ranks, with gradient, and says
which rows are its own. `critics` measures how alike two maps are. Derivations: docs/theory.md, sections 4, 6 and 7.

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

from comir_hpc.config.train import LossSettings
from comir_hpc.errors import ConfigError
from comir_hpc.learning.critics import CRITICS, exact, require_known, require_shapes
from comir_hpc.learning.crops import ShiftZYX, require_room
from comir_hpc.learning.pairs import NO_NEGATIVES, PairScores, score_pairs

BOUNDS = ("infonce", "jsd", "nwj")

# float32 overflows above exp(88). A critic that is at most 1 reaches 1 / temperature, so this bounds the temperature.
_LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class LossParts:
    """The loss and what it is made of: scalars on the maps' device. Only `loss` has a gradient.

    The mean of each part over ranks of equal size is its value over all samples.
    """

    loss: Tensor
    """Contrastive loss plus activation decay, which is what training minimises."""
    contrastive: Tensor
    """Mean loss of an anchor under the chosen bound."""
    decay: Tensor
    """Weighted activation decay."""
    bound: Tensor
    """Lower bound in nats: of mutual information (infonce, at most ln 2 too high; nwj), or of the Jensen-Shannon
    divergence (jsd)."""
    ceiling: Tensor
    """Largest value that `bound` can take: mean ln(1 + negatives) for infonce, the critic's largest score for nwj,
    ln 2 for jsd."""
    retrieval: Tensor
    """Share of anchors, in [0, 1], whose partner scores higher than every negative."""
    num_negatives: Tensor
    """Mean number of negatives of an anchor."""
    positive: Tensor
    """Mean score of aligned partners, without temperature."""
    negative: Tensor
    """Mean score of negatives, without temperature."""
    used: Tensor
    """Share of anchors, in [0, 1], that share enough valid voxels with their partner and have a negative."""

    def numbers(self) -> dict[str, float]:
        """Return all parts as plain numbers by name, for a log. This waits for the device."""
        return {field.name: float(getattr(self, field.name).detach()) for field in fields(self)}


def check(settings: LossSettings, num_samples: int, patch_zyx: Sequence[int]) -> None:
    """Refuse settings that leave nothing to contrast. Call it before any data is read.

    Parameters
    ----------
    settings : LossSettings
        The settings to check.
    num_samples : int
        Number of aligned patches in one step, over all ranks.
    patch_zyx : three int
        Sides of a patch of the representation, in voxels.

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

    A displacement and its opposite together pull the optimum to neither side. Without the opposite, the shifts of a
    step would favour an offset between the two representations, which is a bias of the registration.

    Parameters
    ----------
    rng : numpy Generator
        Random numbers with the same seed on all ranks, so that their losses are parts of one.
    settings : LossSettings
        How many are drawn (`displacement_negatives`), and how long they are in voxels (`displacement_voxels`,
        Euclidean).
    patch_zyx : three int
        Sides of a patch in voxels. Nothing is displaced along an axis of one voxel (2D).

    Returns
    -------
    tuple of (dz, dy, dx), voxels

    Raises
    ------
    ConfigError
        If there are fewer shifts of such a length than asked for.
    """
    shortest, longest = settings.displacement_voxels
    count = settings.displacement_negatives
    if not count:
        return ()
    ranges = [np.arange(-longest, longest + 1) if side > 1 else np.zeros(1, int) for side in patch_zyx]
    vectors = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, 3)
    # The list is in order, so that its second half holds one vector of each opposite pair.
    vectors = vectors[len(vectors) // 2 :]
    lengths = np.linalg.norm(vectors, axis=1)
    keep = (lengths >= shortest) & (lengths <= longest)
    if 2 * keep.sum() < count:
        raise ConfigError(
            f"{count} displacement_negatives were asked for, but only {2 * keep.sum()} shifts "
            f"are {shortest} to {longest} voxels long; ask for fewer, or widen displacement_voxels"
        )
    # There are about r^(d-1) lattice vectors of length r in d dimensions. This weight makes all lengths as likely.
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

    Take an ordered pair of modalities. The anchor is sample i's map in the first one, and the positive is its map in
    the second one. The negatives are the other samples' maps in both, 2N - 2 of them. `shifts_zyx` adds K more: the
    positive itself, displaced. The loss is the mean over anchors and ordered pairs of modalities.

    Parameters
    ----------
    maps : M >= 2 tensors (N, L, Z, Y, X)
        Representations of N aligned samples of all ranks, with every group element undone.
    settings : LossSettings
        Critic, bound, temperature, and what else defines the loss. `displacement_negatives` and `displacement_voxels`
        act through `draw_shifts` only.
    masks : M bool tensors (N, 1, Z, Y, X), optional
        True where a voxel is valid, with group elements undone. Every sum runs over jointly valid voxels. An anchor is
        left out if it has less than the share `min_overlap` of its voxels in common with its partner. A negative is
        left out if it has less than that in common with the anchor.
    ignore : bool (N, N), optional
        True where two samples overlap in the specimen, so that they are no negatives of each other. An anchor without
        any negative contributes nothing (`LossParts.used` shows it).
    shifts_zyx : sequence of (dz, dy, dx), voxels
        Displacements that `draw_shifts` gave. Every map is cropped by the largest shift along each axis, so that
        aligned and displaced crops have one size.
    rows : (start, stop), optional
        Range of samples whose anchors are scored here; all by default. The mean over K equal ranges, of the loss and of
        its gradient, is that of all samples.

    Returns
    -------
    LossParts
        The loss with its gradient, and the parts that it is made of.

    Raises
    ------
    ConfigError
        If shapes disagree, there are no negatives, or the masks leave no anchor. This depends only on the maps of all
        ranks together, so that either all ranks raise it or none does.

    Notes
    -----
    InfoNCE: van den Oord et al. 2018 (arXiv 1807.03748). JSD: Hjelm et al. 2019 (arXiv 1808.06670), after Nowozin
    et al. 2016 (arXiv 1606.00709). NWJ: Nguyen, Wainwright and Jordan 2010 (arXiv 0809.0853).
    """
    require_known("bound", settings.bound, BOUNDS)
    require_shapes(maps, masks)
    rows = _rows_of(maps, rows)
    # Scores divided by a small temperature need all digits: half precision would round neighbours to one number.
    with torch.autocast(maps[0].device.type, enabled=False):
        scores = score_pairs(maps, settings, masks, ignore, shifts_zyx, rows)
        decay = activation_decay(maps, settings, masks=masks, rows=rows)
        return _parts(scores, settings, decay)


def _rows_of(maps: Sequence[Tensor], rows: tuple[int, int] | None) -> tuple[int, int]:
    """Return the range of samples that is scored, once the maps are found to be of as many samples each."""
    if len(maps) < 2 or any(len(one) != len(maps[0]) for one in maps):
        raise ConfigError(
            f"maps of shapes {[tuple(one.shape) for one in maps]}; expected two or more modalities of one shape"
        )
    rows = rows or (0, len(maps[0]))
    if not 0 <= rows[0] < rows[1] <= len(maps[0]):
        raise ConfigError(f"rows {rows} of {len(maps[0])} samples; expected start < stop within them")
    return rows


def activation_decay(
    maps: Sequence[Tensor],
    settings: LossSettings,
    *,
    masks: Sequence[Tensor] | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Compute ``decay_l1`` times mean |z| plus ``decay_l2`` times mean z^2, over valid voxels, channels and modalities.

    The parameters are those of `contrastive_loss`. The result is a scalar with gradient.
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
    # The count is that of all samples, not of the local ones: a rank with fewer valid voxels has to weigh less.
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
    """Compute the loss of each anchor, (P, n). It is finite, with finite gradient, for unusable anchors too."""
    positive = scores.positive / settings.temperature
    # A row without negatives would hold only -inf. Its gradient is NaN, also where the row is not used, so such a row
    # counts all candidates.
    eligible = scores.eligible | ~scores.eligible.any(dim=-1, keepdim=True)
    negative = (scores.negative / settings.temperature).masked_fill(~eligible, -math.inf)
    count = eligible.sum(dim=-1).to(positive.dtype)
    if settings.bound == "infonce":
        # Over the positive as well: the bound is then at most ln(1 + negatives), and the loss is never negative.
        return torch.logsumexp(torch.cat([positive[..., None], negative], dim=-1), dim=-1) - positive
    if settings.bound == "jsd":
        return F.softplus(-positive) + F.softplus(negative).sum(dim=-1) / count
    return torch.exp(torch.logsumexp(negative, dim=-1) - count.log() - 1) - positive


def _bound(contrastive: Tensor, log_candidates: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Compute the value of the bound that the loss stands for, and the largest value that it can take."""
    if settings.bound == "infonce":
        return log_candidates - contrastive, log_candidates
    if settings.bound == "jsd":
        return math.log(2) - contrastive / 2, torch.full_like(contrastive, math.log(2))
    largest = 0.0 if settings.critic == "mse" else 1 / settings.temperature
    return -contrastive, torch.full_like(contrastive, largest)
