"""How well labels lie on labels after a registration: Dice, and the 95th percentile of the surface distance in mm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from comir_hpc.errors import VolumeError
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.space.grid import Box
from comir_hpc.transforms.protocol import PointMap
from comir_hpc.volumes.volume import Volume

_BYTES = 120  # of each voxel: both label volumes, and the distances of one structure
# Voxels that are carried at once: their points take 24 MiB as float64.
_SLAB_VOXELS = 1 << 20
# More than an atlas has. An image that was given in place of a segmentation ends here.
_MOST_LABELS = 4096
# The largest distance would be that of one stray voxel.
_PERCENTILE = 95

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """How one structure of the fixed volume is covered by the same structure of the moving one.

    Attributes
    ----------
    label : int
        Value of the structure's voxels.
    dice : float
        Twice the common voxels over the sum of both, 0 to 1.
    hd95_mm : float
        The larger of the two 95th percentiles of the distance from one surface to the other, in mm; NaN where the
        structure is missing in one of them.
    """

    label: int
    dice: float
    hd95_mm: float


def label_overlaps(fixed: Path, moving: Path, transform: PointMap) -> tuple[Overlap, ...]:
    """Measure every structure of the fixed labels; 0 is no structure.

    Parameters
    ----------
    fixed, moving : Path
        Stores of labels in the two worlds.
    transform : PointMap
        Map from fixed to moving points. Each fixed voxel gets the label of the moving voxel that is nearest to where it
        is sent.

    Raises
    ------
    VolumeError
        If a volume holds no labels, or both do not fit into memory.
    """
    ours, theirs = Volume.open(fixed), Volume.open(moving)
    needed = _BYTES * (math.prod(ours.grid.shape_zyx) + math.prod(theirs.grid.shape_zyx))
    if needed > available_bytes():
        raise VolumeError(
            f"the labels {fixed} and {moving} need {in_words(needed)} of memory to be compared, "
            f"{in_words(available_bytes())} are free; use a larger machine"
        )
    wanted = _read(ours, fixed)
    found = _carried(_read(theirs, moving), theirs, ours, transform)
    names = np.unique(wanted)
    names = names[names != 0]
    if not len(names):
        raise VolumeError(f"{fixed} holds no label but 0; give the labels of the fixed volume")
    return tuple(_overlap(int(n), wanted == n, found == n, ours.grid.spacing_mm) for n in names)


def means(overlaps: tuple[Overlap, ...]) -> tuple[float, float]:
    """Return the mean Dice of all structures, and the mean distance in mm of those that both volumes have."""
    distances = [one.hd95_mm for one in overlaps if math.isfinite(one.hd95_mm)]
    return float(np.mean([one.dice for one in overlaps])), float(
        np.mean(distances)
    ) if distances else math.nan


def _read(volume: Volume, path: Path) -> Labels:
    values = volume.read()[0]
    labels: Labels = np.rint(values).astype(np.int64)
    if not np.array_equal(labels, values):
        raise VolumeError(
            f"{path} holds values that are not whole numbers, so they are no labels; give a segmentation"
        )
    if (count := len(np.unique(labels))) > _MOST_LABELS:
        raise VolumeError(
            f"{path} holds {count} different values, at most {_MOST_LABELS} are taken for labels"
        )
    return labels


def _carried(labels: Labels, theirs: Volume, ours: Volume, transform: PointMap) -> Labels:
    """Look the moving labels up on the fixed grid, slab by slab; 0 outside."""
    grid = ours.grid
    depth, rows, columns = grid.shape_zyx
    found = np.zeros(grid.shape_zyx, dtype=np.int64)
    step = max(1, _SLAB_VOXELS // (rows * columns))
    last = np.asarray(labels.shape) - 1
    for start in range(0, depth, step):
        box = Box((start, 0, 0), (min(depth, start + step), rows, columns))
        index = np.rint(theirs.grid.index_zyx(transform.apply_to_grid(grid.crop(box)))).astype(np.int64)
        inside = ((index >= 0) & (index <= last)).all(axis=-1)
        if theirs.grid.planar:  # the plane of a slice has no thickness that counts
            inside = ((index[..., 1:] >= 0) & (index[..., 1:] <= last[1:])).all(axis=-1)
        # Clipped, so that every look-up is allowed. What lay outside becomes 0 in the next line.
        values = labels[tuple(np.moveaxis(np.clip(index, 0, last), -1, 0))]
        found[box.slices] = np.where(inside, values, 0)
    return found


def _overlap(
    label: int, one: NDArray[np.bool_], other: NDArray[np.bool_], spacing_mm: tuple[float, ...]
) -> Overlap:
    sizes = int(one.sum()), int(other.sum())
    if not all(sizes):
        return Overlap(label, 0.0, math.nan)
    dice = 2 * int((one & other).sum()) / sum(sizes)
    # Only the box around both matters for distances between them.
    boxes = ndimage.find_objects((one | other).astype(np.int8))[0]
    around = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in boxes)
    one, other = one[around], other[around]
    # The surface is the layer of voxels that an erosion takes away.
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (one, other)]
    away = [ndimage.distance_transform_edt(~surface, sampling=spacing_mm) for surface in surfaces]
    directed = [
        np.percentile(away[1][surfaces[0]], _PERCENTILE),
        np.percentile(away[0][surfaces[1]], _PERCENTILE),
    ]
    return Overlap(label, dice, float(max(directed)))
