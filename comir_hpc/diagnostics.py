"""What encoders can do, in figures: equivariance, agreement, retrieval, rank. Pure functions of maps and encoders.

`train` logs some of them while it runs, `evaluate` all of them, benchmarks call them directly. Definitions:
docs/theory.md, section 8; how they are measured: docs/diagnostics.md.

Axes: n patches or cubes, c image channels, l latent channels, z y x space; G elements of a group, A angles, K axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from comir_hpc.errors import ConfigError
from comir_hpc.groups import Group, act
from comir_hpc.rotations import FloatArray, rotation_by
from comir_hpc.turning import Encode, TurnedCubes, require_sides, spread_axes

ANGLES_DEG = tuple(range(15, 181, 15))


# ---------------------------------------------------------------------- equivariance


def equivariance_errors(
    encode: Encode,
    cubes: Tensor,
    group: Group,
    *,
    trim_zyx: Sequence[int] = (0, 0, 0),
    mask: Tensor | None = None,
) -> FloatArray:
    """Measure ``e(g) = mean |f(T_g x) - T_g f(x)|^2 / mean |f(x) - mean f(x)|^2`` for every element g of a group.

    Nothing is interpolated: T_g permutes voxels. The means run over all cubes, over the voxels left when `trim_zyx`
    is cut off each face, and over the mask; ``mean f(x)`` is each channel's. The padding at a cube's faces changes
    what f is there: cut off as much as the network sees to measure the f of a large volume.

    Parameters
    ----------
    encode : callable
        The network of one modality.
    cubes : (n, c, z, y, x) float
        Sides that elements exchange are equal, and all are multiples of the network's total stride: otherwise g would
        not carry pooling cells onto pooling cells, and the error would be the grid's.
    group : Group
        Reflections are allowed.
    trim_zyx : three int
        Voxels cut off both ends of each axis.
    mask : (n, z, y, x) bool, optional
        Voxels that count, in the frame of `cubes`; all by default.

    Returns
    -------
    (G,) float64
        In the order of ``group.matrices``: 0 for the identity, NaN everywhere if the maps do not vary.

    Raises
    ------
    ConfigError
        If an element changes the cubes' shape or nothing is left to compare.
    """
    shape = tuple(cubes.shape[-3:])
    group.require_invariant(shape, "the shape of the cubes")
    group.require_invariant(tuple(trim_zyx), "the trim")
    straight = encode(cubes)
    keep = _kept(straight, trim_zyx, mask)
    variance = _variance(straight, keep)
    errors = [
        _mean_square(act(encode(act(cubes, g).contiguous()), g.T) - straight, keep) for g in group.matrices
    ]
    return _share(errors, variance)


@dataclass(frozen=True)
class So3Curve:
    """Equivariance error between the angles of any group.

    Attributes
    ----------
    angles_deg : (A,) float64
    axes_zyx : (K, 3) float64
        Unit vectors.
    errors : (A, K) float64
        e(R) of the rotation by an angle about an axis, resampling included.
    floor : (A,) float64
        What resampling alone can add to it, about the first axis: below it the curve says nothing.
    voxels : int
        Compared.
    """

    angles_deg: FloatArray
    axes_zyx: FloatArray
    errors: FloatArray
    floor: FloatArray
    voxels: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers rounded to five significant digits."""
        arrays = ("angles_deg", "axes_zyx", "errors", "floor")
        rounded = {
            name: np.vectorize(_rounded, otypes=[object])(getattr(self, name)).tolist() for name in arrays
        }
        return {**rounded, "voxels": self.voxels}


def so3_curve(
    encode: Encode,
    surroundings: NDArray[np.float32],
    side_zyx: Sequence[int],
    *,
    angles_deg: Sequence[float] = ANGLES_DEG,
    axes_zyx: ArrayLike | None = None,
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    trim_zyx: Sequence[int] = (0, 0, 0),
    mask: NDArray[np.bool_] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> So3Curve:
    """Measure e(R) for rotations R of any angle, beside what the resampling that they need adds to it.

    For each R the content is turned about the middle by cubic splines, a cube is cut from the middle and encoded, and
    the representation of the unturned cube is turned likewise: f(T_R x) against T_R f(x), over the ball that lies
    inside the trimmed cube however it is turned, and over the turned mask. Both sides carry the error of one
    resampling. The floor resamples there and back, where both errors occur twice: ``|T_R^-1 T_R f(x) - f(x)|^2`` for
    the representation plus ``|f(T_R^-1 T_R x) - f(x)|^2`` for the image, over the same variance. If the errors of two
    resamplings in a row do not cancel, it bounds what resampling adds to e(R) from above.

    Parameters
    ----------
    encode : callable
        The network of one modality.
    surroundings : (n, c, Z, Y, X) float32
        Cubes with what lies around them: sqrt(3) times their sides and a few voxels more, so that turned corners hold
        image and not padding. The parities of the sides are those of `side_zyx`.
    side_zyx : three int
        Voxels of the cube that is encoded: multiples of the total stride.
    angles_deg : sequence of A float
    axes_zyx : (K, 3), optional
        Spread over the hemisphere by default; z alone for single slices.
    spacing_zyx : three float
        Of voxels: rotations are those of the world, which are no rotations of anisotropic voxels.
    trim_zyx : three int
        Voxels at each face that padding may reach.
    mask : (n, Z, Y, X) bool, optional
        Voxels that count, in the frame of `surroundings`.

    Returns
    -------
    So3Curve
        NaN if the maps do not vary.

    Raises
    ------
    ConfigError
        If the sides do not fit each other, or no voxel is left to compare.
    """
    side = np.asarray(side_zyx)
    require_sides(np.asarray(surroundings.shape[-3:]), side, trim_zyx)
    default = [[1.0, 0.0, 0.0]] if side[0] == 1 else spread_axes(3)
    axes = np.asarray(default if axes_zyx is None else axes_zyx, dtype=np.float64)
    axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    measured = TurnedCubes(encode, surroundings, side, spacing_zyx, trim_zyx, mask, torch.device(device))
    errors, floor = np.empty((len(angles_deg), len(axes))), np.empty(len(angles_deg))
    for row, angle in enumerate(angles_deg):
        rotations = [rotation_by(axis, angle) for axis in axes]
        errors[row] = [measured.error(rotation) for rotation in rotations]
        floor[row] = measured.floor(rotations[0])
        if progress:
            progress(row + 1, len(angles_deg))
    return So3Curve(np.asarray(angles_deg, dtype=np.float64), axes, errors, floor, measured.voxels)


# ---------------------------------------------------------------------- agreement and rank


# ---------------------------------------------------------------------- sums


def _kept(maps: Tensor, trim_zyx: Sequence[int], mask: Tensor | None) -> Tensor:
    """Voxels that count, bool (n, 1, z, y, x)."""
    n, _, *shape = maps.shape
    kept = torch.zeros((n, 1, *shape), dtype=torch.bool, device=maps.device)
    inner = [slice(cut, side - cut) for cut, side in zip(trim_zyx, shape, strict=True)]
    kept[..., inner[0], inner[1], inner[2]] = True
    if mask is not None:
        kept &= mask.to(maps.device).unsqueeze(1)
    if not kept.any():
        where = "" if mask is None else ", and of these none is in the mask"
        raise ConfigError(
            f"cubes of {tuple(shape)} voxels (z, y, x) trimmed by {tuple(trim_zyx)} leave "
            f"{int(np.prod([max(0, s.stop - s.start) for s in inner]))} voxels each{where}; use larger cubes or others"
        )
    return kept


def _variance(maps: Tensor, kept: Tensor) -> float:
    values = maps.transpose(0, 1).flatten(1)[:, kept.flatten()].double()
    return float(values.var(dim=1, correction=0).mean())


def _mean_square(difference: Tensor, kept: Tensor) -> float:
    values = difference.transpose(0, 1).flatten(1)[:, kept.flatten()].double()
    return float(values.square().mean())


def _share(errors: Sequence[float], variance: float) -> FloatArray:
    if not variance > 0:
        return np.full(len(errors), np.nan)
    return np.asarray(errors, dtype=np.float64) / variance


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None
