"""Make random anatomies: label images of many kinds, none of which is any real specimen.

A label stands for one material. What it looks like is decided later, for each view on its own (`contrasts`). The kinds
are mixed because what is learned from one kind carries poorly to others: argmax of noise gives tissue, iso-bands give
layers, Voronoi cells give grains, particles and tubes give powders, cells and vessels, nested shells give heads and
fruit (Billot et al. 2023 and Hoffmann et al. 2022 for noise; general.md of the project's notes for the mix).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from comir_hpc.learning.synthetic.fields import Floats, nearest, patch_points, reach_of, smooth_noise, turned
from comir_hpc.space.grid import Triple
from comir_hpc.space.rotations import random_rotation

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A specimen that does not exist.

    Attributes
    ----------
    labels : (z, y, x) int64
        Number of the material at each voxel.
    count : int
        Number of materials.
    air : (z, y, x) bool
        True outside the specimen.
    rim : (z, y, x) bool
        True in a layer below the specimen's surface.
    kind : str
        How the labels were made.
    """

    labels: Labels
    count: int
    air: NDArray[np.bool_]
    rim: NDArray[np.bool_]
    kind: str


def noise_argmax(rng: np.random.Generator, points: Floats) -> tuple[Labels, int]:
    """Give each voxel the number of the smooth field that is largest there: compact regions of equal rank."""
    count = int(rng.integers(3, 14))
    fields = smooth_noise(rng, points, count, cell=float(np.exp(rng.uniform(np.log(4), np.log(14)))))
    fields += rng.normal(0, 0.4, (count, 1, 1, 1)).astype(np.float32)  # some materials are rare
    return fields.argmax(axis=0), count


def iso_bands(rng: np.random.Generator, points: Floats) -> tuple[Labels, int]:
    """Cut one smooth field into bands: layers that follow each other in order."""
    count = int(rng.integers(3, 9))
    field = smooth_noise(rng, points, 1, cell=float(rng.uniform(7, 18)))[0]
    # The noise has a deviation of about 1, so nearly all of it lies between these ends.
    cuts = np.sort(rng.uniform(-1.6, 1.6, count - 1))
    return np.digitize(field, cuts).astype(np.int64), count


def grains(rng: np.random.Generator, points: Floats) -> tuple[Labels, int]:
    """Fill space with Voronoi cells of a few materials."""
    count, seeds = int(rng.integers(3, 9)), int(np.exp(rng.uniform(np.log(10), np.log(160))))
    reach = reach_of(points)
    centres = rng.uniform(-reach, reach, (seeds, 3)).astype(np.float32)
    cells, _ = nearest(points, centres, np.zeros(seeds, np.float32))
    return rng.integers(count, size=seeds)[cells], count


def particles(rng: np.random.Generator, points: Floats) -> tuple[Labels, int]:
    """Put balls of several sizes and materials into a matrix of one or two materials."""
    count, seeds = int(rng.integers(2, 7)), int(np.exp(rng.uniform(np.log(6), np.log(80))))
    reach = reach_of(points)
    centres = rng.uniform(-reach, reach, (seeds, 3)).astype(np.float32)
    # The distance between seeds shrinks with their number, and the balls with it.
    radii = (reach / seeds ** (1 / 3) * rng.uniform(0.3, 1.0, seeds)).astype(np.float32)
    cells, power = nearest(points, centres, radii**2)
    matrix = (smooth_noise(rng, points, 1, cell=12.0)[0] > rng.uniform(-0.5, 1.5)).astype(np.int64)
    return np.where(power < 0, 2 + rng.integers(count, size=seeds)[cells], matrix), count + 2


def tubes(rng: np.random.Generator, points: Floats) -> tuple[Labels, int]:
    """Lay curved tubes through a matrix of compact regions."""
    labels, count = noise_argmax(rng, points)
    reach = reach_of(points)
    many, length = int(rng.integers(2, 7)), 24
    start = rng.uniform(-0.8, 0.8, (many, 1, 3)) * reach
    # The direction itself walks at random: tubes bend, and have no kinks.
    heading = rng.standard_normal((many, 1, 3)) + 0.35 * rng.standard_normal((many, length, 3)).cumsum(axis=1)
    steps = heading / np.linalg.norm(heading, axis=-1, keepdims=True) * reach / 10
    path = (start + steps.cumsum(axis=1)).reshape(-1, 3).astype(np.float32)
    radii = np.repeat(rng.uniform(1.2, 4.0, many), length).astype(np.float32)
    cells, power = nearest(points, path, radii**2)
    return np.where(power < 0, count + cells // length, labels), count + many


def shells(rng: np.random.Generator, points: Floats) -> tuple[Labels, int]:
    """Paint ellipsoids over each other, each with a wall of another material."""
    many = int(rng.integers(4, 13))
    reach = reach_of(points)
    labels = (smooth_noise(rng, points, 1, cell=14.0)[0] > 0).astype(np.int64)
    for number in range(many):
        radii = reach * np.exp(rng.uniform(np.log(0.12), np.log(0.8), 3)) * (1 - 0.6 * number / many)
        axes = (random_rotation(rng) / radii).astype(np.float32)
        centre = rng.uniform(-0.7, 0.7, 3).astype(np.float32) * reach
        distance = np.square((points - centre) @ axes).sum(axis=-1)
        wall = rng.uniform(0.5, 0.9) ** 2
        labels[distance < 1] = 2 + 2 * number
        labels[distance < wall] = 3 + 2 * number
    return labels, 2 + 2 * many


KINDS: dict[str, tuple[float, Callable[[np.random.Generator, Floats], tuple[Labels, int]]]] = {
    "noise argmax": (0.42, noise_argmax),
    "ellipsoids in shells": (0.28, shells),
    "iso-bands": (0.08, iso_bands),
    "Voronoi grains": (0.08, grains),
    "particles": (0.07, particles),
    "tubes": (0.07, tubes),
}
"""Share and maker of each kind. The first two are the mix that was seen to work alone; the others widen it."""

_BODY, _RIM = 0.65, 0.25  # shares of anatomies that have a surface, and of those that have a layer below it


def draw_anatomy(rng: np.random.Generator, patch_zyx: Triple, scale: float) -> Anatomy:
    """Draw one anatomy.

    Parameters
    ----------
    rng : Generator
        Source of everything random.
    patch_zyx : three int
        Sides in voxels.
    scale : float
        Size of a voxel: with 2, structures have half as many voxels across, and twice as many of them are seen.
    """
    points = turned(rng, patch_points(patch_zyx), scale, bend=rng.uniform(0.5, 3.0))
    names = list(KINDS)
    kind = names[int(rng.choice(len(names), p=[KINDS[name][0] for name in names]))]
    labels, count = KINDS[kind][1](rng, points)
    air = np.zeros(patch_zyx, dtype=bool)
    rim = air
    if rng.random() < _BODY:
        depth = _depth(rng, points, scale)
        air = depth < 0
        if rng.random() < _RIM:
            rim = ~air & (depth < scale * rng.uniform(1.0, 4.0))
    return Anatomy(labels, count, air, rim, kind)


def _depth(rng: np.random.Generator, points: Floats, scale: float) -> Floats:
    """Measure how far points are below a rough, large surface, in their own unit."""
    reach = reach_of(points)
    if rng.random() < 0.5:
        # A whole body in the patch, or nearly: what a search sees at its coarse scale.
        radii = reach * rng.uniform(0.55, 1.0, 3)
        inside = 1 - np.sqrt(
            np.square((points @ (random_rotation(rng) / radii)).astype(np.float32)).sum(axis=-1)
        )
        depth = inside * radii.min()
    else:
        normal = rng.standard_normal(3)
        normal /= np.linalg.norm(normal)
        depth = points @ normal.astype(np.float32) + reach * rng.uniform(-0.1, 0.5)
    rough = smooth_noise(rng, points, 1, cell=10.0)[0] * scale * rng.uniform(0.3, 2.5)
    return np.asarray(depth + rough, dtype=np.float32)
