"""Make what random anatomies are cut from: points of a patch that are turned, scaled and bent, and smooth noise.

Points are in voxels from the centre of the patch. Everything is computed on the CPU in float32, since reader processes
make patches ahead of the device.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from comir_hpc.space.grid import Triple
from comir_hpc.space.rotations import random_rotation

Floats = NDArray[np.float32]


def patch_points(shape_zyx: Triple) -> Floats:
    """List the voxels' offsets from the centre of a patch, (z, y, x, 3) float32, in voxels."""
    axes = [np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2) for n in shape_zyx]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def turned(rng: np.random.Generator, points: Floats, scale: float, bend: float) -> Floats:
    """Turn points by any rotation, multiply them by `scale`, and bend them smoothly by up to about `bend` voxels.

    Labels are functions of such points. So they have no axes in common with the voxel grid, and no straight borders.
    """
    bent = points + smooth_noise(rng, points, 3, cell=12.0).transpose(1, 2, 3, 0) * np.float32(bend)
    return np.asarray((bent @ random_rotation(rng).astype(np.float32)) * np.float32(scale), dtype=np.float32)


def reach_of(points: Floats) -> float:
    """Return about the largest coordinate of turned and bent points, from the eight corners of their patch."""
    # Points between the corners lie within, but for the bending; beyond its border the lattice holds its outer numbers.
    z, y, x = (np.array([0, n - 1]) for n in points.shape[:3])
    return float(np.abs(points[np.ix_(z, y, x)]).max())


def smooth_noise(rng: np.random.Generator, points: Floats, count: int, cell: float) -> Floats:
    """Make smooth random fields, (count, z, y, x) float32 of about unit variance, whose values change over `cell`.

    It is value noise: normal numbers on a lattice of one number a cell, interpolated. The place within a cell goes
    through a smooth step, so that the fields have no creases at the faces of the lattice (Perlin 1985).

    Parameters
    ----------
    rng : Generator
        Source of the lattice's numbers and of its place.
    points : (z, y, x, 3) float32
        Where the fields are evaluated.
    count : int
        Number of fields.
    cell : float
        Side of a lattice cell, in the unit of the points.
    """
    reach = reach_of(points)
    places = (points + np.float32(reach)) / np.float32(cell) + rng.random(3, dtype=np.float32)
    whole = np.floor(places)
    step = places - whole
    places = whole + step * step * (3 - 2 * step)
    side = int(np.ceil(2 * reach / cell)) + 3
    lattice = rng.standard_normal((1, count, side, side, side), dtype=np.float32)
    where = places * np.float32(2 / (side - 1)) - 1
    found = sampled(torch.from_numpy(lattice), where)
    # Interpolation averages eight numbers and takes away a part of their variance.
    return np.asarray(found * np.float32(1.6))


def sampled(values: Tensor, where: Floats, padding: str = "border") -> Floats:
    """Interpolate values (1, c, Z, Y, X) trilinearly at places (z, y, x, 3), -1 and 1 at the outer voxels' centres."""
    grid = torch.from_numpy(np.ascontiguousarray(where[None, ..., ::-1], dtype=np.float32))
    found = F.grid_sample(values, grid, mode="bilinear", padding_mode=padding, align_corners=True)
    return found[0].numpy()


def nearest(points: Floats, seeds: Floats, weights: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Find the seed that each point belongs to: the one with the smallest squared distance less its weight.

    Parameters
    ----------
    points : (z, y, x, 3) float32
        Points to ask for.
    seeds : (K, 3) float32
        Centres.
    weights : (K,) float32
        Squared radius of each seed. With equal ones the cells are those of Voronoi.

    Returns
    -------
    number of the seed (z, y, x) int64, and squared distance less weight (z, y, x) float32: negative inside its ball.
    """
    flat = torch.from_numpy(points.reshape(-1, 3))
    centres = torch.from_numpy(seeds)
    table = torch.addmm(
        (centres**2).sum(dim=1)[None] - torch.from_numpy(weights)[None], flat, centres.T, alpha=-2.0
    )
    best, index = table.min(dim=1)
    power = best + (flat**2).sum(dim=1)
    return index.reshape(points.shape[:-1]).numpy(), power.reshape(points.shape[:-1]).numpy()
