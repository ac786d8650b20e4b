"""Hold a pair on two coarse grids, on which answers are checked in a fraction of a second each.

Answers are compared with each other on the finer grid (48 voxels along a mean side), and moved about on the coarser one
(32). The general model's volumes are encoded for both. Other features are averaged to them. Intensities are described
by their self-similarity: an answer that mutual information has found is then checked by a criterion which it was not
optimised for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from comir_hpc.register.alignment import Aligned, Alignment
from comir_hpc.register.coarse import CoarseFeatures, coarsen, standardise
from comir_hpc.representations.criteria import Array32
from comir_hpc.representations.features import Features
from comir_hpc.representations.mind import self_similarity
from comir_hpc.space.grid import FloatArray
from comir_hpc.transforms.affine import Affine as Transform

_ACROSS, _ACROSS_DESCRIBED, _ACROSS_SLICE = (32, 48), (24, 32), (64, 96)
# Voxels along a mean side of the specimen, on the coarser and the finer grid: of maps, described channels and slices.
_CLASSES = 24
_POINTS = 400
_STEPS = 8


@dataclass(frozen=True, eq=False)
class Probe:
    """Both volumes on the grid of the checks.

    Attributes
    ----------
    fixed, moving : CoarseFeatures
        What is compared; the moving one has a grid twice as fine.
    images : tuple of CoarseFeatures
        Intensities of both, on the same kind of grids.
    sides : tuple of Features
        Features that both were made of.
    shown : (z, y, x)
        Intensity of the moving volume, on the grid of its features.
    finer : tuple of Features
        Features on which answers are compared with each other.
    optimised : bool
        Whether the answer was found by what is compared here. It was not where mutual information found it.
    """

    fixed: CoarseFeatures
    moving: CoarseFeatures
    images: tuple[CoarseFeatures, CoarseFeatures]
    sides: tuple[Features, Features]
    shown: Array32
    finer: tuple[Features, Features]
    optimised: bool

    @classmethod
    def of(
        cls,
        fixed: Features,
        moving: Features,
        images: tuple[NDArray[np.float32], NDArray[np.float32]],
        *,
        correlates: bool,
        finer: tuple[Features, Features] | None = None,
    ) -> Probe:
        """Make the probe of a pair.

        Parameters
        ----------
        fixed, moving : Features
            Features that are compared, at the scale of the checks or finer.
        images : two of (z, y, x)
            Intensities on the grids of the features.
        correlates : bool
            Whether a right answer makes the features correlate. If not, they are described by their self-similarity.
        finer : two Features, optional
            Features that were made for the finer grid; the same ones if there are none.

        Raises
        ------
        RegistrationError
            If a specimen is too small or does not vary.
        """
        sides = fixed, moving
        if not correlates:
            described = [replace(side, values=side.values[:1], describe=self_similarity) for side in sides]
            sides = described[0], described[1]
        spacing = spacing_of_checks(*sides)[0]
        shown = [
            Features(image[None], side.mask, side.grid, side.known)
            for image, side in zip(images, sides, strict=True)
        ]
        return cls(
            fixed=coarsen(sides[0], spacing),
            moving=coarsen(sides[1], spacing, finer=2),
            images=(coarsen(shown[0], spacing), coarsen(shown[1], spacing, finer=2)),
            sides=sides,
            shown=images[1],
            finer=sides if finer is None or not correlates else finer,
            optimised=correlates,
        )

    @property
    def spacing_mm(self) -> float:
        """Side of a voxel of the checks, in mm."""
        return self.fixed.spacing_mm

    @cached_property
    def alignment(self) -> Alignment:
        """What compares and improves answers on the coarser grid."""
        return Alignment(self.fixed, self.moving)

    @cached_property
    def judging(self) -> Alignment:
        """What compares answers with each other, on the finer grid."""
        return self.judging_with(self.finer[1])

    def judging_with(self, moving: Features) -> Alignment:
        """Make the same with another moving volume: the mirrored one."""
        spacing = spacing_of_checks(*self.finer)[1]
        return Alignment(coarsen(self.finer[0], spacing), coarsen(moving, spacing, finer=2))

    @cached_property
    def swapped(self) -> Alignment:
        """The same with the roles of the two volumes exchanged: its answers go from moving to fixed points."""
        fixed, moving = self.sides
        return Alignment(coarsen(moving, self.spacing_mm), coarsen(fixed, self.spacing_mm, finer=2))

    @cached_property
    def grid_mm(self) -> FloatArray:
        """World points of all voxels of the fixed grid, (z*y*x, 3), in mm."""
        index = np.stack(np.meshgrid(*map(np.arange, self.fixed.weights.shape), indexing="ij"), -1)
        return self.fixed.origin_mm + index.reshape(-1, 3) @ self.fixed.frame.T

    @cached_property
    def points_mm(self) -> FloatArray:
        """Some points of the fixed specimen, (N, 3) in mm."""
        inside = self.grid_mm[self.fixed.weights.ravel() > 0.5]
        return inside[:: max(1, len(inside) // _POINTS)]

    @cached_property
    def side_mm(self) -> float:
        """Mean side of the box around the fixed specimen, in mm; for a slice without z."""
        sides = np.ptp(self.points_mm, axis=0)
        return float(sides[: 2 if self.fixed.planar else 3].mean())

    @cached_property
    def axes(self) -> tuple[FloatArray, FloatArray]:
        """Main axes of the fixed specimen (columns, x, y, z), the longest first, and its spread along them in mm."""
        values, vectors = np.linalg.eigh(np.cov(self.points_mm.T) + 1e-9 * np.eye(3))
        return np.asarray(vectors[:, ::-1]), np.sqrt(np.maximum(values[::-1], 0))

    def improve(self, answer: Transform, steps: int = _STEPS) -> Aligned:
        """Improve an answer on the coarser grid."""
        return self.alignment.improve(answer, steps)

    def judged(self, rough: Transform) -> Aligned:
        """Improve a rough answer on both grids, and measure it on the finer one."""
        better = self.improve(rough.about(self.alignment.centre_mm)).transform
        return self.judging.improve(better, _STEPS)

    def apart_vox(self, one: Transform, other: Transform) -> float:
        """Measure the mean distance between two answers, in voxels of the checks."""
        return float(one.distance_mm(other, self.points_mm).mean()) / self.spacing_mm

    def halves(self) -> list[tuple[Alignment, Alignment]]:
        """Cut the fixed specimen across each axis through its centre of mass: what compares each half alone."""
        place = self.grid_mm - self.fixed.centroid_mm
        unit = self.fixed.frame / np.linalg.norm(self.fixed.frame, axis=0)
        along = (place @ unit).reshape(*self.fixed.weights.shape, 3)
        axes = (1, 2) if self.fixed.planar else (0, 1, 2)
        lower = [(along[..., axis] < 0).astype(np.float32) for axis in axes]
        return [
            (Alignment(self.fixed, self.moving, half), Alignment(self.fixed, self.moving, 1 - half))
            for half in lower
        ]

    # ------------------------------------------------------------------ the moving volume under an answer

    def seen(self, answer: Transform) -> tuple[Array32, Array32]:
        """Look at the moving channels (C, z, y, x) on the fixed grid, and at the weights of both together."""
        values, held = self._looked_up(self.moving, answer)
        cube = values.reshape(-1, *self.fixed.weights.shape)
        if self.moving.describe is not None:
            cube = self.moving.describe(cube[0])
        return cube, held.reshape(self.fixed.weights.shape) * self.fixed.weights

    def seen_image(self, answer: Transform) -> tuple[Array32, Array32]:
        """Look at the moving intensity (z, y, x) on the grid of the fixed image, and at the weights of both."""
        fixed, moving = self.images
        values, held = self._looked_up(moving, answer, self._image_points_mm)
        return values[0].reshape(fixed.weights.shape), held.reshape(fixed.weights.shape) * fixed.weights

    def information(self, answer: Transform) -> float:
        """Measure the normalised mutual information of the intensities, less 1: 0 to 1."""
        values, weights = self.seen_image(answer)
        return self.shared_information(values, weights)

    def shared_information(self, values: Array32, weights: Array32) -> float:
        """Measure it for moving intensities that lie on the fixed grid."""
        inside = weights > 0.5
        if inside.sum() < _CLASSES:
            return 0.0
        fixed = self._classes[inside]
        moving = _classes(values[inside], self._moving_range)
        counts = np.bincount(fixed * _CLASSES + moving, minlength=_CLASSES**2).reshape(_CLASSES, _CLASSES)
        joint = counts / counts.sum()
        both = _entropy(joint)
        return (_entropy(joint.sum(0)) + _entropy(joint.sum(1))) / both - 1 if both > 0 else 0.0

    def correlation(self, cube: Array32, weights: Array32) -> float:
        """Correlate moving channels that lie on the fixed grid with the fixed ones."""
        inside = weights.ravel() > 0.25
        if inside.sum() < _CLASSES:
            return 0.0
        held = weights.ravel()[inside]
        sides = [
            standardise(v.reshape(len(v), -1)[:, inside], held) for v in (self.fixed.described.values, cube)
        ]
        if sides[0] is None or sides[1] is None:
            return 0.0
        product = np.einsum("cn,cn,n->", sides[0][0], sides[1][0], held, dtype=np.float64)
        return float(product) / float(held.sum(dtype=np.float64))

    # ------------------------------------------------------------------ parts

    @cached_property
    def _image_points_mm(self) -> FloatArray:
        fixed = self.images[0]
        index = np.stack(np.meshgrid(*map(np.arange, fixed.weights.shape), indexing="ij"), -1).reshape(-1, 3)
        return fixed.origin_mm + index @ fixed.frame.T

    @cached_property
    def _classes(self) -> NDArray[np.int64]:
        fixed = self.images[0]
        inside = fixed.values[0][fixed.weights > 0.5]
        return _classes(fixed.values[0], _range(inside))

    @cached_property
    def _moving_range(self) -> tuple[float, float]:
        moving = self.images[1]
        return _range(moving.values[0][moving.weights > 0.5])

    def _looked_up(
        self, moving: CoarseFeatures, answer: Transform, points_mm: FloatArray | None = None
    ) -> tuple[Array32, Array32]:
        points = self.grid_mm if points_mm is None else points_mm
        return moving.at((answer.apply(points) - moving.origin_mm) @ np.linalg.inv(moving.frame).T)


def spacing_of_checks(fixed: Features, moving: Features) -> tuple[float, float]:
    """Choose the side of a voxel of the coarser and the finer grid, in mm: no finer than the features."""
    inside = np.argwhere(fixed.mask)
    sides = (np.ptp(inside, axis=0) + 1) * fixed.grid.spacing_mm
    mean = float(np.mean([sides[axis] for axis in fixed.grid.axes]))
    across = _ACROSS_DESCRIBED if fixed.describe is not None else _ACROSS
    if fixed.grid.planar:
        across = _ACROSS_SLICE
    finest = max(fixed.grid.finest_mm, moving.grid.finest_mm)
    return max(finest, mean / across[0]), max(finest, mean / across[1])


def _range(values: Array32) -> tuple[float, float]:
    low, high = np.percentile(values, (0.5, 99.5)) if values.size else (0.0, 1.0)
    return float(low), float(high)


def _classes(values: Array32, limits: tuple[float, float]) -> NDArray[np.int64]:
    low, high = limits
    scaled = (values - low) / max(high - low, 1e-12) * _CLASSES
    found: NDArray[np.int64] = np.clip(scaled.astype(np.int64), 0, _CLASSES - 1)
    return found


def _entropy(shares: FloatArray) -> float:
    held = shares[shares > 0]
    return float(-(held * np.log(held)).sum())
