"""An image file, opened: what its header says, and its voxels box by box."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import ComirError, ConfigError, VolumeError, printable
from comir_hpc.space.grid import IDENTITY, MM_PER_UNIT, Box, Grid, Matrix, Triple, Vector, unit_name

# What the readers' libraries raise on a file that is torn or not what its name says.
UNREADABLE: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, ArithmeticError, KeyError, IndexError, TypeError, AttributeError, AssertionError,
    RuntimeError, NotImplementedError, SyntaxError, struct.error, zlib.error,
)  # fmt: skip
_SPACING_HELP = "give it with --spacing Z Y X --unit mm (or um, nm, ...)"
THICKNESS = 1.0
"""Spacing across a single slice whose file names none, in the unit of the others. Nothing is computed with it."""
NO_THICKNESS = "the file names no slice thickness: it is taken as 1 in the unit of the spacing"


@dataclass(frozen=True, eq=False)
class Source:
    """One volume in a file (or folder) of any format.

    Parameters
    ----------
    path : Path
        Path that the user named.
    kind : str
        Name of the format for people, e.g. ``NIfTI``.
    shape : four int
        Voxels of the volume along c, z, y, x.
    dtype : dtype
        Type of the values that `read` gives: native byte order, bool as uint8.
    read_box : callable
        `Box` -> (c, z, y, x) of that box, any byte order.
    files : sequence of Path
        Files that the content depends on; a folder stands for everything in it.
    spacing_zyx, unit : optional
        Voxel spacing along z, y, x and its unit; None where the file does not say them.
    unit_assumed : bool
        Whether `unit` is a convention, because the file names none; then another one may be given.
    origin_xyz, direction
        World (LPS) placing in `unit`, as in `Grid`.
    load_bytes : int
        Memory that reading holds for the whole volume; 0 where any box can be read alone.
    atom_zyx : three int
        Smallest box that is decoded at once; smaller reads decode it again and again.
    says : str
        Words of the file about its spacing where they are not enough to place it, for the error.
    notes : sequence of str
        Conventions that were applied because the file leaves them open, for the user to see.
    digest : str, optional
        Digest of the content, given where there is no file (an array in memory).
    order : three int
        The file's axes (0 is its z) that became z, y, x; see `upright`.
    """

    path: Path
    kind: str
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    read_box: Callable[[Box], NDArray[Any]]
    files: Sequence[Path]
    spacing_zyx: Vector | None = None
    unit: str | None = None
    origin_xyz: Vector = (0.0, 0.0, 0.0)
    direction: Matrix = IDENTITY
    load_bytes: int = 0
    atom_zyx: Triple = (1, 1, 1)
    says: str = ""
    notes: tuple[str, ...] = ()
    digest: str | None = None
    order: Triple = (0, 1, 2)
    unit_assumed: bool = False

    def __post_init__(self) -> None:
        # The notes quote names and values of the file.
        object.__setattr__(self, "notes", tuple(map(printable, self.notes)))

    @property
    def shape_zyx(self) -> Triple:
        """Number of voxels along z, y, x."""
        return self.shape[1], self.shape[2], self.shape[3]

    @property
    def num_channels(self) -> int:
        """Number of channels, the length of the c axis."""
        return self.shape[0]

    @property
    def streamed(self) -> bool:
        """Whether a box is read without holding the whole volume in memory."""
        return self.load_bytes == 0

    def read(self, box: Box | None = None) -> NDArray[Any]:
        """Read `box` (the whole volume when none is given) as contiguous (c, z, y, x) of `dtype`.

        Raises
        ------
        VolumeError
            If the box leaves the volume, or the file cannot be read there.
        """
        whole = Box((0, 0, 0), self.shape_zyx)
        box = whole if box is None else box
        if not whole.contains(box) or box.size == 0:
            raise VolumeError(f"{self.path}: box {box} is not inside the volume {whole}")
        with reading(self.path, f"box {box} of a {self.kind} volume"):
            values = np.ascontiguousarray(self.read_box(box), dtype=self.dtype)
        if values.shape != (self.num_channels, *box.shape):
            raise VolumeError(
                f"{self.path}: box {box} holds {values.shape} values, expected {(self.num_channels, *box.shape)} "
                "(c, z, y, x): the file is shorter than its header says; copy or export it again"
            )
        return values

    def grid(self, spacing: Vector | None = None, unit: str | None = None) -> Grid:
        """Return the grid of the voxels.

        This is the file's word, replaced by `spacing` (in the file's order, and in `unit`) where that is given.

        Raises
        ------
        VolumeError
            If the file has no spacing or no unit and they are not given, or the given unit contradicts the file's.
        """
        said = f"; {self.says}" if self.says else ""
        own, unit = self.unit, unit_name(unit) if unit else None
        if spacing is None and self.spacing_zyx is None:
            raise VolumeError(
                f"{self.path}: no voxel spacing in this {self.kind} file{said}; {_SPACING_HELP}"
            )
        if spacing is None and unit and self.unit_assumed:
            own = unit  # all numbers of the file are in the unit that it does not name
        if spacing is None and unit and own and unit != own:
            raise VolumeError(
                f"{self.path}: its spacing is in {own}, --unit says {unit}; leave --unit out, or replace the "
                f"spacing as well: --spacing Z Y X --unit {unit}"
            )
        named = unit or own
        if named is None:
            raise VolumeError(
                f"{self.path}: no unit of length for its spacing in this {self.kind} file{said}; "
                "give it with --unit mm (or um, nm, ...)"
            )
        used = tuple(spacing[axis] for axis in self.order) if spacing else self.spacing_zyx
        assert used is not None
        # The origin stays where the file put it, also if the user gives the spacing in another unit.
        scale = MM_PER_UNIT[own] / MM_PER_UNIT[named] if own else 1.0
        x, y, z = (o * scale for o in self.origin_xyz)
        try:
            return Grid(self.shape_zyx, used, (x, y, z), self.direction, named)  # type: ignore[arg-type]
        except VolumeError as error:
            raise VolumeError(f"{self.path}: {error}") from error

    def fingerprint(self) -> str:
        """Return a digest of path, size and time of every file; it changes when the content may have changed."""
        if self.digest is not None:
            return self.digest
        digest = hashlib.sha256()
        for file in _every_file(self.files):
            try:
                stat = file.stat()
            except OSError as error:
                raise VolumeError(f"{file} disappeared while it was read ({error}); run again") from error
            # Not the content: that would read terabytes before the first block.
            digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


@contextmanager
def reading(path: Path, what: str, *also: type[Exception]) -> Iterator[None]:
    """Turn a library's complaint about a torn or foreign file into a `VolumeError` with the path and the remedy.

    `also` are errors of the library's own that are no builtin ones.
    """
    try:
        yield
    except ComirError:
        raise
    except MemoryError as error:
        raise VolumeError(
            f"{path}: no memory left to read {what}; free some or use a larger machine"
        ) from error
    except PermissionError as error:
        raise VolumeError(
            f"{error.filename or path} may not be read (permission denied); ask its owner, or copy it where you may"
        ) from error
    except (*UNREADABLE, *also) as error:
        # What ITK says of itself, its exceptions and its source files, helps nobody.
        text = " ".join(str(error).rpartition("ERROR:")[2].split())
        if not text or "pickle" in text:  # numpy advises to load what may run code
            text = type(error).__name__
        raise VolumeError(
            f"{path} cannot be read as {what} ({text[-300:]}); it is truncated, damaged or of another format: "
            "copy or export it again"
        ) from error


def storable(dtype: np.dtype[Any], path: Path) -> np.dtype[Any]:
    """Return the dtype that a volume keeps for `dtype`: the same in native byte order, bool as uint8.

    Raises
    ------
    VolumeError
        For complex, structured, text and extended-precision values.
    """
    dtype = np.dtype(dtype).newbyteorder("=")
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind == "c":
        raise VolumeError(
            f"{path} holds complex values ({dtype}); export magnitude or phase as a volume of its own"
        )
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise VolumeError(
            f"{path} holds values of type {dtype}; expected integers of 8 to 64 bits or floats of 16 to 64"
        )
    return dtype


def upright(source: Source) -> Source:
    """Turn a single slice across y or x so that its normal is z; the other axes keep their order.

    Everything else knows single slices by their one voxel along z. The voxels stay where they are in the world.
    """
    single = [axis for axis, size in enumerate(source.shape_zyx) if size == 1]
    # Volumes, slices as they should be, and lines, which ingest refuses.
    if len(single) != 1 or single == [0]:
        return source
    first = single[0]
    y, x = (axis for axis in range(3) if axis != first)
    order = (first, y, x)

    def of(values: Sequence[Any]) -> tuple[Any, Any, Any]:
        return values[first], values[y], values[x]

    def read(box: Box) -> NDArray[Any]:
        start, stop = [0, 0, 0], [0, 0, 0]
        for axis, a, b in zip(order, box.start, box.stop, strict=True):
            start[axis], stop[axis] = a, b
        values = source.read_box(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
        return values.transpose(0, *(1 + axis for axis in order))

    # Columns of the direction belong to x, y, z.
    rows = [(row[2 - x], row[2 - y], row[2 - first]) for row in source.direction]
    name = "zyx"[first]
    return replace(
        source, shape=(source.num_channels, *of(source.shape_zyx)), read_box=read, order=order,
        spacing_zyx=None if source.spacing_zyx is None else of(source.spacing_zyx),
        direction=(rows[0], rows[1], rows[2]), atom_zyx=of(source.atom_zyx),
        notes=(*source.notes, f"{source.path.name}: a slice across {name}; stored across z, the world unchanged"),
    )  # fmt: skip


def axes_of(shape: Sequence[int], path: Path) -> tuple[str, tuple[str, ...]]:
    """Choose the axes of an array that names none: one letter of ``czyx`` each, and notes on what was assumed.

    Two axes are (y, x), a single slice; three are (z, y, x). Of four, the channels are the first or the last,
    whichever is shorter.

    Raises
    ------
    VolumeError
        For any other number of axes.
    """
    if len(shape) in (2, 3):
        return "zyx"[-len(shape) :], ()
    if len(shape) == 4:
        axes = "zyxc" if shape[-1] < shape[0] else "czyx"
        return axes, (f"{path.name}: shape {tuple(shape)} is read as ({', '.join(axes)})",)
    raise VolumeError(
        f"{path}: an array of shape {tuple(shape)}; expected (y, x), (z, y, x), or four axes of which one is the "
        "channels"
    )


def known_unit(names: Iterable[str | None]) -> str | None:
    """Return the unit of a Grid that all these names mean; None where they differ, are missing or are not known."""
    different = set(names)
    if len(different) != 1:
        return None
    name = different.pop()
    try:
        return unit_name(name) if name else None
    except ConfigError:
        return None


def _every_file(files: Iterable[Path]) -> Iterator[Path]:
    for file in files:
        resolved = file.resolve()
        if resolved.is_dir():
            yield from sorted(f for f in resolved.rglob("*") if f.is_file())
        else:
            yield resolved
