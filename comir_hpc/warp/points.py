"""Points of a CSV file carried through a transform, either way, with the way written into the result."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from comir_hpc.config.words import Direction as Direction
from comir_hpc.errors import ConfigError, RegistrationError, VolumeError
from comir_hpc.host import files
from comir_hpc.host.places import require_apart
from comir_hpc.transforms.protocol import PointMap
from comir_hpc.volumes.points import AXES, read_point_table
from comir_hpc.warp.files import make_folder


@dataclass(frozen=True)
class CarriedPoints:
    """Points of a file, carried through a transform.

    Attributes
    ----------
    text : str
        Content of the result, CSV: x, y, z are the points carried, columns named after the space that they came from
        hold the given ones, and all other columns are kept.
    count : int
        Number of points that were carried.
    notes : tuple of str
        Sentences on what was assumed of the file, for the user to see.
    """

    text: str
    count: int
    notes: tuple[str, ...]


def carry_points(path: Path, transform: PointMap, direction: Direction) -> CarriedPoints:
    """Carry the points of a file through a transform.

    Parameters
    ----------
    path : Path
        CSV of points in the space that `direction` begins with.
    transform : PointMap
        Map from fixed points to moving points (x, y, z) in mm.
    direction : {"fixed-to-moving", "moving-to-fixed"}
        Direction in which points are carried; the second needs a transform with an inverse.

    Raises
    ------
    VolumeError
        If the file cannot be read.
    RegistrationError
        If the way back is asked for and the transform has no inverse.
    """
    table = read_point_table(path)
    origin, _, target = direction.partition("-to-")
    moved = _towards(transform, direction).apply(table.points_mm)
    given = [f"{origin}_{axis}" for axis in AXES]
    # Columns that an earlier call has added are replaced and not doubled.
    kept = [i for i, name in enumerate(table.columns) if i not in table.axes and name.lower() not in given]
    out = io.StringIO()
    out.write(
        f"# {origin} -> {target}, world LPS mm: x, y, z are {target} points, {', '.join(given)} the {origin} ones\n"
    )
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*AXES, *given, *(table.columns[i] for i in kept)])
    for row, before, after in zip(table.rows, table.points_mm, moved, strict=True):
        writer.writerow([*map(_number, after), *map(_number, before), *(row[i] for i in kept)])
    return CarriedPoints(out.getvalue(), len(moved), table.notes)


def require_table_name(out: Path, read: tuple[Path, ...]) -> None:
    """Refuse a name for the result that is not one of a table, or a file that is read, links followed.

    Raises
    ------
    ConfigError
        If it is such a name; the message has it.
    """
    if out.suffix.lower() not in (".csv", ".txt"):
        raise ConfigError(f"--out {out}: points are written as CSV; expected a name that ends in .csv")
    require_apart(out, *read)


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a small file whole or not at all; the same content once more is no overwriting.

    Raises
    ------
    VolumeError
        If another file is there and `overwrite` is not set, or it cannot be written.
    """
    try:
        if path.exists() and not overwrite and (path.is_dir() or path.read_bytes() != text.encode()):
            raise VolumeError(
                f"{path} exists and holds something else; choose another --out, or pass --overwrite"
            )
        make_folder(path)
        files.write_text(path, text)
    except OSError as error:
        raise VolumeError(f"{path} cannot be written ({error.strerror}); make room or get access") from error


def _towards(transform: PointMap, direction: Direction) -> PointMap:
    if direction == "fixed-to-moving":
        return transform
    try:
        return transform.inverse()
    except RegistrationError as error:
        raise RegistrationError(
            f"{error}, so moving points cannot be carried to the fixed volume by it; write its inverse with "
            "`comir-hpc export TRANSFORM --inverse --to itk`, and carry them by that, --direction fixed-to-moving"
        ) from error


def _number(value: float) -> str:
    # A nanometre, one metre away from the origin.
    return f"{value:.10g}"
