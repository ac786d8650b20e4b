"""Turn cubes from a volume by any angle, with spline interpolation, to compare maps over all of SO(3).

Axes: n cubes, c image channels, l latent channels, z y x space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from comir_hpc.errors import ConfigError
from comir_hpc.space.rotations import FloatArray

Encode = Callable[[Tensor], Tensor]
"""Images (n, c, z, y, x) to maps (n, l, z, y, x), in evaluation mode and without gradient."""
Order = Literal[0, 1, 3]
"""Order of a spline: 0 takes the nearest voxel, 1 is linear, 3 is cubic."""

SPLINE: Order = 3  # a linear spline blurs, which is an error as large as the one that is measured
_GOLDEN_DEG = 180 * (3 - 5**0.5)


def spread_axes(count: int) -> FloatArray:
    """Spread directions evenly over half of the sphere: (count, 3) unit vectors zyx, none along an axis of the grid."""
    # Points of a Fibonacci spiral. It starts at 20 degrees and not at 0, so that no axis lies in a plane of the grid.
    height = (np.arange(count) + 0.5) / count
    turn = np.radians(_GOLDEN_DEG * np.arange(count) + 20.0)
    radius = np.sqrt(1 - height**2)
    return np.stack([height, radius * np.sin(turn), radius * np.cos(turn)], axis=1)


def turn(
    values: NDArray[Any],
    rotation: FloatArray,
    *,
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    side_zyx: Sequence[int] | None = None,
    order: Order = SPLINE,
) -> NDArray[np.float32]:
    """Rotate the content of an array about its middle by spline interpolation: ``(T_R x)(v) = x(R^-1 v)``.

    Rotations of the grid give its values back to rounding. Values at the faces are held beyond them.

    Parameters
    ----------
    values : (..., z, y, x)
        Arrays to turn, each about its middle.
    rotation : (3, 3)
        Rotation of the world, in zyx order.
    spacing_zyx : three float
        Voxel spacing, in any one unit.
    side_zyx : three int, optional
        Sides of the result in voxels, about the same middle; those of `values` by default.
    order : 0, 1 or 3
        Order of the spline: 0 takes the nearest voxel, 1 is linear, 3 is cubic.

    Returns
    -------
    (..., z, y, x) float32
    """
    spacing = np.asarray(spacing_zyx, dtype=np.float64)
    inner = np.asarray(values.shape[-3:])
    outer = inner if side_zyx is None else np.asarray(side_zyx)
    # An output voxel shows the input at R^-1 times its place. Places are voxels: to the world, undo R, and back.
    back = np.asarray(rotation).T * spacing / spacing[:, None]
    offset = (inner - 1) / 2 - back @ ((outer - 1) / 2)
    shape = tuple(int(n) for n in outer)
    flat = values.reshape(-1, *inner)
    result = np.empty((len(flat), *shape), dtype=np.float32)
    for number, one in enumerate(flat):
        source = one.astype(np.float32, copy=False)
        ndimage.affine_transform(
            source, back, offset, shape, output=result[number], order=order, mode="nearest"
        )
    return result.reshape(*values.shape[:-3], *shape)


class TurnedCubes:
    """One set of cubes, encoded once straight, and then turned by one rotation after another.

    Parameters
    ----------
    encode : callable
        Network of one modality.
    surroundings : (n, c, Z, Y, X) float32
        Cubes with enough around them, so that a turned cube is filled.
    side : (3,) int64
        Sides (z, y, x) in voxels of a cube, which lies in the middle of its surroundings.
    spacing_zyx : three float
        Voxel spacing, in any one unit.
    trim_zyx : three int
        Voxels that are cut off each face before maps are compared.
    mask : (n, Z, Y, X) bool, optional
        Voxels that count; all by default.
    device : torch device
        Where the network is.

    Raises
    ------
    ConfigError
        If no voxel of the mask lies in the ball that stays inside the cube.
    """

    def __init__(
        self,
        encode: Encode,
        surroundings: NDArray[np.float32],
        side: NDArray[np.int64],
        spacing_zyx: Sequence[float],
        trim_zyx: Sequence[int],
        mask: NDArray[np.bool_] | None,
        device: torch.device,
    ) -> None:
        self._encode, self._device = encode, device
        self._side, self._spacing = tuple(int(n) for n in side), tuple(spacing_zyx)
        self._images = surroundings
        shape = (len(surroundings), *surroundings.shape[-3:])
        self._mask = np.ones(shape, dtype=np.bool_) if mask is None else mask
        self._ball = inner_ball(self._side, trim_zyx, self._spacing)
        self._straight = self._represent(_middle(surroundings, self._side))
        # Only the ball counts, also for the unturned cube: a turned corner would lie outside of the cube.
        self._kept = _middle(self._mask, self._side) & self._ball
        self.voxels = int(self._kept.sum())
        if not self.voxels:
            raise ConfigError(
                f"no voxel of the mask lies in the ball inside cubes of {self._side} voxels trimmed by "
                f"{tuple(trim_zyx)}; place the cubes in the specimen, or trim less"
            )
        straight = self._straight.transpose(1, 0, 2, 3, 4)[:, self._kept].astype(np.float64)
        self._variance = float(straight.var(axis=1).mean())

    def error(self, rotation: FloatArray) -> float:
        """Return the equivariance error e(R) of a rotation (3, 3) in zyx order."""
        turned = self._represent(self._turn(self._images, rotation, self._side))
        # Linear for the mask: a cubic spline would overshoot at its edges.
        mask = self._turn(self._mask, rotation, self._side, order=1) > 0.5
        return self._distance(turned, self._turn(self._straight, rotation), mask & self._ball)

    def floor(self, rotation: FloatArray) -> float:
        """Return the error that resampling alone adds: that of the image and that of the maps, turned by R and back."""
        image = self._turn(self._turn(self._images, rotation), rotation.T, self._side)
        maps = self._turn(self._turn(self._straight, rotation), rotation.T)
        resampled = (self._represent(image), maps)
        return sum(self._distance(one, self._straight, self._kept) for one in resampled)

    def _represent(self, cubes: NDArray[np.float32]) -> NDArray[np.float32]:
        images = torch.from_numpy(np.ascontiguousarray(cubes, dtype=np.float32)).to(self._device)
        return self._encode(images).detach().float().cpu().numpy()

    def _turn(
        self,
        values: NDArray[Any],
        rotation: FloatArray,
        side: Sequence[int] | None = None,
        order: Order = SPLINE,
    ) -> NDArray[np.float32]:
        return turn(values, rotation, spacing_zyx=self._spacing, side_zyx=side, order=order)

    def _distance(
        self, maps: NDArray[np.float32], others: NDArray[np.float32], kept: NDArray[np.bool_]
    ) -> float:
        if not kept.any() or not self._variance > 0:
            return float("nan")
        difference = (maps.astype(np.float64) - others).transpose(1, 0, 2, 3, 4)[:, kept]
        return float(np.square(difference).mean() / self._variance)


def inner_ball(
    side_zyx: Sequence[int], trim_zyx: Sequence[int], spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0)
) -> NDArray[np.bool_]:
    """Mark the voxels (z, y, x) of a cube that stay inside its trimmed core in every rotation about its middle.

    In single slices the ball is a disc. One voxel at its rim is left out, because interpolation looks at neighbours.
    """
    side, spacing = np.asarray(side_zyx), np.asarray(spacing_zyx, dtype=np.float64)
    reach = (side / 2 - np.asarray(trim_zyx) - 1) * spacing
    radius = reach[side > 1].min(initial=np.inf)
    offsets = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * s for n, s in zip(side, spacing, strict=True)), indexing="ij"
    )
    ball: NDArray[np.bool_] = np.square(offsets).sum(axis=0) <= max(radius, 0.0) ** 2
    return ball


def require_sides(outer: NDArray[np.int64], side: NDArray[np.int64], trim_zyx: Sequence[int]) -> None:
    """Refuse cubes that cannot be cut from the middle of their surroundings, or that are empty after trimming.

    Raises
    ------
    ConfigError
        If the surroundings are smaller than the cube, larger by an odd number, or trimming leaves fewer than 4 voxels.
    """
    if (side > outer).any() or ((outer - side) % 2).any():
        raise ConfigError(
            f"cubes of {side.tolist()} voxels cannot be cut from the middle of surroundings of {outer.tolist()}; "
            "these must be larger, by an even number"
        )
    # Single slices have nothing around them along z.
    short = (side > 1) & (side - 2 * np.asarray(trim_zyx) < 4)
    if short.any():
        raise ConfigError(
            f"cubes of {side.tolist()} voxels trimmed by {list(trim_zyx)} leave fewer than 4 along an axis; "
            "use larger cubes"
        )


def _middle(values: NDArray[Any], side: Sequence[int]) -> NDArray[Any]:
    z, y, x = (
        slice((whole - n) // 2, (whole - n) // 2 + n)
        for whole, n in zip(values.shape[-3:], side, strict=True)
    )
    return values[..., z, y, x]
