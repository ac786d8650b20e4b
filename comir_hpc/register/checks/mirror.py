"""Search the mirrored moving volume: if it agrees better, the header of one of the two files has a flipped axis."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from comir_hpc.register.alignment import Alignment
from comir_hpc.register.checks.again import SearchAgain
from comir_hpc.register.checks.measured import lead_of
from comir_hpc.register.coarse import coarsen
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import Grid
from comir_hpc.transforms.affine import Affine as Transform

if TYPE_CHECKING:  # a type only: the chain of imports stays short
    from comir_hpc.register.checks.probe import Probe

_ANSWERS = 4  # of the search that are improved
_SHARP, _SHARP_STEPS = 80, 6  # voxels along a mean side on which the mirror is compared, and steps there
_NAMED = 0.03  # lead of the mirror from which it is called better: below this, both are equally good


def search_mirrored(
    probe: Probe, repeat: SearchAgain, answer: Transform, sharp: tuple[Features, Features]
) -> tuple[float, str | None]:
    """Search the mirrored moving volume.

    Parameters
    ----------
    answer : Transform
        The answer that is checked.
    sharp : two Features
        Features on which the two are compared in the end.

    Returns
    -------
    float
        Lead of the answer over the mirrored volume's best one, as a share of the answer's evidence.
    str or None
        Axis of the moving volume (x, y, z) that is probably flipped, if the mirror is better.
    """
    fixed, moving = probe.sides
    flipped = mirrored(moving)
    coarse = Alignment(probe.fixed, coarsen(flipped, probe.spacing_mm, finer=2))
    # A body that is nearly its own mirror is found with its sides exchanged, whatever the header says. So the answer
    # with its sides exchanged is a start for the mirror, as sure as the search that found the answer.
    starts = repeat.answers(fixed, flipped)[:_ANSWERS] + exchanged(answer, probe)
    rough = [coarse.improve(one.about(coarse.centre_mm)) for one in starts]
    rough.sort(key=lambda one: -one.evidence)
    found = []
    for other in (sharp[1], flipped if sharp[1] is moving else mirrored(sharp[1])):
        spacing = max(sharp[0].grid.finest_mm, other.grid.finest_mm, probe.side_mm / _SHARP)
        alignment = Alignment(coarsen(sharp[0], spacing), coarsen(other, spacing))
        starts = [answer] if other is sharp[1] else [one.transform for one in rough[:3]]
        improved = [alignment.improve(one.about(alignment.centre_mm), _SHARP_STEPS) for one in starts]
        found.append(max(improved, key=lambda one: one.evidence))
    lead = lead_of(found[0].evidence, found[1].evidence)
    return lead, flipped_axis(found[1].transform, moving.grid) if lead < -_NAMED else None


def exchanged(answer: Transform, probe: Probe) -> list[Transform]:
    """Make answers for the mirrored moving volume from one for itself: two sides change places.

    There are three, for the planes across the main axes of the fixed specimen.
    """
    back, middle = mirror_map(probe.sides[1].grid), probe.alignment.centre_mm
    found = []
    for axis in probe.axes[0].T:
        flip = np.eye(4)
        flip[:3, :3] -= 2 * np.outer(axis, axis)
        flip[:3, 3] = middle - flip[:3, :3] @ middle
        found.append(back.compose(answer).compose(Transform(flip)))
    return found


def mirrored(features: Features) -> Features:
    """Mirror a volume along the x axis of its array. Maps of mirror-blind encoders are then those of the mirror."""
    known = None if features.known is None else features.known[..., ::-1]
    return replace(
        features,
        values=np.ascontiguousarray(features.values[..., ::-1]),
        mask=np.ascontiguousarray(features.mask[..., ::-1]),
        known=None if known is None else np.ascontiguousarray(known),
    )


def mirror_map(grid: Grid) -> Transform:
    """Make the map of moving world points to the places that `mirrored` sends their content to."""
    normal = np.asarray(grid.direction)[:, 0]
    middle = grid.centre_mm
    flip = np.eye(3) - 2 * np.outer(normal, normal)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = flip, middle - flip @ middle
    return Transform(matrix)


def flipped_axis(answer: Transform, grid: Grid) -> str:
    """Name the array axis of the moving volume (x, y, z) that is probably flipped.

    Parameters
    ----------
    answer : Transform
        From fixed points to points of the mirrored moving volume.
    grid : Grid
        Grid of the moving volume.
    """
    improper = (mirror_map(grid).matrix_mm @ answer.matrix_mm)[:3, :3]
    direction = np.asarray(grid.direction)
    turns = []
    for axis in range(3):
        flip = np.eye(3) - 2 * np.outer(direction[:, axis], direction[:, axis])
        turns.append(Transform.rigid(flip @ improper, np.zeros(3), np.zeros(3)).rotation_deg)
    return "xyz"[int(np.argmin(turns))]
