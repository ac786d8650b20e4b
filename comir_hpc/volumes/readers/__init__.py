"""Every file format that comir-hpc takes, each as one `Source`: header first, voxels box by box."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from comir_hpc.errors import ComirError, VolumeError
from comir_hpc.volumes.readers import tiff as _tiff
from comir_hpc.volumes.readers.hdf5 import hdf5
from comir_hpc.volumes.readers.metaimage import metaimage
from comir_hpc.volumes.readers.npy import in_memory, npy
from comir_hpc.volumes.readers.nrrd import nrrd
from comir_hpc.volumes.readers.paths import require_readable
from comir_hpc.volumes.readers.pictures import picture
from comir_hpc.volumes.readers.source import Source, upright
from comir_hpc.volumes.readers.zarr_stores import MARKS, zarr_array

__all__ = ["FORMATS", "Source", "in_memory", "open_source"]

FORMATS = "NIfTI and Analyze (.nii, .nii.gz, .hdr and .img), MGH (.mgh, .mgz), NRRD (.nrrd, .nhdr), MetaImage " \
    "(.mha, .mhd), TIFF and OME-TIFF (.tif, .tiff), HDF5 (.h5, .hdf5), Imaris (.ims), .npy, .zarr, DICOM (a file or " \
    "a folder), .png or .jpg (a slice), a folder of slices (TIFF, PNG, JPEG) or of tiles"  # fmt: skip


# nibabel takes a fifth of a second to load, and most formats do not need it.
def _nifti(path: Path) -> Source:
    from comir_hpc.volumes.readers.nifti import nifti

    return nifti(path)


def _pair(path: Path) -> Source:
    from comir_hpc.volumes.readers.analyze import pair

    return pair(path)


def _mgh(path: Path) -> Source:
    from comir_hpc.volumes.readers.mgh import mgh

    return mgh(path)


_BY_SUFFIX: dict[str, Callable[[Path], Source]] = {
    ".nii": _nifti, ".nii.gz": _nifti, **dict.fromkeys((".hdr", ".img", ".hdr.gz", ".img.gz"), _pair),
    **dict.fromkeys((".mgh", ".mgz", ".mgh.gz"), _mgh), ".nrrd": nrrd, ".nhdr": nrrd, ".mha": metaimage,
    ".mhd": metaimage, ".npy": npy,
    ".png": picture, ".jpg": picture, ".jpeg": picture,
}  # fmt: skip
_BY_SUFFIX_AND_DATASET: dict[str, Callable[[Path, str | None], Source]] = {
    **dict.fromkeys((*_tiff.SUFFIXES, *_tiff.MICROSCOPES), _tiff.tiff),
    **dict.fromkeys((".h5", ".hdf5", ".hdf", ".ims"), hdf5),
}


def open_source(path: Path, dataset: str | None = None) -> Source:
    """Open a volume of any format; only its header is read.

    Parameters
    ----------
    dataset : str, optional
        Name of the one that is read where a file has several: path of an array in HDF5 or zarr, number of a TIFF
        series, UID of a DICOM series.

    Raises
    ------
    VolumeError
        If nothing is there, the format is unknown, or the header does not describe a volume.
    """
    try:
        return upright(_opened(path, dataset))
    except ComirError:
        raise
    except OSError as error:  # a folder without permission, a link that leads back to itself
        raise VolumeError(f"{error.filename or path} cannot be opened ({error.strerror or error})") from error


def _opened(path: Path, dataset: str | None) -> Source:
    require_readable(path, FORMATS)
    if path.is_dir():
        return _folder(path, dataset)
    suffix = _suffix(path)
    if suffix is None:
        return _dicom(path, dataset)
    if suffix in _BY_SUFFIX_AND_DATASET:
        return _BY_SUFFIX_AND_DATASET[suffix](path, dataset)
    _refuse_dataset(path, dataset)
    return _BY_SUFFIX[suffix](path)


def _dicom(path: Path, dataset: str | None) -> Source:
    """Open a file of any name that is marked as DICOM."""
    # Here, since pydicom takes a tenth of a second to load.
    from comir_hpc.volumes.readers.dicom import dicom_file, is_dicom

    if not is_dicom(path):
        raise VolumeError(f"{path}: unknown format; expected {FORMATS}")
    _refuse_dataset(path, dataset)
    return dicom_file(path)


def _refuse_dataset(path: Path, dataset: str | None) -> None:
    if dataset is not None:
        raise VolumeError(f"{path} holds one volume: leave --dataset {dataset} out")


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((s for s in (*_BY_SUFFIX, *_BY_SUFFIX_AND_DATASET) if name.endswith(s)), None)


def _folder(path: Path, dataset: str | None) -> Source:
    if path.suffix == ".zarr" or any((path / mark).is_file() for mark in MARKS):
        return zarr_array(path, dataset)
    # Here, since most sources are no folders: the rules for them load every other format.
    from comir_hpc.volumes.readers.folders import folder

    return folder(path, dataset, opened=_opened, suffix_of=_suffix, formats=FORMATS)
