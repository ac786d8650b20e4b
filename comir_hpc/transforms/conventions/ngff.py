"""Scenes of OME-NGFF 0.6: transformations between named coordinate systems.

A transformation of a scene maps its `input` to its `output`. We write fixed points as the input and moving points as
the output, as our own transforms map them. The axes of a coordinate system have names, an order and a unit. The
standard has no word for the world's directions, so we add the `orientation` of RFC-4 to every axis: the x axis of LPS
points from right to left. Axes without one are read as LPS only if the user says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comir_hpc.errors import ConfigError, RegistrationError
from comir_hpc.space.grid import MM_PER_UNIT, FloatArray, unit_name
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import Composite
from comir_hpc.transforms.conventions.grids import inverted
from comir_hpc.transforms.itk import ItkTransform
from comir_hpc.transforms.protocol import PointMap

VERSION = "0.6"
FIXED_WORLD, MOVING_WORLD = "fixed_lps_mm", "moving_lps_mm"
_FIELD = "displacements"  # group of a store in which the displacements of a part lie, with its number
_ENDS = {"x": ("right", "left"), "y": ("anterior", "posterior"), "z": ("inferior", "superior")}
_EXPECTED = (
    "expected a scene of OME-NGFF 0.6 with one coordinate transformation between two systems of x, y, z"
)


def world_axes(order: str = "xyz") -> list[dict[str, Any]]:
    """Return the axes of a world in LPS and mm, in the order of the letters given."""
    return [
        {
            "name": axis,
            "type": "space",
            "unit": "millimeter",
            "orientation": {"type": "anatomical", "value": "-to-".join(_ENDS[axis])},
        }
        for axis in order
    ]


def scene(transformation: dict[str, Any], order: str = "xyz") -> dict[str, Any]:
    """Return the ``ome`` entry of a scene with one transformation from fixed to moving points in LPS and mm."""
    return {
        "version": VERSION,
        "scene": {
            "coordinateSystems": [
                {"name": name, "axes": world_axes(order)} for name in (FIXED_WORLD, MOVING_WORLD)
            ],
            "coordinateTransformations": [
                {
                    **transformation,
                    "name": "fixed to moving",
                    "input": {"name": FIXED_WORLD},
                    "output": {"name": MOVING_WORLD},
                }
            ],
        },
    }


def affine_entry(matrix: FloatArray) -> dict[str, Any]:
    """Return the transformation of a matrix (4, 4)."""
    return {"type": "affine", "affine": matrix[:3].tolist()}


def write_scene(parts: Sequence[PointMap], folder: Path) -> None:
    """Write transforms, applied one after the other, as a store with a scene.

    Parameters
    ----------
    parts : sequence of PointMap
        `Affine` transforms and displacement fields of ITK.
    folder : Path
        Empty folder for the store.

    Raises
    ------
    RegistrationError
        If a part is of another kind; the message has its number and kind.
    """
    # Here, since zarr takes a while to load, and few transforms are fields.
    from comir_hpc.transforms.conventions.ngff_fields import write_displacements

    steps: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        if isinstance(part, Affine):
            # The axes of a stored field are z, y, x, so those of the scene are, too.
            turned = np.eye(4)[[2, 1, 0, 3]]
            steps.append(affine_entry(turned @ part.matrix_mm @ turned))
            continue
        name = f"{_FIELD}-{number}"
        found = write_displacements(part, folder / name) if isinstance(part, ItkTransform) else None
        if found is None:
            kind = part.itk.GetName() if isinstance(part, ItkTransform) else type(part).__name__
            raise RegistrationError(
                f"part {number + 1} of {len(parts)} ({kind}) has no form in OME-NGFF {VERSION}, which holds affine "
                "transforms and displacement fields; sample it first: export --to itk --out field.nii.gz, then export "
                "that"
            )
        frame = found  # the field lies along the axes of its own grid
        steps += [
            affine_entry(inverted(frame)),
            {"type": "displacements", "path": name, "interpolation": "linear"},
            affine_entry(frame),
        ]
    whole = steps[0] if len(steps) == 1 else {"type": "sequence", "transformations": steps}
    content = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": scene(whole, "zyx")}}
    (folder / "zarr.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def field_scene(path: str, frame: FloatArray, after: Affine) -> dict[str, Any]:
    """Return the ``ome`` entry of a scene with one displacement field, and an affine transform behind it.

    Parameters
    ----------
    path : str
        Group of the displacements, below the scene's own.
    frame : (4, 4)
        Matrix from the field's frame to the world, both in the order z, y, x.
    after : Affine
        What is applied to the displaced points, LPS in mm.
    """
    turned = np.eye(4)[[2, 1, 0, 3]]
    steps = [
        affine_entry(inverted(frame)),
        {"type": "displacements", "path": path, "interpolation": "linear"},
        affine_entry(frame),
        affine_entry(turned @ after.matrix_mm @ turned),
    ]
    return scene({"type": "sequence", "transformations": steps}, "zyx")


def is_scene(record: Any) -> bool:
    """Return whether parsed JSON is a scene of OME-NGFF, or the metadata of a store with one."""
    return _scene_of(record) is not None


def read_scene(path: Path, *, assume_lps: bool) -> PointMap:
    """Read the one transformation of a scene: a JSON file, or a store.

    Parameters
    ----------
    assume_lps : bool
        Whether axes without an orientation are taken as LPS.

    Raises
    ------
    RegistrationError
        If there is none or more than one, it is of a kind that is not read, or its axes do not say what is needed.
    """
    file = path / "zarr.json" if path.is_dir() else path
    try:
        found = _scene_of(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise RegistrationError(f"{path} is no JSON ({str(error)[:80]}); {_EXPECTED}") from error
    if found is None:
        raise RegistrationError(f"{path} holds no scene; {_EXPECTED}")
    try:
        entries = found["coordinateTransformations"]
        if len(entries) != 1:
            raise RegistrationError(f"{path} holds {len(entries)} coordinate transformations; {_EXPECTED}")
        systems = {system["name"]: system["axes"] for system in found["coordinateSystems"]}
        worlds = [_world(path, systems, entries[0][end], assume_lps) for end in ("input", "output")]
        steps = _steps(path, entries[0], file.parent)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, RegistrationError):
            raise
        raise RegistrationError(f"{path} is a damaged scene ({repr(error)[:80]}); {_EXPECTED}") from error
    # The steps act on coordinates of the scene's systems, so points come from our world and go back into it.
    return _joined([Affine(inverted(worlds[0])), *steps, Affine(worlds[1])])


def _joined(parts: Sequence[PointMap]) -> PointMap:
    """Join neighbouring matrices into one, and everything into one transform."""
    joined: list[PointMap] = []
    for part in parts:
        # A change of world is a matrix of its own. Joined, a linear scene becomes one matrix again, which any form
        # can hold.
        before = joined[-1] if joined else None
        if isinstance(part, Affine) and isinstance(before, Affine):
            joined[-1] = part.compose(before)
        else:
            joined.append(part)
    kept = [
        part for part in joined if not (isinstance(part, Affine) and np.allclose(part.matrix_mm, np.eye(4)))
    ]
    kept = kept or joined[:1]
    return kept[0] if len(kept) == 1 else Composite(tuple(kept))


def _scene_of(record: Any) -> dict[str, Any] | None:
    if not isinstance(record, dict):
        return None
    record = record.get("attributes", record)
    ome = record.get("ome", record) if isinstance(record, dict) else None
    found = ome.get("scene", ome) if isinstance(ome, dict) else None
    if isinstance(found, dict) and {"coordinateSystems", "coordinateTransformations"} <= found.keys():
        return found
    return None


def _world(path: Path, systems: dict[str, Any], end: Any, assume_lps: bool) -> FloatArray:
    """Return the matrix (4, 4) from the coordinates of a system, in its own order and units, to LPS in mm."""
    name = end if isinstance(end, str) else end["name"]
    if name not in systems or (isinstance(end, dict) and end.get("path")):
        raise RegistrationError(
            f"{path}: the coordinate system {str(name)[:40]!r} stands in another store, and how its image lies is not "
            f"known here; {_EXPECTED}"
        )
    axes = systems[name]
    if sorted(axis["name"] for axis in axes) != ["x", "y", "z"]:
        raise RegistrationError(
            f"{path}: {name} has the axes {', '.join(str(a['name']) for a in axes)[:80]}; {_EXPECTED}"
        )
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for column, axis in enumerate(axes):
        if "unit" not in axis:
            raise RegistrationError(
                f"{path}: axis {axis['name']} of {name} has no unit; add it, e.g. millimeter"
            )
        try:
            scale = MM_PER_UNIT[unit_name(axis["unit"])]
        except ConfigError as error:
            raise RegistrationError(f"{path}: axis {axis['name']} of {name}: {error}") from error
        matrix["xyz".index(axis["name"]), column] = scale * _sign(path, name, axis, assume_lps)
    return matrix


def _sign(path: Path, system: str, axis: dict[str, Any], assume_lps: bool) -> int:
    """Return 1 where an axis points as LPS does, and -1 where it points the other way."""
    said = axis.get("orientation", axis.get("anatomicalOrientation"))
    value = said.get("value") if isinstance(said, dict) else said
    ends = _ENDS[axis["name"]]
    if value == "-to-".join(ends):
        return 1
    if value == "-to-".join(ends[::-1]):
        return -1
    if value is None and (assume_lps or system in (FIXED_WORLD, MOVING_WORLD)):
        return 1
    if value is None:
        raise RegistrationError(
            f"{path}: axis {axis['name']} of {system} does not say where it points to; add its orientation (RFC-4), or "
            "pass --from ngff if the axes are LPS"
        )
    raise RegistrationError(
        f"{path}: axis {axis['name']} of {system} points {str(value)[:40]}; expected {'-to-'.join(ends)} or the "
        "opposite"
    )


def _steps(path: Path, entry: dict[str, Any], folder: Path) -> list[PointMap]:
    """Return the maps of a transformation, acting on coordinates in the order of its axes."""
    kind = entry["type"]
    if kind == "sequence":
        return [step for one in entry["transformations"] for step in _steps(path, one, folder)]
    if kind == "bijection":
        return _steps(path, entry["forward"], folder)
    if kind == "displacements":
        from comir_hpc.transforms.conventions.ngff_fields import read_displacements
        from comir_hpc.transforms.stored import StoredField, is_stored_field

        if is_stored_field(folder / entry["path"]):
            return [StoredField(folder / entry["path"])]
        return [read_displacements(folder / entry["path"], entry.get("interpolation", "linear"))]
    matrix = np.eye(4)
    if kind == "affine" and "affine" in entry:
        matrix[:3] = np.asarray(entry["affine"], dtype=np.float64)
    elif kind == "rotation" and "rotation" in entry:
        matrix[:3, :3] = np.asarray(entry["rotation"], dtype=np.float64)
    elif kind == "scale":
        matrix[range(3), range(3)] = np.asarray(entry["scale"], dtype=np.float64)
    elif kind == "translation":
        matrix[:3, 3] = np.asarray(entry["translation"], dtype=np.float64)
    elif kind == "mapAxis":
        # The i-th output coordinate is the input coordinate that the i-th number names.
        matrix[:3, :3] = np.eye(3)[[int(axis) for axis in entry["mapAxis"]]]
    elif kind != "identity":
        raise RegistrationError(
            f"{path} holds a transformation of type {str(kind)[:40]} whose numbers are not in the scene; affine, "
            "rotation, scale, translation, mapAxis, identity, displacements, and sequences of these are read"
        )
    return [Affine(matrix)]
