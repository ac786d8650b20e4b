"""Normalised gradient magnitude: where structures begin and end, compared by correlation. It needs no training.

Haber and Modersitzki, "Intensity gradient based registration and fusion of multi-modal images", MICCAI 2006. The
gradient g is that of a Gaussian of a stated scale, in mm, and the channel is |g| / sqrt(|g|^2 + eta^2). eta is the mean
of |g| over the specimen. So the channel lies between 0 and 1. A change of brightness or contrast changes nothing, and
neither does its inversion.

A length has no direction: the channel of a turned volume is the turned channel. This holds because the Gaussian has the
same width in mm along every axis, and because it is wide enough for the grid (at least 1.2 voxels of the coarser one of
both volumes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.representations.features import Features, checked
from comir_hpc.representations.intensity import Intensity
from comir_hpc.representations.isotropic import cut_grid
from comir_hpc.representations.measures import CORRELATION, Measure
from comir_hpc.representations.protocol import Array, Representation, Role
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.volume import Volume

SCALE_VOXELS = 1.2
"""Standard deviation of the Gaussian in voxels. At 1 voxel a sampled Gaussian still depends on where the grid lies."""
_REACH = 2  # standard deviations from padding within which a gradient is that of the padding
_VERSION = 1  # of what the values are, for the fingerprint of a result


@dataclass(frozen=True, eq=False)
class Gradient(Intensity):
    """Normalised gradient magnitude of the first channel; thick slices are interpolated first.

    Attributes
    ----------
    scale_mm : float
        Standard deviation of the Gaussian in mm, at the finest level. It is the same for both volumes of a pair.
    """

    scale_mm: float

    measure: ClassVar[Measure] = CORRELATION
    origin: ClassVar[str] = "gradient magnitude of the intensity"
    noun: ClassVar[str] = "gradients"
    pictured: ClassVar[bool] = True

    @classmethod
    def from_settings(
        cls, volume: Volume, settings: RegisterSettings, role: Role, partner: Volume
    ) -> Representation:
        """Choose the scale of a pair: that of the volume with the coarser voxels."""
        del settings, role
        return cls(volume, SCALE_VOXELS * max(_coarsest_mm(one.grid) for one in (volume, partner)))

    def features(self, level: int) -> tuple[Features, Array]:
        """Make the gradient magnitude on nearly cubic voxels, and show the intensity on the same grid."""
        features, image = super().features(level)
        kept = self._away_from_padding(features)
        mask = features.mask if kept is None else features.mask & kept
        if not mask.any():
            raise RegistrationError(
                f"{self.compared.path}: no voxel of the specimen is further than {_REACH} x {self.scale_mm:.3g} mm "
                "from padding, so nothing has a gradient of its own; use --representation intensity"
            )
        magnitude = gradient_magnitude(features.values[0], features.grid, self.scale_at(features.grid))
        values = normalised(magnitude, mask)[None]
        found = replace(features, values=values, mask=mask, known=kept)
        return checked(found, self.compared.path), image

    def represented(self, image: Array, mask: NDArray[np.bool_], grid: Grid) -> Features | None:
        """Make the gradient magnitude of another image."""
        magnitude = gradient_magnitude(image, grid, self.scale_at(grid))
        return Features(normalised(magnitude, mask)[None], mask, grid)

    def scale_at(self, grid: Grid) -> float:
        """Give the standard deviation in mm on a grid: a coarser level needs a wider Gaussian."""
        return max(self.scale_mm, SCALE_VOXELS * _coarsest_mm(grid))

    def working_bytes(self, level: int) -> float:
        """Predict the memory, in bytes, of the three derivatives and their sum."""
        z, y, x = self.grid(level).shape_zyx
        return 16.0 * z * y * x

    def identity(self) -> dict[str, Any]:
        """Say what the values depend on beside the volume: the scale, which follows from both volumes."""
        return super().identity() | {"gradient": _VERSION, "scale_mm": self.scale_mm}

    def notes(self, level: int) -> list[str]:
        """Say what is assumed about the volume, and the scale."""
        scale = self.scale_at(self.grid(level))
        return [*super().notes(level), f"gradients are those of a Gaussian of {scale:.3g} mm"]

    def _away_from_padding(self, features: Features) -> NDArray[np.bool_] | None:
        """Mark the voxels whose gradient saw no padding: the step to it is no edge of the specimen."""
        known = features.known
        if known is None or known.all():
            return known
        reach = [max(_REACH * s, 1.0) for s in _in_voxels(features.grid, self.scale_at(features.grid))]
        return np.asarray(ndimage.distance_transform_edt(known, sampling=[1 / r for r in reach]) > 1)


def gradient_magnitude(image: Array, grid: Grid, scale_mm: float) -> Array:
    """Measure the length of the gradient of a smoothed image, per mm.

    Parameters
    ----------
    image : (z, y, x) float32
        Intensities. Beyond the border the nearest value counts; an axis of one voxel is left out.
    grid : Grid
        Grid of the image.
    scale_mm : float
        Standard deviation of the Gaussian in mm, the same along every axis.

    Returns
    -------
    (z, y, x) float32
        Gradient magnitude in units of the intensity per mm.
    """
    sigma = _in_voxels(grid, scale_mm)
    total = np.zeros(image.shape, dtype=np.float32)
    for axis in grid.axes:
        order = [int(a == axis) for a in range(3)]
        # Beyond its border the image goes on as it ends. Zeros there would be an edge that nobody measured.
        slope = ndimage.gaussian_filter(image, sigma, order=order, mode="nearest")
        total += np.square(slope / np.float32(grid.spacing_mm[axis]))
    return np.asarray(np.sqrt(total), dtype=np.float32)


def normalised(magnitude: Array, mask: NDArray[np.bool_]) -> Array:
    """Bring gradient magnitudes (z, y, x) to 0 to 1, by their mean over the mask; zeros stay where nothing varies."""
    eta = float(magnitude[mask].mean(dtype=np.float64)) if mask.any() else 0.0
    if not eta > 0:
        return np.zeros_like(magnitude)
    return np.asarray(magnitude / np.sqrt(np.square(magnitude) + np.float32(eta**2)), dtype=np.float32)


def _coarsest_mm(grid: Grid) -> float:
    """Coarsest spacing in mm of the nearly cubic voxels that a volume is compared on."""
    cut = cut_grid(grid)
    return max(cut.spacing_mm[axis] for axis in cut.axes)


def _in_voxels(grid: Grid, scale_mm: float) -> list[float]:
    return [scale_mm / s if axis in grid.axes else 0.0 for axis, s in enumerate(grid.spacing_mm)]
