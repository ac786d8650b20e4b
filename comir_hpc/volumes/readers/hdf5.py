"""HDF5: one dataset as a volume, with the axes and sizes that ilastik, vigra, Fiji and others write beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box, Vector
from comir_hpc.volumes.readers import bigdataviewer, imaris
from comir_hpc.volumes.readers.choice import listed, only
from comir_hpc.volumes.readers.claims import require_credible_dataset
from comir_hpc.volumes.readers.named_axes import axis_letter, named_axes
from comir_hpc.volumes.readers.raw import cut, shape_of
from comir_hpc.volumes.readers.source import THICKNESS, Source, reading, storable

_SIZE_UNITS = {
    "element_size_um": "micrometer",
    "element_size_nm": "nanometer",
    "element_size_mm": "millimeter",
}
"""Attributes that hold the size of a voxel as (z, y, x), and their units."""


def hdf5(path: Path, dataset: str | None = None) -> Source:
    """Open one dataset of an HDF5 file, streamed; Imaris and BigDataViewer files are known by their layout.

    The order of the axes is that of vigra's `axistags`, or of the dimension labels, where the file has them.
    `element_size_um` (z, y, x) on the dataset or on a group above it is the spacing.

    Raises
    ------
    VolumeError
        If `dataset` is not in the file, or not given and not the only one of three axes or more (or, where there is
        none, of two); if its axes are no volume; if it claims more than can have been stored.
    """
    with reading(path, "HDF5"), h5py.File(path, "r") as file:
        if imaris.is_imaris(file):
            return imaris.imaris(path, file, dataset)
        if bigdataviewer.is_bigdataviewer(file):
            return bigdataviewer.bigdataviewer(path, file, dataset)
        name = dataset or only(path, _datasets(file))
        found = file.get(name)
        if not isinstance(found, h5py.Dataset):
            raise VolumeError(f"{path} has no dataset {name!r}; it holds {listed(_datasets(file))}")
        _require_parts(path, found)
        require_credible_dataset(path, found)
        shape = tuple(int(n) for n in found.shape)
        tags = _axistags(path, found)
        labels = [str(tag["key"]) for tag in tags] if tags else _labels(found)
        axes, notes = named_axes(labels, shape, path, "axistags" if tags else "dimension labels")
        dtype = storable(found.dtype, path)
        # A chunk is decoded as a whole, so that blocks along chunks decode each one once.
        chunks = shape_of(found.chunks, axes)[1:] if found.chunks else (1, 1, 1)
        spacing, unit, says = _spacing(found, tags)
        if unit and [a for a in axes if a in "zyx"] != list("zyx"[-(3 if "z" in axes else 2) :]):
            notes = (
                *notes,
                f"{path.name}: its axes are ({', '.join(axes)}); its element size is read as (z, y, x)",
            )
    return Source(
        path=path, kind="HDF5", shape=shape_of(shape, axes), dtype=dtype,
        read_box=lambda box: read_dataset(path, name, axes, box), files=(path,),
        spacing_zyx=spacing, unit=unit, atom_zyx=chunks, says=says, notes=notes,
    )  # fmt: skip


def read_dataset(path: Path, name: str, axes: str, box: Box) -> NDArray[Any]:
    """Read the voxels of `box` out of one dataset as (c, z, y, x); the file is opened for the call."""
    with h5py.File(path, "r") as file:
        return cut(file[name], axes, box)


def _require_parts(path: Path, found: Any) -> None:
    """Refuse a dataset made of parts in other files that are missing: HDF5 would read zeros in their place."""
    for part in found.virtual_sources() if found.is_virtual else ():
        if part.file_name != "." and not (path.parent / part.file_name).is_file():
            raise VolumeError(
                f"{path}: a part of {found.name} lies in {path.parent / part.file_name}, which does not exist; copy "
                "that file to this place"
            )


def _datasets(file: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    found: dict[str, tuple[tuple[int, ...], str]] = {}

    def note(name: str, node: Any) -> None:
        # A dataset without a dataspace (H5S_NULL) has no shape.
        if isinstance(node, h5py.Dataset) and node.shape is not None:
            found[name] = (tuple(node.shape), str(node.dtype))

    file.visititems(note)
    return found


# ---------------------------------------------------------------------- what stands beside the voxels


def _labels(found: Any) -> list[str]:
    """Read the dimension labels from their attribute.

    HDF5's own function for them crashes on damaged ones.
    """
    said = found.attrs.get("DIMENSION_LABELS")
    if said is None:
        return [""] * found.ndim
    words = np.ravel(said).tolist()
    if len(words) != found.ndim:
        raise ValueError(f"{len(words)} dimension labels of {found.ndim} axes")
    return [w.decode(errors="replace") if isinstance(w, bytes) else str(w or "") for w in words]


def _axistags(path: Path, found: Any) -> list[dict[str, Any]]:
    """Read vigra's description of the axes, an entry each in the order of the array; empty where there is none."""
    text = found.attrs.get("axistags")
    if text is None:
        return []
    try:
        tags = json.loads(text)["axes"]
        return [{"key": tag["key"], **tag} for tag in tags]
    except (ValueError, TypeError, KeyError) as error:
        raise VolumeError(
            f"{path}: the attribute axistags of {found.name} is no list of axes, so their order is not known; repair "
            "or remove it"
        ) from error


def _spacing(found: Any, tags: Sequence[dict[str, Any]]) -> tuple[Vector | None, str | None, str]:
    """Read spacing (z, y, x) and unit as far as the file says them, and say in words what it has otherwise."""
    planar = found.ndim == 2
    for holder in _and_above(found):
        for name, unit in _SIZE_UNITS.items():
            if name in holder.attrs:
                sizes = _numbers(holder.attrs[name])
                # A single slice need not say how thick it is.
                if planar and len(sizes) == 2:
                    sizes = [THICKNESS, *sizes]
                if len(sizes) == 3 and all(np.isfinite(sizes)) and min(sizes) > 0:
                    return (sizes[0], sizes[1], sizes[2]), unit, ""
                return (
                    None,
                    None,
                    f"its attribute {name} is {sizes}, expected three positive numbers (z, y, x)",
                )
    says = "its dataset has no attribute element_size_um"
    return _resolution(tags) or (None, None, says)


def _resolution(tags: Sequence[dict[str, Any]]) -> tuple[Vector, None, str] | None:
    """Read the resolution from vigra's tags, which name no unit; None where there is none."""
    sizes = {axis_letter(tag["key"]): _numbers(tag.get("resolution", 0)) for tag in tags}
    known = [sizes.get(axis, [0.0]) for axis in "zyx"]
    if any(len(size) != 1 or not np.isfinite(size[0]) or size[0] <= 0 for size in known):
        return None
    return (known[0][0], known[1][0], known[2][0]), None, "the resolution in its axistags has no unit"


def _and_above(found: Any) -> list[Any]:
    """Return the dataset and the groups that hold it, the nearest first."""
    holders = [found]
    while holders[-1].name != "/":
        holders.append(holders[-1].parent)
    return holders


def _numbers(value: Any) -> list[float]:
    """Read the numbers of an attribute: an array, one number, or a text such as ``[2.0, 0.5, 0.5]``."""
    values = np.ravel(value)
    if values.dtype.kind in "OSU":
        words = " ".join(v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values)
        return [float(n) for n in re.findall(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?", words)]
    return [float(v) for v in values]
