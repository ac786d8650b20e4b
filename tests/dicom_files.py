"""DICOM files made for tests: classic slices and enhanced multi-frame images, with pydicom alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CLASSES = {"MR": MRImageStorage, "CT": CTImageStorage, "PT": PositronEmissionTomographyImageStorage}
Change = Callable[[Dataset, int], Any]


def phantom(shape: tuple[int, ...] = (8, 6, 5), dtype: str = "uint16") -> np.ndarray:
    """Values that say where they are."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def _image(array: np.ndarray, sop_class: str, uid: str, syntax: str) -> Dataset:
    """Everything but the geometry; `array` is (y, x), (y, x, 3) or (frame, y, x)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = sop_class
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.Modality = uid, "1.2", "MR"
    colour = array.ndim == 3 and array.shape[-1] == 3
    ds.Rows, ds.Columns = array.shape[:2] if colour or array.ndim == 2 else array.shape[1:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    bits = 8 * array.dtype.itemsize
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    ds.PixelRepresentation = int(array.dtype.kind == "i")
    ds.PixelData = array.tobytes()
    ds["PixelData"].VR = "OB" if bits == 8 else "OW"
    return ds


def save(ds: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def slices(
    folder: Path,
    array: np.ndarray,
    *,
    uid: str = "1.2.3",
    change: Change = lambda ds, k: None,
    step: Sequence[float] = (0.0, 0.0, 3.0),
    orientation: Sequence[float] = AXIAL,
    syntax: str = ExplicitVRLittleEndian,
    name: str = "{:03}.dcm",
    modality: str = "MR",
) -> Path:
    """A classic series, a file a slice; `change` has the last word on each data set."""
    for k, plane in enumerate(array):
        ds = _image(plane, CLASSES[modality], uid, syntax)
        ds.Modality, ds.InstanceNumber, ds.SliceThickness = modality, k + 1, 3
        ds.ImagePositionPatient = [float(v) for v in np.array((5.0, 6.0, 7.0)) + k * np.array(step)]
        ds.ImageOrientationPatient = list(orientation)
        ds.PixelSpacing = [1.5, 1.0]
        if change(ds, k) is not False:
            save(ds, folder / name.format(k))
    return folder


def enhanced(
    path: Path,
    array: np.ndarray,
    *,
    heights: Sequence[float] | None = None,
    change: Change = lambda group, k: None,
    whole: Callable[[Dataset], Any] = lambda ds: None,
    spacing: tuple[float, float] = (1.5, 1.0),
) -> Path:
    """An enhanced MR image, all frames in one file; `change` has the last word on each frame's groups."""
    ds = _image(array, EnhancedMRImageStorage, "1.2.9", ExplicitVRLittleEndian)
    ds.NumberOfFrames = len(array)
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = list(AXIAL)
    measures.PixelSpacing, measures.SliceThickness = list(spacing), 3
    shared = Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    ds.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for k, z in enumerate(7.0 + 3.0 * np.arange(len(array)) if heights is None else heights):
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = [5.0, 6.0, float(z)]
        group.PlanePositionSequence = [position]
        group.FrameContentSequence = [Dataset()]
        change(group, k)
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = groups
    whole(ds)
    return save(ds, path)


def rescaled(group: Dataset, slope: float, intercept: float) -> None:
    """Give a functional group a slope and an intercept."""
    values = Dataset()
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, intercept, "US"
    group.PixelValueTransformationSequence = [values]
