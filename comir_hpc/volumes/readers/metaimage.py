"""MetaImage: .mha, or .mhd with its data file. Our own reading of the header follows ITK's MetaIO."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers.itk_files import Header, itk_source
from comir_hpc.volumes.readers.packed import DEFLATE_GAIN
from comir_hpc.volumes.readers.paths import named_file
from comir_hpc.volumes.readers.raw import RawLayout
from comir_hpc.volumes.readers.source import Source, reading

_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_LOCAL = ("LOCAL", "Local", "local")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_NO_UNIT = ("", "?", "UNKNOWN")


def metaimage(path: Path) -> Source:
    """Open a MetaImage; streamed unless it is compressed, text, or spread over several files.

    Raises
    ------
    VolumeError
        If its header is damaged or names files that are not there, or the voxels are fewer than it says.
    """
    with reading(path, "MetaImage"):
        fields, length = _fields(path)
        _require_sizes(path, fields)
        _require_numbers(path, fields)
        name, notes = fields["ElementDataFile"], _value_notes(path, fields)
        renamed: tuple[str, ...] = ()
        data: tuple[Path, ...] = (path,)
        files: tuple[Path, ...] = (path,)
        if name.startswith("LIST") or "%" in name:
            data, files = (), (path, path.parent)
        elif name not in _LOCAL:
            file, renamed = named_file(path, name)
            data, files = (file,), (path, file)
        layout, start = _layout(fields, length, data[0], local=name in _LOCAL) if data else (None, 0)
    unit, packed = fields.get("DistanceUnits", ""), _yes(fields, "CompressedData")
    if packed and layout is None:  # ITK gives what was in memory where such a stream is torn
        raise VolumeError(
            f"{path}: compressed voxels of type {fields.get('ElementType')} in {name} are not read; write it without "
            "compression, in one file"
        )
    return itk_source(
        path, "MetaImage",
        Header(layout, spaced="ElementSpacing" in fields or "ElementSize" in fields,
               units=() if unit in _NO_UNIT else (unit,), gain=DEFLATE_GAIN if packed else 1, data=data, files=files,
               notes=notes, renamed=renamed, form="zlib" if packed else None, start=start),
    )  # fmt: skip


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """Read the header's fields, and its length in bytes. Names count in their capitals, as in MetaIO."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        # ElementDataFile is the last line of every header; a header is far below 1 MiB.
        for line in iter(lambda: file.readline(1 << 16), b""):
            name, *value = re.split("[=:]", line.decode("utf-8", errors="replace"), maxsplit=1)
            if not value or file.tell() > 1 << 20:
                break
            fields[name.strip()] = value[0].strip()
            if name.strip() == "ElementDataFile":
                return fields, file.tell()
    raise VolumeError(f"{path} has no ElementDataFile line; it is no MetaImage or its header is damaged")


def _require_sizes(path: Path, fields: dict[str, str]) -> None:
    """Refuse numbers of axes and sizes that MetaIO would take on trust."""
    axes, sizes = fields.get("NDims", ""), fields.get("DimSize", "").split()
    whole = axes.isdigit() and all(re.fullmatch(r"\d+", s) for s in sizes)
    if not whole or not 1 <= int(axes) <= 10 or len(sizes) != int(axes) or min(map(int, sizes)) < 1:
        raise VolumeError(
            f"{path}: NDims {axes!r} and DimSize {' '.join(sizes[:12])!r} do not fit; expected three axes and a size "
            "above 0 for each; the header is damaged: export it again"
        )


def _require_numbers(path: Path, fields: dict[str, str]) -> None:
    """Refuse places and directions that are no numbers, or too few: MetaIO takes what it finds, and 0 for the rest."""
    axes = int(fields["NDims"])
    counts = dict.fromkeys(
        ("Offset", "Position", "Origin", "ElementSpacing", "ElementSize", "ElementOrigin"), axes
    )
    counts |= dict.fromkeys(("TransformMatrix", "Rotation", "Orientation", "ElementDirection"), axes * axes)
    for name, count in counts.items():
        words = fields.get(name, "0 " * count).split()
        if len(words) < count or not all(_NUMBER.fullmatch(word) for word in words[:count]):
            raise VolumeError(
                f"{path}: {name} is {fields[name][:80]!r}, expected {count} numbers; the header is damaged: "
                "export it again"
            )


def _yes(fields: dict[str, str], name: str, default: str = "False") -> bool:
    return fields.get(name, default)[:1] in ("T", "t", "1")


def _value_notes(path: Path, fields: dict[str, str]) -> tuple[str, ...]:
    """Note a scaling of the values that ITK reads past."""
    slope = fields.get("ElementToIntensityFunctionSlope", "1")
    offset = fields.get("ElementToIntensityFunctionOffset", "0")
    if float(slope) == 1 and float(offset) == 0:
        return ()
    return (
        f"{path.name}: ElementToIntensityFunctionSlope {slope} and Offset {offset} are not applied, as in ITK",
    )


def _layout(fields: dict[str, str], length: int, file: Path, *, local: bool) -> tuple[RawLayout | None, int]:
    """Return where the voxels lie (None when only ITK can unpack them), and where the packed stream begins."""
    code, skip = _TYPES.get(fields.get("ElementType", "")), int(fields.get("HeaderSize", "0"))
    shape = tuple(int(n) for n in fields["DimSize"].split())[::-1]
    packed = _yes(fields, "CompressedData")
    if code is None or not _yes(fields, "BinaryData", "True") or len(shape) not in (2, 3):
        return None, 0
    if packed and skip < 0:
        return None, 0
    channels = int(fields.get("ElementNumberOfChannels", "1"))
    order = "BinaryDataByteOrderMSB" if "BinaryDataByteOrderMSB" in fields else "ElementByteOrderMSB"
    axes, kind = "zyx"[-len(shape) :], np.dtype((">" if _yes(fields, order) else "<") + code)
    offset = skip if skip > 0 else length if local else 0
    layout = RawLayout(file, 0 if packed else offset, kind, (*shape, channels) if channels > 1 else shape,
                       axes + "c" if channels > 1 else axes)  # fmt: skip
    if skip == -1:  # the voxels are the end of the file
        return replace(layout, offset=file.stat().st_size - layout.num_bytes), 0
    return layout, offset
