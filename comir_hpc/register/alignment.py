"""Improve a rough answer on one isotropic grid by Gauss-Newton steps, fast enough to try hundreds of answers.

What is made as large as possible is the evidence: the correlation over the overlap, of all channels together, times the
root of the overlap. The moving volume is turned onto the fixed grid at every step, and then described if its channels
look along the axes (`Features.describe`). So one way serves maps that turn like a picture and channels that do not.

A step solves for a small motion of the fixed points by least squares. The slope is the mean of both volumes' gradients
(Benhimane and Malis, IROS 2004, "efficient second-order minimisation"): a step is then as exact as with second
derivatives. Where the correlation is weak these steps are too short. So the next one is made longer after a step that
led upwards, and shorter after one that did not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.ndimage import binary_dilation
from scipy.spatial.transform import Rotation

from comir_hpc.errors import RegistrationError
from comir_hpc.register.coarse import CoarseFeatures, standardise
from comir_hpc.representations.criteria import Array32
from comir_hpc.space.grid import FloatArray
from comir_hpc.transforms.affine import Affine as Transform

Kind = Literal["rigid", "affine"]

_HELD = 0.25  # weight from which a voxel counts as one of the mask
_FEWEST = 30  # voxels that have to overlap
_LONGEST_VOX = 2.0  # most that a step moves the specimen's rim, in voxels
_SHORTEST_VOX = 0.005  # a step that moves less ends the search
_GROWS, _SHRINKS, _LONGEST_GAIN = 1.7, 0.35, 4.0


@dataclass(frozen=True, eq=False)
class Aligned:
    """One answer on this grid.

    Correlation and overlap are kept apart: a small overlap can correlate by chance, and `evidence` puts both
    together.

    Attributes
    ----------
    transform : Transform
        From fixed to moving points.
    correlation : float
        Correlation over the overlap, of all channels together.
    overlap : float
        Share of the smaller mask that overlaps, 0 to 1.
    steps : int
        Number of steps that led here.
    """

    transform: Transform
    correlation: float
    overlap: float
    steps: int = 0

    @property
    def evidence(self) -> float:
        """Correlation times the root of the overlap (`Agreement.evidence`)."""
        return self.correlation * float(np.sqrt(self.overlap))


@dataclass(frozen=True, eq=False)
class _Seen:
    """Moving volume as it lies on the fixed grid under one answer, beside the fixed one.

    Attributes
    ----------
    there : (C, N) float32
        Channels of the moving volume at the compared voxels.
    held : (N,) float32
        Weights of the moving volume there.
    whole : tuple of (C, z, y, x) and (z, y, x) float32, or None
        Channels and weights on the whole grid, where channels describe a neighbourhood and need it.
    weights : (N,) float32
        Product of both weights at the compared voxels.
    pair : tuple of (C, N) float32, or None
        Channels of both volumes there, standardised over the overlap; None if that is too small or nothing varies.
    scales : tuple of float
        Factors by which the two were standardised.
    answer : Aligned
        The answer and its numbers.
    """

    there: Array32
    held: Array32
    whole: tuple[Array32, Array32] | None
    weights: Array32
    pair: tuple[Array32, Array32] | None
    scales: tuple[float, float]
    answer: Aligned


class Alignment:
    """Compare and improve any number of answers for one pair on one grid.

    Parameters
    ----------
    fixed, moving : CoarseFeatures
        Both volumes; the moving one may be on a finer grid.
    within : (z, y, x), optional
        Weights of the fixed voxels, instead of the mask's.
    """

    def __init__(self, fixed: CoarseFeatures, moving: CoarseFeatures, within: Array32 | None = None) -> None:
        self._moving = moving
        self._to_moving = np.asarray(np.linalg.inv(moving.frame), dtype=np.float64)
        self._spacing = fixed.spacing_mm
        self._planar = fixed.planar
        self._shape = fixed.weights.shape
        weights = fixed.weights if within is None else fixed.weights * within
        # What is thinner than a voxel of this grid has small weights everywhere.
        self._voxels = np.flatnonzero(weights.ravel() > 0.5 * weights.max())
        if len(self._voxels) < _FEWEST:
            raise RegistrationError(
                f"the fixed specimen fills {len(self._voxels)} voxels of {self._spacing:.4g} mm, expected at least "
                f"{_FEWEST}"
            )
        self._weights = weights.ravel()[self._voxels]
        # Voxels that are not compared but lie beside one that is: only slopes need them.
        compared = np.zeros(self._shape, dtype=np.bool_)
        compared.ravel()[self._voxels] = True
        self._beside = np.flatnonzero(binary_dilation(compared) & ~compared)
        self._frame, self._origin_mm = fixed.frame, fixed.origin_mm
        self._index = np.indices(self._shape, dtype=np.float32).reshape(3, -1)
        # Taken once, since every look at an answer needs them.
        self._index_compared, self._index_beside = self._index[:, self._voxels], self._index[:, self._beside]
        middle = self._index_compared.mean(axis=1, dtype=np.float64)
        self.centre_mm = self._origin_mm + self._frame @ middle
        # In voxels, about the centre: turns and shifts are then of one size.
        self._arm = (self._frame @ (self._index_compared - middle[:, None]) / self._spacing).astype(
            np.float32
        )
        self._reach = float(np.sqrt((self._arm**2).sum(axis=0)).max())
        self._unit = (fixed.frame / np.linalg.norm(fixed.frame, axis=0)).astype(np.float32)
        described = fixed.described
        self._values = described.values.reshape(len(described.values), -1)[:, self._voxels]
        self._slopes = self._gradients(described.values, fixed.weights)
        smaller = float((moving.weights**2).sum()) * (moving.spacing_mm / self._spacing) ** (
            2 if self._planar else 3
        )
        self._full = min(float((fixed.weights**2).sum()), smaller)

    def at(self, transform: Transform) -> Aligned:
        """Measure one answer."""
        return self._seen(transform).answer

    def improve(self, start: Transform, steps: int = 12, kind: Kind = "rigid") -> Aligned:
        """Improve one answer by at most so many steps; what is returned is never worse than the start."""
        best, gain, taken = self._seen(start), 1.0, 0
        step: FloatArray | None = None
        for _ in range(steps):
            if best.pair is None:
                break
            if step is None:
                step = self._step(best, *best.pair, kind)
            motion, moved_vox = self._motion(gain * step, kind)
            if moved_vox < _SHORTEST_VOX:
                break
            # The motion moves fixed points, so it is applied before the transform.
            found = self._seen(best.answer.transform.compose(motion).about(self.centre_mm))
            if found.answer.evidence > best.answer.evidence:
                best, step, gain, taken = found, None, min(gain * _GROWS, _LONGEST_GAIN), taken + 1
            else:
                gain *= _SHRINKS
        return replace(best.answer, steps=taken)

    # ------------------------------------------------------------------ one place

    def _seen(self, transform: Transform) -> _Seen:
        whole = None
        if self._moving.describe is None:
            there, held = self._looked_up(transform, self._index_compared)
        else:
            values, weights = self._looked_up(transform, self._index)
            whole = self._moving.describe(values.reshape(self._shape)), weights.reshape(self._shape)
            there, held = whole[0].reshape(len(whole[0]), -1)[:, self._voxels], weights[self._voxels]
        weights = self._weights * held
        overlap = min(1.0, float(weights.sum(dtype=np.float64)) / self._full)
        pair, scales, correlation = None, (1.0, 1.0), 0.0
        if (weights > _HELD).sum() >= _FEWEST:
            fixed, moving = standardise(self._values, weights), standardise(there, weights)
            if fixed is not None and moving is not None:
                pair, scales = (fixed[0], moving[0]), (fixed[1], moving[1])
                product = float(np.einsum("cn,cn,n->", *pair, weights, dtype=np.float64))
                correlation = product / float(weights.sum(dtype=np.float64))
        answer = Aligned(transform, correlation, overlap)
        return _Seen(there, held, whole, weights, pair, scales, answer)

    def _looked_up(self, transform: Transform, index: Array32) -> tuple[Array32, Array32]:
        """Interpolate the moving volume, channels (C, P) and weights (P,), where fixed voxels (3, P) are sent."""
        linear = transform.matrix_mm[:3, :3]
        start_mm = linear @ self._origin_mm + transform.matrix_mm[:3, 3] - self._moving.origin_mm
        return self._moving.at_mapped(
            index, self._to_moving @ linear @ self._frame, self._to_moving @ start_mm
        )

    def _with_neighbours(self, seen: _Seen) -> tuple[Array32, Array32]:
        """Return channels (C, z, y, x) and weights (z, y, x) on the grid, where they are compared and beside that."""
        if seen.whole is not None:
            return seen.whole
        # Most answers that are looked at are no better than before and need no slopes, so this is not done for all.
        values, weights = self._looked_up(seen.answer.transform, self._index_beside)
        cube = np.zeros((len(values), *self._shape), dtype=np.float32)
        held = np.zeros(self._shape, dtype=np.float32)
        for full, compared, beside in (
            (cube.reshape(len(cube), -1), seen.there, values),
            (held.reshape(1, -1), seen.held, weights),
        ):
            full[:, self._voxels], full[:, self._beside] = compared, beside
        return cube, held

    def _step(self, seen: _Seen, fixed: Array32, moving: Array32, kind: Kind) -> FloatArray:
        """Solve for the motion's parameters by weighted least squares over all channels."""
        # Slopes belong to values before they are standardised: they are scaled as those were.
        slopes = np.float32(0.5 * seen.scales[0]) * self._slopes
        slopes += np.float32(0.5 * seen.scales[1]) * self._gradients(*self._with_neighbours(seen))
        size = len(self._parameters(slopes[0], kind))
        matrix: FloatArray = np.zeros((size, size))
        right: FloatArray = np.zeros(size)
        for channel, slope in enumerate(slopes):
            jacobian = self._parameters(slope, kind)
            weighted = jacobian * seen.weights
            matrix = matrix + (weighted @ jacobian.T).astype(np.float64)
            right = right + (weighted @ (fixed[channel] - moving[channel])).astype(np.float64)
        # Of a round or flat specimen some motions change nothing. The ridge keeps the step along these at zero.
        ridge = 1e-3 * float(matrix.trace()) / matrix.shape[0] + 1e-12
        return np.asarray(np.linalg.solve(matrix + ridge * np.eye(matrix.shape[0]), right), dtype=np.float64)

    def _parameters(self, slope: Array32, kind: Kind) -> Array32:
        """Derive the values by each parameter, (6 or 12, N): shifts, then turns or a linear map about the centre."""
        if kind == "affine":
            linear = slope[:, None] * self._arm[None]
            rows = linear[:2, :2].reshape(4, -1) if self._planar else linear.reshape(9, -1)
            return np.concatenate([slope[:2] if self._planar else slope, rows])
        # The cross product of arm and slope; that of numpy takes three times as long.
        (x, y, z), (along_x, along_y, along_z) = self._arm, slope
        turns = np.stack([y * along_z - z * along_y, z * along_x - x * along_z, x * along_y - y * along_x])
        return np.concatenate([slope[:2], turns[2:]] if self._planar else [slope, turns])

    def _motion(self, step: FloatArray, kind: Kind) -> tuple[Transform, float]:
        """Make the motion of fixed points from its parameters, no longer than a step may be, and say how long it is."""
        axes = 2 if self._planar else 3
        length = float(np.linalg.norm(step[:axes]) + self._reach * np.linalg.norm(step[axes:]))
        step = step * min(1.0, _LONGEST_VOX / max(length, 1e-12))
        shift, linear = np.zeros(3), np.eye(3)
        shift[:axes] = step[:axes] * self._spacing
        if kind == "affine":
            linear[:axes, :axes] += step[axes:].reshape(axes, axes)
        else:
            linear = Rotation.from_rotvec([0, 0, step[2]] if self._planar else step[3:]).as_matrix()
        return Transform.rigid(linear, shift, self.centre_mm), min(length, _LONGEST_VOX)

    def _gradients(self, cube: Array32, held: Array32) -> Array32:
        """Take the slopes (C, 3, N) along the world's axes for one voxel, 0 beside voxels outside the mask."""
        slopes = np.zeros((len(cube), 3, len(self._voxels)), dtype=np.float32)
        for axis in range(3):
            # The difference of a voxel's two neighbours needs three voxels. A slice has no slope across its plane.
            if self._shape[axis] < 3:
                continue
            before, after = (
                (slice(None),) * axis + (slice(None, -2),),
                (slice(None),) * axis + (slice(2, None),),
            )
            both = (held[before] > _HELD) & (held[after] > _HELD)
            for channel, values in enumerate(cube):
                full = np.zeros(self._shape, dtype=np.float32)
                inner = (slice(None),) * axis + (slice(1, -1),)
                full[inner] = 0.5 * (values[after] - values[before]) * both
                slopes[channel, axis] = full.ravel()[self._voxels]
        return np.asarray(np.einsum("wa,can->cwn", self._unit, slopes), dtype=np.float32)
