"""Volumes with a known answer for the tests of registration."""

from dataclasses import asdict

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from comir_hpc.representations.features import Features
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform
from comir_hpc.volumes.volume import Intensity, Volume

OBLIQUE = tuple(map(tuple, Rotation.from_euler("xyz", (20, -35, 110), degrees=True).as_matrix().tolist()))
FLIPPED = ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

CAME_LATER = {
    "fixed_mask",
    "moving_mask",
    "form",
    "keypoints",
    "match_ratio",
    "checks",
    "fallback",
    "last_step",
    "smoothness_mm",
}
"""Settings that came later: they count only where they are not their defaults (register/inputs.py)."""


def turn(degrees, axis=(1, 2, -0.5)):
    axis = np.asarray(axis, float)
    return Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis)).as_matrix()


def specimen(shape=(40, 44, 36), seed=0, brightness=0.0):
    """Structures about a mean brightness in an ellipsoid, 0 around it: values (z, y, x) and mask, no symmetry."""
    rng = np.random.default_rng(seed)
    centred = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) / (n / 2) for n in shape], indexing="ij"))
    inside = ((centred / np.array([0.75, 0.8, 0.7])[:, None, None, None]) ** 2).sum(0) < 1
    noise = ndimage.gaussian_filter(rng.normal(size=shape), 2.0)
    values = np.where(inside, brightness + noise / noise.std(), 0)
    return ndimage.gaussian_filter(values, 0.7).astype(np.float32), inside


def seen(values, grid, onto, truth):
    """What a scanner with grid `onto` sees of a fixed volume that lies displaced by `truth` (fixed to moving)."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in onto.shape_zyx], indexing="ij"), axis=-1)
    place = grid.index_zyx(truth.inverse().apply(onto.world_mm(index)))
    moved = ndimage.map_coordinates(values.astype(np.float32), np.moveaxis(place, -1, 0), order=1, cval=0.0)
    return moved.astype(np.float32)


def features_pair(truth, grid=None, onto=None, seed=0):
    """Fixed and moving features of one specimen, displaced by `truth`."""
    values, mask = specimen(seed=seed)
    grid = grid or Grid(values.shape, (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))
    onto = onto or grid
    moved = seen(values, grid, onto, truth)
    moved_mask = seen(mask.astype(np.float32), grid, onto, truth) > 0.5
    return Features(values[None], mask, grid), Features(moved[None], moved_mask, onto)


def stretched_pair(centre):
    """A truth that stretches and shears a little, both sides of it, and the rigid start that is nearest to it."""
    matrix = np.eye(4)
    matrix[:3, :3] = turn(20) @ np.array([[1.06, 0.02, 0], [0, 0.95, 0], [0, 0.03, 1.0]])
    truth = Transform(matrix).compose(Transform.rigid(np.eye(3), (1.0, 0, 0), centre))
    grid = Grid((44, 48, 40), (1.0, 1.0, 1.0), tuple((truth.apply(centre) - np.array([20, 24, 22])).tolist()))
    fixed, moving = features_pair(truth, onto=grid)
    start = Transform.rigid(truth.rotation_xyz, truth.apply(centre) - np.asarray(centre), centre)
    return truth, fixed, moving, start


def store(path, values, grid, *, kind="image", foreground_above=1.0, **metadata):
    """A finished volume of (z, y, x) or (c, z, y, x) values, with the statistics that `ingest` writes."""
    values = values if values.ndim == 4 else values[None]
    volume = Volume.create(
        path, grid, values.dtype, channels=len(values), kind=kind, chunk=16, shard=64, metadata=metadata
    )
    volume.write(grid.box, values)
    volume.build_pyramid()
    statistics = []
    for one in values:
        inside = one[one > foreground_above]
        low, high = np.percentile(inside, (0.1, 99.9)) if inside.size else (0.0, 1.0)
        mean, std = (inside.mean(), inside.std()) if inside.size else (0.0, 1.0)
        statistics.append(
            asdict(Intensity(float(low), float(high), float(mean), float(std), foreground_above))
        )
    volume.finish(**({} if kind == "representation" else {"intensity": statistics}))
    return Volume.open(path)


def errors_vox(found: Transform, truth: Transform, features: Features):
    """Mean distance between where two transforms send the specimen's points, in voxels of the fixed grid."""
    points = features.grid.world_mm(np.argwhere(features.mask)[::7])
    return float(found.distance_mm(truth, points).mean() / min(features.grid.spacing_mm))
