"""Transform files: ours and ITK's read and written, those of other tools recognised.

A file is recognised by its content where that is possible. What is none of these is refused by what it is.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import SimpleITK as sitk

from comir_hpc.errors import RegistrationError
from comir_hpc.host.files import write_json, write_text, written_whole
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import as_affine
from comir_hpc.transforms.fields import displacement_field
from comir_hpc.transforms.foreign import what_it_is
from comir_hpc.transforms.itk import ItkTransform, itk_form, itk_transform, silent_itk
from comir_hpc.transforms.protocol import PointMap

DIRECTION = (
    "maps a point of the fixed volume to the corresponding point of the moving volume "
    "(ITK's resampling direction); world points are LPS (x, y, z) in mm"
)
FIXED_WORLD, MOVING_WORLD = "fixed_lps_mm", "moving_lps_mm"
_NGFF_VERSION = "0.6"
_ITK_TEXT = "#Insight Transform File"


def save_transform(
    transform: Affine, folder: Path, provenance: dict[str, Any] | None = None
) -> tuple[Path, Path]:
    """Write ``transform.tfm`` (ITK) and ``transform.json`` (OME-NGFF 0.6 form, and the plain matrix).

    The ITK file always holds an AffineTransform: every ITK-based tool reads it, and it is exact. A versor loses
    0.002 mm at 100 mm from the centre when the angle is 180 degrees, an Euler transform its axes at 90.

    Parameters
    ----------
    folder : Path
        Folder for the files, which is made if it is missing.
    provenance : dict, optional
        JSON-ready: inputs, versions, settings; kept in ``transform.json``.

    Returns
    -------
    Paths of the two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = itk_text(transform)
    record = ngff_record(transform)
    if provenance:
        record["provenance"] = provenance
    paths = folder / "transform.tfm", folder / "transform.json"
    write_text(paths[0], text)
    write_json(paths[1], record)
    return paths


def save_itk(transform: PointMap, path: Path) -> None:
    """Write a transform of any parts that ITK knows as one file of ITK, whole or not at all.

    One part is written as it is, several as a CompositeTransform.

    Parameters
    ----------
    path : Path
        Ends in ``.h5`` or ``.tfm``; its folder exists.

    Raises
    ------
    RegistrationError
        If a part is no transform that ITK knows, or the file cannot be written.
    """
    with written_whole(path) as spare:
        try:
            sitk.WriteTransform(itk_form(transform), str(spare))
        except RuntimeError as error:
            if isinstance(error, RegistrationError):
                raise
            raise RegistrationError(f"{path} cannot be written by ITK; make room or get access") from error


def itk_text(transform: Affine) -> str:
    """Return the content of an ITK ``.tfm`` file.

    The direction is a comment at its end, where all readers allow one.
    """
    affine = itk_transform(transform)

    def numbers(values: Any) -> str:
        return " ".join(repr(float(value)) for value in values)

    return (
        "#Insight Transform File V1.0\n"
        "#Transform 0\n"
        "Transform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers(affine.GetParameters())}\n"
        f"FixedParameters: {numbers(affine.GetFixedParameters())}\n"
        f"# comir-hpc: {DIRECTION}\n"
    )


def ngff_record(transform: Affine) -> dict[str, Any]:
    """Return the JSON form of a transform.

    It has the matrix, and an OME-NGFF 0.6 scene with one affine between two named coordinate systems.

    NGFF's direction is the one of ours: from `input` (fixed) to `output` (moving) coordinates. Its coordinate
    systems are given the axes x, y, z in that order, so the numbers are those of the matrix.
    """
    axes = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "xyz"]
    return {
        "direction": DIRECTION,
        "matrix_lps_mm": transform.matrix_mm.tolist(),
        "centre_lps_mm": transform.centre_mm.tolist(),
        "ome": {
            "version": _NGFF_VERSION,
            "scene": {
                "coordinateSystems": [{"name": name, "axes": axes} for name in (FIXED_WORLD, MOVING_WORLD)],
                "coordinateTransformations": [
                    {
                        "type": "affine",
                        "name": "fixed to moving",
                        "input": {"name": FIXED_WORLD},
                        "output": {"name": MOVING_WORLD},
                        "affine": transform.matrix_mm[:3].tolist(),
                    }
                ],
            },
        },
    }


def read_transform(path: str | Path) -> PointMap:
    """Read any transform, linear or not.

    ``.json`` of ours, any file that ITK reads (``.tfm``, ``.txt``, ``.h5``, ``.mat``), or a displacement field of ANTs
    (``1Warp.nii.gz``).

    Raises
    ------
    RegistrationError
        If the file is missing or damaged, holds a transform that is not three-dimensional or not invertible, or is
        something else: then the message says what it is and what to do with it.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise RegistrationError(
                f"{path} does not exist; expected transform.tfm or .json made by register"
            )
        return _read(path)
    except OSError as error:
        raise RegistrationError(
            f"{path} cannot be read ({error.strerror or error}); get access to it"
        ) from error
    except RegistrationError as error:
        if str(path) in str(error):
            raise
        raise RegistrationError(f"{path}: {error}") from error


def load_transform(path: str | Path) -> Affine:
    """Read a transform that is linear, as `read_transform` does.

    Raises
    ------
    RegistrationError
        For the same reasons as `read_transform`, and if the transform is not linear.
    """
    found = as_affine(transform := read_transform(path))
    if found is None:
        kind = transform.itk.GetName() if isinstance(transform, ItkTransform) else type(transform).__name__
        raise RegistrationError(
            f"{path}: {kind} is not a linear transform in 3 dimensions, which is needed here"
        )
    return found


def _read(path: Path) -> PointMap:
    name = path.name.lower()
    if path.is_file():
        if name.endswith(".json"):
            return _from_json(path)
        if name.endswith((".nii", ".nii.gz")) and (field := displacement_field(path)):
            return field
        with path.open("rb") as file:
            head = file.read(1 << 10)
        if _is_itk(path, head):
            return _from_itk_file(path)
    kind, remedy = what_it_is(path)
    raise RegistrationError(f"{path} is {kind}; {remedy}")


def _is_itk(path: Path, head: bytes) -> bool:
    if head.lstrip().startswith(_ITK_TEXT.encode()):
        _check_itk_text(path)
        return True
    if h5py.is_hdf5(path):
        return _check_itk_hdf5(path)
    return path.suffix.lower() == ".mat" and _is_matlab_4(path.read_bytes())


def _is_matlab_4(content: bytes) -> bool:
    """Return whether a file is what ITK writes as .mat.

    Such a file holds arrays, each with a header of five integers, a name, and numbers.
    """
    place, kinds = 0, set()
    while place + 20 <= len(content):
        kind, rows, columns, _, length = struct.unpack_from("<5i", content, place)
        kinds.add(kind)
        if kinds not in ({0}, {10}) or min(rows, columns) < 0 or not 0 < length < 80:
            return False
        place += 20 + length + rows * columns * (8 if kind == 0 else 4)
    return 0 < place == len(content)


def _check_itk_text(path: Path) -> None:
    """Refuse what SimpleITK reads wrongly or complains of in the words of its parser."""
    if path.suffix.lower() not in (".tfm", ".txt"):
        raise RegistrationError(f"{path} is a transform of ITK; rename it to end in .tfm, as ITK expects")
    kinds: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "Transform":
            kinds.append(value.strip())
        if key.strip() not in ("Parameters", "FixedParameters"):
            continue
        for number in value.split():
            try:
                finite = bool(np.isfinite(float(number)))
            except ValueError:
                finite = False
            if not finite:
                raise RegistrationError(
                    f"{path} is a transform of ITK in which {number[:30]!r} stands where a finite number is expected; "
                    "write it again"
                )
    _refuse_a_list(path, kinds)


def _check_itk_hdf5(path: Path) -> bool:
    try:
        with h5py.File(path) as file:
            group = file.get("TransformGroup")
            if not isinstance(group, h5py.Group):
                return False
            members = [group[name] for name in sorted(group, key=lambda name: (len(name), name))]
            kinds = [np.ravel(member["TransformType"][()])[0].decode() for member in members]
            # Every array is opened here, because ITK's own HDF5 prints what it stumbles over.
            file.visititems(lambda name, item: None)
    except (OSError, RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RegistrationError(
            f"{path} is an HDF5 file that is damaged or cut off; copy it again"
        ) from error
    _refuse_a_list(path, kinds)
    return True


def _refuse_a_list(path: Path, kinds: list[str]) -> None:
    if len(kinds) > 1 and not kinds[0].startswith("CompositeTransform"):
        raise RegistrationError(
            f"{path} is a list of {len(kinds)} transforms that does not say in which order they are applied; write "
            "them as one CompositeTransform of ITK"
        )


def _from_itk_file(path: Path) -> ItkTransform:
    try:
        with silent_itk():
            return ItkTransform(sitk.ReadTransform(str(path)))
    # ITK quotes the file in its message: of a damaged one that may be no text.
    except (RuntimeError, UnicodeDecodeError) as error:
        if isinstance(error, RegistrationError):
            raise
        raise RegistrationError(
            f"{path} is a transform of ITK that is damaged, cut off or of a kind that is not known here; write it again"
        ) from error


def _from_json(path: Path) -> Affine:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        matrix = np.asarray(record["matrix_lps_mm"], dtype=np.float64)
        centre = np.asarray(record.get("centre_lps_mm", (0.0, 0.0, 0.0)), dtype=np.float64)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RegistrationError(
            f"{path} holds no matrix_lps_mm ({repr(error)[:100]}); expected transform.json made by register"
        ) from error
    return Affine(matrix, centre)
