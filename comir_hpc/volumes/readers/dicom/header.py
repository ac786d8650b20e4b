"""Read the headers of DICOM files: what each frame shows, where it lies, and how its pixels are stored."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers.dicom.layout import Pixels, stored_pixels
from comir_hpc.volumes.readers.source import reading

# What makes two images of one place different, the most telling first; the words are for the error.
FACETS = {
    "TemporalPositionIdentifier": "time points", "TemporalPositionIndex": "time points",
    "DiffusionBValue": "b-values", "DiffusionGradientOrientation": "gradient directions",
    "EchoNumbers": "echoes", "EchoTime": "echoes", "EffectiveEchoTime": "echoes",
    "ReferencedSegmentNumber": "segments", "InversionTime": "inversion times", "FlipAngle": "flip angles",
    "ComplexImageComponent": "image components", "ImageType": "image types", "FrameType": "image types",
    "TriggerTime": "heart phases", "NominalCardiacTriggerDelayTime": "heart phases",
    "FrameReferenceTime": "time points", "FrameReferenceDateTime": "time points",
    "AcquisitionNumber": "acquisitions", "AcquisitionTime": "time points",
    "FrameAcquisitionDateTime": "time points", "ContentTime": "time points",
}  # fmt: skip
# What pydicom raises on a damaged file, besides the builtin errors that every reader expects.
UNREADABLE = (InvalidDicomError, BytesLengthException, AttributeError, ArithmeticError)
_FRAMES, _SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
_TAGS = [
    *FACETS, _FRAMES, _SHARED, "SOPClassUID", "SeriesInstanceUID", "Modality", "SeriesDescription", "InstanceNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "SliceLocation", "TotalPixelMatrixColumns", "GridFrameOffsetVector", "DoseGridScaling",
    "FrameTime", "FrameTimeVector", "DetectorInformationSequence", "RescaleSlope", "RescaleIntercept", "NumberOfFrames",
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PhotometricInterpretation", "PlanarConfiguration", "SpecificCharacterSet",
]  # fmt: skip
_WANTED = [k for k in (*_TAGS, "ImagePositionVolume", "ImageOrientationVolume") if not k.endswith("Sequence")]


@dataclass(frozen=True)
class Frame:
    """One image of a DICOM file: a slice.

    Attributes
    ----------
    number : int
        Place of the frame in its file, counted from 0.
    position, orientation : optional
        ImagePositionPatient (x, y, z) in mm, and ImageOrientationPatient (row, column).
    spacing : two float, optional
        Distance between rows and between columns, in mm.
    thickness, between : float, optional
        SliceThickness and SpacingBetweenSlices in mm.
    says : str
        Words for what is wrong with the spacing that the file names.
    """

    pixels: Pixels
    number: int
    series: str
    title: str
    instance: int | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, float] | None
    thickness: float | None
    between: float | None
    location: float | None
    slope: float
    intercept: float
    facets: dict[str, str]
    in_time: str
    notes: tuple[str, ...]
    says: str

    @property
    def name(self) -> str:
        """The file's name, with the number of the frame where there are several."""
        several = f" frame {self.number + 1}" if self.pixels.frames > 1 else ""
        return self.pixels.file.name + several


def read_frames(path: Path) -> tuple[Frame, ...]:
    """Read the header of a DICOM file; give its frames in the order of the file.

    A DICOM file without an image (a report, a list of files) has none.

    Raises
    ------
    VolumeError
        If it is no DICOM file, is damaged, or is shorter than its header says.
    """
    if path.stat().st_size == 0:
        raise VolumeError(f"{path} is empty (0 bytes); copy or export it again")
    # `force`: files without the mark "DICM" at byte 128 are common. Only the elements that count are read, since
    # private ones may be of any length.
    with reading(path, "DICOM", *UNREADABLE), quiet(), path.open("rb") as file:
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=_TAGS)
        if "Rows" not in header or "Columns" not in header:
            # A report, or the list of files on a disc (DICOMDIR), is whole and has no image.
            if "SOPClassUID" in header or "MediaStorageSOPClassUID" in header.file_meta:
                return ()
            raise ValueError("it has neither the mark of DICOM nor an image's size")
        pixels = stored_pixels(path, header, file)
        return _frames(header, pixels) if pixels else ()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom's warnings off the terminal: what it objects to and what matters is said in our error."""
    before, pydicom.config.logger.disabled = pydicom.config.logger.disabled, True
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        pydicom.config.logger.disabled = before


# ---------------------------------------------------------------------- one frame


def _frames(header: Dataset, pixels: Pixels) -> tuple[Frame, ...]:
    if "MOSAIC" in str(header.get("ImageType", "")):
        raise VolumeError(
            f"{pixels.file} is a mosaic: its slices lie beside each other in one image (Siemens); convert it to NIfTI "
            "with dcm2niix first"
        )
    if "TotalPixelMatrixColumns" in header and pixels.frames > 1:
        raise VolumeError(
            f"{pixels.file} is a slide whose {pixels.frames} frames are tiles of one plane; export the plane as TIFF"
        )
    several = header.get(_FRAMES) or ()
    if several and len(several) != pixels.frames:
        raise ValueError(f"{pixels.frames} frames, and {len(several)} are described")
    detector, shared = header.get("DetectorInformationSequence") or (), header.get(_SHARED) or ()
    # The later counts: what an enhanced file says of all frames, over what its plain header says.
    of_all = _values([*detector, header, *chain.from_iterable(map(_parts, shared))])
    if not several:
        return tuple(_frame(of_all, pixels, k, alone=pixels.frames == 1) for k in range(pixels.frames))
    return tuple(_frame(of_all | _values(_parts(g)), pixels, k, alone=True) for k, g in enumerate(several))


def _frame(said: dict[str, Any], pixels: Pixels, number: int, *, alone: bool) -> Frame:
    """Make a frame from what the header says about it.

    `alone` means that it is said about this frame, and not about the first of all frames.
    """
    orientation = _numbers(said.get("ImageOrientationPatient", said.get("ImageOrientationVolume")), 6)
    position = _numbers(said.get("ImagePositionPatient", said.get("ImagePositionVolume")), 3)
    if not alone:
        position = _along(said, position, orientation, number)
    spacing, says, spacing_notes = _pixel_spacing(said)
    slope, intercept, slope_notes = _rescale(said, pixels)
    instance = _one(said.get("InstanceNumber"))
    words = [str(said.get(k, "")).strip() for k in ("Modality", "SeriesDescription")]
    in_time = next((k for k in ("FrameTime", "FrameTimeVector") if k in said), "")
    return Frame(
        pixels=pixels,
        number=number,
        series=str(said.get("SeriesInstanceUID", "")),
        title=", ".join(filter(None, words)),
        instance=None if instance is None else int(instance),
        position=position,
        orientation=orientation,
        spacing=spacing,
        thickness=_length(said.get("SliceThickness")),
        between=_length(said.get("SpacingBetweenSlices")),
        location=_one(said.get("SliceLocation")),
        slope=slope,
        intercept=intercept,
        facets={k: str(said[k]) for k in FACETS if k in said},
        in_time="" if alone else in_time,
        notes=(*spacing_notes, *slope_notes, *_pixel_notes(said, pixels)),
        says=says,
    )


def _pixel_notes(said: dict[str, Any], pixels: Pixels) -> Iterator[str]:
    """Note what is assumed of the pixels where the header leaves it open, or says less than there is."""
    if "PhotometricInterpretation" not in said:
        yield "the header has no PhotometricInterpretation: it is taken as MONOCHROME2 (large values are bright)"
    if "BitsStored" not in said and pixels.kind != "f":
        yield f"the header has no BitsStored: all {pixels.allocated} bits of a pixel are taken"
    if "PixelRepresentation" not in said and pixels.kind != "f":
        yield "the header has no PixelRepresentation: its values are taken as unsigned"
    if pixels.guessed:
        yield f"it names no transfer syntax: its elements look like {pixels.guessed}, and are read so"
    if pixels.excess:
        rows, columns, _ = pixels.shape
        yield (
            f"{pixels.excess} bytes follow the pixels of its {pixels.frames} frames of {rows} x {columns} and are not "
            "read: are Rows, Columns and NumberOfFrames right?"
        )


def _values(parts: Iterable[Dataset]) -> dict[str, Any]:
    """Merge several data sets by keyword; a later one replaces what an earlier one says."""
    found: dict[str, Any] = {}
    for part in parts:
        for keyword in filter(part.__contains__, _WANTED):
            try:
                value = part[keyword].value
            except (ValueError, TypeError):
                value = "unreadable"  # an error only where the value is needed
            if value is not None and value != "" and not (isinstance(value, Sequence) and not len(value)):
                found[keyword] = value
    return found


def _parts(group: Dataset) -> Iterator[Dataset]:
    """Yield the macros of a functional group, and those one level below."""
    for element in group:
        if element.VR == "SQ":
            for item in element.value:
                yield item
                yield from chain.from_iterable(inner.value for inner in item if inner.VR == "SQ")


def _along(
    said: dict[str, Any], start: Sequence[float] | None, orientation: Sequence[float] | None, number: int
) -> tuple[float, ...] | None:
    """Return the position of a frame where a file names only the first one's: dose grids, nuclear medicine."""
    if start is None or orientation is None:
        return None
    normal = np.cross(orientation[:3], orientation[3:])
    offsets = said.get("GridFrameOffsetVector")
    if offsets is not None:
        values = [float(v) for v in offsets]
        if values[0] != 0:  # DICOM C.8.8.3.2: these are positions along z, not distances
            return (start[0], start[1], values[number])
        return tuple(float(v) for v in np.asarray(start) + values[number] * normal)
    step = _one(said.get("SpacingBetweenSlices"))
    return tuple(float(v) for v in np.asarray(start) + number * step * normal) if step else None


def _pixel_spacing(said: dict[str, Any]) -> tuple[tuple[float, float] | None, str, tuple[str, ...]]:
    """Read the spacing between rows and between columns in mm; where it is wrong, say what the file has."""
    keyword = next((k for k in ("PixelSpacing", "ImagerPixelSpacing") if k in said), None)
    if keyword is None:
        return None, "it has no PixelSpacing", ()
    try:
        values = _numbers(said[keyword], 2)
    except ValueError:
        values = None
    if values is None or min(values) <= 0:
        return None, f"its {keyword} is {said[keyword]}", ()
    detector = "the spacing is that of the detector (ImagerPixelSpacing), as ITK takes it"
    return (values[0], values[1]), "", () if keyword == "PixelSpacing" else (detector,)


def _rescale(said: dict[str, Any], pixels: Pixels) -> tuple[float, float, tuple[str, ...]]:
    """Return the slope and intercept of the stored values."""
    # Doses are scaled by an element of their own, and may carry a rescale slope without meaning.
    dose = _one(said.get("DoseGridScaling"))
    if dose is not None:
        return dose, 0.0, ()
    slope, intercept = _one(said.get("RescaleSlope")), _one(said.get("RescaleIntercept")) or 0.0
    if pixels.kind == "f":
        return 1.0, 0.0, ()
    if slope is None:
        return 1.0, intercept, ()
    if slope == 0:
        return 1.0, intercept, ("RescaleSlope is 0 and is taken as 1, as ITK does",)
    return slope, intercept, ()


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """Read so many finite numbers, or None where the element is missing or empty."""
    if value is None or value == "" or (isinstance(value, Sequence) and not len(value)):
        return None
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    values = tuple(float(v) for v in listed)
    # A decimal string may say NaN or 1e999.
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"{value} instead of {count} numbers")
    return values


def _one(value: Any) -> float | None:
    values = _numbers(value, 1)
    return None if values is None else values[0]


def _length(value: Any) -> float | None:
    length = _one(value)
    return length if length is not None and length > 0 else None
