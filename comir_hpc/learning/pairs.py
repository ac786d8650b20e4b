"""Score each anchor with its partner and its negatives; the contrastive loss is computed from these scores.

Shapes: M modalities, N samples (of all ranks, after sub-cropping), n of them local, P = M (M - 1) ordered pairs of
modalities, K displacements, L latent channels, V voxels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from comir_hpc.config.train import LossSettings
from comir_hpc.errors import ConfigError
from comir_hpc.learning.critics import Maps, all_pairs, partners, prepare, score
from comir_hpc.learning.crops import ShiftZYX, crop, require_room

NO_NEGATIVES = (
    "one aligned patch in a step and nothing else: an anchor has no negatives; use two or more patches "
    "(sampling.pairs_per_step), loss.subcrops of 2 or more, or loss.displacement_negatives"
)


@dataclass(frozen=True)
class PairScores:
    """Scores of each local anchor for every ordered pair of modalities, without temperature.

    Attributes
    ----------
    positive : (P, n)
        Score of each anchor with its partner.
    negative : (P, n, candidates)
        Scores of each anchor with all candidates for a negative.
    eligible : bool (P, n, candidates)
        Which candidates are negatives.
    usable : bool (P, n)
        Which anchors have enough voxels in common with their partner, and a negative.
    share : scalar
        Weight of an anchor in the mean over all samples, times the number of ranks.
    """

    positive: Tensor
    negative: Tensor
    eligible: Tensor
    usable: Tensor
    share: Tensor


def score_pairs(
    maps: Sequence[Tensor],
    settings: LossSettings,
    masks: Sequence[Tensor] | None,
    ignore: Tensor | None,
    shifts_zyx: Sequence[ShiftZYX],
    rows: tuple[int, int],
) -> PairScores:
    """Score all maps against all maps, then sort the scores into positives and negatives.

    The parameters are those of `comir_hpc.learning.loss.contrastive_loss`.

    Raises
    ------
    ConfigError
        If shapes disagree, there are no negatives, or the masks leave no anchor.
    """
    shape = tuple(maps[0].shape[-3:])
    margin = [max((abs(shift[axis]) for shift in shifts_zyx), default=0) for axis in range(3)]
    require_room(shape, margin, settings.subcrops)
    each = prepare(maps, masks, settings.critic)
    cut = partial(crop, margin=margin, pieces=settings.subcrops)
    flat = _stack([cut(one, [(0, 0, 0)])[0] for one in each])
    num_samples = flat.values.shape[1]
    if num_samples < 2 and not shifts_zyx:
        raise ConfigError(NO_NEGATIVES)
    pieces = num_samples // len(maps[0])
    local = slice(rows[0] * pieces, rows[1] * pieces)
    needed = max(1.0, settings.min_overlap * flat.values.shape[-1])

    value, common = _table(flat, local, settings.critic, needed)
    rivals = _rivals(num_samples, local, ignore, pieces, value.device)
    positive, negative, eligible = _sort(value, common & rivals[None, :, None], local)
    if shifts_zyx:
        here = [one.apply(lambda x: x[slice(*rows)]) for one in each]
        crops = partial(cut, shifts_zyx=[(0, 0, 0), *shifts_zyx])
        value, common = _displaced(here, crops, settings.critic, needed)
        negative, eligible = torch.cat([negative, value], dim=-1), torch.cat([eligible, common], dim=-1)
    meeting = _meeting(flat, needed)
    usable = meeting[:, local] & eligible.any(dim=-1)
    # The mean is over the usable anchors of all ranks. The engine averages over ranks: hence the factor, their number.
    share = num_samples / (local.stop - local.start) / meeting.sum().to(value.dtype)
    return PairScores(positive, negative, eligible, usable, share)


def _stack(maps: Sequence[Maps]) -> Maps:
    valid = [one.valid for one in maps if one.valid is not None]
    return Maps(torch.stack([one.values for one in maps]), torch.stack(valid) if valid else None)


def _table(flat: Maps, local: slice, critic: str, needed: float) -> tuple[Tensor, Tensor]:
    """Score local maps with all maps, (M, n, M, N), and find whether the two share enough voxels."""
    num_maps, num_samples = flat.values.shape[:2]
    num_local = local.stop - local.start
    everything = flat.apply(lambda x: x.flatten(0, 1))
    # Where nothing is left out, both are the same object: its energies are then computed once, and only half of the
    # product.
    anchors = everything if num_local == num_samples else flat.apply(lambda x: x[:, local].flatten(0, 1))
    sums = all_pairs(anchors, everything, critic)
    shape = (num_maps, num_local, num_maps, num_samples)
    value = score(sums, critic)
    return value.reshape(shape), (sums.count >= needed).expand(value.shape).reshape(shape)


def _rivals(
    num_samples: int, local: slice, ignore: Tensor | None, pieces: int, device: torch.device
) -> Tensor:
    """Find which samples are negatives of which local ones, bool (n, N): other ones that do not overlap them."""
    rivals = ~torch.eye(num_samples, dtype=torch.bool, device=device)[local]
    if ignore is None:
        return rivals
    patches = num_samples // pieces
    if tuple(ignore.shape) != (patches, patches) or ignore.dtype != torch.bool:
        raise ConfigError(
            f"ignore is {tuple(ignore.shape)} {ignore.dtype}; expected ({patches}, {patches}) torch.bool"
        )
    # Sub-crops of one patch are disjoint, hence negatives of each other.
    overlap = ignore.to(device) & ~torch.eye(patches, dtype=torch.bool, device=device)
    overlap = overlap.repeat_interleave(pieces, 0).repeat_interleave(pieces, 1)
    return rivals & ~overlap[local]


def _sort(value: Tensor, eligible: Tensor, local: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Pick from the table (M, n, M, N), for each ordered pair, the positives (P, n) and candidates (P, n, 2N)."""
    pairs = list(itertools.permutations(range(len(value)), 2))
    # A local anchor's number among all samples is its own plus the first one's.
    partner = value.diagonal(offset=local.start, dim1=1, dim2=3)
    positive = torch.stack([partner[a, b] for a, b in pairs])
    negative, allowed = (
        torch.stack([torch.cat([table[a, :, a], table[a, :, b]], dim=-1) for a, b in pairs])
        for table in (value, eligible)
    )
    return positive, negative, allowed


def _displaced(
    here: Sequence[Maps], crops: Callable[[Maps], list[Maps]], critic: str, needed: float
) -> tuple[Tensor, Tensor]:
    """Score anchors with displaced partners, (P, n, K), and find whether the two share enough voxels.

    `here` holds M sets of maps (N, L, Z, Y, X). `crops` makes from one set its anchors, and then its displaced
    partners.
    """
    parts, place = _by_validity(here)
    scored = [_against_displaced(part, crops, critic, needed) for part in parts]
    value, seen = (torch.cat(some, dim=1) for some in zip(*scored, strict=True))
    order = torch.arange(value.shape[1], device=place.device).reshape(len(place), -1)[place].flatten()
    return value.index_select(1, order), seen.index_select(1, order)


def _by_validity(here: Sequence[Maps]) -> tuple[list[Sequence[Maps]], Tensor]:
    """Divide samples into those that are valid everywhere, which need no masks, and the others.

    Returns the parts, and for each sample its place among the parts put one after the other.
    """
    values, masks = [one.values for one in here], [one.valid for one in here if one.valid is not None]
    everyone = torch.arange(len(values[0]), device=values[0].device)
    if not masks or masks[0].device.type != "cpu":  # a GPU would have to be waited for
        return [here], everyone
    whole = torch.stack([mask.flatten(1).all(dim=1) for mask in masks]).all(dim=0)
    first, rest = everyone[whole], everyone[~whole]
    parts: list[Sequence[Maps]] = []
    if len(first):
        parts.append([Maps(one[first], None) for one in values])
    if len(rest):
        parts.append([one.apply(lambda x: x[rest]) for one in here])
    return parts, torch.cat([first, rest]).argsort()


def _against_displaced(
    here: Sequence[Maps], crops: Callable[[Maps], list[Maps]], critic: str, needed: float
) -> tuple[Tensor, Tensor]:
    each = [crops(one) for one in here]
    values, common = [], []
    for (anchors, *_), (_, *moved) in itertools.permutations(each, 2):
        sums = [partners(anchors, one, critic) for one in moved]
        values.append(torch.stack([score(one, critic) for one in sums], dim=-1))
        enough = [(one.count >= needed).expand(len(anchors.values)) for one in sums]
        common.append(torch.stack(enough, dim=-1))
    return torch.stack(values), torch.stack(common)


def _meeting(flat: Maps, needed: float) -> Tensor:
    """Find for all samples whether partners share enough voxels, bool (P, N); every rank finds the same."""
    num_maps, num_samples = flat.values.shape[:2]
    pairs = list(itertools.permutations(range(num_maps), 2))
    if flat.valid is None:
        return torch.ones(len(pairs), num_samples, dtype=torch.bool, device=flat.values.device)
    valid = flat.valid
    meeting = torch.stack([(valid[a] & valid[b]).sum(dim=(1, 2)) >= needed for a, b in pairs])
    if not meeting.any():
        raise ConfigError(
            f"the masks leave none of {num_samples} aligned samples with {needed:.0f} jointly valid voxels of "
            f"{valid.shape[-1]}; raise sampling.foreground, lower loss.min_overlap, or check the masks"
        )
    return meeting
