"""Test the method on the moving volume alone: it has to find a turned copy of it, with new noise.

If it does not, it cannot see this specimen: that is too smooth, alike when turned, or nothing but noise to it. If it
does, and the pair still has nothing in common, the two volumes do not match. The copy is turned as an image, and
represented after that, so that neither its voxels nor its noise are those of the volume.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from comir_hpc.errors import RegistrationError
from comir_hpc.register.alignment import Alignment
from comir_hpc.register.checks.again import SearchAgain, known_turn
from comir_hpc.register.coarse import coarsen
from comir_hpc.representations.criteria import Array32
from comir_hpc.representations.features import Features
from comir_hpc.representations.protocol import Representation
from comir_hpc.space.grid import FloatArray, Grid, Triple
from comir_hpc.transforms.affine import Affine as Transform

if TYPE_CHECKING:  # a type only: the chain of imports stays short
    from comir_hpc.register.checks.probe import Probe

_NOISE = 0.05  # of the copy, in deviations of the specimen's intensities
_MOST_VOXELS = 128**3  # of a copy: representing a larger one would take longer than the other checks
_FAR_VOX = 20.0
_FEWEST, _ANSWERS, _STEPS = 60, 4, 12
_AS_WELL = 0.03  # share of the best answer's evidence by which another one is as good
_BESIDE_VOX, _BESIDE_DEG = 2.0, 10.0


def found_itself(probe: Probe, representation: Representation, repeat: SearchAgain) -> float | None:
    """Find the moving volume in a turned copy of itself.

    Parameters
    ----------
    probe : Probe
        Both volumes on the grid of the checks.
    representation : Representation
        Representation of the moving volume.
    repeat : SearchAgain
        How a search is repeated.

    Returns
    -------
    float or None
        Mean distance from the known motion to what was found, in voxels of the checks. None if it was not tried: the
        representation is stored and cannot be made of another image, or the volume is large.
    """
    moving = probe.sides[1]
    motion = known_turn(moving, moving.grid.planar)
    grid = grid_around(moving, motion)
    if np.prod(grid.shape_zyx) > _MOST_VOXELS:
        return None
    copy = representation.represented(*turned_copy(probe.shown, moving.mask, moving.grid, motion, grid), grid)
    if copy is None:
        return None
    if moving.describe is not None and copy.describe is None:
        copy = replace(copy, describe=moving.describe)
    points = _inside_mm(moving, 400)
    try:
        alignment = Alignment(coarsen(moving, probe.spacing_mm), coarsen(copy, probe.spacing_mm, finer=2))
        # A search with few rotations may miss what the method sees. So it starts beside the known motion, too: the
        # search is there to find what looks alike elsewhere.
        few = replace(repeat, rotations=max(_FEWEST, repeat.rotations // 2), points_mm=points, progress=None)
        starts = few.answers(moving, copy)[:_ANSWERS]
        starts.append(motion.compose(_beside(moving, _BESIDE_VOX * probe.spacing_mm)))
        ends = [alignment.improve(one.about(alignment.centre_mm), _STEPS) for one in starts]
    except RegistrationError:  # nothing varies in it
        return _FAR_VOX
    # What agrees best counts, wherever it began; of answers that agree as well, the farthest: nothing tells them apart.
    best = max(one.evidence for one in ends)
    away = [
        float(one.transform.distance_mm(motion, points).mean()) / probe.spacing_mm
        for one in ends
        if one.evidence >= best - _AS_WELL * abs(best)
    ]
    return min(max(away), _FAR_VOX)


def _beside(features: Features, shift_mm: float) -> Transform:
    """Make a motion by a shift in x and a turn in the plane across z, which a slice can make, too."""
    turned = Rotation.from_euler("z", _BESIDE_DEG, degrees=True).as_matrix()
    return Transform.rigid(turned, np.array([shift_mm, 0.0, 0.0]), features.centroid_mm)


def grid_around(features: Features, motion: Transform) -> Grid:
    """Make a grid that holds the specimen after a motion, with the voxels and axes of its own grid."""
    grid = features.grid
    # Of so many points none is much nearer to the rim than the farthest voxel; the five voxels below make up for it.
    reach = float(np.linalg.norm(_inside_mm(features, 100_000) - features.centroid_mm, axis=1).max())
    z, y, x = (
        2 * int(np.ceil(reach / s)) + 5 if axis in grid.axes else 1 for axis, s in enumerate(grid.spacing_mm)
    )
    shape: Triple = (z, y, x)
    half = grid.matrix_mm[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    corner = motion.apply(features.centroid_mm) - half
    return Grid(
        shape, grid.spacing_mm, (float(corner[0]), float(corner[1]), float(corner[2])), grid.direction
    )


def turned_copy(
    image: Array32, mask: NDArray[np.bool_], grid: Grid, motion: Transform, onto: Grid
) -> tuple[Array32, NDArray[np.bool_]]:
    """See an image and its mask (z, y, x) after a motion, on another grid, with noise that the image has not."""
    back = np.linalg.inv(grid.matrix_mm) @ motion.inverse().matrix_mm @ onto.matrix_mm
    outside = float(np.median(image[~mask])) if not mask.all() else float(image.min())
    moved, seen = (
        ndimage.affine_transform(
            one.astype(np.float32),
            back[:3, :3],
            back[:3, 3],
            output_shape=onto.shape_zyx,
            order=1,
            cval=empty,
        )
        for one, empty in ((image, outside), (mask, 0.0))
    )
    spread = _NOISE * float(image[mask].std())
    moved += np.float32(spread) * np.random.default_rng(0).standard_normal(moved.shape, dtype=np.float32)
    return moved, seen > 0.5


def _inside_mm(features: Features, count: int) -> FloatArray:
    """Give about `count` points of the specimen, (N, 3) in mm: all of them would take more memory than the volume."""
    index = np.flatnonzero(features.mask)
    every = max(1, len(index) // count) | 1  # an odd stride, since sides are often even
    return features.grid.world_mm(np.stack(np.unravel_index(index[::every], features.mask.shape), axis=-1))
