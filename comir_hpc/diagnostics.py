"""What encoders can do, in figures: equivariance, agreement, retrieval, rank. Pure functions of maps and encoders.

`train` logs some of them while it runs, `evaluate` all of them, benchmarks call them directly. Definitions:
docs/theory.md, section 8; how they are measured: docs/diagnostics.md.

Axes: n patches or cubes, c image channels, l latent channels, z y x space; G elements of a group, A angles, K axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor

from comir_hpc.critics import scores
from comir_hpc.errors import ConfigError
from comir_hpc.rotations import FloatArray, Group, act, rotation_by

Encode = Callable[[Tensor], Tensor]
"""Images (n, c, z, y, x) to maps (n, l, z, y, x), in evaluation mode and without gradient."""

ANGLES_DEG = tuple(range(15, 181, 15))
Order = Literal[0, 1, 3]
_SPLINE: Order = 3  # of interpolation; a linear one blurs as much as the error that is sought
_GOLDEN_DEG = 180 * (3 - 5**0.5)


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
    _require_sides(np.asarray(surroundings.shape[-3:]), side, trim_zyx)
    default = [[1.0, 0.0, 0.0]] if side[0] == 1 else spread_axes(3)
    axes = np.asarray(default if axes_zyx is None else axes_zyx, dtype=np.float64)
    axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    measured = _Turning(encode, surroundings, side, spacing_zyx, trim_zyx, mask, torch.device(device))
    errors, floor = np.empty((len(angles_deg), len(axes))), np.empty(len(angles_deg))
    for row, angle in enumerate(angles_deg):
        rotations = [rotation_by(axis, angle) for axis in axes]
        errors[row] = [measured.error(rotation) for rotation in rotations]
        floor[row] = measured.floor(rotations[0])
        if progress:
            progress(row + 1, len(angles_deg))
    return So3Curve(np.asarray(angles_deg, dtype=np.float64), axes, errors, floor, measured.voxels)


def spread_axes(count: int) -> FloatArray:
    """Directions spread evenly over half of the sphere, (count, 3) unit vectors zyx, none along an axis of the grid."""
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
    order: Order = _SPLINE,
) -> NDArray[np.float32]:
    """Rotate the content of an array about its middle by spline interpolation: ``(T_R x)(v) = x(R^-1 v)``.

    Rotations of the grid give its values back to rounding. Values at the faces are held beyond them.

    Parameters
    ----------
    values : (..., z, y, x)
    rotation : (3, 3)
        Of the world, in zyx order.
    side_zyx : three int, optional
        Of the result, about the same middle; those of `values` by default.
    order : 0, 1 or 3
        Of the spline: 0 takes the nearest voxel, 1 is linear.

    Returns
    -------
    (..., z, y, x) float32
    """
    spacing = np.asarray(spacing_zyx, dtype=np.float64)
    inner = np.asarray(values.shape[-3:])
    outer = inner if side_zyx is None else np.asarray(side_zyx)
    # The output's voxel o shows what the input has at the rotation undone, in voxels of each axis.
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


class _Turning:
    """One set of cubes, encoded once straight, and then turned by one rotation after another."""

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
        """e(R)."""
        turned = self._represent(self._turn(self._images, rotation, self._side))
        mask = self._turn(self._mask, rotation, self._side, order=1) > 0.5
        return self._distance(turned, self._turn(self._straight, rotation), mask & self._ball)

    def floor(self, rotation: FloatArray) -> float:
        """What resampling there and back does, to the representation and to the image, added up."""
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
        order: Order = _SPLINE,
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
    """Voxels (z, y, x) of a cube that stay inside its trimmed core however it is turned about its middle.

    A disc in single slices. One voxel is left at the rim for interpolation.
    """
    side, spacing = np.asarray(side_zyx), np.asarray(spacing_zyx, dtype=np.float64)
    reach = (side / 2 - np.asarray(trim_zyx) - 1) * spacing
    radius = reach[side > 1].min(initial=np.inf)
    offsets = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * s for n, s in zip(side, spacing, strict=True)), indexing="ij"
    )
    ball: NDArray[np.bool_] = np.square(offsets).sum(axis=0) <= max(radius, 0.0) ** 2
    return ball


def _require_sides(outer: NDArray[np.int64], side: NDArray[np.int64], trim_zyx: Sequence[int]) -> None:
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


# ---------------------------------------------------------------------- agreement and rank


def agreement(maps_u: Tensor, maps_v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Correlation of every map of one set with every map of another over common valid voxels, (n, n)."""
    return scores(maps_u, maps_v, "correlation", mask_u=valid, mask_v=valid)


def foreground_agreement(maps_u: Tensor, maps_v: Tensor, mask: Tensor) -> float:
    """Correlation of two sets of maps over all voxels of a mask together, which is how `register` measures it.

    Parameters
    ----------
    maps_u, maps_v : (n, l, z, y, x)
    mask : (n, 1, z, y, x) bool
    """
    u, v = (one.movedim(1, 0).reshape(1, one.shape[1], 1, 1, -1) for one in (maps_u, maps_v))
    kept = mask.reshape(1, 1, 1, 1, -1)
    return float(scores(u, v, "correlation", mask_u=kept, mask_v=kept))


def retrieval(table: Tensor, ignore: Tensor | None = None) -> float:
    """Share of patches, of either modality, whose partner is the most similar of all.

    Parameters
    ----------
    table : (n, n)
        Similarity of every patch of one modality with every patch of the other, partners on the diagonal.
    ignore : (n, n) bool, optional
        Pairs of places too near each other to be told apart; the diagonal does not matter.
    """
    partner = table.diagonal()
    others = table.clone()
    if ignore is not None:
        others[ignore] = -torch.inf
    others.fill_diagonal_(-torch.inf)
    found = torch.cat([partner > others.amax(dim=dim) for dim in (0, 1)])
    return float(found.double().mean())


def effective_rank(maps: Tensor, mask: Tensor | None = None) -> float:
    """Number of latent channels that vary: exponential of the entropy of the covariance's spectrum.

    1 for one channel; less than the number of channels says that some repeat others (Roy and Vetterli 2007).
    0 if nothing varies.

    Parameters
    ----------
    maps : (n, l, z, y, x)
    mask : (n, 1, z, y, x) bool, optional
        Voxels that count; all by default.
    """
    values = maps.transpose(0, 1).flatten(1).double()
    if mask is not None:
        values = values[:, mask.flatten()]
    spectrum = torch.linalg.eigvalsh(torch.cov(values).reshape(len(values), -1)).clamp_min(0)
    if not spectrum.sum() > 0:
        return 0.0
    return float(torch.special.entr(spectrum / spectrum.sum()).sum().exp())


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
