"""Points of a CSV file carried through a transform, either way, with the way written into the result."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import SimpleITK as sitk

from comir_hpc.config.words import Direction as Direction
from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.points import AXES, read_point_table
from comir_hpc.warp.resampling import apply_itk


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
    given = [f"{origin}_{axis}" for axis in AXES]
    kept = [i for i, name in enumerate(table.columns) if name.lower() not in (*AXES, *given)]
    out = io.StringIO()
    out.write(
        f"# {origin} -> {target}, world LPS mm: x, y, z are {target} points, {', '.join(given)} the {origin} ones\n"
    )
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*AXES, *given, *(table.columns[i] for i in kept)])
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


def _number(value: float) -> str:
    return f"{value:.10g}"
