"""Read the pixels of DICOM frames: straight from the file where they are plain, by a library where they are packed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, SecondaryCaptureImageStorage

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box
from comir_hpc.volumes.readers.codestreams import claimed_size
from comir_hpc.volumes.readers.dicom.header import UNREADABLE, Frame, quiet
from comir_hpc.volumes.readers.dicom.layout import DEFLATED, RUNS, Pixels
from comir_hpc.volumes.readers.itk_files import itk_dtype, itk_header
from comir_hpc.volumes.readers.source import reading

INVERTED = "MONOCHROME1"
_PALETTE = "PALETTE COLOR"
_IMAGE = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData",
    *(f"{c}PaletteColorLookupTable{k}" for c in ("Red", "Green", "Blue") for k in ("Descriptor", "Data")),
]  # fmt: skip
_PLAIN = {"MONOCHROME1", "MONOCHROME2", "RGB"}


def is_plain(pixels: Pixels) -> bool:
    """Say whether the pixels are an array of numbers in the file, so that any rows can be read alone."""
    swapped = pixels.order == ">" and pixels.allocated == 8  # pairs of bytes are exchanged in some of these
    usual = pixels.allocated in (8, 16, 32, 64) and pixels.high == pixels.stored - 1
    return not pixels.coder and usual and not swapped and pixels.photometric in _PLAIN


def values_of(frames: Sequence[Frame]) -> tuple[np.dtype[Any], int]:
    """Return the type of the values of all frames, each times its own slope, and the number of channels.

    Whole slopes give integers that hold every possible value, as in ITK. Others give float32, or float64 where more
    than 16 bits are stored.
    """
    pixels = frames[0].pixels
    if pixels.photometric == _PALETTE:
        if pixels.coder == DEFLATED:
            raise VolumeError(
                f"{pixels.file}: a palette in a deflated DICOM file is not supported; save it as RGB"
            )
        header = itk_header(pixels.file, "DICOM")
        return itk_dtype(header), int(header.GetNumberOfComponents())
    channels = pixels.shape[2]
    if pixels.kind == "f":
        return np.dtype(f"f{pixels.allocated // 8}"), channels
    scales = {(f.pixels.range, f.slope, f.intercept) for f in frames}
    whole = all(float(s).is_integer() and float(i).is_integer() for _, s, i in scales)
    ends = [v * s + i for stored, s, i in scales for v in stored]
    if not whole or max(map(abs, ends)) >= 2**53:
        largest = max(map(abs, ends))
        wide = max(f.pixels.stored for f in frames) > 16 or largest > float(np.finfo(np.float32).max)
        return np.dtype(np.float64 if wide else np.float32), channels
    if all((s, i) == (1, 0) for _, s, i in scales):
        return _integer(min(ends), max(ends), max(f.pixels.allocated for f in frames)), channels
    return _integer(min(ends), max(ends), 8), channels


def _integer(smallest: float, largest: float, bits: int) -> np.dtype[Any]:
    """Return the narrowest integers, of at least so many bits, that hold both bounds."""
    kind = "i" if smallest < 0 else "u"
    widths = [w for w in (1, 2, 4, 8) if 8 * w >= bits]
    return next(
        (t for t in (np.dtype(f"{kind}{w}") for w in widths)
         if np.iinfo(t).min <= smallest and largest <= np.iinfo(t).max),
        np.dtype(np.float64),
    )  # fmt: skip


@dataclass(frozen=True)
class FrameReader:
    """The slices of a volume, each a frame of some file.

    Parameters
    ----------
    frames : sequence of Frame
        Frames of the volume, ordered along z.
    dtype, channels
        Type of the values and number of channels, as `values_of` returns them.
    """

    frames: Sequence[Frame]
    dtype: np.dtype[Any]
    channels: int

    def read(self, box: Box) -> NDArray[Any]:
        """Read the voxels of `box` as (c, z, y, x)."""
        out = np.empty((self.channels, *box.shape), dtype=self.dtype)
        for z, frame in enumerate(self.frames[box.start[0] : box.stop[0]]):
            with reading(frame.pixels.file, "DICOM slice", *UNREADABLE), quiet():
                out[:, z] = self._slice(frame, box)
        return out

    def _slice(self, frame: Frame, box: Box) -> NDArray[Any]:
        """Read one frame as (c, y, x)."""
        if frame.pixels.photometric == _PALETTE:
            return _cut(_unpacked(frame.pixels)[frame.number], box)
        if is_plain(frame.pixels):
            stored = _stored(frame, box)
        elif frame.pixels.coder == RUNS:  # GDCM refuses some small ones
            stored = _cut(pixel_array(frame.pixels.file, index=frame.number), box)
        else:
            stored = _cut(_unpacked(frame.pixels)[frame.number], box)
        if frame.pixels.photometric == INVERTED and frame.pixels.kind != "f":
            stored = _turned(stored, frame.pixels)
        if (frame.slope, frame.intercept) == (1, 0):
            return stored
        return stored.astype(np.float64) * frame.slope + frame.intercept


def _cut(values: NDArray[Any], box: Box) -> NDArray[Any]:
    """Cut (y, x) or (y, x, c) to the box and return it as (c, y, x)."""
    piece = values[box.slices[1:]]
    return piece[None] if piece.ndim == 2 else np.moveaxis(piece, -1, 0)


def _stored(frame: Frame, box: Box) -> NDArray[Any]:
    """Read the stored values (c, y, x) of plain pixels: only the rows of the box are read."""
    pixels = frame.pixels
    rows, columns, samples = pixels.shape
    top, bottom = box.start[1], box.stop[1]
    start = pixels.offset + frame.number * pixels.frame_bytes
    dtype = np.dtype(f"{pixels.order}{pixels.kind}{pixels.allocated // 8}")
    planes, inner = (samples, 1) if pixels.by_plane else (1, samples)
    line = columns * inner
    parts = []
    with pixels.file.open("rb") as file:
        for plane in range(planes):
            file.seek(start + (plane * rows + top) * line * dtype.itemsize)
            part = np.fromfile(file, dtype, (bottom - top) * line)
            if part.size < (bottom - top) * line:
                raise EOFError("the file ends inside a slice")
            parts.append(part.reshape(bottom - top, columns, inner)[:, box.start[2] : box.stop[2]])
    values = np.moveaxis(np.concatenate(parts, axis=2), -1, 0)
    return values if pixels.kind == "f" else _meant(values.astype(dtype.newbyteorder("=")), pixels)


def _meant(values: NDArray[Any], pixels: Pixels) -> NDArray[Any]:
    """Return integers without the bits that do not count."""
    unused = pixels.allocated - pixels.stored
    return values << unused >> unused if unused else values  # keeps the sign of signed ones


def _turned(values: NDArray[Any], pixels: Pixels) -> NDArray[Any]:
    """Turn the stored values of MONOCHROME1 round, as ITK does."""
    smallest, largest = pixels.range
    return (smallest + largest - values.astype(np.int64)).astype(values.dtype)


def _unpacked(pixels: Pixels) -> NDArray[Any]:
    """Unpack every frame of a file as its library gives it, not turned round: (frame, y, x) or (frame, y, x, c)."""
    stat = pixels.file.stat()
    if pixels.frames > 1:
        return _kept(pixels, (stat.st_size, stat.st_mtime_ns))
    return _array(pixels)


@lru_cache(maxsize=1)
def _kept(pixels: Pixels, stamp: tuple[int, int]) -> NDArray[Any]:
    return _array(pixels)


def _array(pixels: Pixels) -> NDArray[Any]:
    if pixels.coder == DEFLATED:  # GDCM believes every length in it, and allocates it
        values: NDArray[Any] = pixel_array(pydicom.dcmread(pixels.file))
        return values if pixels.frames > 1 else values[None]
    bare = _bare(pixels)
    if pixels.coder:
        _require_same_size(pixels, bare)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.dcm"
        bare.save_as(copy, enforce_file_format=True)
        return _itk_array(copy)


def _require_same_size(pixels: Pixels, bare: Dataset) -> None:
    """Refuse a compressed frame that claims another size than the header: GDCM would allocate it."""
    for number, stream in enumerate(generate_frames(bare.PixelData, number_of_frames=pixels.frames)):
        size = claimed_size(stream)
        if size not in (None, pixels.shape[:2]):
            raise VolumeError(
                f"{pixels.file}: the compressed image of frame {number + 1} says {size[0]} x {size[1]} pixels, the "
                f"header {pixels.shape[0]} x {pixels.shape[1]} (rows, columns); it is damaged: copy or export it again"
            )


def _bare(pixels: Pixels) -> Dataset:
    """Return a data set with the image of a file and nothing else, for ITK.

    ITK gives every frame the slope of the first, turns some MONOCHROME1 images round, and GDCM allocates whatever
    length an element claims.
    """
    whole, bare = pydicom.dcmread(pixels.file, force=True), Dataset()
    for keyword in filter(whole.__contains__, _IMAGE):
        bare[keyword] = whole[keyword]
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = whole.file_meta.TransferSyntaxUID
    bare.file_meta.MediaStorageSOPClassUID = bare.SOPClassUID = SecondaryCaptureImageStorage
    bare.file_meta.MediaStorageSOPInstanceUID = bare.SOPInstanceUID = UID("1.2")
    if pixels.photometric == INVERTED:
        bare.PhotometricInterpretation = "MONOCHROME2"
    return bare


def _itk_array(file: Path) -> NDArray[Any]:
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what ITK objects to is said in our error or note
    try:
        image = sitk.ReadImage(str(file))
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
    values: NDArray[Any] = sitk.GetArrayFromImage(image)
    return values if image.GetDimension() > 2 else values[None]
