"""Find where the refinement of a pair starts, as the settings ask for.

There are five ways: as the grids say, at equal centres, by a search of all rotations and shifts, by keypoints, or at a
transform or landmarks that the user gives.
"""

from __future__ import annotations

import numpy as np

from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.host.progress import Progress
from comir_hpc.register.global_search import rotations_to_try, search_spacing_mm
from comir_hpc.register.inputs import Inputs
from comir_hpc.register.long_specimens import axial_rotations
from comir_hpc.register.pair import Pair
from comir_hpc.register.slices import SlicePlane
from comir_hpc.register.starts import Initial, Scale, StartFinder
from comir_hpc.representations import Measure
from comir_hpc.transforms.affine import Affine as Transform

# A slice has about a thirtieth of a volume's voxels. So its coarse grid is finer along each axis, to give enough
# evidence.
_SLICE_GRID = 2


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
        return Initial([(start, None)])
    if settings.initial == "identity":
        if pair.similarity.at(Transform.identity()).overlap == 0:
            raise RegistrationError(
                "the specimens do not overlap where the two grids put them, so --initial identity has nowhere to "
                "start; use --initial global or moments"
            )
        return Initial([(Transform.identity().about(pair.fixed.centroid_mm), None)])
    if settings.initial == "moments":
        return Initial([(centred(pair), None)])
    if settings.initial == "features":
        return _by_keypoints(pair, settings, inputs, frame, progress)
    return _by_search(pair, settings, inputs, frame, progress)


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
