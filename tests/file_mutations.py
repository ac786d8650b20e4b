"""Files of every format that are nearly right: a small valid one, then a few seeded changes.

Each maker writes into an empty folder and gives the path to open and a line that says what was done. Changed are
fields and tags (odd values, other types), text (JSON, XML, attributes, lines), bytes, and lengths.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pydicom
import tifffile
import zarr
from dicom_files import enhanced, phantom, slices
from header_mutations import metaimage_bytes, nifti_bytes, nrrd_bytes
from mutations import broken, changed_json, reworded

Made = tuple[Path, str]
SHAPE = (4, 5, 6)
# ---------------------------------------------------------------------- headers of text and of fields


def _one_file(name: str, maker: Callable[[random.Random], tuple[bytes, str]]) -> Callable[..., Made]:
    def make(folder: Path, rng: random.Random) -> Made:
        content, what = maker(rng)
        if rng.random() < 0.3:
            content, more = broken(content, rng, 348)
            what = f"{what}; {more}"
        path = folder / name
        if name.endswith(".nii") and rng.random() < 0.3:
            path, content = folder / f"{name}.gz", gzip.compress(content, 1, mtime=0)
            if rng.random() < 0.3:
                content, more = broken(content, rng, len(content))
                what = f"{what}; packed, {more}"
        path.write_bytes(content)
        return path, what

    return make


# ---------------------------------------------------------------------- TIFF


@functools.cache
def _tiff(kind: str, form: str, order: str, pack: str) -> bytes:
    shape = (2, *SHAPE) if form == "channels" else SHAPE
    array = np.arange(np.prod(shape), dtype="u1" if pack == "byte" else "u2").reshape(shape)
    stream = io.BytesIO()
    how: dict[str, Any] = {"byteorder": order, "compression": "zlib" if pack == "zlib" else None}
    if form == "tiles":
        how["tile"] = (16, 16)
    if kind == "ome":
        axes = "CZYX" if form == "channels" else "ZYX"
        sizes = {f"PhysicalSize{a}": s for a, s in zip("ZYX", (2.0, 0.5, 0.25), strict=True)}
        how |= {"ome": True, "metadata": {"axes": axes, **sizes, "PhysicalSizeZUnit": "µm"}}
    elif kind == "imagej":
        axes = "CZYX" if form == "channels" else "ZYX"
        how |= {"imagej": True, "resolution": (4.0, 2.0)}
        how |= {"metadata": {"axes": axes, "spacing": 2.0, "unit": "um"}}
        array = array.swapaxes(0, 1) if form == "channels" else array
        how["metadata"]["axes"] = "ZCYX" if form == "channels" else axes
        how.pop("tile", None)
        if order == ">" or pack != "zlib":
            how["compression"] = None
    else:
        array = array.reshape(-1, *SHAPE[1:])
        how |= {"metadata": None, "photometric": "minisblack"}
    tifffile.imwrite(stream, array, **how)
    return stream.getvalue()


def _tiff_maker(*kinds: str) -> Callable[[Path, random.Random], Made]:
    def make(folder: Path, rng: random.Random) -> Made:
        kind, form = rng.choice(kinds), rng.choice(["plain", "plain", "channels", "tiles"])
        order, pack = rng.choice("<>"), rng.choice(["none", "zlib", "byte"])
        content = _tiff(kind, form, "<" if kind == "ome" else order, pack)
        what = f"{kind} {form} {order} {pack}: "
        chance = rng.random()
        if chance < 0.45 and kind != "plain":
            content, more = _other_description(content, rng)
        elif chance < 0.8:
            content, more = _other_tag(content, rng)
        else:
            content, more = broken(content, rng)
        path = folder / ("m.ome.tif" if kind == "ome" else "m.tif")
        path.write_bytes(content)
        return path, what + more

    return make


def _entries(content: bytes) -> list[tuple[int, str]]:
    """Offsets of the tags of the first pages, and the byte order."""
    order = "<" if content[:2] == b"II" else ">"
    (at,) = struct.unpack(f"{order}I", content[4:8])
    found = []
    for _ in range(3):
        if not 0 < at < len(content) - 2:
            break
        (count,) = struct.unpack(f"{order}H", content[at : at + 2])
        found += [(at + 2 + 12 * k, order) for k in range(count)]
        end = at + 2 + 12 * count
        (at,) = struct.unpack(f"{order}I", content[end : end + 4])
    return found


def _other_tag(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    changed, done = bytearray(content), []
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, order = rng.choice(_entries(content))
        code = struct.unpack(f"{order}H", content[at : at + 2])[0]
        part = rng.random()
        if part < 0.15:
            struct.pack_into(f"{order}H", changed, at + 2, rng.choice([0, 1, 2, 3, 4, 5, 7, 12, 16, 99]))
        elif part < 0.3:
            struct.pack_into(f"{order}I", changed, at + 4, rng.choice([0, 1, 2, 3, 100, 2**31, 2**32 - 1]))
        elif part < 0.36:
            struct.pack_into(
                f"{order}H", changed, at, rng.choice([254, 256, 257, 258, 262, 277, 284, 317, 339, 700])
            )
        else:
            value = rng.choice(
                [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 64, 100, 1000, 32773, 34712, 65535, 2**31]
            )
            narrow = struct.unpack(f"{order}H", content[at + 2 : at + 4])[0] == 3
            struct.pack_into(
                f"{order}{'H' if narrow else 'I'}", changed, at + 8, value & 0xFFFF if narrow else value
            )
        done.append(
            f"tag {code}: {content[at : at + 12].hex(' ')} -> {bytes(changed[at : at + 12]).hex(' ')}"
        )
    return bytes(changed), "; ".join(done)


def _other_description(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """The text of tag 270 replaced, behind the end of the file."""
    at, order = next(
        (a, o) for a, o in _entries(content) if struct.unpack(f"{o}H", content[a : a + 2])[0] == 270
    )
    count, start = struct.unpack(f"{order}II", content[at + 4 : at + 12])
    text = content[start : start + count].rstrip(b"\0").decode("utf-8", "replace")
    text, done = reworded(text, rng)
    data = text.encode() + b"\0"
    changed = bytearray(content) + b"\0" * (len(content) % 2)
    struct.pack_into(f"{order}II", changed, at + 4, len(data), len(changed))
    return bytes(changed) + data, done


# ---------------------------------------------------------------------- DICOM


_ODD_NUMBERS = (0, 1, -1, 2, 3, 7, 1000, 65535)
_ODD_TEXT = (
    "", "0", "-1", "1e99", "nan", "x", "2,5", "1\\2", "1\\2\\3", "0\\0\\0", "1\\0\\0\\0\\1\\0", "1\\0\\0\\0\\0\\1",
    "-1\\0\\0\\0\\1\\0", "0.5\\0.5", "MONOCHROME1", "RGB", "PALETTE COLOR", "YBR_FULL", "1.2.3", "99999999999",
)  # fmt: skip
_KEYWORDS = (
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "InstanceNumber", "SpacingBetweenSlices",
    "RescaleSlope", "RescaleIntercept", "SliceLocation", "SeriesInstanceUID", "EchoTime", "AcquisitionNumber",
    "ImageType", "TemporalPositionIdentifier", "Modality", "PixelData",
)  # fmt: skip


_SYNTAXES = (b"1.2.840.10008.1.2\0\0\0", b"1.2.840.10008.1.2.2\0", b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.9\0",
             b"1.2.840.10008.1.2.4\0")  # fmt: skip


def dicom_series(folder: Path, rng: random.Random) -> Made:
    """Four slices; one or all of them changed."""
    array = phantom((4, 6, 5), rng.choice(["uint16", "int16", "uint8"]))
    slices(folder / "series", array, step=rng.choice([(0, 0, 3.0), (0, 0, -3.0)]))
    files = sorted((folder / "series").iterdir())
    chosen = files if rng.random() < 0.4 else [rng.choice(files)]
    seed, what = rng.randrange(2**32), ""
    for file in chosen:
        what = _other_dicom(file, random.Random(seed))
    return folder / "series", f"{len(chosen)} of 4: {what}"


def dicom_frames(folder: Path, rng: random.Random) -> Made:
    """An enhanced file of four frames, changed."""
    heights = rng.choice([(7, 10, 13, 16), (16, 13, 10, 7), (7, 13, 10, 16)])
    path = enhanced(folder / "m.dcm", phantom((4, 6, 5)), heights=heights)
    return path, _other_dicom(path, rng)


def _other_dicom(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.3:
        content, what = broken(path.read_bytes(), rng, 1600)
        path.write_bytes(content)
        return what
    done = []
    with pydicom.config.disable_value_validation():
        whole = pydicom.dcmread(path)
        holders = [whole]
        for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
            for group in whole.get(name, ()):
                holders += [item for element in group for item in element.value]
        for _ in range(rng.choice([1, 1, 2, 3])):
            holder = rng.choice(holders) if rng.random() < 0.4 else whole
            keywords = [e.keyword for e in holder if e.keyword in _KEYWORDS] or list(_KEYWORDS)
            done.append(
                _other_element(holder, rng.choice(keywords if rng.random() < 0.7 else _KEYWORDS), rng)
            )
        stream = io.BytesIO()
        whole.save_as(stream, enforce_file_format=True)
    content = stream.getvalue()
    if rng.random() < 0.1:
        syntax = rng.choice(_SYNTAXES)
        content, done = (
            content.replace(b"1.2.840.10008.1.2.1\0", syntax, 1),
            [*done, f"syntax {syntax.decode()}"],
        )
    path.write_bytes(content)
    return "; ".join(done)


def _other_element(holder: Any, keyword: str, rng: random.Random) -> str:
    if keyword in holder and rng.random() < 0.2:
        del holder[keyword]
        return f"{keyword} lost"
    tag = pydicom.tag.Tag(keyword)
    vr = pydicom.datadict.dictionary_VR(tag)
    if vr.startswith(("OB", "OW")):
        value: Any = rng.randbytes(rng.choice([0, 1, 7, 60, 400]))
        vr = "OW"
    else:
        value = rng.choice(_ODD_NUMBERS) if vr == "US" else rng.choice(_ODD_TEXT)
        if vr == "US":
            value &= 0xFFFF
    element = pydicom.dataelem.RawDataElement(tag, vr, 0, _raw(value, vr), 0, False, True)
    holder[tag] = element
    return f"{keyword} = {str(value)[:30]!r}"


def _raw(value: Any, vr: str) -> bytes:
    if vr == "US":
        return struct.pack("<H", value)
    content = value if isinstance(value, bytes) else str(value).encode()
    return content + (b"\0" if vr in ("UI", "OW") else b" ") * (len(content) % 2)


# ---------------------------------------------------------------------- HDF5


def hdf5_file(folder: Path, rng: random.Random) -> Made:
    """One dataset with axistags or labels and element sizes, changed."""
    path = folder / "m.h5"
    order = rng.choice(["zyx", "xyz", "yxz", "czyx", "zyxc", "tzyxc"])
    sizes = dict(zip("tczyx", (1, 2, *SHAPE), strict=True))
    array = np.arange(np.prod([sizes[a] for a in order]), dtype=rng.choice(["u1", ">u2", "f4", "i8", "f2"]))
    tags = json.dumps(
        {"axes": [{"key": a, "typeFlags": 2, "resolution": 0.5, "description": ""} for a in order]}
    )
    said, what = rng.choice(["axistags", "labels", "none"]), f"{order} {array.dtype}"
    with h5py.File(path, "w") as file:
        made = file.create_dataset("volume/data", data=array.reshape([sizes[a] for a in order]),
                                   chunks=True if rng.random() < 0.5 else None)  # fmt: skip
        made.attrs["element_size_um"] = [2.0, 0.5, 0.25]
        if said == "axistags":
            made.attrs["axistags"] = tags
        elif said == "labels":
            for dim, letter in zip(made.dims, order, strict=True):
                dim.label = letter
        if (chance := rng.random()) < 0.35:
            text, more = reworded(tags, rng)
            made.attrs["axistags"] = text
        elif chance < 0.5:
            value = rng.choice([0, -1, "x", [1, 2], [1, 2, 3, 4], [0, 1, 1], [2, -1, 1], [float("nan")] * 3, "[2,1,1]",
                                b"\xff\xfe", [[1, 2, 3]], "2 1 1", "1,5 2 2", np.zeros(0), True])  # fmt: skip
            made.attrs["element_size_um"], more = value, f"element_size_um {value}"
        elif chance < 0.65:
            label = rng.choice(["z", "t", "x", "c", "", "depth", "müll", "q"])
            place = rng.randrange(len(order))
            made.dims[place].label, more = label, f"label {place} {label!r}"
        else:
            more = ""
    if not more:
        content, more = broken(path.read_bytes(), rng, path.stat().st_size)
        path.write_bytes(content)
    return path, f"{what} {said}; {more}"


# ---------------------------------------------------------------------- zarr


def zarr_store(folder: Path, rng: random.Random) -> Made:
    """An OME-Zarr image of version 0.4 or 0.5, or a plain array, its metadata or a chunk changed."""
    path, form = folder / "m.zarr", rng.choice([2, 3])
    order = rng.choice(["zyx", "czyx", "tczyx", "xyz"])
    sizes = dict(zip("tczyx", (1, 2, *SHAPE), strict=True))
    array = np.arange(np.prod([sizes[a] for a in order]), dtype=rng.choice(["u1", "u2", "f4", "i8"]))
    array = array.reshape([sizes[a] for a in order])
    root = zarr.open_group(store=str(path), mode="w", zarr_format=form)
    names = {"dimension_names": list(order)} if form == 3 and rng.random() < 0.5 else {}
    root.create_array("0", data=array, chunks=(2,) * array.ndim, **names)
    if rng.random() < 0.85:
        entries = _ome(order)
        root.attrs.update({"ome": {"version": "0.5", **entries}} if form == 3 else entries)
    files = [f for f in sorted(path.rglob("*")) if f.is_file()]
    marks = [f for f in files if f.name in ("zarr.json", ".zattrs", ".zarray", ".zgroup")]
    # What blosc (v2) makes of a damaged chunk is left to chance: other values every time.
    file, what = rng.choice(files if form == 3 and rng.random() < 0.15 else marks), f"v{form} {order}"
    if file in marks and rng.random() < 0.85:
        entry, done = changed_json(json.loads(file.read_bytes()), rng)
        file.write_text(json.dumps(entry), encoding="utf-8")
    else:
        content, done = broken(file.read_bytes(), rng)
        file.write_bytes(content)
    return path, f"{what} {file.relative_to(path)}: {done}"


def _ome(order: str) -> dict[str, Any]:
    kinds, unit = {"t": "time", "c": "channel"}, "micrometer"
    axes = [
        {"name": a, "type": kinds.get(a, "space"), **({"unit": unit} if a in "zyx" else {})} for a in order
    ]
    scale = [dict(zip("tczyx", (1.0, 1.0, 2.0, 0.5, 0.25), strict=True))[a] for a in order]
    shift = [dict(zip("tczyx", (0.0, 0.0, 10.0, 20.0, 30.0), strict=True))[a] for a in order]
    steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
    datasets = [{"path": "0", "coordinateTransformations": steps}]
    return {"multiscales": [{"version": "0.4", "axes": axes, "datasets": datasets, "name": "m"}]}


# ---------------------------------------------------------------------- points


def point_table(folder: Path, rng: random.Random) -> Made:
    """A table of points, or fiducials of 3D Slicer, its text changed."""
    separator = rng.choice([",", ",", ";", "\t"])
    head = rng.choice([["x", "y", "z"], ["name", "x", "y", "z"], ["z", "y", "x", "label"], ["X", "Y", "Z"]])
    lines = [separator.join(head)]
    for k in range(4):
        cells = {"x": k + 0.5, "y": -2.0 * k, "z": 3 * k, "name": f'"p{k}"', "label": f"l{k}"}
        lines.append(separator.join(str(cells[name.lower()]) for name in head))
    if rng.random() < 0.2:
        lines.insert(
            0, rng.choice(["# CoordinateSystem = RAS", "# unit = um", "# made by hand", "# space: LPS"])
        )
    suffix = ".csv"
    if rng.random() < 0.2:
        suffix = ".fcsv"
        lines = ["# Markups fiducial file version = 4.11", "# CoordinateSystem = LPS",
                 "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID",
                 "1,9,18,33,0,0,0,1,1,1,0,F-1,,", "2,8,17,32,0,0,0,1,1,1,0,F-2,,"]  # fmt: skip
    content, what = "\n".join([*lines, ""]), ""
    if rng.random() < 0.7:
        content, what = reworded(content, rng)
        data = content.encode(rng.choice(["utf-8", "utf-8", "utf-16", "utf-8-sig"]))
    else:
        data, what = broken(content.encode(), rng)
    path = folder / f"m{suffix}"
    path.write_bytes(data)
    return path, what


MAKERS: dict[str, Callable[[Path, random.Random], Made]] = {
    "NIfTI": _one_file("m.nii", nifti_bytes),
    "MetaImage": _one_file("m.mha", metaimage_bytes),
    "NRRD": _one_file("m.nrrd", nrrd_bytes),
    "TIFF": _tiff_maker("plain", "imagej"),
    "OME-TIFF": _tiff_maker("ome"),
    "DICOM series": dicom_series,
    "DICOM frames": dicom_frames,
    "HDF5": hdf5_file,
    "zarr": zarr_store,
    "points": point_table,
}
"""Format to maker of a mutated file."""
