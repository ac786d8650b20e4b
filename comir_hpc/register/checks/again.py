"""Search again: from a turned position, and for the mirrored moving volume.

Both are searches of all rotations with fewer of them than the first one, on the grid of the coarsest maps. A right
answer is found again wherever the moving volume lies. A mirrored volume that agrees better than the volume itself says
that one of the two headers has a flipped axis.
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

_APART_VOX = 1.5
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
