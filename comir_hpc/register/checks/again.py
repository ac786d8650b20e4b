"""Search again, from a turned position: a right answer is found again wherever the moving volume lies.

It is a search of all rotations, with fewer of them than the first one, on the grid of the coarsest maps. Where it finds
only what agrees far less than the answer, it is done once more with as many rotations as the first one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from comir_hpc.host.progress import Progress, part_of
from comir_hpc.register.alignment import Alignment
from comir_hpc.register.coarse import coarsen
from comir_hpc.register.global_search import distinct, rotations_to_try, search
from comir_hpc.register.long_specimens import axial_rotations
from comir_hpc.representations.features import Features
from comir_hpc.representations.measures import CORRELATION
from comir_hpc.space.grid import FloatArray, Grid, Matrix
from comir_hpc.transforms.affine import Affine as Transform

_APART_VOX = 4.0
"""Distance of the answers that are improved. At 1.5 voxels, seven of twelve led to one half turn of a T1w/EPI head, and
none to the answer that agreed best."""
_FINER = 0.8  # voxel on which answers are improved, in voxels of the search
_STEPS = 8
_KNOWN_TURN_DEG = (57.0, -71.0, 23.0)  # far from every rotation of a cube


@dataclass(frozen=True, eq=False)
class SearchAgain:
    """How a search is repeated.

    Attributes
    ----------
    rotations : int
        Number of rotations that are tried.
    voxels : int
        Voxels along the longest side of the fixed specimen.
    improved : int
        Number of answers that are improved.
    points_mm : (N, 3)
        Points of the fixed specimen, at which answers are told apart.
    threads : int
        Number of threads.
    progress : callable or None
        Function that is called with what is being done, how much of it is done, and how much there is.
    """

    rotations: int
    voxels: int
    improved: int
    points_mm: FloatArray
    threads: int = 1
    progress: Progress | None = None

    def answers(self, fixed: Features, moving: Features) -> list[Transform]:
        """Search all rotations and shifts, and improve the best answers; the best first.

        Raises
        ------
        RegistrationError
            If a volume does not vary inside its mask.
        """
        rotations = axial_rotations(fixed, moving, self.rotations)
        if rotations is None:
            rotations = rotations_to_try(self.rotations, fixed.grid.planar)
        found = search(
            fixed, moving, rotations, voxels=self.voxels, measure=CORRELATION, closer=0, threads=self.threads,
            progress=part_of(self.progress, "check"),
        )  # fmt: skip
        spacing = _FINER * found.spacing_mm
        alignment = Alignment(coarsen(fixed, spacing), coarsen(moving, spacing, finer=2))
        chosen = distinct(found, self.points_mm, self.improved, _APART_VOX * found.spacing_mm)
        improved = [alignment.improve(found.transform(index), _STEPS) for index in chosen]
        return [one.transform for one in sorted(improved, key=lambda one: -one.evidence)]

    def answers_turned(self, fixed: Features, moving: Features) -> list[Transform]:
        """Search with the moving volume in a known other position, and undo the known motion."""
        motion = known_turn(moving, fixed.grid.planar)
        return [motion.inverse().compose(one) for one in self.answers(fixed, moved(moving, motion))]


def known_turn(moving: Features, planar: bool) -> Transform:
    """Make the known motion of the moving volume: a turn by a large, crooked angle about its centre."""
    degrees = (0.0, 0.0, _KNOWN_TURN_DEG[0]) if planar else _KNOWN_TURN_DEG
    rotation = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    return Transform.rigid(rotation, np.zeros(3), moving.centroid_mm)


def moved(features: Features, motion: Transform) -> Features:
    """Move a volume in the world without touching its voxels: only its grid says where they lie."""
    grid = features.grid
    direction = motion.rotation_xyz @ np.asarray(grid.direction)
    rows: list[tuple[float, ...]] = [tuple(row) for row in direction.tolist()]
    turned: Matrix = (rows[0], rows[1], rows[2])  # type: ignore[assignment]
    x, y, z = motion.apply(grid.origin_mm).tolist()
    return replace(features, grid=Grid(grid.shape_zyx, grid.spacing_mm, (x, y, z), turned))
