"""Transform files: ours and ITK's read and written, displacement fields of ANTs read.

A file is recognised by its content where that is possible. What is none of these is refused by what it is.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from comir_hpc.errors import RegistrationError
from comir_hpc.host.files import write_json, write_text
from comir_hpc.memory import available_bytes, in_words
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import as_affine
from comir_hpc.transforms.foreign import what_it_is
from comir_hpc.transforms.itk import ItkTransform, itk_transform
from comir_hpc.transforms.protocol import PointMap

DIRECTION = (
    "maps a point of the fixed volume to the corresponding point of the moving volume "
    "(ITK's resampling direction); world points are LPS (x, y, z) in mm"
)
FIXED_WORLD, MOVING_WORLD = "fixed_lps_mm", "moving_lps_mm"
_NGFF_VERSION = "0.6"
_ITK_TEXT = "#Insight Transform File"
_VECTOR_INTENT = 1007  # NIFTI_INTENT_VECTOR, under which ITK and ANTs keep LPS displacements
# What nibabel raises on a file that is torn or not what its name says.
_UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    zlib.error,
    struct.error,
)
_FIELD_COPIES = 2  # of a displacement field in float64, while it is read


def save_transform(
    transform: Affine, folder: Path, provenance: dict[str, Any] | None = None
) -> tuple[Path, Path]:
    """Write ``transform.tfm`` (ITK) and ``transform.json`` (OME-NGFF 0.6 form, and the plain matrix).

    The ITK file always holds an AffineTransform: every ITK-based tool reads it, and it is exact. A versor loses
    0.002 mm at 100 mm from the centre when the angle is 180 degrees, an Euler transform its axes at 90.

    Parameters
    ----------
    folder : Path
        Made if missing.
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


def itk_text(transform: Affine) -> str:
    """Content of an ITK ``.tfm`` file, with the direction as a comment at its end, where all readers allow one."""
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
    """JSON form: the matrix, and an OME-NGFF 0.6 scene with one affine between two named coordinate systems.

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
        As `read_transform`, and if the transform is not linear.
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
        if name.endswith((".nii", ".nii.gz")) and (field := _displacement_field(path)):
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
    # ITK's own .mat is MATLAB's level 4: a little-endian header of five small integers.
    return path.suffix.lower() == ".mat" and len(head) > 20 and head[1:4] == b"\0\0\0"


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
        return ItkTransform(sitk.ReadTransform(str(path)))
    except RuntimeError as error:
        if isinstance(error, RegistrationError):
            raise
        raise RegistrationError(
            f"{path} is a transform of ITK that is damaged, cut off or of a kind that is not known here; write it again"
        ) from error


def _displacement_field(path: Path) -> ItkTransform | None:
    """Read the displacement field in a NIfTI file, or None where it holds an image.

    ITK and ANTs keep one vector a voxel along the fifth axis, in LPS and mm, and name the intent "vector". Fields of
    other tools are refused by name, because theirs are other worlds, positions instead of displacements, or both.
    """
    try:
        header: Any = nibabel.load(path).header
    except _UNREADABLE as error:
        raise RegistrationError(
            f"{path} is a NIfTI file that cannot be read; copy or export it again"
        ) from error
    shape, intent = header.get_data_shape(), int(header["intent_code"])
    word = header["intent_name"].item().decode(errors="replace").strip()
    if len(shape) < 4 or shape[-1] != 3 or (len(shape) == 4 and not 2006 <= intent <= 2009):
        return None
    if intent != _VECTOR_INTENT or word or len(shape) != 5 or shape[3] != 1:
        tool = {"Mapping": "SPM", "NREG_TRANS": "NiftyReg"}.get(word, "FSL" if 2006 <= intent <= 2009 else "")
        raise RegistrationError(
            f"{path} is a field of vectors{f' of {tool}' if tool else ''} (shape {shape}, intent {intent}"
            f"{f' {word}' if word else ''}), whose world and meaning are not ITK's; convert it to a displacement field "
            "of ITK (intent 1007, LPS, mm) or a transform of ITK (.h5)"
        )
    if "inversewarp" in path.name.lower():
        raise RegistrationError(
            f"{path} is by its name the inverse warp of ANTs, which maps moving to fixed points; give the one from "
            "fixed to moving points (1Warp.nii.gz beside it)"
        )
    return _loaded_field(path, shape)


def _loaded_field(path: Path, shape: tuple[int, ...]) -> ItkTransform:
    needed, free = _FIELD_COPIES * 8 * int(np.prod(shape)), available_bytes()
    if needed > free:
        raise RegistrationError(
            f"{path} needs {in_words(needed)} of memory as a displacement field, {in_words(free)} are free; use a "
            "larger machine"
        )
    note = (
        f"{path.name}: read as a displacement field of ANTs (LPS vectors in mm, fixed to moving). ANTs keeps the "
        "affine part in a file of its own (0GenericAffine.mat), which is not applied here"
    )
    try:
        # ITK's reader turns what is not finite into zero, which would be "no displacement here".
        stored: Any = nibabel.load(path)
        if not np.isfinite(np.asarray(stored.dataobj, dtype=np.float32)).all():
            raise RegistrationError(
                f"{path} is a displacement field with numbers that are not finite; write it again"
            )
        field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
        return ItkTransform(sitk.DisplacementFieldTransform(field), (note,))
    except (RuntimeError, *_UNREADABLE) as error:
        if isinstance(error, RegistrationError):
            raise
        raise RegistrationError(
            f"{path} is a displacement field that is damaged or cut off; copy it again"
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
