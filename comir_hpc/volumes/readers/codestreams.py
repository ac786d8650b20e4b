"""Size that a compressed image claims for itself, read before a decoder allocates it.

A DICOM file says rows and columns, and the JPEG stream inside says them again. Decoders believe the stream.
"""

from __future__ import annotations

import struct

_NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
# Frames of JPEG (ISO 10918-1) and JPEG-LS (0xF7); 0xC4, 0xC8 and 0xCC are tables.
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_JPEG_2000 = b"\xff\x4f\xff\x51"


def claimed_size(stream: bytes) -> tuple[int, int] | None:
    """Read the rows and columns that a stream of JPEG, JPEG-LS or JPEG 2000 claims; None where it claims none."""
    start = stream.find(_JPEG_2000, 0, 4096)  # behind the boxes of a JP2 file, if there are some
    if start >= 0 and len(stream) >= start + 24:
        right, bottom, left, top = struct.unpack(">4I", stream[start + 8 : start + 24])
        return bottom - top, right - left
    return _jpeg_size(stream) if stream.startswith(b"\xff\xd8") else None


def _jpeg_size(stream: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker in _FRAMES:
            rows, columns = struct.unpack(">2H", stream[at + 5 : at + 9])
            return rows, columns
        if marker == 0xFF:  # a byte that fills
            at += 1
        elif marker in _NO_LENGTH:
            at += 2
        else:
            at += 2 + struct.unpack(">H", stream[at + 2 : at + 4])[0]
    return None
