"""Describe voxel grids in the world and boxes of voxels, and plan how a volume is split into blocks.

Two orders meet here and nowhere else. Arrays are indexed (z, y, x); world points are ITK's LPS (x, y, z) in
millimetres. `Grid` is the only place where one becomes the other. Pure numpy: nothing is read or written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from comir_hpc.errors import ConfigError, VolumeError

Triple = tuple[int, int, int]
Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]
FloatArray = NDArray[np.float64]

IDENTITY: Matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

MM_PER_UNIT = {
    "nanometer": 1e-6,
    "micrometer": 1e-3,
    "millimeter": 1.0,
    "centimeter": 10.0,
    "meter": 1e3,
}
_SHARPNESS = 1e-3  # of a voxel, at least: what `Grid.agrees_with` takes for the same place
_UNIT_ALIASES = {
    "nm": "nanometer",
    "um": "micrometer",
    "µm": "micrometer",
    "μm": "micrometer",
    "micron": "micrometer",
    "microns": "micrometer",
    "mm": "millimeter",
    "cm": "centimeter",
    "m": "meter",
    "inch": "inch",
}


def unit_name(text: str) -> str:
    """Return the OME-Zarr (UDUNITS) name of a unit of length, e.g. ``um`` -> ``micrometer``.

    Raises
    ------
    ConfigError
        If the unit is not one of nm, um, mm, cm, m or their long names.
    """
    name = text.strip().replace("metre", "meter")
    name = _UNIT_ALIASES.get(name, name)
    if name not in MM_PER_UNIT:
        known = ", ".join(("nm", "um", "mm", "cm", "m", *MM_PER_UNIT))
        raise ConfigError(f"unknown unit of length {text!r}; expected one of {known}")
    return name


def as_triple(values: Sequence[Any], kind: type) -> tuple[Any, Any, Any]:
    """Make a tuple of three values of one type."""
    first, second, third = values
    return kind(first), kind(second), kind(third)


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie in the world.

    Parameters
    ----------
    shape_zyx : three int
        Voxels along z, y, x, each at least 1.
    spacing_zyx : three float
        Distance between voxel centres along z, y, x, in `unit`. Each is positive.
    origin_xyz : three float
        World position (LPS) of the centre of voxel (0, 0, 0), in `unit`.
    direction : 3 x 3 float
        ITK's direction matrix: column j is the world direction in which index axis j of (x, y, z) grows. It is
        orthonormal; a determinant of -1 (a flipped axis) is allowed.
    unit : str
        Unit of `spacing_zyx` and `origin_xyz`. The methods give every world coordinate in mm.

    Raises
    ------
    VolumeError
        If a number is not finite or so large that neighbouring voxels get the same coordinates, a spacing is not
        positive, or the direction is not orthonormal.
    """

    shape_zyx: Triple
    spacing_zyx: Vector
    origin_xyz: Vector = (0.0, 0.0, 0.0)
    direction: Matrix = IDENTITY
    unit: str = "millimeter"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape_zyx", as_triple(self.shape_zyx, int))
        object.__setattr__(self, "spacing_zyx", as_triple(self.spacing_zyx, float))
        object.__setattr__(self, "origin_xyz", as_triple(self.origin_xyz, float))
        object.__setattr__(self, "direction", tuple(as_triple(row, float) for row in self.direction))
        object.__setattr__(self, "unit", unit_name(self.unit))
        if min(self.shape_zyx) < 1:
            raise VolumeError(
                f"a grid of {self.shape_zyx} voxels (z, y, x) is empty; expected at least one along each axis"
            )
        if any(s < 0 for s in self.spacing_zyx):
            # The message does not advise to give another spacing. That would hide that the axis runs backwards, and
            # mirror the volume.
            raise VolumeError(
                f"spacing {self.spacing_zyx} {self.unit} (z, y, x) is negative: expected lengths, and an axis that "
                "runs backwards in the direction; export the volume again"
            )
        if not all(math.isfinite(s) and s > 0 for s in self.spacing_zyx):
            raise VolumeError(
                f"spacing {self.spacing_zyx} {self.unit} (z, y, x) is not positive; "
                "give the true one with --spacing Z Y X"
            )
        if not all(math.isfinite(o) for o in self.origin_xyz):
            raise VolumeError(f"origin {self.origin_xyz} {self.unit} (x, y, z) is not finite")
        self._require_distinct_voxels()
        columns = np.asarray(self.direction)
        # The tolerance is 1e-3: NIfTI keeps its orientation in single precision, and scanners round theirs to four
        # digits.
        if not np.allclose(columns.T @ columns, np.eye(3), atol=1e-3):
            raise VolumeError(
                f"direction {np.round(columns, 4).tolist()} is not orthonormal (sheared axes); "
                "resample the volume on a grid with perpendicular axes first"
            )

    def _require_distinct_voxels(self) -> None:
        """Refuse coordinates so large that double precision cannot tell neighbouring voxels apart."""
        # An axis of one voxel has no neighbours: its spacing is a thickness and may be any number.
        steps = [(n - 1, s) for n, s in zip(self.shape_zyx, self.spacing_zyx, strict=True) if n > 1]
        farthest = max(map(abs, self.origin_xyz)) + sum(n * s for n, s in steps)
        finest = min((s for _, s in steps), default=math.inf)
        if math.ulp(farthest) > _SHARPNESS * finest:
            raise VolumeError(
                f"its coordinates reach {farthest:.3g} {self.unit} (origin {self.origin_xyz}, x, y, z), where double "
                f"precision does not tell voxels {finest:.3g} {self.unit} apart from each other; correct the origin or "
                "the spacing in its metadata, or export it again"
            )

    @property
    def spacing_mm(self) -> Vector:
        """Distance between voxel centres along z, y, x in mm."""
        z, y, x = (s * MM_PER_UNIT[self.unit] for s in self.spacing_zyx)
        return z, y, x

    @property
    def origin_mm(self) -> Vector:
        """World position (x, y, z) of voxel (0, 0, 0) in mm."""
        x, y, z = (o * MM_PER_UNIT[self.unit] for o in self.origin_xyz)
        return x, y, z

    @property
    def extent_mm(self) -> Vector:
        """Side lengths along z, y, x in mm, from outer edge to outer edge."""
        z, y, x = (n * s for n, s in zip(self.shape_zyx, self.spacing_mm, strict=True))
        return z, y, x

    @property
    def planar(self) -> bool:
        """Whether this is a single slice: one voxel along z, whose spacing there is only a thickness."""
        return self.shape_zyx[0] == 1

    @property
    def axes(self) -> tuple[int, ...]:
        """Array axes (0 is z) that count: (1, 2) for a single slice, otherwise all three."""
        return (1, 2) if self.planar else (0, 1, 2)

    @property
    def finest_mm(self) -> float:
        """Smallest spacing along `axes` in mm. It is the length of a voxel when errors are counted in voxels."""
        return min(self.spacing_mm[axis] for axis in self.axes)

    @property
    def mean_side_mm(self) -> float:
        """Mean side length along `axes` in mm. Errors are compared with it."""
        return float(np.mean([self.extent_mm[axis] for axis in self.axes]))

    @property
    def centre_mm(self) -> FloatArray:
        """World position (x, y, z) of the middle of the grid in mm, shape (3,)."""
        return self.world_mm((np.asarray(self.shape_zyx) - 1) / 2)

    @property
    def matrix_mm(self) -> FloatArray:
        """Matrix (4, 4) from homogeneous voxel index (z, y, x, 1) to world (x, y, z, 1) in mm."""
        matrix = np.eye(4)
        # Columns in reverse: ITK's direction and spacing have one column for x, y, z, but an index is (z, y, x).
        spacing_xyz = np.asarray(self.spacing_mm[::-1])
        matrix[:3, :3] = (np.asarray(self.direction) * spacing_xyz)[:, ::-1]
        matrix[:3, 3] = self.origin_mm
        return matrix

    def world_mm(self, points_zyx: ArrayLike) -> FloatArray:
        """Convert continuous voxel indices (..., 3) as (z, y, x) into world positions (..., 3) as (x, y, z) in mm."""
        matrix = self.matrix_mm
        world: FloatArray = np.asarray(points_zyx, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
        return world

    def index_zyx(self, points_mm: ArrayLike) -> FloatArray:
        """Convert world positions (..., 3) as (x, y, z) in mm into continuous voxel indices (..., 3) as (z, y, x)."""
        inverse = np.linalg.inv(self.matrix_mm)
        index: FloatArray = np.asarray(points_mm, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3]
        return index

    def corners_mm(self) -> FloatArray:
        """Return the world positions of the eight outer corners, shape (8, 3), (x, y, z) in mm."""
        # Half a voxel beyond the centres of the outer voxels.
        edges = [(-0.5, n - 0.5) for n in self.shape_zyx]
        return self.world_mm(np.asarray(list(itertools.product(*edges))))

    def downsampled(self, factors_zyx: Sequence[int]) -> Grid:
        """Return the grid of the means over blocks of `factors_zyx` voxels; a partial block at the end counts as one.

        The centre of the first coarse voxel lies (factor - 1) / 2 fine voxels further in. Many pyramids forget this,
        which is an error of half a voxel.
        """
        factors = np.asarray(factors_zyx, dtype=np.float64)
        start = self.world_mm((factors - 1) / 2) / MM_PER_UNIT[self.unit]
        return Grid(
            shape_zyx=as_triple(
                [-(-n // int(f)) for n, f in zip(self.shape_zyx, factors_zyx, strict=True)], int
            ),
            spacing_zyx=as_triple([s * f for s, f in zip(self.spacing_zyx, factors_zyx, strict=True)], float),
            origin_xyz=as_triple(start.tolist(), float),
            direction=self.direction,
            unit=self.unit,
        )

    def crop(self, box: Box) -> Grid:
        """Return the grid of the voxels inside `box`."""
        start = self.world_mm(box.start) / MM_PER_UNIT[self.unit]
        return Grid(box.shape, self.spacing_zyx, as_triple(start.tolist(), float), self.direction, self.unit)

    @property
    def box(self) -> Box:
        """The whole grid as a box of voxels."""
        return Box((0, 0, 0), self.shape_zyx)

    def agrees_with(self, other: Grid, tolerance: float = 1e-3) -> bool:
        """Say whether two grids put every voxel at one place, to `tolerance` of a voxel; a slice may be thicker."""
        if self.shape_zyx != other.shape_zyx:
            return False
        # Along an axis of one voxel only its centre is compared, because its spacing is only a thickness.
        ends = [(0.0,) if n == 1 else (-0.5, n - 0.5) for n in self.shape_zyx]
        # The difference of two affine maps is affine: it is largest at a corner.
        corners = np.asarray(list(itertools.product(*ends)))
        distance = np.abs(self.world_mm(corners) - other.world_mm(corners)).max()
        return bool(distance <= tolerance * self.finest_mm)

    def overlap_fraction(self, other: Grid, samples: int = 16) -> float:
        """Measure the share of this grid's extent that lies inside `other`, on `samples`^3 points; in [0, 1]."""
        axes = [(np.arange(samples) + 0.5) / samples * n - 0.5 for n in self.shape_zyx]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        index = other.index_zyx(self.world_mm(points))
        inside = ((index >= -0.5) & (index <= np.asarray(other.shape_zyx) - 0.5)).all(axis=1)
        return float(inside.mean())

    def as_dict(self) -> dict[str, Any]:
        """Return the grid ready for JSON; `Grid.from_dict` reads it back."""
        return {
            "shape_zyx": list(self.shape_zyx),
            "spacing_zyx": list(self.spacing_zyx),
            "origin_xyz": list(self.origin_xyz),
            "direction": [list(row) for row in self.direction],
            "unit": self.unit,
            "world": "LPS, (x, y, z)",
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Grid:
        """Read what `as_dict` wrote."""
        return cls(**{k: record[k] for k in ("shape_zyx", "spacing_zyx", "origin_xyz", "direction", "unit")})

    def __str__(self) -> str:
        shape = " x ".join(str(n) for n in self.shape_zyx)
        spacing = " x ".join(f"{s:g}" for s in self.spacing_zyx)
        return f"{shape} voxels of {spacing} {self.unit} (z, y, x)"


@dataclass(frozen=True)
class Box:
    """A half-open box of voxels: `start` is inside, `stop` is outside, both (z, y, x)."""

    start: Triple
    stop: Triple

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", as_triple(self.start, int))
        object.__setattr__(self, "stop", as_triple(self.stop, int))

    @property
    def shape(self) -> Triple:
        """Number of voxels along z, y, x; zero where the box is empty."""
        z, y, x = (max(0, b - a) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    @property
    def size(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Slices that cut this box out of a (z, y, x) array."""
        z, y, x = (slice(a, max(a, b)) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    def slices_in(self, outer: Box) -> tuple[slice, slice, slice]:
        """Return the slices that cut this box out of an array that holds `outer`."""
        return self.shifted(tuple(-a for a in outer.start)).slices

    def intersect(self, other: Box) -> Box:
        """Return the box of the voxels in both boxes (possibly none)."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(max(a, b) for a, b in zip(start, map(min, self.stop, other.stop), strict=True))
        return Box(as_triple(start, int), as_triple(stop, int))

    def contains(self, other: Box) -> bool:
        """Say whether every voxel of `other` is in this box; an empty box is in any."""
        return other.size == 0 or self.intersect(other).shape == other.shape

    def grown(self, margin_zyx: Sequence[int]) -> Box:
        """Return the box with `margin_zyx` voxels more on each side."""
        return Box(
            as_triple([a - m for a, m in zip(self.start, margin_zyx, strict=True)], int),
            as_triple([b + m for b, m in zip(self.stop, margin_zyx, strict=True)], int),
        )

    def shifted(self, offset_zyx: Sequence[int]) -> Box:
        """Return the box moved by `offset_zyx` voxels."""
        return Box(
            as_triple([a + o for a, o in zip(self.start, offset_zyx, strict=True)], int),
            as_triple([b + o for b, o in zip(self.stop, offset_zyx, strict=True)], int),
        )

    def __str__(self) -> str:
        return " ".join(f"{axis}[{a}:{b}]" for axis, a, b in zip("zyx", self.start, self.stop, strict=True))
