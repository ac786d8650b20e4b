"""Find where the refinement of a pair starts, as the settings ask for: as given, at equal centres, or by a search."""

from __future__ import annotations

import numpy as np

from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.host.progress import Progress
from comir_hpc.register.global_search import Search, rotations_to_try
from comir_hpc.register.inputs import Inputs
from comir_hpc.register.long_specimens import axial_rotations
from comir_hpc.register.pair import Pair
from comir_hpc.register.slices import SlicePlane
from comir_hpc.register.starts import Scale, Start, StartFinder
from comir_hpc.representations import Measure
from comir_hpc.transforms.affine import Affine as Transform

# A slice has about a thirtieth of a volume's voxels. So its coarse grid is finer along each axis, to give enough
# evidence.
_SLICE_GRID = 2


def find_starts(
    pair: Pair, settings: RegisterSettings, inputs: Inputs, frame: SlicePlane, progress: Progress | None
) -> tuple[list[Start], Search | None, int | None]:
    """Find rough answers with their scores, the search that they come from, and the level that they were left at.

    Without a search there is none. The level is None if it is the one that is compared.

    Raises
    ------
    RegistrationError
        If there is nowhere to start.
    """
    if settings.initial == "identity":
        if pair.similarity.at(Transform.identity()).overlap == 0:
            raise RegistrationError(
                "the specimens do not overlap where the two grids put them, so --initial identity has nowhere to "
                "start; use --initial global or moments"
            )
        return [(Transform.identity().about(pair.fixed.centroid_mm), None)], None, None
    if settings.initial == "moments":
        return [(centred(pair), None)], None, None
    planar = pair.fixed.grid.planar
    finder = StartFinder(
        pair.measure,
        pair.points_mm,
        settings.candidates,
        search_voxels(settings, pair.measure, planar),
        pair.threads,
    )
    rotations = axial_rotations(pair.fixed, pair.moving, settings.rotations)
    if rotations is None:
        rotations = rotations_to_try(settings.rotations, planar)
    searched, finer = inputs.searched_levels
    if not searched:
        return *finder.at_one_scale(Scale(pair.fixed, pair.moving), rotations, progress), None
    scales = {level: scale_at(inputs, frame, level) for level in (*searched, *finer)}
    compared = Scale(pair.fixed, pair.moving)
    starts, found, left = finder.through_scales(
        [scales[level] for level in searched],
        [*(scales[level] for level in finer), compared],
        rotations,
        progress,
    )
    return starts, found, next((level for level, scale in scales.items() if scale is left), None)


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
