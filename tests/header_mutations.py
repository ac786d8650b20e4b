"""Headers that are nearly right: seeded mutations of NIfTI, MetaImage and NRRD, read by ours and reference readers.

Each maker gives the bytes of a file and a line that says what was done to it. `compare` reads the file with ours and
with nibabel and SimpleITK.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.imageglobals import LoggingOutputSuppressor
from scipy.spatial.transform import Rotation

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers import open_source

Verdict = Literal["refused", "same", "noted", "different"]
VOXELS = np.arange(5 * 6 * 7, dtype="<i2").reshape(5, 6, 7)
_MM = {"mm": 1.0, "unknown": 1.0, "micron": 1e-3, "meter": 1e3}
_NUMBERS = (
    0,
    1,
    -1,
    2,
    -2,
    3,
    0.5,
    -0.5,
    1e-3,
    1e30,
    float("nan"),
    float("inf"),
    5,
    7,
    100,
    255,
    256,
    32767,
    -32768,
)
_WORDS = (
    "0",
    "-1",
    "-2.5",
    "1e9",
    "nan",
    "inf",
    "",
    "x",
    "2",
    "none",
    "3 3",
    "0.5",
    "True",
    "raw",
    "gzip",
    "big",
)


def turned(rng: random.Random) -> np.ndarray:
    """Columns of an affine: turned, of three sizes, some axes flipped."""
    angles = [rng.choice([0, 20, 90, 180]) for _ in range(3)]
    flips = [rng.choice([1, -1]) for _ in range(3)]
    matrix: np.ndarray = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * (
        [0.7, 1.1, 2.5] * np.array(flips)
    )
    return matrix


# ---------------------------------------------------------------------- NIfTI


def nifti_bytes(rng: random.Random) -> tuple[bytes, str]:
    """A NIfTI-1 or -2 file in either byte order, up to three numbers of its header changed."""
    two, order = rng.random() < 0.3, rng.choice("<>")
    header = (nibabel.Nifti2Header if two else nibabel.Nifti1Header)(endianness=order)
    header.set_data_dtype(np.int16)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turned(rng), (11, -7.5, 42)
    image = (nibabel.Nifti2Image if two else nibabel.Nifti1Image)(VOXELS.transpose(2, 1, 0), affine, header)
    image.set_sform(affine, code=rng.choice([0, 1, 2, 4]))
    image.set_qform(affine, code=rng.choice([0, 1, 2]))
    image.header.set_xyzt_units(rng.choice(["mm", "micron", "meter", None]))
    content = bytearray(image.to_bytes())
    record = np.frombuffer(content, dtype=type(header).template_dtype.newbyteorder(order), count=1).copy()
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        field, value = (
            rng.choice(_FIELDS),
            rng.choice([*_NUMBERS, rng.uniform(-2, 2), rng.uniform(-0.1, 0.1)]),
        )
        done.append(f"{field}={value}")
        _put(record, field, value, rng)
    content[: record.nbytes] = record.tobytes()
    return bytes(content), f"NIfTI-{1 + two} {order} {done}"


_FIELDS = (
    "dim", "pixdim", "pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
    "sform_code", "qform_code", "xyzt_units", "scl_slope", "scl_inter", "vox_offset", "datatype", "magic", "sizeof_hdr",
)  # fmt: skip


def _put(record: np.ndarray, field: str, value: float, rng: random.Random) -> None:
    try:
        with np.errstate(all="ignore"):
            if record[field].dtype.kind == "S":
                record[field] = rng.choice([b"", b"n+1", b"ni1", b"n+2", b"xxx"])
            elif record[field].ndim > 1:
                record[field][0][rng.randrange(record[field].shape[1])] = value
            else:
                record[field] = value
    except (OverflowError, ValueError):
        pass  # an integer field keeps what it has


# ---------------------------------------------------------------------- headers of text


def metaimage_bytes(rng: random.Random) -> tuple[bytes, str]:
    """A .mha file, up to three of its lines changed, lost, doubled or moved."""
    columns = turned(rng)
    spacing = [rng.choice([0.7, 1, 2.5, -3]) for _ in range(3)]
    direction = columns / np.linalg.norm(columns, axis=0)
    lines = [
        "ObjectType = Image", "NDims = 3", "BinaryData = True",
        f"BinaryDataByteOrderMSB = {rng.choice(['True', 'False', 'true', '1', '0'])}", "CompressedData = False",
        "TransformMatrix = " + " ".join(map(str, direction.T.ravel())), "Offset = 1 2 3", "CenterOfRotation = 0 0 0",
        "ElementSpacing = " + " ".join(map(str, spacing)), "DimSize = 7 6 5", "ElementType = MET_SHORT",
        "ElementDataFile = LOCAL",
    ]  # fmt: skip
    lines, what = _mutated(lines, rng, _META_LINES, "=")
    return "\n".join([*lines, ""]).encode() + VOXELS.tobytes(), f"MetaImage {what}"


def nrrd_bytes(rng: random.Random) -> tuple[bytes, str]:
    """A .nrrd file, up to three of its lines changed, lost, doubled or moved."""
    columns = turned(rng)
    space = rng.choice(["left-posterior-superior", "RAS", "LAS", "scanner-xyz", "3D-right-handed"])
    lines = [
        "NRRD0004", "type: short", "dimension: 3", f"space: {space}", "sizes: 7 6 5",
        "space directions: " + " ".join("(" + ",".join(map(str, c)) + ")" for c in columns.T),
        "kinds: domain domain domain", f"endian: {rng.choice(['little', 'big'])}", "encoding: raw",
        "space origin: (1,2,3)",
    ]  # fmt: skip
    if rng.random() < 0.3:
        lines = ["NRRD0004", "type: short", "dimension: 3", "sizes: 7 6 5", "spacings: 1 2 3", "axis mins: 1 2 3",
                 "endian: little", "encoding: raw"]  # fmt: skip
    lines, what = _mutated(lines, rng, _NRRD_LINES, ":")
    return "\n".join([*lines, "", ""]).encode() + VOXELS.tobytes(), f"NRRD {what}"


_META_LINES = (
    "elementspacing = 9 9 9", "ElementSpacing = 4 5 6", "Position = 9 9 9", "Origin = 4 4 4",
    "Rotation = 0 1 0 1 0 0 0 0 1", "ElementSize = 2 2 2", "DistanceUnits = um", "DistanceUnits: mm", "NDims = 2",
    "AnatomicalOrientation = LPI", "HeaderSize = 300", "HeaderSize = -1", "ElementNumberOfChannels = 2",
    "DimSize = 3 3 3", "ElementByteOrderMSB = True", "CompressedData = True", "BinaryData = False",
    "ElementDirection = 0 1 0 1 0 0 0 0 1",
)  # fmt: skip
_NRRD_LINES = (
    'space units: "mm" "um" "mm"', 'units: "mm" "mm" "mm"', "byte skip: 2", "byteskip: -1", "lineskip: 1",
    "spacings: 9 9 9", "centers: node node node", "axis mins: 3 3 3", "kinds: time domain domain", "key:=value",
    "sizes: 3 3 3", "space directions: none (1,0,0) (0,1,0)", "thicknesses: 1 2 3", "space: RAS",
)  # fmt: skip


def _mutated(
    lines: list[str], rng: random.Random, extra: tuple[str, ...], separator: str
) -> tuple[list[str], str]:
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind, at = rng.random(), rng.randrange(1, len(lines) - 1)
        done.append(lines[at])
        if kind < 0.45:
            name, mark, value = lines[at].partition(separator)
            words = re.split(r"([ ,()]+)", value.strip())
            places = [i for i, word in enumerate(words) if word.strip(" ,()")]
            if places:
                words[rng.choice(places)] = rng.choice([*_WORDS, str(rng.uniform(-2, 2))])
            lines[at] = f"{name}{mark} {''.join(words)}"
        elif kind < 0.55:
            del lines[at]
        elif kind < 0.65:
            other = rng.randrange(1, len(lines) - 1)
            lines[at], lines[other] = lines[other], lines[at]
        elif kind < 0.7:
            lines[at] = lines[at].swapcase()
        else:
            lines.insert(at, rng.choice(extra))
        done.append(lines[at])
    return lines, " | ".join(done)


MAKERS: dict[str, Callable[[random.Random], tuple[bytes, str]]] = {
    ".nii": nifti_bytes,
    ".mha": metaimage_bytes,
    ".nrrd": nrrd_bytes,
}
"""Suffix to maker of a mutated file."""


# ---------------------------------------------------------------------- what readers say


def compare(path: Path) -> Verdict:
    """How our reading of a file stands to nibabel's and SimpleITK's.

    The corners of the volume are compared in mm. Errors other than `VolumeError` are not caught.
    """
    try:
        source = open_source(path)
        grid = source.grid()
        source.read()
    except VolumeError:
        return "refused"
    size = tuple(source.shape_zyx[source.order.index(axis)] for axis in (2, 1, 0))
    # Corners in the file's axes (x, y, z), and where ours are.
    corners = _corners(size)
    ours = grid.world_mm(corners[:, ::-1][:, list(source.order)])
    tolerance = 1.1e-3 * grid.finest_mm + 1e-6 * float(np.abs(ours).max())
    for theirs in (_nibabel_corners(path, size), _itk_corners(path, size)):
        if theirs is not None and np.abs(theirs - ours).max() <= tolerance:
            return "same"
    return "noted" if source.notes else "different"


def _corners(size_xyz: tuple[int, ...]) -> np.ndarray:
    ends = [(0, n - 1) for n in size_xyz]
    return np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)


def _nibabel_corners(path: Path, size_xyz: tuple[int, ...]) -> np.ndarray | None:
    try:
        with LoggingOutputSuppressor(), np.errstate(all="ignore"):
            image = nibabel.load(path)
            unit = getattr(image.header, "get_xyzt_units", lambda: ("mm", ""))()[0]
    except Exception:  # noqa: BLE001 - whatever a reference reader raises, it has no answer
        return None
    if (*image.shape, 1, 1)[:3] != size_xyz:
        return None
    with np.errstate(all="ignore"):
        world = _corners(size_xyz) @ image.affine[:3, :3].T + image.affine[:3, 3]
        return np.nan_to_num(world * (-1, -1, 1) * _MM[unit], nan=np.inf)


def _itk_corners(path: Path, size_xyz: tuple[int, ...]) -> np.ndarray | None:
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError:
        return None
    if image.GetSize() != size_xyz:
        return None
    return np.array([image.TransformIndexToPhysicalPoint(tuple(map(int, c))) for c in _corners(size_xyz)])
