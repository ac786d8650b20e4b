"""Points in CSV files: a header that names x, y and z, world LPS in mm."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import FloatArray

AXES = ("x", "y", "z")


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


def _places(path: Path, columns: Sequence[str]) -> tuple[int, int, int]:
    names = [name.lower() for name in columns]
    missing = [axis for axis in AXES if axis not in names]
    if missing:
        raise VolumeError(
            f"{path} has the columns {', '.join(columns)}; {', '.join(missing)} missing: expected a comma-separated "
            "header with x, y, z (world LPS in mm)"
        )
    x, y, z = (names.index(axis) for axis in AXES)
    return x, y, z


def _point(
    path: Path, row: Sequence[str], places: Sequence[int], num_columns: int, number: int, line: int
) -> list[float]:
    where = f"{path}, row {number} (line {line})"
    if len(row) != num_columns:
        raise VolumeError(f"{where} has {len(row)} values, the header {num_columns} columns; repair that row")
    point = []
    for axis, place in zip(AXES, places, strict=True):
        try:
            value = float(row[place])
        except ValueError:
            value = float("nan")
        if not np.isfinite(value):
            raise VolumeError(f"{where}: {axis} is {row[place]!r}, expected a number in mm")
        point.append(value)
    return point
