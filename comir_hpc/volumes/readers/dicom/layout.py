"""How a DICOM file stores its pixels: where they begin, how many there are, and whether the file can hold them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import AllTransferSyntaxes, DeflatedExplicitVRLittleEndian, RLELossless

from comir_hpc.errors import VolumeError
from comir_hpc.host.memory import in_words

_PIXEL_DATA, _FLOAT, _DOUBLE = 0x7FE00010, 0x7FE00008, 0x7FE00009
_UNDEFINED = 0xFFFFFFFF
_PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR", "PALETTE COLOR")
RUNS, DEFLATED, CODEC = "run lengths", "deflated", "a codec such as JPEG"
# How many times smaller a coder can make an image. The formats of RLE and deflate set theirs; of JPEG 2000, a black
# image of 4096 pixels a side is two hundred thousand times smaller.
_HIGHEST_COMPRESSION = {RUNS: 64, DEFLATED: 1032, CODEC: 1_000_000}


@dataclass(frozen=True)
class Pixels:
    """How a file stores its frames.

    Attributes
    ----------
    shape : three int
        Rows, columns and samples a pixel, the same for every frame.
    frames : int
        Number of frames in the file.
    allocated, stored, high : int
        Bits of a sample's container, bits that count, and the highest of these.
    kind : str
        ``u`` (unsigned), ``i`` (signed) or ``f`` (floats).
    offset : int
        Byte of the file at which the pixels begin, counted from 0.
    order : str
        Byte order: ``<`` (little endian) or ``>`` (big endian).
    coder : str
        Compression of the pixels: `RUNS`, `DEFLATED`, `CODEC`, or empty where they are not compressed.
    excess : int
        Bytes of plain pixels beyond those of all frames, which are not read.
    guessed : str
        How the elements are written, where the file does not say it and their look decides; otherwise empty.
    """

    file: Path
    shape: tuple[int, int, int]
    frames: int
    allocated: int
    stored: int
    high: int
    kind: str
    photometric: str
    by_plane: bool
    offset: int
    order: str
    coder: str
    excess: int = 0
    guessed: str = ""

    @property
    def frame_bytes(self) -> int:
        """Length in bytes of one unpacked frame."""
        rows, columns, samples = self.shape
        return (rows * columns * samples * self.allocated + 7) // 8

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest value that the stored integers can have."""
        if self.kind == "i":
            return -(1 << self.stored - 1), (1 << self.stored - 1) - 1
        return 0, (1 << self.stored) - 1


def stored_pixels(path: Path, header: Dataset, file: Any) -> Pixels | None:
    """Read how the pixels are stored, and check it against the file's length before anything is allocated.

    Parameters
    ----------
    path : Path
        The file that was opened, for errors.
    header : Dataset
        All elements of the file before the pixels.
    file : binary file
        The open file, which stands at the first byte behind the header.

    Returns
    -------
    Pixels or None
        The layout of the pixels, or None where the file has no pixels.

    Raises
    ------
    VolumeError
        If the file is shorter than its header says.
    ValueError
        If the header's numbers are impossible.
    """
    syntax = header.file_meta.get("TransferSyntaxUID", None)
    implicit, little = header.original_encoding
    order = "<" if little else ">"
    element = _element(header, file, syntax, order)
    if element is None:
        return None
    tag, length, start = element
    coder = _coder(path, syntax, length)
    bits, stored, high, kind = _bits(header, tag)
    photometric = str(header.get("PhotometricInterpretation", None) or "MONOCHROME2").strip()
    if photometric.split("_")[0] not in _PHOTOMETRIC:
        raise ValueError(
            f"its pixels are {photometric[:20]!r}, expected MONOCHROME1 or 2, RGB, YBR or a palette"
        )
    samples = header.get("SamplesPerPixel", None)
    if samples is None and photometric[:4] not in ("MONO", "PALE"):
        raise ValueError(f"no SamplesPerPixel in it, and its pixels are {photometric[:20]!r}")
    pixels = Pixels(
        path, (int(header.Rows), int(header.Columns), 1 if samples is None else int(samples)),
        int(header.get("NumberOfFrames", 1) or 1), bits, stored, high, kind,
        photometric, bool(header.get("PlanarConfiguration", 0)), start, order, coder,
        guessed="" if syntax else f"{'im' if implicit else 'ex'}plicit {'little' if little else 'big'} endian",
    )  # fmt: skip
    _check_length(pixels, length)
    # One byte makes an odd length even.
    excess = 0 if coder else length - pixels.frame_bytes * pixels.frames
    return replace(pixels, excess=excess) if excess > 1 else pixels


def _element(header: Dataset, file: Any, syntax: Any, order: str) -> tuple[int, int, int] | None:
    """Read the head of the pixels' element: its tag, length and first byte; None where the file ends before it."""
    if syntax == DeflatedExplicitVRLittleEndian:
        # The header is packed together with the pixels: the element has no place in the file.
        return _PIXEL_DATA, _UNDEFINED, 0
    element = file.read(8)
    if len(element) < 8:
        return None
    tag = (struct.unpack(f"{order}H", element[:2])[0] << 16) + struct.unpack(f"{order}H", element[2:4])[0]
    implicit, _ = header.original_encoding
    # These types have two bytes of nothing, and then a length of four bytes.
    long = not implicit and element[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN")
    length = struct.unpack(f"{order}I", file.read(4) if long else element[4:])[0]
    return tag, length, file.tell()


def _coder(path: Path, syntax: Any, length: int) -> str:
    """Return how the pixels are compressed, and refuse a transfer syntax that DICOM does not know."""
    # Only compressed pixels come in pieces, and then the whole has no length.
    coder = CODEC if length == _UNDEFINED else ""
    coder = {DeflatedExplicitVRLittleEndian: DEFLATED, RLELossless: RUNS}.get(syntax, coder)
    known = not syntax or syntax in AllTransferSyntaxes
    if not known or (coder == CODEC and not (syntax and syntax.is_compressed)):
        raise VolumeError(
            f"{path}: its transfer syntax {str(syntax)[:64]!r} is not known, so neither is the order of its bytes; "
            "convert it to explicit little endian (gdcmconv --raw, dcmconv +te)"
        )
    return coder


def _bits(header: Dataset, tag: int) -> tuple[int, int, int, str]:
    """Return bits allocated, bits stored, number of the highest bit, and kind of the values."""
    if tag == _PIXEL_DATA and header.get("BitsAllocated", None) is None:
        raise ValueError("no BitsAllocated in it")
    bits = {_FLOAT: 32, _DOUBLE: 64}.get(tag) or int(header.BitsAllocated)
    stored = bits if tag != _PIXEL_DATA else _or(header.get("BitsStored", None), bits)
    signed = int(header.get("PixelRepresentation", 0) or 0)
    if signed not in (0, 1):
        raise ValueError(f"PixelRepresentation is {signed}, expected 0 (unsigned) or 1 (signed)")
    kind = "f" if tag != _PIXEL_DATA else "ui"[signed]
    if not 1 <= stored <= bits <= 64:
        raise ValueError(f"{stored} bits stored of {bits}")
    high = _or(header.get("HighBit", None), stored - 1)
    if not stored - 1 <= high < bits:
        raise ValueError(f"the highest of {stored} bits stored is number {high} of {bits}")
    return bits, stored, high, kind


def _or(value: Any, default: int) -> int:
    """Return the element as a number, or the default where it is missing or empty."""
    return default if value is None or value == "" else int(value)


def _check_length(pixels: Pixels, length: int) -> None:
    there = pixels.file.stat().st_size - pixels.offset
    rows, columns, samples = pixels.shape
    claimed = pixels.frame_bytes * pixels.frames
    if min(rows, columns, samples, pixels.frames) < 1:
        raise ValueError(f"{pixels.frames} frames of {rows} x {columns} pixels with {samples} samples")
    most = there * _HIGHEST_COMPRESSION[pixels.coder] if pixels.coder else min(there, length)
    # Every frame of a codec begins with eight bytes of its own.
    if claimed > most or (pixels.coder == CODEC and pixels.frames * 8 > there):
        raise VolumeError(
            f"{pixels.file} is truncated or its header is wrong: {pixels.frames} frames of {rows} x {columns} pixels "
            f"are {in_words(claimed)}, and there are {in_words(max(there, 0))} for them; copy or export it again"
        )
