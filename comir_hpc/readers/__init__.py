"""Every file format that comir-hpc takes, each as one `Source`: header first, voxels box by box."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from comir_hpc.errors import VolumeError
from comir_hpc.readers import tiff as _tiff
from comir_hpc.readers.arrays import hdf5, in_memory, npy, zarr_array
from comir_hpc.readers.dicom import dicom_file, is_dicom
from comir_hpc.readers.folders import folder
from comir_hpc.readers.itk_files import metaimage, nifti, nrrd
from comir_hpc.readers.pictures import picture
from comir_hpc.readers.source import Source, upright

__all__ = ["FORMATS", "Source", "in_memory", "open_source"]

FORMATS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd), TIFF and OME-TIFF (.tif, .tiff), " \
    "HDF5 (.h5, .hdf5), .npy, .zarr, DICOM (a file or a folder), .png or .jpg (a slice), a folder of slices (TIFF, " \
    "PNG, JPEG) or of tiles"  # fmt: skip
_ZARR_MARKS = ("zarr.json", ".zgroup", ".zarray", ".zattrs")
_BY_SUFFIX: dict[str, Callable[[Path], Source]] = {
    ".nii": nifti, ".nii.gz": nifti, ".nrrd": nrrd, ".nhdr": nrrd, ".mha": metaimage, ".mhd": metaimage, ".npy": npy,
    ".png": picture, ".jpg": picture, ".jpeg": picture,
}  # fmt: skip
_BY_SUFFIX_AND_DATASET: dict[str, Callable[[Path, str | None], Source]] = {
    **dict.fromkeys(_tiff.SUFFIXES, _tiff.tiff),
    **dict.fromkeys((".h5", ".hdf5", ".hdf"), hdf5),
}


def open_source(path: Path, dataset: str | None = None) -> Source:
    """Open a volume of any format; only its header is read.

    Parameters
    ----------
    dataset : str, optional
        Which of several: path of an array in HDF5 or zarr, number of a TIFF series, UID of a DICOM series.

    Raises
    ------
    VolumeError
        If nothing is there, the format is unknown, or the header does not describe a volume.
    """
    return upright(_opened(path, dataset))


def _opened(path: Path, dataset: str | None) -> Source:
    if not path.exists():
        raise VolumeError(f"{path} does not exist; expected {FORMATS}")
    if path.is_dir():
        return _folder(path, dataset)
    if path.stat().st_size == 0:
        raise VolumeError(f"{path} is empty (0 bytes); copy or export it again")
    suffix = _suffix(path)
    if suffix is None and not is_dicom(path):
        raise VolumeError(f"{path}: unknown format; expected {FORMATS}")
    if suffix in _BY_SUFFIX_AND_DATASET:
        return _BY_SUFFIX_AND_DATASET[suffix](path, dataset)
    if dataset is not None:
        raise VolumeError(f"{path} holds one volume: leave --dataset {dataset} out")
    return dicom_file(path) if suffix is None else _BY_SUFFIX[suffix](path)


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((s for s in (*_BY_SUFFIX, *_BY_SUFFIX_AND_DATASET) if name.endswith(s)), None)


def _folder(path: Path, dataset: str | None) -> Source:
    if path.suffix == ".zarr" or any((path / mark).is_file() for mark in _ZARR_MARKS):
        return zarr_array(path, dataset)
    return folder(path, dataset, opened=_opened, suffix_of=_suffix, formats=FORMATS)
