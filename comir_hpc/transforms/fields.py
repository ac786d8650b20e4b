"""Displacement fields in NIfTI files: those of ITK and ANTs are read, all others are refused by name."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger
from nibabel.spatialimages import HeaderDataError

from comir_hpc.errors import RegistrationError
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.transforms.itk import ItkTransform, silent_itk

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
_FIELD_COPIES = 2  # copies of a displacement field in float64 that exist while it is read


def displacement_field(path: Path) -> ItkTransform | None:
    """Read the displacement field in a NIfTI file, or None where it holds an image.

    ITK and ANTs keep one vector a voxel along the fifth axis, in LPS and mm, and name the intent "vector". Fields of
    other tools are refused by name, because theirs are other worlds, positions instead of displacements, or both.

    Raises
    ------
    RegistrationError
        If the file is damaged, is a field of another kind or of the other direction, or does not fit into memory.
    """
    try:
        with _silent_nibabel():
            header: Any = nibabel.load(path).header
    except _UNREADABLE as error:
        raise RegistrationError(
            f"{path} is a NIfTI file that cannot be read; copy or export it again"
        ) from error
    shape, intent = header.get_data_shape(), int(header["intent_code"])
    word = header["intent_name"].item().decode(errors="replace").strip()
    # Four axes with three values at the end may be an image with three time points. Only the intents of FSL (2006 to
    # 2009) say that they are vectors.
    if len(shape) < 4 or shape[-1] != 3 or (len(shape) == 4 and not 2006 <= intent <= 2009):
        return None
    if intent != _VECTOR_INTENT or word or len(shape) != 5 or shape[3] != 1:
        tool = {"Mapping": "SPM", "NREG_TRANS": "NiftyReg"}.get(word, "FSL" if 2006 <= intent <= 2009 else "")
        raise RegistrationError(
            f"{path} is a field of vectors{f' of {tool}' if tool else ''} (shape {shape}, intent {intent}"
            f"{f' {word}' if word else ''}), whose world and meaning are not ITK's; convert it to a displacement field "
            "of ITK (intent 1007, LPS, mm) or a transform of ITK (.h5)"
        )
    # Nothing in the file says which way it maps: ANTs says it by the name alone.
    if "inversewarp" in path.name.lower():
        raise RegistrationError(
            f"{path} is by its name the inverse warp of ANTs, which maps moving to fixed points; give the one from "
            "fixed to moving points (1Warp.nii.gz beside it)"
        )
    return _loaded_field(path, shape)


@contextmanager
def _silent_nibabel() -> Iterator[None]:
    """Keep nibabel from printing what it mends in a header: what is wrong with a file is said in our error."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


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
        with _silent_nibabel():
            stored: Any = nibabel.load(path)
        if not np.isfinite(np.asarray(stored.dataobj, dtype=np.float32)).all():
            raise RegistrationError(
                f"{path} is a displacement field with numbers that are not finite; write it again"
            )
        with silent_itk():
            field = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
        return ItkTransform(sitk.DisplacementFieldTransform(field), (note,))
    except (RuntimeError, *_UNREADABLE) as error:
        if isinstance(error, RegistrationError):
            raise
        raise RegistrationError(
            f"{path} is a displacement field that is damaged or cut off; copy it again"
        ) from error


def displacement_image(path: Path) -> ItkTransform:
    """Read a displacement field that ITK keeps as an image of three channels (.mha, .nrrd): LPS vectors in mm.

    Raises
    ------
    RegistrationError
        If the file is damaged, holds no vectors of three, or a vector is not finite.
    """
    try:
        with silent_itk():
            image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise RegistrationError(f"{path} cannot be read by ITK; copy or export it again") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 3:
        found = f"{image.GetNumberOfComponentsPerPixel()} channels in {image.GetDimension()} dimensions"
        raise RegistrationError(
            f"{path} is an image of {found}; expected a field of displacements: vectors of three in a volume"
        )
    return ItkTransform(sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64)))
