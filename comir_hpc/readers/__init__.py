"""Every file format that comir-hpc takes, each as one `Source`: header first, voxels box by box."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from comir_hpc.errors import ComirError, VolumeError
from comir_hpc.readers import tiff as _tiff
from comir_hpc.readers.analyze import pair
from comir_hpc.readers.dicom import dicom, dicom_series
from comir_hpc.readers.hdf5 import hdf5
from comir_hpc.readers.metaimage import metaimage
from comir_hpc.readers.mgh import mgh
from comir_hpc.readers.nifti import nifti
from comir_hpc.readers.npy import in_memory, npy
from comir_hpc.readers.nrrd import nrrd
from comir_hpc.readers.paths import require_readable
from comir_hpc.readers.pictures import picture
from comir_hpc.readers.source import Source, upright
from comir_hpc.readers.stack import tiles_along_z
from comir_hpc.readers.zarr_stores import MARKS, zarr_array

__all__ = ["FORMATS", "Source", "in_memory", "open_source"]

FORMATS = "NIfTI and Analyze (.nii, .nii.gz, .hdr and .img), MGH (.mgh, .mgz), NRRD (.nrrd, .nhdr), MetaImage " \
    "(.mha, .mhd), TIFF and OME-TIFF (.tif, .tiff), HDF5 (.h5, .hdf5), Imaris (.ims), .npy, .zarr, a folder of " \
    "DICOM or TIFF slices or of tiles along z, one slice as .png or .jpg"  # fmt: skip
_BY_SUFFIX: dict[str, Callable[[Path], Source]] = {
    ".nii": nifti, ".nii.gz": nifti, **dict.fromkeys((".hdr", ".img", ".hdr.gz", ".img.gz"), pair),
    **dict.fromkeys((".mgh", ".mgz", ".mgh.gz"), mgh), ".nrrd": nrrd, ".nhdr": nrrd, ".mha": metaimage,
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
        Which of several: path of an array in HDF5 or zarr, number of a TIFF series, UID of a DICOM series.

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
        raise VolumeError(f"{path}: unknown format; expected {FORMATS}")
    if suffix in _BY_SUFFIX_AND_DATASET:
        return _BY_SUFFIX_AND_DATASET[suffix](path, dataset)
    if dataset is not None:
        raise VolumeError(f"{path} holds one volume: leave --dataset {dataset} out")
    return _BY_SUFFIX[suffix](path)


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((s for s in (*_BY_SUFFIX, *_BY_SUFFIX_AND_DATASET) if name.endswith(s)), None)


def _tiles(path: Path) -> list[Path]:
    """Volumes of one format in a folder, two or more; none where formats are mixed."""
    found = [f for f in path.iterdir() if f.is_file() and not f.name.startswith(".")]
    volumes = [f for f in found if _suffix(f) not in (None, ".png", ".jpg", ".jpeg")]
    return volumes if len(volumes) > 1 and len({_suffix(f) for f in volumes}) == 1 else []


def _folder(path: Path, dataset: str | None) -> Source:
    if path.suffix == ".zarr" or any((path / mark).is_file() for mark in MARKS):
        return zarr_array(path, dataset)
    slices = [f for f in path.iterdir() if f.suffix.lower() in _tiff.SUFFIXES and not f.name.startswith(".")]
    series = {} if slices else dicom_series(path)
    if series:
        return dicom(path, series, dataset)
    if slices and _tiff.num_pages(slices[0]) == 1:
        return _tiff.tiff_folder(path, slices)
    if tiles := _tiles(path):
        return tiles_along_z(path, tiles, lambda file: _opened(file, dataset))
    folders = sorted(f.name for f in path.iterdir() if f.is_dir())[:8]
    inside = f"; its folders are {', '.join(folders)}" if folders else ""
    raise VolumeError(
        f"{path} holds neither DICOM nor TIFF slices nor tiles of one format, and is no zarr store{inside}; "
        f"expected {FORMATS}"
    )
