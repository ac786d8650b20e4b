"""OME-Zarr's multiscale metadata: which axis is which, and where the voxels of one level lie.

Read are versions 0.1 to 0.5 (https://ngff.openmicroscopy.org) and the coordinate systems of 0.6 as far as they are
affine. 0.1 to 0.3 know no spacing; 0.1 and 0.2 have the fixed order t, c, z, y, x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Matrix, Vector
from comir_hpc.volumes.readers.lengths import grid_unit, in_one_unit, mm_of
from comir_hpc.volumes.readers.named_axes import axis_letter, letters_for_cut
from comir_hpc.volumes.readers.source import NO_THICKNESS, THICKNESS

FloatArray = NDArray[np.float64]

_OLD_ORDER = "tczyx"
_BY_TYPE = {"channel": "c", "time": "t"}
# RFC 4: where an axis leads to, as an axis of the world (0 is x) and a sign in LPS.
_LEADS_TO = {
    "right-to-left": (0, 1.0), "left-to-right": (0, -1.0), "anterior-to-posterior": (1, 1.0),
    "posterior-to-anterior": (1, -1.0), "inferior-to-superior": (2, 1.0), "superior-to-inferior": (2, -1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """What the metadata say of one level; the fields have the meaning of `Source`'s.

    Attributes
    ----------
    axes : str
        Letters for `cut`, in the order of the array.
    """

    axes: str
    spacing_zyx: Vector | None
    unit: str | None
    origin_xyz: Vector
    direction: Matrix
    says: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Axis:
    name: str
    letter: str
    unit: str | None
    orientation: str | None


def placement(
    path: Path, multiscale: dict[str, Any], dataset: dict[str, Any], shape: Sequence[int]
) -> Placement:
    """Read axes, spacing, unit, origin and direction of one level.

    A negative scale is a direction, not a wrong number: the voxels stay where the file puts them.

    Parameters
    ----------
    multiscale, dataset : dict
        Entry of ``multiscales``, and the entry of its ``datasets`` that is read.
    shape : sequence of int
        Shape of that level's array, in the order of its axes.

    Raises
    ------
    VolumeError
        If the axes are no single volume, or the transformations are no placement of a regular grid.
    """
    axes, notes = _axes(path, multiscale, dataset, shape)
    told = f"{path}: axes ({', '.join(a.name for a in axes)}) of {tuple(shape)}"
    letters = letters_for_cut([a.letter for a in axes], shape, told)
    placed, scaled = _matrix(path, multiscale, dataset, len(axes))
    _require_still_channels(path, placed, letters)
    if "z" not in letters:
        notes += (f"{path.name}: {NO_THICKNESS}",)
    space = [letters.index(a) for a in "xyz" if a in letters]
    spatial = [axes[i] for i in space]
    unit, placed, says = _in_one_unit(placed, spatial, space)
    columns, origin = np.eye(3) * THICKNESS, np.zeros(3)
    columns[: len(space), : len(space)] = placed[np.ix_(space, space)]
    origin[: len(space)] = placed[space, -1]
    turn, turn_notes = _to_lps(path, spatial)
    spacing, direction = _spacing_and_direction(path, columns)
    if scaled and min(spacing) <= 0:
        says = says or f"its scale is {list(spacing)} (z, y, x), expected numbers other than 0"
    x, y, z = (turn @ origin).tolist()
    turned: Any = tuple(map(tuple, (turn @ direction + 0.0).tolist()))
    # Numbers in one unit that is not known need no more than --unit.
    known = scaled and min(spacing) > 0 and (unit is not None or len({a.unit for a in spatial}) == 1)
    return Placement(
        letters,
        spacing if known else None,
        unit,
        (x, y, z),
        turned,
        says,
        (*notes, *turn_notes),
    )


# ---------------------------------------------------------------------- axes


def _axes(
    path: Path, multiscale: dict[str, Any], dataset: dict[str, Any], shape: Sequence[int]
) -> tuple[list[_Axis], tuple[str, ...]]:
    system, notes = _system(path, multiscale, dataset)
    entries = system.get("axes")
    if entries is None:
        if len(shape) > len(_OLD_ORDER):
            raise VolumeError(f"{path}: an image of shape {tuple(shape)}; expected at most t, c, z, y, x")
        order = _OLD_ORDER[-len(shape) :]
        notes += (
            f"{path.name}: its metadata name no axes: {', '.join(order)}, the fixed order of OME-Zarr 0.1 and 0.2",
        )
        return [_Axis(a, a, None, None) for a in order], notes
    axes = [_axis(entry if isinstance(entry, dict) else {"name": entry}) for entry in entries]
    if len(axes) != len(shape):
        raise VolumeError(
            f"{path}: its metadata name {len(axes)} axes ({', '.join(a.name for a in axes)}) and its array has shape "
            f"{tuple(shape)}; correct the metadata, or export it again"
        )
    return axes, notes


def _axis(entry: dict[str, Any]) -> _Axis:
    name, kind = str(entry["name"]), entry.get("type")
    letter = _BY_TYPE.get(str(kind)) or axis_letter(name) or "?"
    turned = entry.get("orientation") or entry.get("anatomicalOrientation")
    turned = turned.get("value") if isinstance(turned, dict) else turned
    return _Axis(name, letter, entry.get("unit"), str(turned) if turned else None)


def _system(
    path: Path, multiscale: dict[str, Any], dataset: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the mapping that holds the axes.

    This is the image, or from 0.6 on the coordinate system that the level is placed in.
    """
    systems = multiscale.get("coordinateSystems")
    if not systems:
        return multiscale, ()
    steps: Sequence[dict[str, Any]] = dataset.get("coordinateTransformations") or ({},)
    target: Any = steps[0].get("output")
    target = target.get("name") if isinstance(target, dict) else target
    found: dict[str, Any] = next((s for s in systems if s.get("name") == target), systems[0])
    others = [str(s.get("name")) for s in systems if s is not found]
    note = f"{path.name}: placed in its coordinate system {found.get('name')}, not in {', '.join(others)}"
    return found, (note,) if others else ()


# ---------------------------------------------------------------------- where it lies


def _matrix(
    path: Path, multiscale: dict[str, Any], dataset: dict[str, Any], num_axes: int
) -> tuple[FloatArray, bool]:
    """Return the map (n, n + 1) from array index to the file's world, and whether the file gives a scale at all."""
    steps: list[dict[str, Any]] = list(dataset.get("coordinateTransformations") or ())
    # From 0.6 on those of the image lead on into other coordinate systems.
    if not multiscale.get("coordinateSystems"):
        steps += list(multiscale.get("coordinateTransformations") or ())
    matrix, scaled = np.eye(num_axes + 1), False
    for step in _flat(steps):
        # Each step acts on the result of the one before, so it stands on the left.
        matrix = _one_step(path, step, num_axes) @ matrix
        scaled |= step["type"] not in ("identity", "translation")
    return matrix[:-1], scaled


def _flat(steps: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for step in steps:
        if step["type"] == "sequence":
            yield from _flat(step["transformations"])
        else:
            yield step


def _one_step(path: Path, step: dict[str, Any], num_axes: int) -> FloatArray:
    matrix = np.eye(num_axes + 1)
    kind = step["type"]
    if kind == "identity":
        return matrix
    values = np.array(step[kind], dtype=np.float64) if kind in step else np.zeros(())
    if kind == "scale":  # a number that is missing is one that the user can give
        values[~np.isfinite(values)] = 0
    expected = {
        "scale": (num_axes,), "translation": (num_axes,), "rotation": (num_axes, num_axes),
        "affine": (num_axes, num_axes + 1),
    }.get(kind)  # fmt: skip
    if values.shape != expected or not np.isfinite(values).all():
        raise VolumeError(
            f"{path}: its coordinate transformation {kind!r} of shape {values.shape} cannot be read; expected finite "
            f"numbers of a scale, translation, rotation or affine for {num_axes} axes, written in the metadata"
        )
    if kind == "scale":
        matrix[:-1, :-1] = np.diag(values)
    elif kind == "translation":
        matrix[:-1, -1] = values
    elif kind == "rotation":
        matrix[:-1, :-1] = values
    else:
        matrix[:-1] = values
    return matrix


def _require_still_channels(path: Path, matrix: FloatArray, letters: str) -> None:
    """Refuse an affine that moves the channels about in space."""
    space = [i for i, letter in enumerate(letters) if letter in "zyx"]
    channels = [i for i, letter in enumerate(letters) if letter == "c"]
    if np.any(matrix[np.ix_(space, channels)]):
        raise VolumeError(
            f"{path}: its channels do not lie at one place in space; export each as a volume of its own"
        )


def _in_one_unit(
    matrix: FloatArray, axes: Sequence[_Axis], space: Sequence[int]
) -> tuple[str | None, FloatArray, str]:
    """Convert the rows of the spatial axes (x, y, z) to one unit; None and why, where there is none."""
    units = [a.unit for a in axes]
    if any(mm_of(unit) is None for unit in units):
        text = ", ".join(f"{a.name} {a.unit}" for a in axes[::-1])
        if len(set(units)) == 1:
            return None, matrix, f"the unit of its axes is {units[0]}" if units[0] else ""
        # Numbers in several units, one of which is not known, are neither a spacing nor an origin.
        result = matrix.copy()
        result[list(space), -1] = 0
        return None, result, f"the units of its axes are {text}, and not all of them are lengths"
    known = [str(unit) for unit in units]
    # The slowest axis decides: of z in um and y, x in nm the grid is in um.
    unit = grid_unit(known[-1])
    result = matrix.copy()
    for row, name in zip(space, known, strict=True):
        result[row] = in_one_unit(matrix[row].tolist(), [name] * matrix.shape[1], unit)
    return unit, result, ""


def _to_lps(path: Path, axes: Sequence[_Axis]) -> tuple[FloatArray, tuple[str, ...]]:
    """Return the map from the file's world (x, y, z) to LPS.

    It follows the anatomical orientation of the axes where they have one (RFC 4).

    An axis without one is taken as it stands.
    """
    if not any(a.orientation for a in axes):
        return np.eye(3), ()
    text = ", ".join(f"{a.name} {a.orientation}" for a in axes if a.orientation)
    if any(a.orientation and a.orientation not in _LEADS_TO for a in axes):
        return np.eye(3), (
            f"{path.name}: {text} has no place in LPS: its axes are taken as x, y, z as they stand",
        )
    turn = np.zeros((3, 3))
    for column in range(3):
        told = axes[column].orientation if column < len(axes) else None
        row, sign = _LEADS_TO[told] if told else (column, 1.0)
        turn[row, column] = sign
    if abs(np.linalg.det(turn)) != 1:
        raise VolumeError(f"{path}: its axes lead along one line in a patient ({text}); correct the metadata")
    return turn, ()


def _spacing_and_direction(path: Path, columns: FloatArray) -> tuple[Vector, FloatArray]:
    """Take spacing (z, y, x) and ITK's direction from a 3 x 3 matrix of index (x, y, z) to world.

    An axis of spacing 0 keeps its direction as if it were scaled by 1.
    """
    # The length of a column along an axis is its number: a root of a square has other last bits.
    lengths = [
        float(np.linalg.norm(c)) if np.count_nonzero(c) > 1 else float(np.abs(c).sum()) for c in columns.T
    ]
    direction = np.stack(
        [c / n if n else unit for c, n, unit in zip(columns.T, lengths, np.eye(3), strict=True)], axis=1
    )
    # The numbers of the metadata are written as decimals: only more than their rounding is a shear.
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        raise VolumeError(
            f"{path}: its affine shears the axes (direction {np.round(direction, 4).tolist()}); resample the volume on "
            "a grid with perpendicular axes first"
        )
    return (lengths[2], lengths[1], lengths[0]), direction
