"""Points of a CSV file carried through a transform, either way, with the way written into the result."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk

from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.geometry import FloatArray
from comir_hpc.warp.resampling import apply_itk

Direction = Literal["fixed-to-moving", "moving-to-fixed"]

_AXES = ("x", "y", "z")


@dataclass(frozen=True)
class PointTable:
    """Rows of a CSV file.

    Attributes
    ----------
    columns : tuple of str
        As in the file.
    rows : tuple of tuples of str
        As in the file.
    points_mm : (n, 3) float64
        Columns x, y, z: world LPS in mm.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    points_mm: FloatArray


def read_point_table(path: Path) -> PointTable:
    """Read a CSV file with a header that names x, y and z; lines that begin with # are comments.

    Raises
    ------
    VolumeError
        If the file is missing, has no such columns or no rows, or a row does not hold three finite numbers.
    """
    if not path.is_file():
        raise VolumeError(f"{path} does not exist; expected a CSV file with columns x, y, z in mm")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise VolumeError(f"{path} is not text ({error.reason}); expected a CSV file") from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    table = list(csv.reader([line for _, line in numbered]))
    if not table:
        raise VolumeError(
            f"{path} is empty; expected a header with the columns x, y, z and a row for each point"
        )
    columns = tuple(name.strip() for name in table[0])
    places = _places(path, columns)
    points = [
        _point(path, row, places, len(columns), number, line)
        for number, (row, (line, _)) in enumerate(zip(table[1:], numbered[1:], strict=True), 1)
    ]
    if not points:
        raise VolumeError(f"{path} has a header and no points; expected a row for each point")
    return PointTable(columns, tuple(map(tuple, table[1:])), np.array(points))


def carry_points(path: Path, transform: sitk.Transform, direction: Direction) -> tuple[str, int]:
    """Carry the points of a file through a transform.

    Parameters
    ----------
    path : Path
        CSV of points in the space that `direction` begins with.
    transform : sitk.Transform
        Fixed points to moving points.
    direction : {"fixed-to-moving", "moving-to-fixed"}
        Which way; the second needs a transform with an inverse.

    Returns
    -------
    (text, count)
        The content of the result: x, y, z are the points carried, columns named after the space that they came from
        hold the given ones, and all other columns are kept.

    Raises
    ------
    VolumeError
        If the file cannot be read.
    RegistrationError
        If the way back is asked for and the transform has no inverse.
    """
    table = read_point_table(path)
    origin, _, target = direction.partition("-to-")
    moved = apply_itk(_towards(transform, direction), table.points_mm)
    given = [f"{origin}_{axis}" for axis in _AXES]
    kept = [i for i, name in enumerate(table.columns) if name.lower() not in (*_AXES, *given)]
    out = io.StringIO()
    out.write(
        f"# {origin} -> {target}, world LPS mm: x, y, z are {target} points, {', '.join(given)} the {origin} ones\n"
    )
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_AXES, *given, *(table.columns[i] for i in kept)])
    for row, before, after in zip(table.rows, table.points_mm, moved, strict=True):
        writer.writerow([*map(_number, after), *map(_number, before), *(row[i] for i in kept)])
    return out.getvalue(), len(moved)


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a small file whole or not at all; the same content once more is no overwriting.

    Raises
    ------
    VolumeError
        If another file is there and `overwrite` is not set, or it cannot be written.
    """
    if path.exists() and not overwrite and (path.is_dir() or path.read_bytes() != text.encode()):
        raise VolumeError(
            f"{path} exists and holds something else; choose another --out, or pass --overwrite"
        )
    spare = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        spare.write_text(text, encoding="utf-8")
        spare.replace(path)
    except OSError as error:
        spare.unlink(missing_ok=True)
        raise VolumeError(f"{path} cannot be written ({error.strerror}); make room or get access") from error


def _towards(transform: sitk.Transform, direction: Direction) -> sitk.Transform:
    if direction == "fixed-to-moving":
        return transform
    try:
        return transform.GetInverse()
    except RuntimeError as error:
        raise RegistrationError(
            f"this transform ({transform.GetName()}) has no inverse in closed form, so moving points cannot be carried "
            "to the fixed volume; register the other way round, or use --direction fixed-to-moving"
        ) from error


def _places(path: Path, columns: Sequence[str]) -> tuple[int, int, int]:
    names = [name.lower() for name in columns]
    missing = [axis for axis in _AXES if axis not in names]
    if missing:
        raise VolumeError(
            f"{path} has the columns {', '.join(columns)}; {', '.join(missing)} missing: expected a comma-separated "
            "header with x, y, z (world LPS in mm)"
        )
    x, y, z = (names.index(axis) for axis in _AXES)
    return x, y, z


def _point(
    path: Path, row: Sequence[str], places: Sequence[int], num_columns: int, number: int, line: int
) -> list[float]:
    where = f"{path}, row {number} (line {line})"
    if len(row) != num_columns:
        raise VolumeError(f"{where} has {len(row)} values, the header {num_columns} columns; repair that row")
    point = []
    for axis, place in zip(_AXES, places, strict=True):
        try:
            value = float(row[place])
        except ValueError:
            value = float("nan")
        if not np.isfinite(value):
            raise VolumeError(f"{where}: {axis} is {row[place]!r}, expected a number in mm")
        point.append(value)
    return point


def _number(value: float) -> str:
    return f"{value:.10g}"
