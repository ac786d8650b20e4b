"""Keep a part of the specimen from a deformation, and measure there whether it has made anything better.

The part is a regular pattern of cubes. What is found for their surroundings is carried into them by the smoothness of
the deformation alone, so that a deformation that follows noise does not improve them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from comir_hpc.register.deform.warping import Array
from comir_hpc.space.grid import FloatArray

_SIDES_VOX = (4, 16)  # least and largest side of a cube
_FEWEST = 8  # cubes that a judgement needs
_SURE = 2.0  # standard errors by which the mean gain has to be above zero


@dataclass(frozen=True, eq=False)
class Gain:
    """How the agreement of the cubes has changed.

    Attributes
    ----------
    before, after : float
        Mean agreement of the cubes: the square of the correlation of the two volumes' values, with the sign of the
        correlation where only a positive one counts.
    gain, error : float
        Mean of the differences, and its standard error.
    cubes : int
        Number of cubes that both volumes show before and after.
    """

    before: float
    after: float
    gain: float
    error: float
    cubes: int

    @property
    def refusal(self) -> str | None:
        """Why the deformation is not kept, as a sentence; None if it is."""
        if self.cubes < _FEWEST:
            return (
                f"only {self.cubes} cubes of the specimen could be held out to test the deformation on, at least "
                f"{_FEWEST} are needed"
            )
        if self.gain > _SURE * self.error:
            return None
        return (
            f"the deformation does not improve the part of the specimen that was held out: its agreement is "
            f"{self.before:.3f} before and {self.after:.3f} after (gain {self.gain:.4f}, standard error "
            f"{self.error:.4f})"
        )


class HeldOut:
    """Cubes of the specimen that take no part in finding a deformation.

    Parameters
    ----------
    mask : (z, y, x) bool
        Where the specimen is.
    side_vox : float
        Side of a cube in voxels; it is kept between 4 and 16.
    seed : int
        Seed of the pattern's place.
    """

    def __init__(self, mask: NDArray[np.bool_], side_vox: float, seed: int) -> None:
        side = int(np.clip(round(side_vox), *_SIDES_VOX))
        offset = np.random.default_rng(seed).integers(0, 2 * side, 3)
        # Cubes at every second place along each axis: an eighth of the specimen.
        places = [(np.arange(n) + o) // side for n, o in zip(mask.shape, offset, strict=True)]
        counts = [int(p.max()) + 1 for p in places]
        held = [p % 2 == 0 for p in places]
        inside = held[0][:, None, None] & held[1][None, :, None] & held[2][None, None, :] & mask
        number = (places[0][:, None, None] * counts[1] + places[1][None, :, None]) * counts[2] + places[2]
        filled = np.bincount(number[inside], minlength=math.prod(counts))
        # Of a cube at the rim few voxels may be specimen, and few voxels agree by chance.
        full = filled >= side**3 / 2
        labels = np.cumsum(full) * full
        self.labels = np.where(inside, labels[number], 0)
        """Number of the cube that a voxel belongs to, from 1; 0 for none, (z, y, x)."""
        self.num_cubes = int(full.sum())

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Where the cubes are, (z, y, x)."""
        found: NDArray[np.bool_] = self.labels > 0
        return found

    def gain(
        self, fixed: Array, before: tuple[Array, Array], after: tuple[Array, Array], signed: bool
    ) -> Gain:
        """Compare the agreement of the cubes before and after.

        Parameters
        ----------
        fixed : (c, z, y, x)
            Maps of the fixed volume.
        before, after : (values, weights)
            Moving maps (c, z, y, x) on the fixed grid, with the weight (z, y, x) of every voxel, zero where the moving
            volume has none.
        signed : bool
            Whether a negative correlation counts against the agreement.
        """
        agreements = []
        for values, weights in (before, after):
            found = np.mean(
                [self._agreement(f, m, weights > 0.5, signed) for f, m in zip(fixed, values, strict=True)],
                axis=0,
            )
            agreements.append(found)
        first, second = agreements
        both = np.isfinite(first) & np.isfinite(second)
        count = int(both.sum())
        if count < 2:
            return Gain(0.0, 0.0, 0.0, math.inf, count)
        change = second[both] - first[both]
        error = float(change.std(ddof=1)) / math.sqrt(count)
        return Gain(float(first[both].mean()), float(second[both].mean()), float(change.mean()), error, count)

    def _agreement(self, fixed: Array, moving: Array, seen: NDArray[np.bool_], signed: bool) -> FloatArray:
        """Return the agreement of every cube (n,); NaN where less than half of it is seen or nothing varies."""
        labels = self.labels[self.mask]
        shown = seen[self.mask].astype(np.float64)
        f, m = fixed[self.mask].astype(np.float64), moving[self.mask].astype(np.float64)

        def total(values: FloatArray) -> FloatArray:
            sums = np.bincount(labels, weights=values * shown, minlength=self.num_cubes + 1)
            return np.asarray(sums[1:], dtype=np.float64)

        with np.errstate(invalid="ignore", divide="ignore"):
            count, size = total(np.ones(len(f))), np.bincount(labels, minlength=self.num_cubes + 1)[1:]
            mean_f, mean_m = total(f) / count, total(m) / count
            f, m = f - mean_f[labels - 1], m - mean_m[labels - 1]
            both, var_f, var_m = total(f * m), total(f * f), total(m * m)
            # Squared, as the local correlation that the forces follow. The sign is kept where it tells right from
            # wrong.
            found = both * (np.abs(both) if signed else both) / (var_f * var_m)
        agreement: FloatArray = np.where((count >= size / 2) & (var_f > 0) & (var_m > 0), found, np.nan)
        return agreement
