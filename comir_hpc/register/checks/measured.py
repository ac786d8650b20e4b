"""Measure one answer in every way that the verdict looks at.

All is done on the grids of the checks (`probe`). Distances are in voxels of the coarser one, so that a seed and a skull
are treated alike. What an answer does when it is disturbed is measured from where undisturbed steps leave it: the
optimum of the coarser grid is a little beside that of the finer ones. A number that cannot be measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from comir_hpc.errors import RegistrationError
from comir_hpc.register.checks.motions import Motion, known_motions, main_motions
from comir_hpc.register.checks.null import above_chance
from comir_hpc.transforms.affine import Affine as Transform

if TYPE_CHECKING:
    from comir_hpc.register.checks.probe import Probe

FAR_VOX = 20.0
"""Distance in voxels of the checks beyond which it makes no difference how far two answers are apart."""
_KNOWN, _KNOWN_VOX, _KNOWN_STEPS = 3, 3.0, 8
_AWAY_VOX = 2.0  # distance at which the loss of agreement is measured
_STEPS_VOX = (-2.0, -1.0, 0.0, 1.0, 2.0)
_HALF_STEPS, _SWAP_STEPS = 6, 6


@dataclass(frozen=True)
class Measured:
    """What was measured of one answer.

    Attributes
    ----------
    agreement : float
        Correlation over what both specimens share, -1 to 1.
    chance : float or None
        Standard deviations by which it lies above that of shuffled blocks.
    information : float or None
        The same of the mutual information of the intensities.
    margin : float or None
        Lead of the evidence over the best other answer's, as a share of it; None if there is no other.
    overlap : float
        Share of the smaller specimen that the other one covers.
    settled : float
        Distance that undisturbed steps on the coarser grid move the answer, in voxels.
    halves : float or None
        Distance between the answers of two halves, in voxels.
    undone : float
        Distance that is left after known motions and new steps, in voxels: the mean over the motions.
    swapped : float or None
        Distance from the answer with the roles of the volumes exchanged, in voxels.
    second : float
        Distance of the nearest optimum of the mutual information, in voxels, the mean over the main motions.
    loosest : float
        Share of the agreement that is lost two voxels away along the least determined motion.
    loosest_words : str
        That motion in words.
    mirror : float or None
        Lead of the evidence over the mirrored moving volume's; None if that was not searched.
    again : float or None
        Distance from the answer of a repeated search, in voxels; None if there was none.
    itself : float or None
        Distance from the known motion of a turned copy of the moving volume to what the method finds of it, in voxels;
        None if that was not tried.
    """

    agreement: float
    chance: float | None
    information: float | None
    margin: float | None
    overlap: float
    settled: float
    halves: float | None
    undone: float
    swapped: float | None
    second: float
    loosest: float
    loosest_words: str
    mirror: float | None = None
    again: float | None = None
    itself: float | None = None


def measure(
    probe: Probe,
    answer: Transform,
    *,
    rivals: Sequence[float] = (),
    mirror: float | None = None,
    again: Transform | None = None,
    itself: float | None = None,
) -> Measured:
    """Measure one answer.

    Parameters
    ----------
    probe : Probe
        Both volumes on the grid of the checks.
    answer : Transform
        From fixed to moving points.
    rivals : sequence of float
        Evidence of other answers on the finer grid.
    mirror : float, optional
        Lead over the best answer of the mirrored moving volume, if that was searched.
    again : Transform, optional
        Best answer of a repeated search.
    itself : float, optional
        What `found_itself` measured.
    """
    found, motions = probe.judging.at(answer), main_motions(probe)
    chance, information = above_chance(probe, answer)
    here = probe.improve(answer).transform
    loosest, words = _loosest(probe, here, motions)
    settled = probe.apart_vox(here, answer)
    return Measured(
        agreement=found.correlation,
        chance=chance,
        information=information,
        margin=lead_of(found.evidence, max(rivals)) if rivals else None,
        overlap=found.overlap,
        settled=settled,
        halves=_halves(probe, here),
        undone=_undone(probe, here),
        swapped=_swapped(probe, here),
        second=_second(probe, answer, motions) if probe.optimised else min(settled, FAR_VOX),
        loosest=loosest,
        loosest_words=words,
        mirror=mirror,
        again=None if again is None else min(probe.apart_vox(again, answer), FAR_VOX),
        itself=itself,
    )


def lead_of(own: float, other: float) -> float:
    """Say by what share of itself an evidence leads another one, -1 to 1."""
    if own <= 0:
        return -1.0
    return float(np.clip(1 - other / own, -1.0, 1.0))


def _loosest(probe: Probe, answer: Transform, motions: Sequence[Motion]) -> tuple[float, str]:
    """Find the motion that loses least of the agreement, and the share that it loses."""
    own, losses = probe.alignment.at(answer).evidence, []
    for motion in motions:
        there = [
            probe.alignment.at(answer.compose(motion.by(sign * _AWAY_VOX * probe.spacing_mm))).evidence
            for sign in (-1.0, 1.0)
        ]
        losses.append(lead_of(own, float(np.mean(there))))
    least = int(np.argmin(losses))
    return losses[least], motions[least].words


def _halves(probe: Probe, answer: Transform) -> float | None:
    distances = []
    try:
        for lower, upper in probe.halves():
            ends = [half.improve(answer, _HALF_STEPS).transform for half in (lower, upper)]
            distances.append(probe.apart_vox(ends[0], ends[1]))
    except RegistrationError:  # a half holds too few voxels
        return None
    return min(float(np.mean(distances)), FAR_VOX)


def _undone(probe: Probe, answer: Transform) -> float:
    """Move the answer by known motions, let it come back, and measure how far from the answer it ends."""
    away = known_motions(probe, _KNOWN, _KNOWN_VOX * probe.spacing_mm)
    ends = [probe.improve(answer.compose(motion), _KNOWN_STEPS).transform for motion in away]
    return float(np.mean([min(probe.apart_vox(end, answer), FAR_VOX) for end in ends]))


def _swapped(probe: Probe, answer: Transform) -> float | None:
    try:
        back = probe.swapped.improve(answer.inverse(), _SWAP_STEPS).transform
    except RegistrationError:  # the moving specimen fills too few voxels
        return None
    return min(probe.apart_vox(back.inverse(), answer), FAR_VOX)


def _second(probe: Probe, answer: Transform, motions: Sequence[Motion]) -> float:
    """Find where the mutual information of the intensities is largest, along each main motion."""
    at_answer = probe.information(answer)
    offsets = []
    for motion in motions:
        values = [
            at_answer if step == 0 else probe.information(answer.compose(motion.by(step * probe.spacing_mm)))
            for step in _STEPS_VOX
        ]
        offsets.append(abs(_peak(values)))
    return float(np.mean(offsets))


def _peak(values: Sequence[float]) -> float:
    """Find the place of the largest value between steps by a parabola; beyond the outer ones it counts as 3 voxels."""
    best = int(np.argmax(values))
    if best in (0, len(values) - 1):
        return math.copysign(3.0, _STEPS_VOX[best])
    before, there, after = values[best - 1 : best + 2]
    curved = before - 2 * there + after
    return _STEPS_VOX[best] + (0.5 * (before - after) / curved if curved < 0 else 0.0)
