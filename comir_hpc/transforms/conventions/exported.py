"""One transform written in any of the forms that other tools have."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import SimpleITK as sitk

from comir_hpc.config.words import TransformForm
from comir_hpc.errors import RegistrationError
from comir_hpc.host.files import write_json, write_text, written_whole
from comir_hpc.transforms.affine import Affine
from comir_hpc.transforms.composite import as_affine
from comir_hpc.transforms.conventions.elastix import elastix_texts
from comir_hpc.transforms.conventions.grids import GridPair
from comir_hpc.transforms.conventions.lta import lta_text
from comir_hpc.transforms.conventions.matrices import fsl_text, matrix_text
from comir_hpc.transforms.conventions.ngff import affine_entry, scene, write_scene
from comir_hpc.transforms.itk import ItkTransform, itk_displacements, itk_form
from comir_hpc.transforms.protocol import PointMap

IMAGES = (".nii", ".nii.gz", ".mha", ".nrrd")
"""Endings of a file that keeps a displacement field as an image."""
_LINEAR = {
    "fsl": "a matrix of FSL",
    "lta": "an LTA file",
    "matrix-ras": "a matrix",
    "matrix-lps": "a matrix",
}
_ENDINGS: dict[str, tuple[str, ...]] = {
    "itk": (".tfm", ".txt", ".h5", ".mat", *IMAGES),
    "ants": (".mat", ".txt", ".h5", ".nii", ".nii.gz"),
    "elastix": (".txt",),
    "fsl": (".mat", ".txt"),
    "lta": (".lta",),
    "matrix-ras": (".txt", ".mat"),
    "matrix-lps": (".txt", ".mat"),
    "ngff": (".json", ".zarr"),
}


def default_ending(transform: PointMap, form: TransformForm) -> str:
    """Return how the name of a file ends by which a transform is kept in a form."""
    if as_affine(transform) is not None:
        return _ENDINGS[form][0]
    if form == "ants" and len(transform.parts) == 1 and _field(transform.parts[0]) is not None:
        return ".nii.gz"
    return {"itk": ".h5", "ants": ".h5", "ngff": ".zarr"}.get(form, _ENDINGS[form][0])


def require_ending(path: Path, form: TransformForm) -> None:
    """Refuse a name that the form's own tools would not take.

    Raises
    ------
    RegistrationError
        If the name ends otherwise.
    """
    if not path.name.lower().endswith(_ENDINGS[form]):
        raise RegistrationError(
            f"{path}: a transform as {form} is kept in a file that ends in {' or '.join(_ENDINGS[form])}; choose "
            "such a name"
        )


def export_transform(
    transform: PointMap, form: TransformForm, path: Path, grids: GridPair
) -> tuple[str, ...]:
    """Write a transform from fixed to moving points in the form of another tool, whole or not at all.

    Parameters
    ----------
    path : Path
        Path of the file (of a folder for ``.zarr``), whose folder exists. What is there is replaced.
    grids : GridPair
        Grids of both volumes, which FSL, LTA and elastix need.

    Returns
    -------
    Notes for the user: what the form means, or cannot keep.

    Raises
    ------
    RegistrationError
        If the form cannot hold a part of the transform, a grid is missing, or the file cannot be written.
    """
    require_ending(path, form)
    try:
        return _WRITERS[form](transform, form, path, grids)
    except OSError as error:
        raise RegistrationError(
            f"{path} cannot be written ({error.strerror or error}); make room or get access"
        ) from error


def _text(transform: PointMap, form: TransformForm, path: Path, grids: GridPair) -> tuple[str, ...]:
    whole = _require_affine(transform, _LINEAR[form])
    text = {
        "fsl": lambda: fsl_text(whole, grids),
        "lta": lambda: lta_text(whole, grids),
        "matrix-ras": lambda: matrix_text(whole, form),
        "matrix-lps": lambda: matrix_text(whole, form),
    }[form]()
    write_text(path, text)
    notes = {
        "fsl": (
            f"{path.name}: its numbers map moving to fixed coordinates, as those of flirt -omat do; it holds "
            "for NIfTI files whose voxels lie in the order of the two volumes",
        ),
        "lta": (f"{path.name}: src is the moving volume, dst the fixed one",),
    }
    return notes.get(form, ())


def _require_affine(transform: PointMap, holder: str) -> Affine:
    """Return the one matrix of a transform; refuse what bends, with the number and the kind of the part."""
    whole = as_affine(transform)
    if whole is not None:
        return whole
    parts = transform.parts
    number, bent = next((n, part) for n, part in enumerate(parts, 1) if not isinstance(part, Affine))
    where = (
        f"part {number} of {len(parts)} ({kind_of(bent)})"
        if len(parts) > 1
        else f"the transform ({kind_of(bent)})"
    )
    raise RegistrationError(f"{where} bends space, and {holder} cannot hold that; export it with --to itk")


def kind_of(part: PointMap) -> str:
    """Return the name of what a part of a transform is, for messages."""
    return part.itk.GetName() if isinstance(part, ItkTransform) else type(part).__name__


def _itk(transform: PointMap, form: TransformForm, path: Path, grids: GridPair) -> tuple[str, ...]:
    """Write a file of ITK, or a displacement field as an image."""
    name = path.name.lower()
    if name.endswith(IMAGES):
        return _displacements(transform, path, grids)
    whole = as_affine(transform)
    if whole is None and not name.endswith((".h5", ".tfm", ".txt")):
        raise RegistrationError(
            f"{path}: this format keeps matrices only, and a part bends space; write .h5 instead"
        )
    itk = itk_form(transform) if whole is None else whole.to_sitk()
    _by_itk(path, lambda spare: sitk.WriteTransform(itk, str(spare)))
    if form == "ants" and whole is not None:
        return (f"{path.name}: give it to antsApplyTransforms with -t, the fixed volume with -r",)
    return ()


def _displacements(transform: PointMap, path: Path, grids: GridPair) -> tuple[str, ...]:
    """Write a transform as a field of displacements, LPS in mm: its own one, or sampled on the fixed grid."""
    parts = transform.parts
    notes: tuple[str, ...] = ()
    field = _field(parts[0]) if len(parts) == 1 else None
    if field is None:
        if grids.fixed is None:
            raise RegistrationError(
                f"{path}: a field of displacements is sampled on the fixed grid; name the volume with --fixed FIXED"
            )
        field = itk_displacements(transform, grids.fixed)
        notes = (f"{path.name}: sampled on the fixed grid; between its voxels it is linear",)
    _by_itk(path, lambda spare: sitk.WriteImage(field, str(spare)))
    return notes


def _field(part: PointMap) -> sitk.Image | None:
    """Return the field of a part that is a displacement field of ITK."""
    whole = part.itk.Downcast() if isinstance(part, ItkTransform) else None
    # A copy: ITK's own field ends with its transform.
    return (
        sitk.Image(whole.GetDisplacementField())
        if isinstance(whole, sitk.DisplacementFieldTransform)
        else None
    )


def _by_itk(path: Path, write: Callable[[Path], object]) -> None:
    with written_whole(path) as spare:
        # ITK chooses the format by the whole ending, and `written_whole` keeps the last suffix only.
        whole = spare.with_name(f"{spare.name}.nii.gz") if path.name.lower().endswith(".nii.gz") else spare
        try:
            write(whole)
            if whole != spare:
                whole.replace(spare)
        except RuntimeError as error:
            raise RegistrationError(f"{path} cannot be written by ITK; make room or get access") from error
        finally:
            if whole != spare:
                whole.unlink(missing_ok=True)


def _elastix(transform: PointMap, form: TransformForm, path: Path, grids: GridPair) -> tuple[str, ...]:
    del form
    if grids.fixed is None:
        raise RegistrationError(
            f"{path}: a parameter file of elastix holds the grid of its result; name the volume with --fixed FIXED"
        )
    whole = as_affine(transform)
    parts = transform.parts if whole is None else (whole,)
    names = [f"{path.stem}.{n}{path.suffix}" for n in range(len(parts) - 1)] + [path.name]
    for name, text in zip(names, elastix_texts(parts, grids.fixed, names), strict=True):
        write_text(path.with_name(name), text)
    if len(names) == 1:
        return ()
    return (f"{path.name}: names {', '.join(names[:-1])} beside it, which transformix applies first",)


def _ngff(transform: PointMap, form: TransformForm, path: Path, grids: GridPair) -> tuple[str, ...]:
    del form, grids
    whole = as_affine(transform)
    if path.suffix == ".json":
        write_json(
            path,
            {"ome": scene(affine_entry(_require_affine(transform, "a scene without a store").matrix_mm))},
        )
        return ()
    spare = path.with_name(f".{path.name}.partial")
    shutil.rmtree(spare, ignore_errors=True)
    spare.mkdir()
    try:
        write_scene(transform.parts if whole is None else (whole,), spare)
        # No rename replaces a folder that holds files. The old store goes when the new one is whole.
        if path.exists():
            shutil.rmtree(path)
        spare.rename(path)
    finally:
        shutil.rmtree(spare, ignore_errors=True)
    return ()


_WRITERS: dict[str, Callable[[PointMap, TransformForm, Path, GridPair], tuple[str, ...]]] = {
    "itk": _itk,
    "ants": _itk,
    "elastix": _elastix,
    "fsl": _text,
    "lta": _text,
    "matrix-ras": _text,
    "matrix-lps": _text,
    "ngff": _ngff,
}
