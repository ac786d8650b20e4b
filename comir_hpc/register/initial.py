"""Find where the refinement of a pair starts, as the settings ask for.

There are five ways: as the grids say, at equal centres, by a search of all rotations and shifts, by keypoints, or at a
transform or landmarks that the user gives.
"""

from __future__ import annotations

import contextlib

import numpy as np

from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.host.progress import Progress
from comir_hpc.register.global_search import rotations_to_try, search_spacing_mm
from comir_hpc.register.inputs import Inputs
from comir_hpc.register.long_specimens import axial_rotations
from comir_hpc.register.pair import Pair
from comir_hpc.register.ranking import COARSE, FINE
from comir_hpc.register.refine import Refiner
from comir_hpc.register.slices import SlicePlane
from comir_hpc.register.starts import Initial, Scale, StartFinder
from comir_hpc.representations import Measure, one_channel
from comir_hpc.transforms.affine import Affine as Transform

# A slice has about a thirtieth of a volume's voxels. So its coarse grid is finer along each axis, to give enough
# evidence.
_SLICE_GRID = 2
# Gauss-Newton steps on the coarsest grid, from a start that is given: 45 degrees are not done in 12 of them.
_STEPS_FROM_ONE = 40


def find_starts(
    pair: Pair, settings: RegisterSettings, inputs: Inputs, frame: SlicePlane, progress: Progress | None
) -> Initial:
    """Find rough answers with their scores.

    Raises
    ------
    RegistrationError
        If the volumes do not overlap where the refinement is asked to start, or nothing varies in one of them.
    """
    if inputs.start is not None:
        start = frame.compared(inputs.start.transform).about(pair.fixed.centroid_mm)
        if pair.similarity.at(start).overlap == 0:
            raise RegistrationError(
                f"{settings.initial} puts the two specimens beside each other, so there is nothing to refine; expected "
                "a transform from fixed to moving points (LPS, mm): is it the inverse, or of another pair?"
            )
        return _from_one(pair, settings, inputs, frame, start)
    if settings.initial == "identity":
        if pair.similarity.at(Transform.identity()).overlap == 0:
            raise RegistrationError(
                "the specimens do not overlap where the two grids put them, so --initial identity has nowhere to "
                "start; use --initial global or moments"
            )
        return _from_one(pair, settings, inputs, frame, Transform.identity().about(pair.fixed.centroid_mm))
    if settings.initial == "moments":
        return _from_one(pair, settings, inputs, frame, centred(pair))
    if settings.initial == "features":
        return _by_keypoints(pair, settings, inputs, frame, progress)
    return _by_search(pair, settings, inputs, frame, progress)


def _from_one(
    pair: Pair, settings: RegisterSettings, inputs: Inputs, frame: SlicePlane, start: Transform
) -> Initial:
    """Carry a start that is given through the scales, where the representation has several.

    Fine maps agree only where the two volumes nearly lie on each other, coarse ones from farther away. Measured on
    T1w and EPI, 15 to 45 degrees off: on fine maps 0 of 9 starts came back, this way 7. Where much agrees, SimpleITK's
    many small steps on smoothed maps come back from farther away than Gauss-Newton steps do. So both begin, and the
    start itself stays beside them. What agrees best on the finest grid wins.
    """
    searched, finer = inputs.searched_levels
    if not searched:
        return Initial([(start, None)])
    finder = _finder(pair, settings)
    scales = {level: scale_at(inputs, frame, level) for level in (*searched, *finer)}
    coarse, *others = (*scales.values(), Scale(pair.fixed, pair.moving))
    smoothed = scales[searched[-1]]
    begun = [start]
    with contextlib.suppress(RegistrationError):
        refiner = Refiner(
            *one_channel(smoothed.fixed, smoothed.moving), measure=pair.measure, seed=settings.seed,
            threads=pair.threads,
        )  # fmt: skip
        begun.append(refiner.refine(start, (*COARSE, FINE[0])).transform)
    spacing = search_spacing_mm(coarse.fixed, finder.voxels)
    starts, left = finder.from_answers(begun, [coarse], others, spacing, _STEPS_FROM_ONE)
    return Initial([*starts, (start, None)], None, _level_of(left, scales))


def _by_search(
    pair: Pair, settings: RegisterSettings, inputs: Inputs, frame: SlicePlane, progress: Progress | None
) -> Initial:
    """Search all rotations and shifts."""
    finder = _finder(pair, settings)
    rotations = axial_rotations(pair.fixed, pair.moving, settings.rotations)
    if rotations is None:
        rotations = rotations_to_try(settings.rotations, pair.fixed.grid.planar)
    compared = Scale(pair.fixed, pair.moving)
    searched, finer = inputs.searched_levels
    if not searched:
        return Initial(*finder.at_one_scale(compared, rotations, progress))
    scales = {level: scale_at(inputs, frame, level) for level in (*searched, *finer)}
    starts, found, left = finder.through_scales(
        [scales[level] for level in searched],
        [*(scales[level] for level in finer), compared],
        rotations,
        progress,
    )
    return Initial(starts, found, _level_of(left, scales))


def _by_keypoints(
    pair: Pair, settings: RegisterSettings, inputs: Inputs, frame: SlicePlane, progress: Progress | None
) -> Initial:
    """Match keypoints, and take the maps that matches agree on."""
    finder = _finder(pair, settings)
    compared = Scale(pair.fixed, pair.moving)
    searched, finer = inputs.searched_levels
    scales = {level: scale_at(inputs, frame, level) for level in (*searched, *finer)}
    # Keypoints stand on search and alignment: imported where they are used, the chain of imports stays short.
    from comir_hpc.register.keypoints import KeypointFinder

    keypoints = KeypointFinder(settings, pair.measure, pair.points_mm, inputs.fixed.representation.noun)
    spacing = search_spacing_mm(pair.fixed, finder.voxels)
    found = keypoints.find([*scales.values(), compared], spacing, progress)
    if found.failure is not None:
        return Initial([], failure=found.failure)
    starts, left = finder.from_answers(
        found.answers,
        [scales[level] for level in searched],
        [*(scales[level] for level in finer), compared],
        spacing,
    )
    return Initial(starts, None, _level_of(left, scales), (found.note,))


def _finder(pair: Pair, settings: RegisterSettings) -> StartFinder:
    return StartFinder(
        pair.measure,
        pair.points_mm,
        settings.candidates,
        search_voxels(settings, pair.measure, pair.fixed.grid.planar),
        pair.threads,
    )


def _level_of(left: Scale | None, scales: dict[int, Scale]) -> int | None:
    return next((level for level, scale in scales.items() if scale is left), None)


def scale_at(inputs: Inputs, frame: SlicePlane, level: int) -> Scale:
    """Make the features of both volumes at a coarser level, at the place of comparison."""
    return Scale(
        *frame.flattened(*(side.representation.features(level)[0] for side in (inputs.fixed, inputs.moving)))
    )


def search_voxels(settings: RegisterSettings, measure: Measure, planar: bool) -> int:
    """Choose the voxels along the longest side of the fixed specimen in the global search."""
    voxels = settings.search_voxels * (_SLICE_GRID if planar else 1)
    return max(1, round(measure.search_grid * voxels))


def centred(pair: Pair) -> Transform:
    """Shift one specimen's centre of mass onto the other's."""
    centre = pair.fixed.centroid_mm
    return Transform.rigid(np.eye(3), pair.moving.centroid_mm - centre, centre)


def as_before(pair: Pair) -> Transform:
    """Find how the pair lay before: as the grids say, or centred if that shows nothing of the moving specimen."""
    as_given = Transform.identity()
    return as_given if pair.similarity.at(as_given).overlap > 0 else centred(pair)
