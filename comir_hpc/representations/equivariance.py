"""Measure the equivariance of encoders: over a group, and over all angles. Pure functions of encoders and images.

`train` logs it while it runs, `evaluate` measures it for any checkpoint, and benchmarks call these functions. Section 8
of docs/theory.md defines it, and docs/diagnostics.md says how it is measured. Agreement, retrieval and rank are in
`quality`.

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
from comir_hpc.representations.turning import Encode, TurnedCubes, require_sides, spread_axes
from comir_hpc.space.groups import Group, act
from comir_hpc.space.rotations import FloatArray, rotation_by

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

    Nothing is interpolated: T_g permutes voxels. The means run over all cubes, over the voxels that are left when
    `trim_zyx` is cut off each face, and over the mask. ``mean f(x)`` is taken for each channel. Padding at a cube's
    faces changes f there. To measure the f of a large volume, cut off as much as the network sees.

    Parameters
    ----------
    encode : callable
        Network of one modality.
    cubes : (n, c, z, y, x) float
        Cubes of the image. Sides that elements exchange must be equal. All sides must be multiples of the network's
        total stride: otherwise g does not carry pooling cells onto pooling cells, and the error is that of the grid.
    group : Group
        Elements that are measured; reflections are allowed.
    trim_zyx : three int
        Voxels that are cut off both ends of each axis.
    mask : (n, z, y, x) bool, optional
        Voxels that count, in the frame of `cubes`; all by default.

    Returns
    -------
    (G,) float64
        Errors in the order of ``group.matrices``: 0 for the identity, NaN everywhere if the maps do not vary.

    Raises
    ------
    ConfigError
        If an element changes the cubes' shape or nothing is left to compare.
    """
    shape = tuple(cubes.shape[-3:])
    group.require_invariant(shape, "the shape of the cubes")
    group.require_invariant(tuple(trim_zyx), "the trim")
    straight = encode(cubes)
    # The mask needs no turning: each turned map is turned back before it is compared.
    keep = _kept(straight, trim_zyx, mask)
    variance = _variance(straight, keep)
    errors = [
        _mean_square(act(encode(act(cubes, g).contiguous()), g.T) - straight, keep) for g in group.matrices
    ]
    return _share(errors, variance)


@dataclass(frozen=True)
class So3Curve:
    """Equivariance error over all angles, also between those of any group.

    Attributes
    ----------
    angles_deg : (A,) float64
        Angles of the rotations, in degrees.
    axes_zyx : (K, 3) float64
        Axes of the rotations, as unit vectors.
    errors : (A, K) float64
        Error e(R) of the rotation by each angle about each axis, with the error of resampling in it.
    floor : (A,) float64
        Most that resampling alone can add to the error, measured about the first axis. Below it the curve says nothing.
    voxels : int
        Number of voxels that were compared.
    """

    angles_deg: FloatArray
    axes_zyx: FloatArray
    errors: FloatArray
    floor: FloatArray
    voxels: int

    def as_dict(self) -> dict[str, Any]:
        """Return the curve ready for JSON, with numbers rounded to five significant digits."""
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
    """Measure e(R) for rotations R of any angle, and beside it what the resampling that they need can add.

    For each R, the content is turned about the middle by cubic splines. A cube is cut from the middle and encoded. The
    representation of the unturned cube is turned in the same way. Then f(T_R x) is compared with T_R f(x), over the
    turned mask and over the ball that stays inside the trimmed cube in every rotation. Each of the two holds the error
    of one resampling.

    The floor resamples there and back, so that both errors occur twice. It is ``|T_R^-1 T_R f(x) - f(x)|^2`` for the
    representation plus ``|f(T_R^-1 T_R x) - f(x)|^2`` for the image, divided by the same variance. If the errors of two
    resamplings in a row do not cancel, the floor is an upper bound of what resampling adds to e(R).

    Parameters
    ----------
    encode : callable
        Network of one modality.
    surroundings : (n, c, Z, Y, X) float32
        Cubes with what lies around them. They need sqrt(3) times the cube's sides and a few voxels more, so that turned
        corners hold image and not padding. Their sides are odd where those of `side_zyx` are odd.
    side_zyx : three int
        Sides in voxels of the cube that is encoded: multiples of the total stride.
    angles_deg : sequence of A float
        Angles of the rotations, in degrees.
    axes_zyx : (K, 3), optional
        Axes of the rotations. By default they are spread over the hemisphere; for single slices it is z alone.
    spacing_zyx : three float
        Voxel spacing in any one unit. Rotations are those of the world, which are no rotations of anisotropic voxels.
    trim_zyx : three int
        Number of voxels at each face that are left out, because padding may reach them.
    mask : (n, Z, Y, X) bool, optional
        Voxels that count, in the frame of `surroundings`; all by default.
    device : torch device
        Where the network is.
    progress : callable, optional
        Function that is called as ``progress(done, total)`` after each angle.

    Returns
    -------
    So3Curve
        Errors and floor by angle; NaN if the maps do not vary.

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
        # The floor is measured about one axis only, since each axis costs another encoding.
        floor[row] = measured.floor(rotations[0])
        if progress:
            progress(row + 1, len(angles_deg))
    return So3Curve(np.asarray(angles_deg, dtype=np.float64), axes, errors, floor, measured.voxels)


# ---------------------------------------------------------------------- sums


def _kept(maps: Tensor, trim_zyx: Sequence[int], mask: Tensor | None) -> Tensor:
    """Mark the voxels that count, bool (n, 1, z, y, x)."""
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
    # In double precision: millions of squares are added up.
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
