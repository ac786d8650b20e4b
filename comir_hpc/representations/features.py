"""Hold what is compared: a few channels on a grid, and where they mean something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.errors import RegistrationError
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.volumes.resampled import Resampled
from comir_hpc.volumes.volume import Volume

Describe = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Make channels (c, z, y, x) from one channel of values (z, y, x) on cubic voxels."""

# Registration needs neighbours along every axis that it works in. ITK's recursive smoothing refuses fewer than four.
_FEWEST_VOXELS = 4


@dataclass(frozen=True, eq=False)
class Features:
    """One volume as the registration sees it.

    Attributes
    ----------
    values : (c, z, y, x) float32
        Channels of the representation, or one channel of normalised intensity.
    mask : (z, y, x) bool
        True where the specimen is.
    grid : Grid
        Grid of values and mask.
    known : (z, y, x) bool or None
        True where something was measured, so that padding is left out; None if that is everywhere. In `values`,
        padding is background, for operations that look at the neighbours of a voxel.
    describe : callable or None
        Makes the channels that are compared from `values`, if they look along the axes of the grid. A volume is then
        turned onto the other one's grid before it is described. None if `values` are compared as they are.
    """

    values: NDArray[np.float32]
    mask: NDArray[np.bool_]
    grid: Grid
    known: NDArray[np.bool_] | None = None
    describe: Describe | None = None

    @cached_property
    def centroid_mm(self) -> FloatArray:
        """World position (x, y, z) in mm of the mask's centre of mass."""
        return self.grid.world_mm(ndimage.center_of_mass(self.mask))


def specimen_mask(volume: Volume, place: int | Grid) -> NDArray[np.bool_]:
    """Mark the specimen, (z, y, x): above the foreground threshold of `ingest`, without specks, holes and padding.

    Where the volume has a `region`, nothing outside of it belongs to the specimen.

    `place` is the number of a level, or the grid to see the volume on.

    A voxel belongs to it if most of its 5 x 5 x 5 neighbours are above the threshold. Otherwise noise in the air would
    leave single voxels in the mask, and dark tissue would leave holes.

    Raises
    ------
    VolumeError
        If the volume has no intensity statistics, or its region is empty or elsewhere.
    RegistrationError
        If nothing is left.
    """
    seen = Resampled(volume, place)
    values = seen.read()
    above = np.zeros(values.shape[1:], dtype=np.bool_)
    for channel, one in enumerate(values):
        above |= volume.intensity(channel).foreground(one)
    most = ndimage.uniform_filter(above.astype(np.float32), size=5, mode="nearest") > 0.5
    # In a single slice every voxel touches the border along z, so that no hole is closed in 3D: fill holes in 2D.
    filled = ndimage.binary_fill_holes(most[0])[None] if len(most) == 1 else ndimage.binary_fill_holes(most)
    mask: NDArray[np.bool_] = filled & seen.known() if seen.padded else filled
    if volume.region is not None and mask.any():
        mask = mask & volume.region.on(seen.grid)
        if not mask.any():
            raise RegistrationError(
                f"{volume.region.path} covers no voxel of the specimen in {volume.path}; expected a mask of it: "
                "are the two masks exchanged, or the mask turned round?"
            )
    if not mask.any():
        raise RegistrationError(
            f"{volume.path} has no foreground: {int(above.sum())} of {above.size} voxels are above the threshold "
            f"{volume.intensity().foreground_above:g}, scattered; ingest it again with a lower --foreground-above"
        )
    return mask


def interior(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Take two voxels off the surface of a mask, or one, or none: at least half of it is left."""
    # The faces of the volume are no surface: the specimen goes on there, it was only cut off.
    for count in (2, 1):
        inner = ndimage.binary_erosion(mask, iterations=count, border_value=1)
        if 2 * inner.sum() >= mask.sum():
            return np.asarray(inner, dtype=np.bool_)
    return mask


def surrounded(
    mask: NDArray[np.bool_], known: NDArray[np.bool_] | None, grid: Grid, margin_mm: float
) -> NDArray[np.bool_]:
    """Add a margin to a mask (z, y, x), by at least one voxel along every axis, where something was measured.

    Where a motion may change the size, what is around the specimen has to be compared, too. Otherwise nothing is worse
    for a part of it that comes to lie outside the other specimen.
    """
    wide = [
        1 if axis not in grid.axes else 2 * max(1, round(margin_mm / grid.spacing_mm[axis])) + 1
        for axis in range(3)
    ]
    grown: NDArray[np.bool_] = ndimage.maximum_filter(mask, size=wide, mode="constant")
    return grown if known is None else grown & known


def checked(features: Features, path: Path) -> Features:
    """Return the features if they can be registered.

    Raises
    ------
    RegistrationError
        If an axis is too short, a value is not finite or nothing varies inside the mask.
    """
    if min(features.grid.shape_zyx[axis] for axis in features.grid.axes) < _FEWEST_VOXELS:
        raise RegistrationError(
            f"{path}: {features.grid} has fewer than {_FEWEST_VOXELS} voxels along an axis; "
            "expected a volume, or a single slice of that many along y and x"
        )
    if not np.isfinite(features.values).all():
        count = int((~np.isfinite(features.values)).sum())
        raise RegistrationError(
            f"{path}: {count} values are NaN or infinite; ingest it again with --non-finite VALUE"
        )
    if not features.values[:, features.mask].std(axis=1).max() > 0:
        raise RegistrationError(
            f"{path}: the values do not vary inside the specimen; there is nothing to compare"
        )
    return features


def one_channel(fixed: Features, moving: Features) -> tuple[Features, Features]:
    """Mix the channels of both volumes in the same way into one, (1, z, y, x), since SimpleITK's metrics take one.

    It is the mixture that varies most. A single channel is returned as it is.
    """
    if len(fixed.values) == 1:
        return fixed, moving
    inside = np.concatenate([side.values[:, side.mask] for side in (fixed, moving)], axis=1)
    weights = np.linalg.eigh(np.cov(inside))[1][:, -1].astype(np.float32)
    mixed = [
        replace(side, values=np.tensordot(weights, side.values, axes=1)[None]) for side in (fixed, moving)
    ]
    return mixed[0], mixed[1]
