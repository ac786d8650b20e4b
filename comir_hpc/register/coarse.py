"""Bring a volume onto a coarse isotropic grid, and turn it by any rotation.

Shapes: C channels, M maps, P points of the ball; (b, b, b) is the cube that holds a turned volume. A single slice stays
a slice: its ball is a disc, and its cube is a square (1, b, b).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import torch

from comir_hpc.errors import RegistrationError
from comir_hpc.representations.criteria import Array32
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import FloatArray, Triple
from comir_hpc.volumes.volume import downsample

# The moving map is cut to a ball that holds this share of its mask. The corners of a full cube would make every FFT
# half as long again, for 2 % of the evidence.
_BALL_SHARE = 0.98


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
    """

    values: Array32
    weights: Array32
    frame: FloatArray
    origin_mm: FloatArray

    @property
    def planar(self) -> bool:
        """Whether this is a single slice."""
        return len(self.weights) == 1

    @property
    def centroid_mm(self) -> FloatArray:
        """World position (x, y, z) of the mask's centre of mass, in mm."""
        return self.origin_mm + self.frame @ np.asarray(scipy.ndimage.center_of_mass(self.weights))


class Turner:
    """Sample the moving map at any rotation, on the voxels of a ball inside a cube.

    Parameters
    ----------
    moving : CoarseFeatures
        Moving map on a finer grid than that of the search, because every sample is a trilinear interpolation.
    fixed_frame : (3, 3)
        Steps of the search grid in the world, in mm; they are the columns.
    """

    def __init__(self, moving: CoarseFeatures, fixed_frame: FloatArray) -> None:
        spacing = float(np.linalg.norm(fixed_frame[:, -1]))
        self.centre_mm = moving.centroid_mm
        radius = _ball_radius_mm(moving, self.centre_mm)
        side = 2 * int(np.ceil(radius / spacing)) + 1
        self.shape: Triple = (1 if moving.planar else side, side, side)
        steps = [np.arange(side) - (side - 1) / 2 for side in self.shape]
        offsets = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).reshape(-1, 3)
        self.ball = np.flatnonzero((offsets**2).sum(axis=1) * spacing**2 <= radius**2)
        self._offsets_mm = offsets[self.ball] @ fixed_frame.T
        maps = np.concatenate([moving.values * moving.weights, moving.weights[None]])
        self._maps = torch.from_numpy(maps)[None]
        self._to_index = np.linalg.inv(moving.frame)
        self._centre_zyx = self._to_index @ (self.centre_mm - moving.origin_mm)

    def sample(self, rotation_xyz: FloatArray) -> tuple[Array32, Array32]:
        """Sample values (C, P) and weights (P,) at the ball's voxels."""
        index = self._offsets_mm @ (self._to_index @ rotation_xyz).T + self._centre_zyx
        last = np.asarray(self._maps.shape[2:]) - 1
        # grid_sample wants x first. With align_corners, -1 and 1 are the centres of the outer voxels.
        place = torch.from_numpy((2 * index / np.maximum(last, 1) - 1)[:, ::-1].astype(np.float32))
        sampled = torch.nn.functional.grid_sample(
            self._maps, place[None, None, None], mode="bilinear", padding_mode="zeros", align_corners=True
        )[0, :, 0, 0].numpy()
        weights = sampled[-1]
        return sampled[:-1] / np.maximum(weights, 1e-6), weights

    def cube(self, maps: Array32) -> Array32:
        """Put maps (M, P) of the ball into cubes (M, b, b, b) of zeros."""
        cubes = np.zeros((len(maps), math.prod(self.shape)), dtype=np.float32)
        cubes[:, self.ball] = maps
        return cubes.reshape(len(maps), *self.shape)


def coarsen(features: Features, spacing_mm: float, finer: int = 1) -> CoarseFeatures:
    """Low-pass features to `spacing_mm` and sample them at ``spacing_mm / finer`` around their mask.

    The values are a normalised convolution with the mask as weight, so that nothing from outside the mask is averaged
    into them.

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
    stacked = downsample(np.concatenate([features.values * mask, mask]), step)
    grid = features.grid.downsampled(step)
    spacing = np.asarray(grid.spacing_mm)
    sigma = 0.5 * spacing_mm / spacing * blurred_axes
    blurred = scipy.ndimage.gaussian_filter(stacked, (0, *sigma), mode="constant")
    inside = np.argwhere(stacked[-1] > 0)
    if not len(inside):
        raise RegistrationError("the mask of a volume is empty: there is no foreground to compare")
    # The new grid is centred on the box around the mask, and just large enough for it.
    every = np.where(blurred_axes, spacing_mm / finer / spacing, 1.0)
    low, high = inside.min(axis=0), inside.max(axis=0)
    counts = np.ceil((high - low) / every).astype(int) + 1
    start = (low + high) / 2 - every * (counts - 1) / 2
    axes = [s + e * np.arange(n) for s, e, n in zip(start, every, counts, strict=True)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"))
    sampled = np.stack([scipy.ndimage.map_coordinates(one, places, order=1) for one in blurred])
    weights = np.clip(sampled[-1], 0, 1)
    values = _standardised(sampled[:-1] / np.maximum(weights, 1e-6), weights)
    frame = np.asarray(grid.matrix_mm[:3, :3]) * every
    return CoarseFeatures(values, weights, frame, grid.world_mm(start))


def _standardised(values: Array32, weights: Array32) -> Array32:
    """Subtract each channel's weighted mean, and divide all channels by one standard deviation."""
    total = weights.sum(dtype=np.float64)
    means = (values * weights).sum(axis=(1, 2, 3), dtype=np.float64) / total
    centred = values - means[:, None, None, None].astype(np.float32)
    variance = float((centred**2 * weights).sum(dtype=np.float64) / total)
    # A constant value shows differences of about 3e-5 of itself where the mask fades out, from single precision. The
    # square of that is below this limit of the variance.
    if not variance > 1e-8 * float((means**2).sum()):
        raise RegistrationError(
            "the values of a volume do not vary inside its foreground; nothing can be compared"
        )
    return np.asarray(centred / np.float32(np.sqrt(variance)), dtype=np.float32)


def _ball_radius_mm(moving: CoarseFeatures, centre_mm: FloatArray) -> float:
    index = np.argwhere(moving.weights > 0)
    weights = moving.weights[tuple(index.T)]
    distance = np.linalg.norm(index @ moving.frame.T + moving.origin_mm - centre_mm, axis=1)
    order = np.argsort(distance, kind="stable")
    held = np.cumsum(weights[order], dtype=np.float64)
    return float(distance[order][np.searchsorted(held, _BALL_SHARE * held[-1])])
