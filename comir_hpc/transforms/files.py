"""Transform files: ours and ITK's read and written, those of other tools recognised.

A file is recognised by its content where that is possible. What is none of these is refused by what it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from comir_hpc.config.words import TransformForm
from comir_hpc.errors import RegistrationError
from comir_hpc.host.files import write_json, write_text, written_whole
from comir_hpc.space.grid import Grid
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import as_affine
from comir_hpc.transforms.conventions.elastix import read_elastix
from comir_hpc.transforms.conventions.grids import GridPair
from comir_hpc.transforms.conventions.lta import read_lta
from comir_hpc.transforms.conventions.matrices import read_matrix, said_world
from comir_hpc.transforms.conventions.ngff import (
    affine_entry,
    is_scene,
    read_scene,
    scene,
)
from comir_hpc.transforms.foreign import what_it_is
from comir_hpc.transforms.itk import ItkTransform, itk_form, itk_transform
from comir_hpc.transforms.itk_files import is_itk_file, read_itk_file
from comir_hpc.transforms.protocol import PointMap
from comir_hpc.transforms.stored import is_field

DIRECTION = (
    "maps a point of the fixed volume to the corresponding point of the moving volume "
    "(ITK's resampling direction); world points are LPS (x, y, z) in mm"
)
_SNIFFED = 1 << 16  # bytes of a text by which its form is recognised


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

    The affine of the scene maps `input` (fixed) to `output` (moving) coordinates, as the matrix does. The coordinate
    systems are given the axes x, y, z in that order, so the numbers are those of the matrix.
    """
    return {
        "direction": DIRECTION,
        "matrix_lps_mm": transform.matrix_mm.tolist(),
        "centre_lps_mm": transform.centre_mm.tolist(),
        "ome": scene(affine_entry(transform.matrix_mm)),
    }


def read_transform(
    path: str | Path, form: TransformForm | None = None, grids: GridPair | None = None
) -> PointMap:
    """Read any transform, linear or not.

    ``.json`` of ours, any file that ITK reads (``.tfm``, ``.txt``, ``.h5``, ``.mat``), a displacement field of ANTs
    (``1Warp.nii.gz``), and the forms of `comir_hpc.transforms.conventions`.

    Parameters
    ----------
    form : str, optional
        Form of the file, where it does not say it itself: a matrix in text needs one. What the form leaves open is
        then taken as the form's own tools take it.
    grids : GridPair, optional
        Grids of both volumes, which a matrix of FSL needs.

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
        return _read(path) if form is None else _read_as(path, form, grids or GridPair())
    except OSError as error:
        raise RegistrationError(
            f"{path} cannot be read ({error.strerror or error}); get access to it"
        ) from error
    except RegistrationError as error:
        if str(path) in str(error):
            raise
        raise RegistrationError(f"{path}: {error}") from error


def content_digest(path: Path, transform: PointMap, grid: Grid) -> str:
    """Return a digest of all that a transform read from `path` depends on.

    Parameters
    ----------
    transform : PointMap
        What was read.
    grid : Grid
        Fixed grid: where its corners go to stands for files that `path` only names.
    """
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.read_bytes())
    if path.is_dir() or (len(transform.parts) > 1 and path.suffix.lower() == ".txt"):
        # Files of elastix name other files, which lie elsewhere. Where the corners of the grid are sent stands for
        # them, to the nanometre.
        digest.update(np.round(transform.apply(grid.corners_mm()), 6).tobytes())
    return digest.hexdigest()[:16]


def load_transform(
    path: str | Path, form: TransformForm | None = None, grids: GridPair | None = None
) -> Affine:
    """Read a transform that is linear, as `read_transform` does.

    Raises
    ------
    RegistrationError
        For the same reasons as `read_transform`, and if the transform is not linear.
    """
    found = as_affine(transform := read_transform(path, form, grids))
    if found is None:
        kind = transform.itk.GetName() if isinstance(transform, ItkTransform) else type(transform).__name__
        raise RegistrationError(
            f"{path}: {kind} is not a linear transform in 3 dimensions, which is needed here"
        )
    return found


def _read(path: Path) -> PointMap:
    """Read a file that says itself what it is."""
    name = path.name.lower()
    if path.is_file():
        if name.endswith(".json"):
            return _from_json(path)
        if name.endswith((".nii", ".nii.gz")):
            from comir_hpc.transforms.fields import displacement_field  # loads nibabel, which most need not

            if (field := displacement_field(path)) is not None:
                return field
        with path.open("rb") as file:
            head = file.read(_SNIFFED)
        if is_itk_file(path, head):
            return read_itk_file(path)
        if (form := _form_of_text(head)) is not None:
            return _read_as(path, form, GridPair())
    elif _is_scene_store(path):
        return read_scene(path, assume_lps=False)
    elif is_field(path):
        raise RegistrationError(
            f"{path} is incomplete: the command that writes it was stopped; run that command again"
        )
    kind, remedy = what_it_is(path)
    raise RegistrationError(f"{path} is {kind}; {remedy}")


def _read_as(path: Path, form: TransformForm, grids: GridPair) -> PointMap:
    """Read a file of a form that the user, or the file itself, has named."""
    if form == "ngff":
        return read_scene(path, assume_lps=True)
    if path.is_dir():
        raise RegistrationError(f"{path} is a folder; expected a file for --from {form}")
    if form in ("itk", "ants"):
        name = path.name.lower()
        if name.endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
            from comir_hpc.transforms.fields import displacement_image

            return displacement_image(path)
        return _read(path)
    if form == "elastix":
        return read_elastix(path, _read)
    return read_lta(path) if form == "lta" else read_matrix(path, form, grids)


def _form_of_text(head: bytes) -> TransformForm | None:
    """Return the form that a text names by its content."""
    text = head.decode("utf-8-sig", errors="replace")
    if "\0" in text:
        return None
    if re.search(r"^\(Transform\s+\"", text, re.MULTILINE):
        return "elastix"
    if re.search(r"^nxforms\s*=", text, re.MULTILINE):
        return "lta"
    said = said_world(text)
    return None if said is None else ("matrix-ras" if said == "matrix-ras" else "matrix-lps")


def _is_scene_store(path: Path) -> bool:
    try:
        return is_scene(json.loads((path / "zarr.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return False


def _from_json(path: Path) -> PointMap:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        # Our own file is a scene as well. Its plain matrix is read, because it needs no convention.
        if "matrix_lps_mm" not in record and is_scene(record):
            return read_scene(path, assume_lps=False)
        matrix = np.asarray(record["matrix_lps_mm"], dtype=np.float64)
        centre = np.asarray(record.get("centre_lps_mm", (0.0, 0.0, 0.0)), dtype=np.float64)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, RegistrationError):
            raise
        raise RegistrationError(
            f"{path} holds no matrix_lps_mm ({repr(error)[:100]}); expected transform.json made by register"
        ) from error
    return Affine(matrix, centre)
