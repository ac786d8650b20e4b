"""NRRD: .nrrd, or .nhdr with its data file."""

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
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
# Bytes that one byte of each encoding can stand for: bzip2 packs 45 MB of one value into 40 bytes.
_GAIN = {"raw": 1, "gzip": DEFLATE_GAIN, "gz": DEFLATE_GAIN, "bzip2": 1 << 21, "bz2": 1 << 21}
_SPATIAL = ("domain", "space")
# Spaces that ITK turns into its own world; it takes the axes of any other one as if they were LPS.
_ANATOMICAL = {
    "left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las",
}  # fmt: skip


def nrrd(path: Path) -> Source:
    """Open an NRRD file (or the .nhdr header of one); streamed when its encoding is raw.

    Raises
    ------
    VolumeError
        If its header is damaged or names files that are not there, leaves a direction open, or the voxels are fewer
        than it says.
    """
    with reading(path, "NRRD"):
        fields, length = _fields(path)
        sizes = [int(n) for n in fields.get("sizes", "").split()]
        if not sizes or min(sizes) < 1 or len(sizes) > 16:
            raise VolumeError(
                f"{path}: its sizes are {fields.get('sizes', 'missing')!r}; expected whole numbers above 0"
            )
        name, notes = fields.get("data file") or fields.get("datafile"), _space_notes(path, fields)
        data: tuple[Path, ...] = (path,)
        files: tuple[Path, ...] = (path,)
        if name and (name.upper().startswith("LIST") or "%" in name):
            data, files = (), (path, path.parent)
        elif name:
            file, renamed = named_file(path, name)
            if renamed:  # ITK opens it with the header
                raise VolumeError(
                    f"{path}: it names the file {name}; {file.name} beside it differs in letters: rename it"
                )
            data, files = (file,), (path, file)
        spatial = _spatial(fields, len(sizes))
        packed = fields.get("encoding", "").lower() in ("gzip", "gz")
        start = 0 if name else length
        layout = _layout(fields, sizes, spatial, data[0], 0 if packed else start) if data else None
        spaced = _spaced(path, fields, spatial)
    return itk_source(
        path, "NRRD",
        Header(layout, spaced=spaced, units=_units(fields, spatial),
               gain=_GAIN.get(fields.get("encoding", "").lower(), DEFLATE_GAIN), data=data, files=files, notes=notes,
               form="gzip" if packed else None, start=start),
    )  # fmt: skip


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """Read the header's fields, names in lower case, and the length of the header in bytes."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        if not file.readline(1 << 10).startswith(b"NRRD"):
            raise VolumeError(f"{path} does not begin with NRRD; it is another format or damaged")
        for line in iter(lambda: file.readline(1 << 16), b""):
            text = line.decode("utf-8", errors="replace").strip()
            if not text:
                break
            name, separator, value = text.partition(":")
            if separator and not value.startswith("=") and not text.startswith("#"):
                fields[name.strip().lower()] = value.strip()
        return fields, file.tell()


def _spatial(fields: dict[str, str], num_axes: int) -> list[bool]:
    """Return whether each axis (fastest first) is one of space."""
    kinds = fields.get("kinds", "").lower().split()
    directions = _directions(fields)
    if len(kinds) == num_axes:
        return [k in (*_SPATIAL, "time") for k in kinds]
    return [d != "none" for d in directions] if len(directions) == num_axes else [True] * num_axes


def _directions(fields: dict[str, str]) -> list[str]:
    return re.findall(r"\([^)]*\)|none", fields.get("space directions", "").lower())


def _spaced(path: Path, fields: dict[str, str], spatial: list[bool]) -> bool:
    """Return whether every axis of space has a spacing.

    Raises
    ------
    VolumeError
        If some have a direction and others none: a spacing given by hand would not say which way they go.
    """
    if "space directions" in fields:
        found = _directions(fields)
        ours = [d for d, is_space in zip(found, spatial, strict=False) if is_space]
        if len(found) != len(spatial) or any(d == "none" or "nan" in d for d in ours):
            raise VolumeError(
                f"{path}: its space directions are {fields['space directions'][:120]!r}, which leaves an axis of space "
                "without one; write one for each into the header"
            )
        return True
    said = fields.get("spacings", "").lower().split()
    ours = [s for s, is_space in zip(said, spatial, strict=False) if is_space]
    return len(said) == len(spatial) and all(s.lstrip("+-") not in ("nan", "none", "inf") for s in ours)


def _units(fields: dict[str, str], spatial: list[bool]) -> tuple[str, ...]:
    """Return the units of the axes of the world, without quotes; empty where none is named."""
    world = re.findall(r'"([^"]*)"', fields.get("space units", ""))
    if not world:
        axes = re.findall(r'"([^"]*)"', fields.get("units", ""))
        world = [u for u, is_space in zip(axes, spatial, strict=False) if is_space]
    named = tuple(u.strip() for u in world)
    return () if set(named) <= {"", "none", "???"} else named


def _space_notes(path: Path, fields: dict[str, str]) -> tuple[str, ...]:
    """Note a world whose axes nobody knows."""
    if "space directions" not in fields:
        return ()
    space = fields.get("space", "")
    if space.lower() in _ANATOMICAL:
        return ()
    said = f"space {space!r} is no anatomical one" if space else "its space is not named"
    return (f"{path.name}: {said}: its axes are taken as LPS (left, back, head), as ITK does",)


def _layout(
    fields: dict[str, str], sizes: list[int], spatial: list[bool], file: Path, length: int
) -> RawLayout | None:
    """Return where the voxels lie, or None when only ITK can unpack them."""
    code = next((c for c, names in _TYPES.items() if fields.get("type", "").lower() in names), None)
    skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    lines = int(fields.get("line skip", fields.get("lineskip", "0")))
    encoding = fields.get("encoding", "").lower()
    # Bytes are skipped in what is unpacked; from the end of it, only ITK knows how many.
    if code is None or lines or encoding not in (("raw",) if skip < 0 else ("raw", "gzip", "gz")):
        return None
    if len(sizes) in (2, 3) and all(spatial):
        axes = "zyx"[-len(sizes) :]
    elif len(sizes) == 4 and spatial == [False, True, True, True]:
        axes = "zyxc"
    else:
        return None
    order = {"big": ">", "little": "<"}.get(fields.get("endian", "").lower(), "=")
    layout = RawLayout(file, length, np.dtype(order + code), tuple(sizes[::-1]), axes)
    if skip < 0:  # -1: the voxels are the end of the file
        return replace(layout, offset=file.stat().st_size - layout.num_bytes)
    return replace(layout, offset=layout.offset + skip)
