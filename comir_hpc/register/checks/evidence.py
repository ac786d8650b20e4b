"""Gather what is measured of an answer, for its verdict.

What is measured on the grid of the checks (`measured`) is held against the calibration. The other numbers are those
that a registration has anyway. Two searches come on top, unless the checks are quick: one of the mirrored moving
volume, and one from another position.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.host.progress import Progress
from comir_hpc.register.alignment import Aligned
from comir_hpc.register.checks.again import SearchAgain
from comir_hpc.register.checks.causes import CLOSE, FOUND_VOX, Cause, causes_of
from comir_hpc.register.checks.cross_check import halves_distance_mm
from comir_hpc.register.checks.itself import found_itself
from comir_hpc.register.checks.measured import Measured, measure
from comir_hpc.register.checks.mirror import search_mirrored
from comir_hpc.register.checks.probe import Probe
from comir_hpc.register.inputs import Inputs
from comir_hpc.register.pair import Pair
from comir_hpc.register.ranking import FINE, SAME_SHARE, Ranking
from comir_hpc.register.slices import SlicePlane
from comir_hpc.representations.criteria import Array32
from comir_hpc.representations.features import Features
from comir_hpc.transforms.affine import Affine as Transform

Compared = tuple[Features, Features, tuple[Array32, Array32]]
"""Features of the fixed and the moving volume, and their intensities on the same grids."""

_SHARE_OF_ROTATIONS = 6  # a search that is repeated tries this part of the rotations
_FEWEST_ROTATIONS = 80
_MOST_VOXELS = 24
_IMPROVED = 12
_RIVALS = 4


@dataclass(frozen=True)
class Evidence:
    """Numbers from which a verdict is made.

    Attributes
    ----------
    measured : Measured or None
        What was measured on the grid of the checks; None if the specimens are too small for one.
    agreement : float
        Correlation of the compared values over the common specimen, at the finest level.
    reference : float or None
        Agreement on the model's aligned training pair; None where nothing is learned or nothing is known.
    margin : float or None
        Relative lead of the score over the best other answer at the finest level; None if there is no other.
    halves_mm : float
        Distance between the answers of two halves there; infinite if a half cannot be registered.
    overlap : float
        Share of the smaller specimen that the other one covers, 0 to 1.
    consensus, starts : int
        How many starts led to this answer, and how many there were.
    drift_mm : float
        Distance that refinement moved the answer from its start.
    side_mm, voxel_mm : float
        Mean side of the fixed specimen, and side of a voxel of the checks.
    thorough : bool
        Whether nothing was left out for the sake of time.
    unchecked : tuple of str
        Sentences on what could not be checked. Each keeps an answer from PASS.
    mirror_axis : str or None
        Axis of the moving volume (x, y, z) that is probably flipped, if the mirrored volume agrees better.
    deviation : float or None
        Spread of the maps over that of the model's training; None where that is not known.
    causes : tuple of Cause
        What is probably wrong with the pair.
    compared : str
        What was compared on the grids of the checks, in the plural.
    representation : str
        The word for it in the settings. A calibration without rows of it says nothing about it.
    """

    measured: Measured | None
    agreement: float
    reference: float | None = None
    margin: float | None = None
    halves_mm: float = float("inf")
    overlap: float = 1.0
    consensus: int = 1
    starts: int = 1
    drift_mm: float = 0.0
    side_mm: float = 1.0
    voxel_mm: float = 1.0
    thorough: bool = True
    unchecked: tuple[str, ...] = ()
    mirror_axis: str | None = None
    deviation: float | None = None
    causes: tuple[Cause, ...] = field(default=())
    compared: str = "intensities"
    representation: str = "comir"


@dataclass(frozen=True)
class _Checked:
    """What the probe of a pair says."""

    measured: Measured | None = None
    voxel_mm: float = 1.0
    unchecked: tuple[str, ...] = ()
    mirror_axis: str | None = None
    causes: tuple[Cause, ...] = ()


def gather(
    pair: Pair,
    ranking: Ranking,
    inputs: Inputs,
    frame: SlicePlane,
    settings: RegisterSettings,
    images: tuple[Array32, Array32],
    progress: Progress | None = None,
) -> Evidence:
    """Measure the best answer of a ranking.

    Parameters
    ----------
    pair : Pair
        Both volumes as they are compared.
    ranking : Ranking
        The answers, the best first.
    inputs : Inputs
        What is known of the representation, and the features of coarser levels.
    frame : SlicePlane
        Place of comparison.
    settings : RegisterSettings
        How thorough the checks are, and how wide the first search was.
    images : two of (z, y, x)
        Intensities on the grids of the features that are compared.
    progress : callable, optional
        Function that is called with what is being done, how much of it is done, and how much there is.
    """
    best, rival = ranking.best, ranking.runner_up
    seen = inputs.fixed.representation
    apart = halves_distance_mm(pair.refiner, pair.fixed, best.transform, FINE[:1], pair.points_mm)
    try:
        checked = _check(
            probe_of(inputs, frame, (pair.fixed, pair.moving, images)),
            pair,
            ranking,
            inputs,
            settings,
            progress,
        )
    except RegistrationError as error:
        checked = _Checked(unchecked=(f"the answer cannot be checked: {error}",))
    return Evidence(
        measured=checked.measured,
        agreement=best.agreement.correlation,
        reference=seen.reference,
        margin=None if rival is None or best.score <= 0 else 1 - rival.score / best.score,
        halves_mm=apart,
        overlap=best.agreement.overlap,
        consensus=ranking.consensus,
        starts=len(ranking.candidates),
        drift_mm=float(best.start.distance_mm(best.transform, pair.points_mm).mean()),
        side_mm=pair.side_mm,
        voxel_mm=checked.voxel_mm,
        thorough=settings.checks == "full",
        unchecked=checked.unchecked,
        mirror_axis=checked.mirror_axis,
        deviation=_deviation(pair, inputs),
        causes=checked.causes,
        compared=seen.noun if pair.measure.correlates else f"self-similarities of the {seen.noun}",
        representation=settings.representation,
    )


def probe_of(inputs: Inputs, frame: SlicePlane, compared: Compared | None = None) -> Probe:
    """Make the probe of a pair, from maps that were made at the scale of the checks where the representation can.

    Parameters
    ----------
    inputs : Inputs
        Both volumes as they are represented.
    frame : SlicePlane
        Place of comparison.
    compared : two Features and two intensities, optional
        What is compared at the inputs' own level, at that place. It is made again if it is not given.

    Raises
    ------
    RegistrationError
        If a specimen is too small or does not vary.
    """
    levels, correlates = inputs.scales_of_checks, inputs.measure.correlates
    if levels is None:
        fixed, moving, images = compared or _features_at(inputs, frame, None)
        return Probe.of(fixed, moving, images, correlates=correlates)
    fixed, moving, images = _features_at(inputs, frame, levels[0])
    finer = None if levels[1] == levels[0] else _features_at(inputs, frame, levels[1])[:2]
    return Probe.of(fixed, moving, images, correlates=correlates, finer=finer)


def _features_at(inputs: Inputs, frame: SlicePlane, level: int | None) -> Compared:
    """Make the features and intensities of a level, or of the inputs' own, at the place of comparison."""
    made = [
        side.representation.features(side.level if level is None else level)
        for side in (inputs.fixed, inputs.moving)
    ]
    fixed, moving = frame.flattened(made[0][0], made[1][0])
    return fixed, moving, (made[0][1], made[1][1])


def _check(
    probe: Probe,
    pair: Pair,
    ranking: Ranking,
    inputs: Inputs,
    settings: RegisterSettings,
    progress: Progress | None,
) -> _Checked:
    """Measure the best answer, and search again."""
    answer = ranking.best.transform.about(probe.alignment.centre_mm)
    others = [c.transform for c in ranking.candidates if c.failure is None and c.answer > 0]
    unchecked: list[str] = []
    mirror = again = axis = itself = None
    if settings.checks == "full":
        repeat, thorough = repeats(probe, settings, pair.threads, progress)
        again, turned = search_again(probe, answer, repeat, thorough)
        others += turned
        itself = found_itself(probe, inputs.moving.representation, repeat)
        if _is_mirror_blind(inputs):
            mirror, axis = search_mirrored(probe, repeat, answer, sharp_of(pair, probe))
        else:
            unchecked.append(
                "whether the axis of a header is flipped was not checked: these encoders are not blind to mirrors, so "
                "their maps cannot be mirrored in place of the volume"
            )
    elif settings.initial != "global":
        begun = "where keypoints agree" if settings.finds_starts else "at one place"
        unchecked.append(
            f"the refinement started {begun} (--initial {settings.initial}), and --checks quick searches no other: "
            "whether another place agrees better, or a mirrored volume, was not checked"
        )
    rivals = _rivals(probe, answer, others)
    measured = measure(
        probe, answer, rivals=[one for one, _ in rivals], mirror=mirror, again=again, itself=itself
    )
    rival = max(rivals, key=lambda one: one[0])[1] if rivals else None
    return _Checked(
        measured,
        probe.spacing_mm,
        tuple(unchecked),
        axis,
        tuple(causes_of(probe, answer, measured, rival)),
    )


def search_again(
    probe: Probe, answer: Transform, short: SearchAgain, thorough: SearchAgain
) -> tuple[Transform, list[Transform]]:
    """Search from another position: shortly, and thoroughly if what is found is no rival of the answer.

    A short search may miss a right answer: the fine grains of some specimens agree over a few degrees only. What it
    finds instead then agrees far less, so that it has missed the answer and not contradicted it.

    Returns
    -------
    again : Transform
        What agrees best of all that was found.
    found : list of Transform
        All of it.
    """
    found = short.answers_turned(*probe.sides)
    best = _best(probe, found)
    missed = probe.apart_vox(best.transform, answer) > FOUND_VOX
    if missed and best.evidence < (1 - CLOSE) * probe.judged(answer).evidence:
        found = found + thorough.answers_turned(*probe.sides)
        best = _best(probe, found)
    return best.transform, found


def _best(probe: Probe, answers: list[Transform]) -> Aligned:
    """Improve the distinct answers of a repeated search, and give the one that agrees best on the finer grid.

    On the grid of such a search a half turn may agree better than the answer.
    """
    same_vox = SAME_SHARE * probe.side_mm / probe.spacing_mm
    chosen: list[Transform] = []
    for answer in answers:
        if all(probe.apart_vox(answer, one) >= same_vox for one in chosen):
            chosen.append(answer)
    return max(map(probe.judged, chosen), key=lambda one: one.evidence)


def repeats(
    probe: Probe, settings: RegisterSettings, threads: int, progress: Progress | None = None
) -> tuple[SearchAgain, SearchAgain]:
    """Choose how a search is repeated: shortly, and with as many rotations as the first one."""
    rotations = max(_FEWEST_ROTATIONS, settings.rotations // _SHARE_OF_ROTATIONS)
    voxels = min(_MOST_VOXELS, settings.search_voxels) * (2 if probe.fixed.planar else 1)
    if probe.fixed.describe is not None:
        voxels = round(0.75 * voxels)
    short = SearchAgain(rotations, max(1, voxels), _IMPROVED, probe.points_mm, threads, progress)
    return short, replace(short, rotations=max(rotations, settings.rotations), improved=2 * _IMPROVED)


def _rivals(probe: Probe, answer: Transform, others: list[Transform]) -> list[tuple[float, Transform]]:
    """Improve other answers as this one was, the first few that differ, and leave out those that lead to it."""
    same_vox = SAME_SHARE * probe.side_mm / probe.spacing_mm
    found: list[tuple[float, Transform]] = []
    chosen = [answer]
    for other in others:
        if len(found) == _RIVALS:
            break
        if any(probe.apart_vox(other, one) < same_vox for one in chosen):
            continue
        chosen.append(other)
        better = probe.judged(other)
        if probe.apart_vox(better.transform, answer) >= same_vox:
            found.append((better.evidence, better.transform))
    return found


def sharp_of(pair: Pair, probe: Probe) -> tuple[Features, Features]:
    """Give the features on which the mirror is compared: the finest, described where the probe's are.

    On coarse grids many specimens look like their mirror. A head led its mirror by 2 % of the evidence on 48 voxels of
    the general model's maps, and by a third on the finest maps of a specialist.
    """
    return probe.sides if probe.sides[0].describe is not None else (pair.fixed, pair.moving)


def _is_mirror_blind(inputs: Inputs) -> bool:
    return inputs.fixed.representation.mirror_blind and inputs.moving.representation.mirror_blind


def _deviation(pair: Pair, inputs: Inputs) -> float | None:
    """Compare how much the maps vary with how much they did in training; the side that differs more counts."""
    found = []
    for side, features in ((inputs.fixed, pair.fixed), (inputs.moving, pair.moving)):
        expected = side.representation.expected_deviation
        if expected:
            found.append(float(features.values[:, features.mask].std()) / expected)
    return max(found, key=lambda ratio: max(ratio, 1 / max(ratio, 1e-9))) if found else None
