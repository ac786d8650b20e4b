"""Bring a volume onto a coarse isotropic grid, and turn it by any rotation.

Shapes: C channels, M maps, P points of the ball; (b, b, b) is the cube that holds a turned volume. A single slice stays
a slice: its ball is a disc, and its cube is a square (1, b, b).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from comir_hpc.errors import RegistrationError
from comir_hpc.register.lookup import Lookup
from comir_hpc.representations.criteria import Array32
from comir_hpc.representations.features import Describe, Features
from comir_hpc.space.grid import FloatArray, Triple
from comir_hpc.volumes.volume import downsample

# The moving map is cut to a ball that holds this share of its mask. The corners of a full cube would make every FFT
# half as long again, for 2 % of the evidence.
_BALL_SHARE = 0.98
_SURROUNDINGS = 3  # voxels around the mask that are kept where channels describe a neighbourhood


@dataclass(frozen=True, eq=False)
class CoarseFeatures:
    """One volume on an isotropic grid.

    Attributes
    ----------
    values : (C, z, y, x) float32
        Values after a low-pass filter, with zero mean for each channel and unit variance of all together, in the mask.
    weights : (z, y, x) float32
        Share of each voxel that belongs to the mask, 0 to 1.
    frame : (3, 3)
        Steps of one voxel along z, y, x in the world (x, y, z), in mm; they are the columns. Along z, a single slice
        keeps its own step.
    origin_mm : (3,)
        World position (x, y, z) of voxel (0, 0, 0), in mm.
    describe : callable or None
        Makes the channels that are compared, as in `Features`. `values` are then one channel, outside the mask too.
    """

    values: Array32
    weights: Array32
    frame: FloatArray
    origin_mm: FloatArray
    describe: Describe | None = None

    @property
    def planar(self) -> bool:
        """Whether this is a single slice."""
        return len(self.weights) == 1

    @property
    def spacing_mm(self) -> float:
        """Side of a voxel in mm."""
        return float(np.linalg.norm(self.frame[:, -1]))

    @property
    def centroid_mm(self) -> FloatArray:
        """World position (x, y, z) of the mask's centre of mass, in mm."""
        return self.origin_mm + self.frame @ np.asarray(scipy.ndimage.center_of_mass(self.weights))

    @cached_property
    def described(self) -> CoarseFeatures:
        """The same with the channels that are compared as its values."""
        if self.describe is None:
            return self
        values = standardised(self.describe(self.values[0]), self.weights)
        return replace(self, values=values, describe=None)

    @cached_property
    def _lookups(self) -> tuple[Lookup, ...]:
        """Values and weights; in one, where both fade out beyond the grid.

        Values that mean nothing outside the mask are multiplied by the weights.
        """
        if self.describe is None:
            return (Lookup.of(np.concatenate([self.values * self.weights, self.weights[None]])),)
        # Beyond its grid a volume goes on as its border does: a step there would be an edge that nothing shows.
        return Lookup.of(self.values, "border"), Lookup.of(self.weights[None])

    def at(self, index_zyx: FloatArray) -> tuple[Array32, Array32]:
        """Interpolate values (C, P) and weights (P,) at voxel indices (P, 3); there is no weight outside the grid."""
        return self.at_mapped(np.asarray(index_zyx.T, dtype=np.float32), np.eye(3), np.zeros(3))

    def at_mapped(self, points: Array32, linear: FloatArray, offset: FloatArray) -> tuple[Array32, Array32]:
        """Interpolate values (C, P) and weights (P,) at the voxel indices ``linear @ points + offset`` (3, P)."""
        if self.planar:  # rounding must not move a point off the only slice there is
            linear, offset = linear * [[0], [1], [1]], offset * [0, 1, 1]
        if self.describe is None:
            sampled = self._lookups[0].at(points, linear, offset)
            return sampled[:-1] / np.maximum(sampled[-1], np.float32(1e-6)), sampled[-1]
        values, weights = self._lookups
        return values.at(points, linear, offset), weights.at(points, linear, offset)[0]


class Turner:
    """Sample the moving map at any rotation, on the voxels of a ball inside a cube.

    Parameters
    ----------
    moving : CoarseFeatures
        Moving map on a finer grid than that of the search, because every sample is a trilinear interpolation.
    fixed_frame : (3, 3)
        Steps of the search grid in the world, in mm; they are the columns.
    rotations_xyz : (K, 3, 3), optional
        The rotations that will be asked for. A long specimen that is only turned about its axis needs no cube, but a
        box as thin as itself.
    """

    def __init__(
        self, moving: CoarseFeatures, fixed_frame: FloatArray, rotations_xyz: FloatArray | None = None
    ) -> None:
        spacing = float(np.linalg.norm(fixed_frame[:, -1]))
        self.centre_mm = moving.centroid_mm
        radius = _ball_radius_mm(moving, self.centre_mm)
        reach = np.full(3, radius)
        if rotations_xyz is not None:
            reach = np.minimum(reach, _reach_mm(moving, self.centre_mm, fixed_frame / spacing, rotations_xyz))
        z, y, x = (2 * np.ceil(reach / spacing).astype(int) + 1).tolist()
        self.shape: Triple = (1 if moving.planar else z, y, x)
        steps = [np.arange(side) - (side - 1) / 2 for side in self.shape]
        offsets = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
        self.ball = np.flatnonzero((offsets**2).sum(axis=1) * spacing**2 <= radius**2)
        self._moving = moving
        # Channels that describe a neighbourhood need all of the cube.
        wanted = offsets[self.ball] if moving.describe is None else offsets
        # Whole and half voxels: nothing is rounded.
        self._offsets = np.ascontiguousarray(wanted.T, dtype=np.float32)
        self._fixed_frame = fixed_frame
        self._to_index = np.linalg.inv(moving.frame)
        self._centre_zyx = self._to_index @ (self.centre_mm - moving.origin_mm)

    def sample(self, rotation_xyz: FloatArray) -> tuple[Array32, Array32]:
        """Sample values (C, P) and weights (P,) at the ball's voxels."""
        linear = self._to_index @ rotation_xyz @ self._fixed_frame
        values, weights = self._moving.at_mapped(self._offsets, linear, self._centre_zyx)
        if self._moving.describe is None:
            return values, weights
        channels = self._moving.describe(values.reshape(self.shape)).reshape(-1, len(weights))[:, self.ball]
        return standardised(channels, weights[self.ball]), weights[self.ball]

    def cube(self, maps: Array32) -> Array32:
        """Put maps (M, P) of the ball into cubes (M, b, b, b) of zeros."""
        cubes = np.zeros((len(maps), math.prod(self.shape)), dtype=np.float32)
        cubes[:, self.ball] = maps
        return cubes.reshape(len(maps), *self.shape)


def coarsen(features: Features, spacing_mm: float, finer: int = 1) -> CoarseFeatures:
    """Low-pass features to `spacing_mm` and sample them at ``spacing_mm / finer`` around their mask.

    The values are a normalised convolution with the mask as weight, so that nothing from outside the mask is averaged
    into them. Values that are to be described are averaged as they are, because their surroundings count.

    Raises
    ------
    RegistrationError
        If the mask is empty or the values do not vary inside it.
    """
    blurred_axes = np.isin(np.arange(3), features.grid.axes)
    factors = [
        max(1, int(spacing_mm / (2 * s))) if blur else 1
        for s, blur in zip(features.grid.spacing_mm, blurred_axes, strict=True)
    ]
    step = (factors[0], factors[1], factors[2])
    mask = features.mask[None].astype(np.float32)
    if not mask.any():
        raise RegistrationError("the mask of a volume is empty: there is no foreground to compare")
    values = features.values * mask if features.describe is None else features.values
    stacked = downsample(np.concatenate([values, mask]), step)
    grid = features.grid.downsampled(step)
    spacing = np.asarray(grid.spacing_mm)
    sigma = 0.5 * spacing_mm / spacing * blurred_axes
    outside: Literal["constant", "nearest"] = "constant" if features.describe is None else "nearest"
    blurred = np.concatenate(
        [
            scipy.ndimage.gaussian_filter(stacked[:-1], (0, *sigma), mode=outside),
            scipy.ndimage.gaussian_filter(stacked[-1:], (0, *sigma), mode="constant"),
        ]
    )
    shape, start, every = _lattice(stacked[-1] > 0, blurred_axes, spacing_mm / finer / spacing, features)

    def sampled_on(one: Array32, mode: Literal["constant", "nearest"]) -> Array32:
        # Not `map_coordinates`: three coordinates of every new voxel would be held in double precision. Steps, not a
        # matrix of them: axis by axis is quicker.
        found: Array32 = scipy.ndimage.affine_transform(one, every, start, shape, order=1, mode=mode)
        return found

    sampled = np.stack([sampled_on(one, outside) for one in blurred[:-1]])
    weights = np.clip(sampled_on(blurred[-1], "constant"), 0, 1)
    frame = np.asarray(grid.matrix_mm[:3, :3]) * every
    if features.describe is None:
        sampled /= np.maximum(weights, np.float32(1e-6))
    values = standardised(sampled, weights)
    return CoarseFeatures(values, weights, frame, grid.world_mm(start), features.describe)


def _lattice(
    inside: NDArray[np.bool_], blurred_axes: NDArray[np.bool_], every: FloatArray, features: Features
) -> tuple[Triple, FloatArray, FloatArray]:
    """Find the shape of the new grid, its first voxel, and its step, both in voxels of the old grid."""
    # The new grid is centred on the box around the mask, and just large enough for it and what is described around it.
    every = np.where(blurred_axes, every, 1.0)
    index = np.argwhere(inside)
    low, high = index.min(axis=0), index.max(axis=0)
    around = _SURROUNDINGS * 2 * blurred_axes if features.describe is not None else 0
    counts = np.ceil((high - low) / every).astype(int) + 1 + around
    # One voxel along z would make a single slice of a volume.
    counts = np.where(blurred_axes, np.maximum(counts, 2), counts)
    start = (low + high) / 2 - every * (counts - 1) / 2
    z, y, x = (int(n) for n in counts)
    return (z, y, x), start, every


def standardised(values: Array32, weights: Array32) -> Array32:
    """Subtract the weighted mean of each channel (C, ...), and divide all channels by one standard deviation.

    Raises
    ------
    RegistrationError
        If the values do not vary.
    """
    found = standardise(values, weights)
    if found is None:
        raise RegistrationError(
            "the values of a volume do not vary inside its foreground; nothing can be compared"
        )
    return found[0]


def standardise(values: Array32, weights: Array32) -> tuple[Array32, float] | None:
    """Do the same, and give the factor that the values were multiplied by; None if they do not vary."""
    axes = tuple(range(1, values.ndim))
    total = weights.sum(dtype=np.float64)
    means = (values * weights).sum(axis=axes, dtype=np.float64) / total
    centred = values - means.reshape(-1, *(1 for _ in axes)).astype(np.float32)
    variance = float((centred**2 * weights).sum(dtype=np.float64) / total)
    # A constant value shows differences of about 3e-5 of itself where the mask fades out, from single precision. The
    # square of that is below this limit of the variance.
    if not variance > 1e-8 * float((means**2).sum()):
        return None
    factor = 1 / np.sqrt(variance)
    return np.asarray(centred * np.float32(factor), dtype=np.float32), float(factor)


def _ball_radius_mm(moving: CoarseFeatures, centre_mm: FloatArray) -> float:
    index = np.argwhere(moving.weights > 0)
    weights = moving.weights[tuple(index.T)]
    distance = np.linalg.norm(index @ moving.frame.T + moving.origin_mm - centre_mm, axis=1)
    order = np.argsort(distance, kind="stable")
    held = np.cumsum(weights[order], dtype=np.float64)
    return float(distance[order][np.searchsorted(held, _BALL_SHARE * held[-1])])


def _reach_mm(
    moving: CoarseFeatures, centre_mm: FloatArray, axes: FloatArray, rotations_xyz: FloatArray
) -> FloatArray:
    """Find how far the turned mask reaches from its centre along the axes (columns) of the search grid, in mm."""
    index = np.argwhere(moving.weights > 0)
    arms = index @ moving.frame.T + moving.origin_mm - centre_mm
    corners = _hull(arms)
    # A fixed vector v is looked up at R v in the moving volume: an arm r of that lies at R^T r.
    return np.asarray(np.abs(np.einsum("nj,kji,ia->kna", corners, rotations_xyz, axes)).max(axis=(0, 1)))


def _hull(arms: FloatArray) -> FloatArray:
    """Take the corners (8, 3) of the box around arms (N, 3) along their own main axes."""
    _, _, main = np.linalg.svd(arms - arms.mean(axis=0), full_matrices=False)
    along = arms @ main.T
    low, high = along.min(axis=0), along.max(axis=0)
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True), indexing="ij"), axis=-1).reshape(-1, 3)
    return np.asarray(corners @ main)
