"""Points in tables: a header that names x, y and z, world points in mm, LPS unless the file says RAS.

Comma, semicolon or tab separate the columns. Lists of fiducials of 3D Slicer (.fcsv) are such tables, with the header
in a comment. What a file says about its coordinates is used, or the file is refused for it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.space.grid import MM_PER_UNIT, FloatArray, unit_name

AXES = ("x", "y", "z")
# Columns that name a world, as 3D Slicer writes them in tables.
_WORLDS: dict[tuple[str, ...], str | None] = {AXES: None, ("r", "a", "s"): "RAS", ("l", "p", "s"): "LPS"}
_SLICER_CODES = {"0": "RAS", "1": "LPS", "2": "IJK"}
_NAMED_WORLDS = {"ITK": "LPS", "DICOM": "LPS", "NIFTI": "RAS", **_SLICER_CODES}
_SYSTEM = re.compile(
    r"(?:coordinate[\s_]*system|world|space|orientation|convention)\s*[=:]\s*\"?([\w+-]+)", re.IGNORECASE
)
_SYSTEM_WORD = re.compile(r"\b([LR][AP][SI]|(?i:ras|lps))\b")
_UNIT = re.compile(r"\bunits?\s*[=:]\s*\"?([\w\u00b5\u03bc]+)", re.IGNORECASE)
_SLICER_HEADER = re.compile(r"#\s*columns\s*=\s*(.*)", re.IGNORECASE)
_SEPARATORS = ",;\t"
_SLICER_PLACED = "2"  # status of a control point that was placed
_EXPECTED = "expected a header with the columns x, y, z (world LPS in mm) and a row for each point"


@dataclass(frozen=True)
class PointTable:
    """Rows of a table of points.

    Attributes
    ----------
    columns : tuple of str
        Names of the columns, spelled and ordered as in the file.
    rows : tuple of tuples of str
        Cells of every row, as the text that the file has.
    points_mm : (n, 3) float64
        Points (x, y, z): world LPS in mm, whatever the file's own world and unit.
    axes : tuple of int
        Numbers of the columns that hold the coordinates, from 0.
    notes : tuple of str
        What was taken from the file's comments, or left out, for the user to see.
    factors : three float
        What the file's own coordinates were multiplied by, along x, y, z.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    points_mm: FloatArray
    axes: tuple[int, int, int]
    notes: tuple[str, ...] = ()
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass
class _Draft:
    """What is known of a file while it is read."""

    path: Path
    columns: tuple[str, ...] = ()
    axes: tuple[int, int, int] = (0, 1, 2)
    separator: str = ","
    slicer: bool = False
    rows: list[tuple[str, ...]] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    num_hash_names: int = 0
    num_left_out: int = 0


def read_point_table(path: Path) -> PointTable:
    """Read a table of points: CSV with commas, semicolons or tabs, or fiducials of 3D Slicer (.fcsv).

    Lines before the header that begin with # are comments. If they name the coordinate system (LPS or RAS) or the unit,
    the points are converted. A row that begins with # is a point if all its columns are there, and a comment otherwise.

    Raises
    ------
    VolumeError
        If the file is missing, is no such table, has no points, names a coordinate system or a unit that is not known,
        or a row does not hold three finite numbers.
    """
    draft = _Draft(path)
    text = _text(path)
    with _fields_of_any_length(len(text)):
        try:
            _read_rows(draft, text)
        except csv.Error as error:
            raise VolumeError(
                f"{path} is no well-formed table ({str(error)!a}); repair its quotes"
            ) from error
    if not draft.points:
        raise VolumeError(f"{path} has a header and no points; expected a row for each point")
    factors, notes = _conversion(draft)
    x, y, z = factors.tolist()
    return PointTable(
        draft.columns, tuple(draft.rows), np.array(draft.points) * factors, draft.axes, notes, (x, y, z)
    )


def _text(path: Path) -> str:
    if not path.is_file():
        raise VolumeError(f"{path} does not exist; expected a CSV file with columns x, y, z in mm")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VolumeError(f"{path} cannot be read ({error.strerror}); get access to it") from error
    # Excel's "Unicode text" is UTF-16.
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise VolumeError(f"{path} is not text ({error.reason}); expected a CSV file in UTF-8") from error
    if "\0" in text:
        raise VolumeError(f"{path} is not text; expected a CSV file in UTF-8")
    # Slicer's own markups (.mrk.json) are JSON.
    if text.lstrip().startswith("{"):
        raise VolumeError(
            f"{path} is JSON, not a table; save the points as .csv or .fcsv in the program that made it"
        )
    return text


@contextmanager
def _fields_of_any_length(limit: int) -> Iterator[None]:
    """Let the csv module read fields as long as the file; its own limit is 131,072 characters."""
    before = csv.field_size_limit(max(limit, 131_072))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_rows(draft: _Draft, text: str) -> None:
    lines = list(io.StringIO(text, newline=""))
    first = _read_header(draft, lines)
    reader = csv.reader(lines[first:], delimiter=draft.separator, strict=True)
    line = first + 1
    for row in reader:
        if any(cell.strip() for cell in row):
            _take(draft, row, line)
        line = first + reader.line_num + 1


def _read_header(draft: _Draft, lines: Sequence[str]) -> int:
    """Find comments, columns and separator; return how many lines come before the first row."""
    in_comment = ""
    for number, line in enumerate(lines):
        bare = line.strip()
        if (match := _SLICER_HEADER.match(bare)) is not None:
            in_comment, draft.slicer = match[1], True
        elif bare.startswith("#"):
            draft.comments.append(bare)
            # numpy writes a header as a comment.
            in_comment = bare.lstrip("# ") if _axes_of(_split(bare.lstrip("# "))[0]) else in_comment
        elif bare and not bare.lower().startswith("sep="):
            if not in_comment or _axes_of(_split(line)[0]):
                _take_header(draft, line)
                return number + 1
            _take_header(draft, in_comment)
            return number
    if in_comment:
        _take_header(draft, in_comment)
        return len(lines)
    raise VolumeError(f"{draft.path} is empty; {_EXPECTED}")


def _take_header(draft: _Draft, line: str) -> None:
    draft.columns, draft.separator = _split(line)
    draft.axes = _places(draft.path, draft.columns)


def _split(line: str) -> tuple[tuple[str, ...], str]:
    """Split a header into its cells, by the separator that occurs most often in it; return both."""
    line = line.rstrip("\r\n")
    # Not csv.Sniffer, which looks at the rows, too: commas in them may be decimals.
    separator = max(_SEPARATORS, key=line.count)
    cells = next(csv.reader([line], delimiter=separator), [])
    return tuple(cell.strip() for cell in cells), separator


def _axes_of(columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return all sets of coordinates that the columns name."""
    names = {name.lower() for name in columns}
    return [axes for axes in _WORLDS if names.issuperset(axes)]


def _places(path: Path, columns: Sequence[str]) -> tuple[int, int, int]:
    names, found = [name.lower() for name in columns], _axes_of(columns)
    if not found:
        missing = [axis for axis in AXES if axis not in names]
        blanks = (
            "; its columns are separated by blanks"
            if len(columns) == 1 and len(columns[0].split()) > 2
            else ""
        )
        raise VolumeError(
            f"{path} has the columns {_shortened(columns)}; {', '.join(missing)} missing{blanks}: expected a header "
            "with x, y, z (world LPS in mm), separated by commas, semicolons or tabs"
        )
    double = [axis for axis in found[0] if names.count(axis) > 1]
    if len(found) > 1 or double:
        what = f"{double[0]} twice" if double else " and ".join(", ".join(axes) for axes in found)
        raise VolumeError(f"{path} has the columns {what}; which of them are the points? Leave one of them")
    x, y, z = (names.index(axis) for axis in found[0])
    return x, y, z


def _take(draft: _Draft, row: Sequence[str], line: int) -> None:
    """Add one row to the points, or leave it out as a comment."""
    if row[0].lstrip().startswith("#"):
        # A name may begin with #. A comment has other columns, or stands where a coordinate should be.
        if len(row) != len(draft.columns) or 0 in draft.axes:
            draft.num_left_out += 1
            return
        draft.num_hash_names += 1
    where = f"{draft.path}, row {len(draft.rows) + 1} (line {line})"
    if draft.slicer and len(row) > len(draft.columns):
        # Slicer 5 adds the status of the point, which its header does not name.
        if row[len(draft.columns)].strip() not in ("", _SLICER_PLACED):
            raise VolumeError(f"{where} is a point that was never placed in 3D Slicer; place or remove it")
        row = row[: len(draft.columns)]
    if len(row) != len(draft.columns):
        hint = "are its decimals commas? " if len(row) > len(draft.columns) and draft.separator == "," else ""
        raise VolumeError(
            f"{where} has {len(row)} values, the header {len(draft.columns)} columns; {hint}repair that row"
        )
    draft.points.append(
        [_number(row[place], axis, where) for axis, place in zip(AXES, draft.axes, strict=True)]
    )
    draft.rows.append(tuple(row))


def _number(cell: str, axis: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    # `float` also takes 1_000, digits of other scripts, and what is around them: none is what a table means.
    plain = cell.strip(" \t")
    if np.isfinite(value) and "_" not in cell and plain.isascii() and plain.isprintable():
        return value
    comma = re.fullmatch(r"\s*[-+]?\d+,\d+\s*", cell) is not None
    raise VolumeError(
        f"{where}: {axis} is {cell[:40]!r}, expected a number in mm"
        + (" with a decimal point: write 1.5, not 1,5" if comma else "")
    )


def _conversion(draft: _Draft) -> tuple[FloatArray, tuple[str, ...]]:
    """Return the factors (3,) that turn the file's coordinates into LPS in mm, and what to tell the user."""
    system, unit, name = _system(draft), _unit(draft), draft.path.name
    notes = []
    factors = np.full(3, MM_PER_UNIT[unit])
    if unit != "millimeter":
        notes.append(f"{name}: its points are in {unit}s, as it says; they were converted to mm")
    if system == "RAS":
        # Of right and left, front and back. Both systems point to the head.
        factors[:2] *= -1
        notes.append(
            f"{name}: its points are RAS, as it says; they were converted to LPS (x and y change their sign)"
        )
    if draft.num_hash_names:
        notes.append(
            f"{name}: {draft.num_hash_names} rows begin with # and have all columns: they are read as points"
        )
    if draft.num_left_out:
        notes.append(f"{name}: {draft.num_left_out} rows begin with # and are left out as comments")
    return factors, tuple(notes)


def _system(draft: _Draft) -> str:
    """Return the coordinate system that the file names, in its comments or by its columns; LPS where it names none."""
    said: list[str] = []
    for comment in draft.comments:
        named = [word.upper() for word in _SYSTEM.findall(comment)]
        said += [_NAMED_WORLDS.get(word, word.removesuffix("+")) for word in named]
        said += [] if named else [word.upper() for word in _SYSTEM_WORD.findall(comment)]
    columns = tuple(draft.columns[place].lower() for place in draft.axes)
    if (world := _WORLDS.get(columns)) is not None:
        said.append(world)
    found = sorted(set(said))
    if len(found) > 1 or (found and found[0] not in ("RAS", "LPS")):
        raise VolumeError(
            f"{draft.path} says that its coordinates are {' and '.join(f[:30] for f in found)}; expected LPS or RAS "
            "in mm: convert the points, and say it in a line before the header: # CoordinateSystem = LPS"
        )
    if not found and draft.path.suffix.lower() == ".fcsv":
        raise VolumeError(
            f"{draft.path} does not say whether its coordinates are RAS or LPS; add the line that is true: "
            "# CoordinateSystem = RAS, or # CoordinateSystem = LPS"
        )
    return found[0] if found else "LPS"


def _unit(draft: _Draft) -> str:
    said = sorted({word for comment in draft.comments for word in _UNIT.findall(comment)})
    if not said:
        return "millimeter"
    try:
        units = {unit_name(word.lower()) for word in said}
    except ConfigError:
        units = set()
    if len(units) != 1:
        raise VolumeError(
            f"{draft.path} says that its unit is {' and '.join(s[:30] for s in said)}; expected nm, um, mm, cm or m"
        )
    return units.pop()


def _shortened(columns: Sequence[str]) -> str:
    """List the names of the first columns, and how many more there are."""
    names = ["".join(letter if letter.isprintable() else "?" for letter in name[:31]) for name in columns[:8]]
    shown = ", ".join(name if len(name) <= 30 else f"{name[:30]}..." for name in names)
    return shown if len(columns) <= 8 else f"{shown} and {len(columns) - 8:,} more"
