"""One block of the fixed grid filled from the moving volume, of which only the part it needs is read.

The transform maps fixed points to moving points, so the part needed is where it sends the block's voxels, and as much
around it as the interpolation looks at. SimpleITK does the arithmetic: a block differs from the whole volume resampled
at once by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from comir_hpc.config.words import Interpolation as Interpolation
from comir_hpc.errors import RegistrationError
from comir_hpc.space.grid import Box, FloatArray, Grid
from comir_hpc.transforms.composite import as_affine
from comir_hpc.transforms.itk import itk_image, itk_lattice, itk_on_grid
from comir_hpc.transforms.protocol import PointMap
from comir_hpc.volumes.volume import Volume

_METHOD = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor, "cubic": sitk.sitkBSpline}
# Moving voxels around the points that are looked up. A cubic spline's coefficients depend on all voxels, by a factor of
# 0.27 less with each one farther away: 16 leave 1e-9.
_MARGIN = {"linear": 2, "nearest": 2, "cubic": 16}
_REGION_BYTES = 256 << 20  # bytes of the moving volume read at once; a block that needs more is split
_BENT_PIECE = 64  # voxels along each side for which the displacement of every voxel is held
_DISPLACEMENT = 96  # bytes a voxel of a bent piece: points of both worlds, and the field that ITK reads
_FORETOLD = 32  # blocks, at most, whose pieces are looked at to tell the memory
_BENT_SPARE = 1.3  # times what a few blocks need: the region of another bent piece may be larger
_LATTICE = 16  # points along each axis at which overlap is sampled


def share_inside(transform: PointMap, fixed: Grid, moving: Grid) -> float:
    """Return the share of the fixed grid, sampled at 4096 points, that the transform sends into the moving grid.

    A moving volume that lies between the sampled points is found from its own side, if the transform has an inverse.
    """
    share = _share_of(fixed, moving, transform)
    if share > 0:
        return share
    try:
        seen = _share_of(moving, fixed, transform.inverse())
    except RegistrationError:
        return 0.0
    # Less than one of the sampled points.
    return seen / _LATTICE**3


def _share_of(one: Grid, other: Grid, transform: PointMap) -> float:
    # A single slice is sampled in its middle: it may be thicker than the other.
    counts = [1 if n == 1 else _LATTICE for n in one.shape_zyx]
    axes = [(np.arange(k) + 0.5) / k * n - 0.5 for k, n in zip(counts, one.shape_zyx, strict=True)]
    lattice = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    index = other.index_zyx(transform.apply(one.world_mm(lattice)))
    inside = ((index >= -0.5) & (index <= np.asarray(other.shape_zyx) - 0.5)).all(axis=1)
    return float(inside.mean())


class Resampler:
    """Resamples a moving volume onto boxes of a fixed grid.

    Parameters
    ----------
    moving : Volume
        The volume whose level 0 is read.
    transform : PointMap
        Map from fixed points to moving points (x, y, z) in mm.
    fixed : Grid
        Grid of the result: where its voxels lie.
    interpolation : {"linear", "nearest", "cubic"}
        Integers are rounded to the nearest one. (SimpleITK cuts the fraction off, which makes an image darker by half a
        grey value.)
    outside : sequence of float
        Value, for each channel, of voxels that come from outside the moving volume.
    """

    def __init__(
        self,
        moving: Volume,
        transform: PointMap,
        fixed: Grid,
        interpolation: Interpolation,
        outside: Sequence[float],
    ) -> None:
        self.moving, self.transform, self.fixed = moving, transform, fixed
        self._straight = as_affine(transform) is not None
        self.interpolation, self.outside = interpolation, outside

    def __call__(self, box: Box) -> NDArray[Any]:
        """Resample a box of the fixed grid: values (c, z, y, x) of the moving volume's dtype."""
        result = np.empty((self.moving.num_channels, *box.shape), dtype=self.moving.dtype)
        for piece, region in self._pieces(box):
            place = (slice(None), *piece.slices_in(box))
            for channel, fill in enumerate(self.outside):
                result[place][channel] = fill if result.dtype.kind == "f" else _clipped(fill, result.dtype)
            if region.size:
                self._fill(result[place], piece, region)
        return result

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what the user should know of the values."""
        if self.interpolation == "nearest" or not _is_wide_integer(self.moving.dtype):
            return ()
        return (
            f"{self.moving.path.name}: its integers of 64 bits are interpolated, which keeps 16 digits; if they are "
            "labels, use --interpolation nearest",
        )

    def region(self, box: Box) -> Box:
        """Find the voxels of the moving volume that a box of the fixed grid depends on; empty when it lies outside."""
        index = self.moving.grid.index_zyx(self._images(box))
        margin = _MARGIN[self.interpolation]
        low = np.floor(index.min(axis=0)).astype(int) - margin
        high = np.ceil(index.max(axis=0)).astype(int) + 1 + margin
        return Box(tuple(low), tuple(high)).intersect(self.moving.grid.box)

    def needed_bytes(self, boxes: Sequence[Box]) -> int:
        """Return the most bytes that resampling any of these boxes takes besides its result; nothing is read.

        A few boxes are looked at, evenly spread, and of a bent transform one piece of each.
        """
        few = boxes[:: max(1, len(boxes) // _FORETOLD)]
        if self._straight:
            return max((self._piece_bytes(*pair) for box in few for pair in self._pieces(box)), default=0)
        pieces = [_middle_of(box, _BENT_PIECE) for box in few[:: max(1, len(few) // 4)]]
        needed = max((self._piece_bytes(*pair) for box in pieces for pair in self._pieces(box)), default=0)
        return math.ceil(_BENT_SPARE * needed)

    def _piece_bytes(self, piece: Box, region: Box) -> int:
        """Return the most bytes that one piece takes while it is filled, one channel after another."""
        stored, channels = self.moving.dtype.itemsize, self.moving.num_channels
        read = region.size * (channels + 1) * stored  # the values read, and ITK's copy of a channel
        wide = stored if self.interpolation == "nearest" else _wide_bytes(self.moving.dtype)
        coefficients = 8 * region.size if self.interpolation == "cubic" else 0
        bent = 0 if self._straight else _DISPLACEMENT * piece.size
        # Integers are there three times: as they are, clipped, rounded. Everything else is there twice.
        integer = self.moving.dtype.kind in "iu" and self.interpolation != "nearest"
        return read + max(wide * piece.size + coefficients + bent, (3 if integer else 2) * wide * piece.size)

    def _images(self, box: Box) -> FloatArray:
        """Find moving points, (N, 3) in mm, whose bounding box holds the images of all voxels of the box."""
        grid = self.fixed.crop(box)
        if self._straight:
            ends = [(0, n - 1) for n in box.shape]
            corners = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
            return self.transform.apply(grid.world_mm(corners))
        return self.transform.apply_to_grid(grid).reshape(-1, 3)

    def _pieces(self, box: Box) -> Iterator[tuple[Box, Box]]:
        """Split a box until what each piece needs of the moving volume fits into memory."""
        longest = int(np.argmax(box.shape))
        bent = not self._straight and box.shape[longest] > _BENT_PIECE
        if not bent:
            region = self.region(box)
            # An image, its float64 copy and ITK's own are held for one channel, the others as they are stored.
            needed = region.size * (self.moving.num_channels * self.moving.dtype.itemsize + 16)
            if needed <= _REGION_BYTES or box.shape[longest] == 1:
                yield box, region
                return
        middle = (box.start[longest] + box.stop[longest]) // 2
        for half in _halves(box, longest, middle):
            yield from self._pieces(half)

    def _fill(self, result: NDArray[Any], piece: Box, region: Box) -> None:
        values = self.moving.read(region)
        source, target = self.moving.grid.crop(region), self.fixed.crop(piece)
        look_up = itk_on_grid(self.transform, target)
        for channel, fill in enumerate(self.outside):
            if self.interpolation == "nearest" and _is_wide_integer(values.dtype):
                result[channel] = _nearest_of_wide(values[channel], source, target, look_up, fill)
                continue
            image = itk_image(values[channel], source)
            # Labels stay what they are; everything else is interpolated in floating point and rounded by us.
            kind = image.GetPixelID() if self.interpolation == "nearest" else _wide(values.dtype)
            size, *frame = itk_lattice(target)
            found = sitk.Resample(image, size, look_up, _METHOD[self.interpolation], *frame, fill, kind)
            result[channel] = _as_dtype(sitk.GetArrayViewFromImage(found), values.dtype)


def _nearest_of_wide(
    values: NDArray[Any], source: Grid, target: Grid, look_up: sitk.Transform, fill: float
) -> NDArray[Any]:
    """Look up 64-bit integers in two halves: ITK passes every value through float64, which is exact to 2^53 only."""
    size, *frame = itk_lattice(target)
    result = np.full(target.shape_zyx, _clipped(fill, values.dtype), dtype=values.dtype)
    halves, found = np.ascontiguousarray(values).view(np.uint32), result.view(np.uint32)
    outside = found[0, 0, :2].tolist()
    for half in (0, 1):
        image = itk_image(halves[..., half::2], source)
        looked_up = sitk.Resample(
            image, size, look_up, sitk.sitkNearestNeighbor, *frame, float(outside[half]), sitk.sitkUInt32
        )
        found[..., half::2] = sitk.GetArrayViewFromImage(looked_up)
    return result


def _halves(box: Box, axis: int, middle: int) -> tuple[Box, Box]:
    stop, start = list(box.stop), list(box.start)
    stop[axis] = start[axis] = middle
    return Box(box.start, (stop[0], stop[1], stop[2])), Box((start[0], start[1], start[2]), box.stop)


def _is_wide_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iu" and dtype.itemsize == 8


def _middle_of(box: Box, side: int) -> Box:
    """Cut a cube of at most that side out of the middle of a box."""
    sides = [min(n, side) for n in box.shape]
    start = [a + (n - s) // 2 for a, n, s in zip(box.start, box.shape, sides, strict=True)]
    stop = [a + s for a, s in zip(start, sides, strict=True)]
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _wide(dtype: np.dtype[Any]) -> int:
    """Return SimpleITK's pixel type that holds interpolated values of a dtype without loss."""
    kind: int = sitk.sitkFloat32 if _wide_bytes(dtype) == 4 else sitk.sitkFloat64
    return kind


def _wide_bytes(dtype: np.dtype[Any]) -> int:
    """Return the bytes of one value of that type."""
    return 4 if dtype.itemsize <= 2 or dtype == np.float32 else 8


def _as_dtype(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind not in "iu" or values.dtype.kind in "iu":
        return values.astype(dtype)
    info = np.iinfo(dtype)
    # A cubic spline overshoots; the largest 64-bit integers have no float64 of their own.
    high = float(info.max) if dtype.itemsize < 8 else float(np.nextafter(float(info.max), 0))
    rounded: NDArray[Any] = np.rint(np.clip(values, float(info.min), high)).astype(dtype)
    return rounded


def _clipped(value: float, dtype: np.dtype[Any]) -> int:
    """Return the integer of a dtype that is nearest to a value."""
    info = np.iinfo(dtype)
    return int(min(max(round(value), int(info.min)), int(info.max)))
