"""A start that the user gives: a transform of any tool, or pairs of landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from comir_hpc.config.register import RegisterSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.space.grid import FloatArray, Grid
from comir_hpc.transforms.affine import Affine as Transform
from comir_hpc.transforms.composite import notes_on
from comir_hpc.transforms.conventions.grids import GridPair
from comir_hpc.volumes.points import AXES, PointTable, read_point_table

_TABLES = (".csv", ".tsv", ".fcsv")
_FLATTEST = 1e-3  # spread of the points along their thinnest direction, over that along their longest one
_EXPECTED = (
    "expected the columns x, y, z (fixed points) and moving_x, moving_y, moving_z, or what `comir-hpc warp --points` "
    "writes"
)


@dataclass(frozen=True, eq=False)
class GivenStart:
    """A start that the user gives.

    A file holds a transform, or landmarks that one was fitted to. Nobody asks later which it was.

    Attributes
    ----------
    transform : Transform
        Map from fixed to moving points.
    notes : tuple of str
        What was fitted or assumed, in sentences.
    """

    transform: Transform
    notes: tuple[str, ...] = ()


def given_start(settings: RegisterSettings, fixed: Grid, moving: Grid) -> GivenStart | None:
    """Read the start that the settings name as a file; None where they name a way to find one.

    Raises
    ------
    RegistrationError, VolumeError
        If the file cannot be read, bends space, or holds too few landmarks or landmarks on a line.
    """
    if not isinstance(settings.initial, Path):
        return None
    path = settings.initial
    if path.suffix.lower() in _TABLES:
        return _from_landmarks(path, affine=settings.transform != "rigid", planar=fixed.planar)
    from comir_hpc.transforms.files import load_transform

    transform = load_transform(path, settings.form, GridPair(fixed, moving))
    return GivenStart(transform, notes_on(transform, path.name))


def _from_landmarks(path: Path, *, affine: bool, planar: bool) -> GivenStart:
    """Fit a transform to pairs of landmarks, by least squares."""
    table = read_point_table(path)
    fixed, moving = _pairs(path, table)
    axes = 2 if planar else 3
    spread = [_spreads(points) for points in (fixed, moving)]
    flat = [sum(s > _FLATTEST * max(one[0], 1e-12) for s in one) if one[0] > 0 else 0 for one in spread]
    needed = axes - 1
    if len(fixed) < axes or min(flat) < needed:
        on = ("one point", "one line")[min(min(flat), 1)] if len(fixed) >= axes else ""
        found = f"{len(fixed)} pairs" + (f", all on {on}" if on else "")
        raise RegistrationError(
            f"{path} holds {found}; a turn and a shift need at least {axes} pairs that do not lie on "
            f"{'one point' if planar else 'one line'}: add pairs away from the others"
        )
    notes = list(table.notes)
    if affine and (len(fixed) <= axes or min(flat) < axes):
        notes.append(
            f"{path.name}: {len(fixed)} pairs that lie in a plane, or no more than {axes}, do not fix scale and shear: "
            "the start is a turn and a shift"
        )
        affine = False
    transform = _affine(fixed, moving, planar=planar) if affine else _rigid(fixed, moving)
    missed = np.linalg.norm(transform.apply(fixed) - moving, axis=1)
    notes.append(
        f"{path.name}: the start is fitted to {len(fixed)} pairs of landmarks ({'affine' if affine else 'rigid'}); "
        f"residual {np.sqrt((missed**2).mean()):.3g} mm (root mean square), {missed.max():.3g} mm at worst (row "
        f"{int(missed.argmax()) + 1})"
    )
    return GivenStart(transform, tuple(notes))


def _pairs(path: Path, table: PointTable) -> tuple[FloatArray, FloatArray]:
    """Return fixed and moving points (N, 3) of a table: x, y, z are those whose own columns are missing."""
    names = [name.lower() for name in table.columns]
    found = {
        role: [names.index(f"{role}_{axis}") for axis in AXES]
        for role in ("fixed", "moving")
        if all(f"{role}_{axis}" in names for axis in AXES)
    }
    if len(found) != 1:
        raise RegistrationError(f"{path} has the columns {', '.join(table.columns)[:120]}; {_EXPECTED}")
    role, places = found.popitem()
    try:
        given = np.array([[float(row[place]) for place in places] for row in table.rows])
    except ValueError as error:
        raise RegistrationError(
            f"{path}: {role}_x, {role}_y or {role}_z holds no number ({str(error)[:60]})"
        ) from error
    if not np.isfinite(given).all():
        raise RegistrationError(
            f"{path}: {role}_x, {role}_y or {role}_z holds numbers that are not finite; mend them"
        )
    # What the file says of its world and unit holds for all of its columns.
    given = given * table.factors
    return (given, table.points_mm) if role == "fixed" else (table.points_mm, given)


def _spreads(points: FloatArray) -> Sequence[float]:
    """Return how far points (N, 3) spread along their main directions, the longest first."""
    spreads: list[float] = np.linalg.svd(points - points.mean(axis=0), compute_uv=False).tolist()
    return [*spreads, 0.0, 0.0, 0.0][:3]


def _rigid(fixed: FloatArray, moving: FloatArray) -> Transform:
    """Fit turn and shift by Kabsch's method."""
    centre, target = fixed.mean(axis=0), moving.mean(axis=0)
    left, _, right = np.linalg.svd((moving - target).T @ (fixed - centre))
    turn = left @ np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))]) @ right
    return Transform.rigid(turn, target - centre, centre)


def _affine(fixed: FloatArray, moving: FloatArray, *, planar: bool) -> Transform:
    centre, target = fixed.mean(axis=0), moving.mean(axis=0)
    if planar:
        # Across the plane nothing was measured: lengths stay as they are.
        normals = [np.linalg.svd(points - points.mean(axis=0))[2][2] for points in (fixed, moving)]
        turn = _rigid(fixed, moving).rotation_xyz
        normals[1] = normals[1] * np.sign(normals[1] @ (turn @ normals[0]))
        fixed = np.vstack([fixed, centre + normals[0]])
        moving = np.vstack([moving, target + normals[1]])
    linear = np.linalg.lstsq(fixed - centre, moving - target, rcond=None)[0].T
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = target - linear @ centre
    return Transform(matrix, centre)
