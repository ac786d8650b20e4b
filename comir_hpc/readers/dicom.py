"""A folder of DICOM slices: one series as a volume, read slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import Box, FloatArray, Matrix, Vector
from comir_hpc.readers.itk_files import geometry_of, itk_dtype, itk_header
from comir_hpc.readers.source import Source, cut, reading, storable

_POSITION, _ORIENTATION, _PIXEL_SPACING, _IMAGER_SPACING = "0020|0032", "0020|0037", "0028|0030", "0018|1164"
_DESCRIPTION, _MODALITY = "0008|103e", "0008|0060"
_UNEVEN = 0.02  # of a slice distance: positions are written with a few decimals


def dicom_series(path: Path) -> dict[str, tuple[str, ...]]:
    """Series of a folder: series UID -> its files in the order of their position (GDCM's)."""
    with reading(path, "DICOM folder"):
        finder = sitk.ImageSeriesReader
        before = sitk.ProcessObject.GetGlobalWarningDisplay()
        sitk.ProcessObject.SetGlobalWarningDisplay(
            False
        )  # a folder without DICOM is no mishap, it may hold TIFF
        try:
            return {
                uid: tuple(finder.GetGDCMSeriesFileNames(str(path), uid))
                for uid in finder.GetGDCMSeriesIDs(str(path))
            }
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(before)


def dicom(path: Path, series: dict[str, tuple[str, ...]], dataset: str | None = None) -> Source:
    """Open one series of a DICOM folder.

    Parameters
    ----------
    series : dict
        What `dicom_series` found.
    dataset : str, optional
        Series UID, where the folder holds several.

    Raises
    ------
    VolumeError
        If there are several series, a slice is missing, or the slices are stacked obliquely (gantry tilt).
    """
    files = series[_chosen(path, series, dataset)]
    header = itk_header(Path(files[0]), "DICOM slice")
    dtype, channels = storable(itk_dtype(header), path), int(header.GetNumberOfComponents())
    if len(files) == 1 and header.GetSize()[-1] > 1:
        return _multiframe(path, Path(files[0]), header, dtype)
    spacing, origin, direction = geometry_of(header, Path(files[0]))  # of one slice: its thickness, its plane
    if len(files) > 1:
        spacing, direction = _stacking(path, files, *spacing[1:])
    spaced = header.HasMetaDataKey(_PIXEL_SPACING) or header.HasMetaDataKey(_IMAGER_SPACING)
    x, y = header.GetSize()[:2]
    return Source(
        path=path, kind="DICOM", shape=(channels, len(files), y, x), dtype=dtype,
        read_box=_Slices(path, files, (x, y), int(header.GetPixelID())).read, files=tuple(map(Path, files)),
        spacing_zyx=spacing if spaced else None, unit="millimeter", origin_xyz=origin, direction=direction,
        atom_zyx=(1, y, x),
    )  # fmt: skip


def _chosen(path: Path, series: dict[str, tuple[str, ...]], dataset: str | None) -> str:
    if dataset is None and len(series) == 1:
        return next(iter(series))
    if dataset is not None and dataset in series:
        return dataset
    named = []
    for uid, files in series.items():
        header = itk_header(Path(files[0]), "DICOM slice")
        words = [header.GetMetaData(k).strip() for k in (_MODALITY, _DESCRIPTION) if header.HasMetaDataKey(k)]
        named.append(f"{uid} ({', '.join([*filter(None, words), f'{len(files)} files'])})")
    asked = f"--dataset {dataset} is none of them; " if dataset else ""
    raise VolumeError(
        f"{path} holds {len(series)} DICOM series; {asked}name one with --dataset UID: {'; '.join(named)}"
    )


def _stacking(path: Path, files: Sequence[str], sy: float, sx: float) -> tuple[Vector, Matrix]:
    """Spacing (z, y, x) and direction of slices from their positions.

    ITK's series reader takes the mean distance and warns; a missing slice would stretch the specimen.
    """
    headers = [itk_header(Path(f), "DICOM slice") for f in files]
    positions = np.asarray([_numbers(h, _POSITION, f, 3) for h, f in zip(headers, files, strict=True)])
    orientation = _numbers(headers[0], _ORIENTATION, files[0], 6)
    for header, file in zip(headers, files, strict=True):
        if not np.allclose(_numbers(header, _ORIENTATION, file, 6), orientation, atol=1e-3):
            raise VolumeError(
                f"{path}: {Path(file).name} is oriented otherwise than {Path(files[0]).name}; split the series"
            )
    row, column = orientation[:3], orientation[3:]
    normal = np.cross(row, column)
    steps = np.diff(positions, axis=0)
    along = steps @ normal
    step = float(np.median(along))
    if abs(step) < 1e-6:
        raise VolumeError(
            f"{path}: several slices at one position (time points or echoes); export one of them"
        )
    worst = int(np.abs(along - step).argmax())
    if abs(along[worst] - step) > _UNEVEN * abs(step):
        raise VolumeError(
            f"{path}: {Path(files[worst]).name} and {Path(files[worst + 1]).name} are {along[worst]:.4g} mm apart, "
            f"the other slices {step:.4g} mm: a slice is missing or double; export the series again"
        )
    mean = float((positions[-1] - positions[0]) @ normal) / (len(files) - 1)
    sideways = float(np.linalg.norm(steps - along[:, None] * normal, axis=1).max())
    if sideways > _UNEVEN * abs(step):
        raise VolumeError(
            f"{path}: each slice is shifted sideways by {sideways:.4g} mm against the next (gantry tilt); "
            "resample it on perpendicular axes first"
        )
    matrix = np.column_stack([row, column, normal * np.sign(mean)])
    rows = [tuple(float(v) for v in line) for line in matrix]
    return (abs(mean), sy, sx), tuple(rows)  # type: ignore[return-value]


def _numbers(header: sitk.ImageFileReader, key: str, file: str, count: int) -> FloatArray:
    text = header.GetMetaData(key) if header.HasMetaDataKey(key) else ""
    with reading(Path(file), f"DICOM slice with {count} numbers in ({key}), found {text!r}"):
        values = np.asarray([float(v) for v in text.split("\\")], dtype=np.float64)
        if len(values) != count:
            raise ValueError(f"{len(values)} numbers")
    return values


@dataclass(frozen=True)
class _Slices:
    path: Path
    files: tuple[str, ...]
    size_xy: tuple[int, int]
    pixel: int

    def read(self, box: Box) -> NDArray[Any]:
        """Voxels of `box` as (c, z, y, x)."""
        return np.stack([self._slice(f, box) for f in self.files[box.start[0] : box.stop[0]]], axis=1)

    def _slice(self, file: str, box: Box) -> NDArray[Any]:
        with reading(Path(file), "DICOM slice"):
            # A slope of its own may give a slice another type: the first slice's holds for all.
            image = sitk.ReadImage(file, self.pixel)
        if image.GetSize()[:2] != self.size_xy:
            raise VolumeError(
                f"{file} has {image.GetSize()[:2]} pixels (x, y), the other slices {self.size_xy}; split the series"
            )
        values = sitk.GetArrayViewFromImage(image)
        flat = Box((0, *box.start[1:]), (1, *box.stop[1:]))
        return cut(values, "zyx" if values.ndim == 3 else "zyxc", flat)[:, 0].copy()


def _multiframe(path: Path, file: Path, header: sitk.ImageFileReader, dtype: np.dtype[Any]) -> Source:
    """One file that holds all slices (enhanced DICOM); ITK unpacks it whole."""
    spacing, origin, direction = geometry_of(header, file)
    x, y, z = (int(n) for n in header.GetSize()[:3])
    channels = int(header.GetNumberOfComponents())

    @lru_cache(maxsize=1)
    def image() -> sitk.Image:
        return sitk.ReadImage(str(file))

    def read(box: Box) -> NDArray[Any]:
        values = sitk.GetArrayViewFromImage(image())
        return cut(values, "zyx" if values.ndim == 3 else "zyxc", box)

    return Source(
        path=path, kind="multi-frame DICOM", shape=(channels, z, y, x), dtype=dtype, read_box=read, files=(file,),
        # ITK reports 1 x 1 x 1 for frames whose spacing it did not find.
        spacing_zyx=None if spacing == (1.0, 1.0, 1.0) else spacing, unit="millimeter", origin_xyz=origin,
        direction=direction, load_bytes=channels * z * y * x * dtype.itemsize + file.stat().st_size,
    )  # fmt: skip
