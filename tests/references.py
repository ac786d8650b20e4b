"""What reference readers say of a file: nibabel, SimpleITK, tifffile, pydicom, h5py, zarr-python, the csv module.

An answer is a list of pieces, each an array (z, y, x, c) and where its voxels lie. Ours agrees with an answer if every
voxel of it has the same value at the same place, and there are no others.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
import tifffile
import zarr
from nibabel.imageglobals import LoggingOutputSuppressor

from comir_hpc.space.grid import Grid

_LARGEST = 1 << 22
_MOST_CHUNKS = 2000  # zarr-python takes 2 ms for each, also for those that are not stored
_NIFTI_MM = {"mm": 1.0, "unknown": 1.0, "micron": 1e-3, "meter": 1e3}
_MM = {"µm": 1e-3, "um": 1e-3, "micrometer": 1e-3, "nm": 1e-6, "nanometer": 1e-6, "mm": 1.0, "millimeter": 1.0,
       "cm": 10.0, "m": 1e3, "meter": 1e3, "micron": 1e-3, "centimeter": 10.0, "angstrom": 1e-7}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Voxels (z, y, x, c), and the affine (3, 4) from index (z, y, x) to the world (LPS, mm), if it is known."""

    values: np.ndarray
    affine: np.ndarray | None


Answer = list[Piece]


def agrees(grid: Grid, ours: np.ndarray, answer: Answer) -> bool:
    """Whether voxels (c, z, y, x) on a grid are those of a reference reader, at the same places."""
    if sum(p.values.size for p in answer) != ours.size:
        return False
    # Pieces at one place would leave other voxels of ours without a comparison.
    seen = np.zeros(ours.shape[1:], dtype=bool)
    return all(_piece_agrees(grid, ours, piece, seen) for piece in answer) and bool(seen.all())


def same_values(ours: np.ndarray, spacing_zyx: Sequence[float] | None, answer: Answer) -> bool:
    """Whether the values are those of a reference reader in the same order, and the voxels of the same proportions.

    For files that do not say all of their place. Proportions are compared where both readers know them.
    """
    values = np.concatenate([np.moveaxis(piece.values, -1, 0) for piece in answer], axis=1)
    if values.shape != ours.shape or not np.allclose(
        values.astype(float), ours.astype(float), equal_nan=True
    ):
        return False
    known = [piece.affine for piece in answer if piece.affine is not None]
    counted = np.array(ours.shape[1:]) > 1
    if spacing_zyx is None or not known or counted.sum() < 2:
        return True
    ratios = np.linalg.norm(known[0][:, :3], axis=0)[counted] / np.asarray(spacing_zyx)[counted]
    return bool(np.ptp(ratios) <= 1e-3 * ratios.max())


def _piece_agrees(grid: Grid, ours: np.ndarray, piece: Piece, seen: np.ndarray) -> bool:
    """Whether one piece is in ours; the places that it was compared at are marked in `seen`."""
    if piece.affine is None:
        return False
    index = np.stack(np.meshgrid(*map(np.arange, piece.values.shape[:3]), indexing="ij"), -1).reshape(-1, 3)
    world = index @ piece.affine[:, :3].T + piece.affine[:, 3]
    place = grid.index_zyx(world)
    if not np.isfinite(place).all():
        return False
    near = np.rint(place).astype(np.int64)
    off = np.abs(place - near)[:, [n > 1 for n in grid.shape_zyx]]  # a slice has any thickness
    if (off > 5e-3).any() or (near < 0).any() or (near >= grid.shape_zyx).any():
        return False
    seen[near[:, 0], near[:, 1], near[:, 2]] = True
    found = ours[:, near[:, 0], near[:, 1], near[:, 2]].T.astype(np.float64)
    said = piece.values.reshape(len(index), -1).astype(np.float64)
    return found.shape == said.shape and np.allclose(found, said, rtol=1e-5, atol=1e-5, equal_nan=True)


def _diagonal(spacing_zyx: Any, origin_xyz: Any = (0, 0, 0)) -> np.ndarray:
    affine = np.zeros((3, 4))
    affine[0, 2], affine[1, 1], affine[2, 0] = spacing_zyx[2], spacing_zyx[1], spacing_zyx[0]
    affine[:, 3] = origin_xyz
    return affine


def _zyxc(array: np.ndarray, axes: str) -> np.ndarray:
    """An array with named axes as (z, y, x, c); axes of length 1 with other names go."""
    for axis in range(len(axes) - 1, -1, -1):
        if axes[axis] not in "zyxc" or (array.shape[axis] == 1 and axes.count(axes[axis]) > 1):
            if array.shape[axis] != 1:
                raise ValueError(f"axis {axes[axis]} of {array.shape}")
            array, axes = array.take(0, axis), axes[:axis] + axes[axis + 1 :]
    for letter in "zc":
        if letter not in axes:
            array, axes = array[..., None], axes + letter
    return array.transpose([axes.index(a) for a in "zyxc"])


# ---------------------------------------------------------------------- the readers


def by_nibabel(path: Path) -> Answer:
    image: Any = nibabel.load(path)
    if math.prod(image.shape) > _LARGEST:
        raise ValueError("too large")
    scale = _NIFTI_MM[getattr(image.header, "get_xyzt_units", lambda: ("mm", ""))()[0]]
    array = np.asarray(image.dataobj)
    array = array.reshape(*(*array.shape, 1, 1, 1)[:3], -1).transpose(2, 1, 0, 3)
    affine = (image.affine[:3] * [[-1.0], [-1.0], [1.0]] * scale)[:, [2, 1, 0, 3]]
    return [Piece(array, affine)]


def by_itk(path: Path) -> Answer:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    if math.prod(reader.GetSize()) > _LARGEST:
        raise ValueError("too large")
    return [_itk_piece(reader.Execute())]


def by_itk_series(path: Path) -> Answer:
    if path.is_file():
        return by_itk(path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
    return [_itk_piece(reader.Execute())]


def _itk_piece(image: sitk.Image) -> Piece:
    dimension = image.GetDimension()
    array = sitk.GetArrayFromImage(image)
    array = array if image.GetNumberOfComponentsPerPixel() > 1 else array[..., None]
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(dimension, dimension)
    if dimension == 4:  # its last axis is made channels
        array = np.moveaxis(array, 0, -1)[..., 0, :]
        dimension = 3
    affine[:dimension, :dimension] = (direction * image.GetSpacing())[:dimension, :dimension]
    affine[:dimension, 3] = image.GetOrigin()[:dimension]
    return Piece(array if array.ndim == 4 else array[None], affine[:3][:, [2, 1, 0, 3]])


def by_tifffile(path: Path) -> Answer:
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        if series.size > _LARGEST:
            raise ValueError("too large")
        axes = series.axes if "Z" in series.axes else series.axes.replace("Q", "Z").replace("I", "Z")
        array = _zyxc(series.asarray(), axes.lower().replace("s", "c"))
        if file.is_ome:
            image = tifffile.xml2dict(file.ome_metadata or "")["OME"]["Image"]
            pixels = (image[0] if isinstance(image, list) else image)["Pixels"]
            sizes = [pixels.get(f"PhysicalSize{a}") for a in "ZYX"]
            units = [pixels.get(f"PhysicalSize{a}Unit", "µm") for a in "ZYX"]
        else:
            said: dict[str, Any] = file.imagej_metadata or {}
            # Damaged, it may be one number or hundreds.
            parts = [np.ravel(series.keyframe.tags.valueof(code, (0, 0))).tolist() for code in (282, 283)]
            (xn, xd), (yn, yd) = (part if len(part) == 2 else (0, 0) for part in parts)
            sizes, units = [said.get("spacing"), yn and yd / yn, xn and xd / xn], [str(said.get("unit"))] * 3
    return [Piece(array, _sized(sizes, units))]


def _letter(name: object) -> str:
    """One letter for an axis, whatever its name is."""
    text = str(name).lower()
    return text if len(text) == 1 else "?"


def _word(unit: object) -> str:
    """A unit in one spelling: words (not symbols, in which a capital means something) in small letters, no plural."""
    text = str(unit)
    return text.lower().removesuffix("s") if len(text) > 4 else text


def _sized(sizes: Any, units: Sequence[str]) -> np.ndarray | None:
    """Affine of voxels of three sizes (z, y, x), None where one of them is no length."""
    try:
        return _diagonal([abs(float(size)) * _MM[unit] for size, unit in zip(sizes, units, strict=True)])
    except (TypeError, ValueError, KeyError):
        return None


def by_pydicom(path: Path) -> Answer:
    """Each slice where its own header puts it, from the lowest to the highest."""
    answer: list[tuple[float, Piece]] = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        whole = pydicom.dcmread(file, force=True)
        whole.setdefault("SamplesPerPixel", 1)
        array = pydicom.pixels.pixel_array(whole)
        single = array.ndim == 2 or (array.ndim == 3 and whole.SamplesPerPixel > 1)
        frames = array[None] if single else array
        groups = whole.get("PerFrameFunctionalGroupsSequence") or [None] * len(frames)
        for values, group in zip(frames, groups, strict=True):
            said = _said(whole, group)
            values = values * float(said.get("RescaleSlope") or 1) + float(said.get("RescaleIntercept") or 0)
            piece = Piece(values.reshape(1, *values.shape[:2], -1), _slice_affine(said))
            answer.append((_height(said), piece))
    return [piece for _, piece in sorted(answer, key=lambda one: one[0])]


def _height(said: dict[str, Any]) -> float:
    try:
        row, column = np.reshape(np.array(said["ImageOrientationPatient"], float), (2, 3))
        return float(np.cross(row, column) @ np.array(said["ImagePositionPatient"], float))
    except (KeyError, ValueError, TypeError):
        return 0.0


def _slice_affine(said: dict[str, Any]) -> np.ndarray | None:
    try:
        row, column = np.reshape(np.array(said["ImageOrientationPatient"], float), (2, 3))
        down, along = map(float, said["PixelSpacing"])
        steps = [
            np.cross(row, column),
            column * down,
            row * along,
            np.array(said["ImagePositionPatient"], float),
        ]
        return np.stack(steps, axis=1)
    except (KeyError, ValueError, TypeError):
        return None


def _said(whole: Any, group: Any) -> dict[str, Any]:
    found = {e.keyword: e.value for e in whole if e.VR != "SQ"}
    for holder in (*(whole.get("SharedFunctionalGroupsSequence") or ()), *([group] if group else ())):
        for sequence in holder:
            found.update({e.keyword: e.value for item in sequence.value for e in item})
    return found


def by_h5py(path: Path) -> Answer:
    with h5py.File(path, "r") as file:
        found = next(d for g in file.values() for d in g.values())  # a name may be damaged
        if found.size > _LARGEST:
            raise ValueError("too large")
        if "axistags" in found.attrs:
            axes = "".join(_letter(tag["key"]) for tag in json.loads(found.attrs["axistags"])["axes"])
        else:
            axes = "".join(str(w).replace("depth", "z")[:1] for w in found.attrs.get("DIMENSION_LABELS", ()))
            axes = axes or ("zyx" if found.ndim == 3 else "czyx")
        array, sizes = _zyxc(found[()], axes.lower()), found.attrs.get("element_size_um", 0)
        sizes = re.findall(r"\d+\.?\d*", sizes) if isinstance(sizes, str) else np.ravel(sizes)
    return [Piece(array, _sized(sizes, ["um"] * 3))]


def by_zarr(path: Path) -> Answer:
    root: Any = zarr.open_group(store=str(path), mode="r")
    said = dict(root.attrs)
    if "multiscales" not in said.get("ome", said):
        array = root["0"]
        _require_few_chunks(array)
        named = getattr(array.metadata, "dimension_names", None)
        axes = "".join(named) if named else "tczyx"[-array.ndim :]
        return [Piece(_zyxc(array[...], axes), None)]
    image = said.get("ome", said)["multiscales"][0]
    level = image["datasets"][0]
    array = root[level["path"]]
    _require_few_chunks(array)
    letters = "".join(
        {"time": "t", "channel": "c"}.get(str(a.get("type")), _letter(a["name"])) for a in image["axes"]
    )
    units = [_MM.get(_word(a.get("unit")), 1.0) for a in image["axes"]]
    scale, shift = np.ones(len(letters)), np.zeros(len(letters))
    steps = [*level.get("coordinateTransformations", ()), *image.get("coordinateTransformations", ())]
    for step in steps:
        if step["type"] == "scale":
            scale, shift = (v * np.array(step["scale"], float) for v in (scale, shift))
        else:
            shift = shift + np.array(step["translation"], float)
    place = [letters.index(a) for a in "zyx"]
    origin = [(shift * units)[p] for p in place[::-1]]
    affine = _diagonal([(scale * units)[p] for p in place], origin) if steps else None
    return [Piece(_zyxc(array[...], letters), affine)]


def _require_few_chunks(array: Any) -> None:
    if array.size > _LARGEST or array.nchunks > _MOST_CHUNKS:
        raise ValueError("too large")


READERS: dict[str, tuple[Callable[[Path], Answer], ...]] = {
    "NIfTI": (by_nibabel, by_itk),
    "MetaImage": (by_itk,),
    "NRRD": (by_itk,),
    "TIFF": (by_tifffile,),
    "OME-TIFF": (by_tifffile,),
    "DICOM series": (by_pydicom, by_itk_series),
    "DICOM frames": (by_pydicom, by_itk),
    "HDF5": (by_h5py,),
    "zarr": (by_zarr,),
}


def answers(kind: str, path: Path) -> Iterator[Answer]:
    """What each reference reader says of a file; one that objects says nothing."""
    for reader in READERS[kind]:
        with LoggingOutputSuppressor(), np.errstate(all="ignore"):
            try:
                yield reader(path)
            except Exception:  # noqa: BLE001 - whatever a reference reader raises, it has no answer
                continue


def points(path: Path) -> np.ndarray | None:
    """Columns x, y, z of a table, by the csv module alone; None where it has no answer."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        lines = re.sub(r"(?m)^# .* = (?=\w*,x,y,z)", "", text).splitlines()  # the header of 3D Slicer
        first = next(n for n, line in enumerate(lines) if not line.startswith("#") and line.strip())
        rows = list(csv.DictReader(lines[first:], delimiter=max(",;\t", key=lines[first].count), strict=True))
        names = {name.strip().lower(): name for name in rows[0] if name}
        return np.array([[float(row[names[a]]) for a in "xyz"] for row in rows])
    except (UnicodeError, StopIteration, csv.Error, LookupError, ValueError, TypeError):
        return None
