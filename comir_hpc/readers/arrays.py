"""Arrays without a medical header: npy, HDF5, zarr and OME-Zarr, and arrays in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import Box, Grid, Triple, Vector
from comir_hpc.readers.source import (
    NO_THICKNESS,
    THICKNESS,
    RawLayout,
    Source,
    axes_of,
    cut,
    known_unit,
    reading,
    shape_of,
    storable,
    upright,
)
from comir_hpc.volume import foreign_arrays, foreign_node

_ELEMENT_SIZE = "element_size_um"
_LISTED = 20


def in_memory(array: NDArray[Any], grid: Grid, name: str = "array") -> Source:
    """An array (z, y, x) or (c, z, y, x) as a source, with the grid that it is given.

    Raises
    ------
    VolumeError
        If shape and grid differ, or the values are of a type that no volume keeps.
    """
    path = Path(name)
    values = array[None] if array.ndim == 3 else array
    if values.ndim != 4 or values.shape[1:] != grid.shape_zyx:
        raise VolumeError(
            f"{name}: an array of shape {array.shape} does not fit a grid of {grid.shape_zyx} (z, y, x)"
        )
    digest = hashlib.sha256(f"{values.shape} {values.dtype}".encode())
    for channel in values:
        for plane in channel:
            digest.update(np.ascontiguousarray(plane).tobytes())
    source = Source(
        path=path, kind="array", shape=values.shape, dtype=storable(values.dtype, path),
        read_box=lambda box: cut(values, "czyx", box), files=(), spacing_zyx=grid.spacing_zyx, unit=grid.unit,
        origin_xyz=grid.origin_xyz, direction=grid.direction, digest=digest.hexdigest()[:16],
    )  # fmt: skip
    return upright(source)


def npy(path: Path) -> Source:
    """Open a .npy file, streamed."""
    with reading(path, "npy array"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    axes, notes = axes_of(array.shape, path)
    # In Fortran order the file is the reversed array in C order.
    turned = array.flags.f_contiguous and not array.flags.c_contiguous
    layout = RawLayout(
        path,
        array.offset,
        array.dtype,
        array.shape[::-1] if turned else array.shape,
        axes[::-1] if turned else axes,
    )
    return Source(
        path=path, kind="npy", shape=shape_of(array.shape, axes), dtype=storable(array.dtype, path),
        read_box=layout.read, files=(path,), notes=notes,
    )  # fmt: skip


# ---------------------------------------------------------------------- HDF5


def hdf5(path: Path, dataset: str | None = None) -> Source:
    """Open one dataset of an HDF5 file, streamed; `element_size_um` (z, y, x) on it is its spacing.

    Raises
    ------
    VolumeError
        If `dataset` is not in the file, or not given and not the only one of three axes or more (or, where there is
        none, of two).
    """
    with reading(path, "HDF5"), h5py.File(path, "r") as file:
        name = dataset or _only(path, _hdf5_datasets(file))
        found = file.get(name)
        if not isinstance(found, h5py.Dataset):
            raise VolumeError(f"{path} has no dataset {name!r}; it holds {_listed(_hdf5_datasets(file))}")
        labels = "".join(d.label for d in found.dims).lower()
        shape = tuple(int(n) for n in found.shape)
        axes, notes = _labelled(labels, shape) or axes_of(shape, path)
        dtype = storable(found.dtype, path)
        chunks = shape_of(found.chunks, axes)[1:] if found.chunks else (1, 1, 1)
        spacing, says = _element_size(found.attrs.get(_ELEMENT_SIZE))

    def read(box: Box) -> NDArray[Any]:
        with h5py.File(path, "r") as file:
            return cut(file[name], axes, box)

    return Source(
        path=path, kind="HDF5", shape=shape_of(shape, axes), dtype=dtype, read_box=read, files=(path,),
        spacing_zyx=spacing, unit="micrometer" if spacing else None, atom_zyx=chunks, says=says, notes=notes,
    )  # fmt: skip


def _hdf5_datasets(file: h5py.File) -> dict[str, tuple[tuple[int, ...], str]]:
    found: dict[str, tuple[tuple[int, ...], str]] = {}

    def note(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.shape is not None:
            found[name] = (tuple(node.shape), str(node.dtype))

    file.visititems(note)
    return found


def _element_size(value: Any) -> tuple[Vector | None, str]:
    if value is None:
        return None, f"its dataset has no attribute {_ELEMENT_SIZE}"
    sizes = [float(v) for v in np.ravel(value)]
    if len(sizes) != 3 or min(sizes) <= 0:
        return None, f"its attribute {_ELEMENT_SIZE} is {sizes}, expected three positive numbers (z, y, x)"
    return (sizes[0], sizes[1], sizes[2]), ""


def _labelled(labels: str, shape: Sequence[int]) -> tuple[str, tuple[str, ...]] | None:
    """Axes from the labels of an HDF5 dataset, if every axis has one that we know."""
    if (
        len(labels) != len(shape)
        or not set("yx") <= set(labels) <= set("tczyx")
        or len(set(labels)) < len(labels)
    ):
        return None
    if "t" in labels and shape[labels.index("t")] > 1:
        return None
    return labels.replace("t", "1"), ()


# ---------------------------------------------------------------------- zarr


def zarr_array(path: Path, dataset: str | None = None) -> Source:
    """Open an OME-Zarr image (0.4 or 0.5, its finest level) or a plain zarr array, streamed.

    Parameters
    ----------
    dataset : str, optional
        Path of an array or of an image group inside the store.

    Raises
    ------
    VolumeError
        If the store holds several arrays and none is named, or an image of several time points.
    """
    with reading(path, "zarr"):
        root = foreign_node(path)
        place = dataset.strip("/") if dataset else ""
        image, level = _image_of(root, place)
        if image is None:
            arrays = {name: (tuple(a.shape), str(a.dtype)) for name, a in foreign_arrays(root)}
            name = place or ("" if "" in arrays else _only(path, arrays))
            if name not in arrays:
                raise VolumeError(f"{path} has no array or image {name!r}; it holds {_listed(arrays)}")
            return _plain_zarr(path, name)
        return _ome_zarr(path, image, level)


def _image_of(root: Any, place: str) -> tuple[str | None, str | None]:
    """The group with multiscale metadata that `place` is, or is a level of; and which level."""
    parts = [p for p in place.split("/") if p]
    for depth in range(len(parts), -1, -1):
        group = "/".join(parts[:depth])
        node = root.get(group) if group else root
        level = "/".join(parts[depth:]) or None
        multiscale = _multiscale(node)
        if multiscale and (level is None or level in [d["path"] for d in multiscale["datasets"]]):
            return group, level
    return None, None


def _multiscale(node: Any) -> dict[str, Any] | None:
    attributes: Any = dict(node.attrs) if node is not None else {}
    found = attributes.get("ome", attributes).get("multiscales")
    return dict(found[0]) if found else None


def _node(path: Path, place: str) -> Any:
    root = foreign_node(path)
    return root[place] if place else root


def _zarr_reader(path: Path, place: str, axes: str) -> Callable[[Box], NDArray[Any]]:
    array = _node(path, place)
    return lambda box: cut(array, axes, box)


def _chunks(array: Any, axes: str) -> Triple:
    _, z, y, x = shape_of(array.chunks, axes)
    return z, y, x


def _plain_zarr(path: Path, place: str) -> Source:
    array = _node(path, place)
    axes, notes = axes_of(array.shape, path)
    return Source(
        path=path, kind="zarr", shape=shape_of(array.shape, axes), dtype=storable(array.dtype, path),
        read_box=_zarr_reader(path, place, axes), files=(path,), atom_zyx=_chunks(array, axes), notes=notes,
    )  # fmt: skip


def _ome_zarr(path: Path, group: str, level: str | None) -> Source:
    node = _node(path, group)
    multiscale = _multiscale(node)
    assert multiscale is not None
    datasets = multiscale["datasets"]
    dataset = next(d for d in datasets if level in (None, d["path"]))
    place = f"{group}/{dataset['path']}".strip("/")
    array = _node(path, place)
    names = "".join(a["name"].lower() for a in multiscale["axes"])
    shape = tuple(int(n) for n in array.shape)
    if not set("yx") <= set(names) <= set("tczyx") or ("t" in names and shape[names.index("t")] > 1):
        raise VolumeError(
            f"{path}: axes ({', '.join(names)}) of {shape}; expected z, y, x (or y, x), channels and one time point"
        )
    axes = names.replace("t", "1")
    scale, translation = _scale_and_translation(multiscale, dataset, len(names))
    units = {a.get("unit") for a in multiscale["axes"] if a["name"].lower() in "zyx"}
    unit = known_unit(units)
    own = dict(node.attrs).get("comir")
    common: dict[str, Any] = dict(
        path=path, kind="OME-Zarr", shape=shape_of(shape, axes), dtype=storable(array.dtype, path),
        read_box=_zarr_reader(path, place, axes), files=(path,), atom_zyx=_chunks(array, axes),
    )  # fmt: skip
    if isinstance(own, dict) and "grid" in own and dataset is datasets[0]:
        grid = Grid.from_dict(own["grid"])
        return Source(
            **common,
            spacing_zyx=grid.spacing_zyx,
            unit=grid.unit,
            origin_xyz=grid.origin_xyz,
            direction=grid.direction,
        )
    place_of = {axis: names.index(axis) for axis in "zyx" if axis in names}
    z, y, x = (scale[place_of[a]] if scale and a in place_of else THICKNESS for a in "zyx")
    return Source(
        **common, spacing_zyx=(z, y, x) if scale else None, unit=unit,
        origin_xyz=tuple(translation[place_of[a]] if a in place_of else 0.0 for a in "xyz"),  # type: ignore[arg-type]
        says="" if unit else f"the units of its axes are {sorted(map(str, units))}",
        notes=() if "z" in names else (f"{path.name}: {NO_THICKNESS}",),
    )  # fmt: skip


def _scale_and_translation(
    multiscale: dict[str, Any], dataset: dict[str, Any], num_axes: int
) -> tuple[list[float] | None, list[float]]:
    """Scale (None where there is none) and translation of one level: the level's own, then the image's."""
    scale, translation, scaled = [1.0] * num_axes, [0.0] * num_axes, False
    for step in [
        *dataset.get("coordinateTransformations", ()),
        *multiscale.get("coordinateTransformations", ()),
    ]:
        if step["type"] == "scale":
            scaled = True
            scale = [a * float(b) for a, b in zip(scale, step["scale"], strict=True)]
            translation = [a * float(b) for a, b in zip(translation, step["scale"], strict=True)]
        elif step["type"] == "translation":
            translation = [a + float(b) for a, b in zip(translation, step["translation"], strict=True)]
    return (scale if scaled else None), translation


# ---------------------------------------------------------------------- what they share


def _only(path: Path, found: dict[str, tuple[tuple[int, ...], str]]) -> str:
    volumes = [name for name, (shape, _) in found.items() if len(shape) >= 3]
    slices = [name for name, (shape, _) in found.items() if len(shape) == 2]
    if len(volumes or slices) == 1:
        return (volumes or slices)[0]
    raise VolumeError(
        f"{path} holds {len(volumes)} arrays of three axes or more; name one with --dataset NAME. "
        f"It holds {_listed(found)}"
    )


def _listed(found: dict[str, tuple[tuple[int, ...], str]]) -> str:
    lines = [f"{name} {'x'.join(map(str, shape))} {dtype}" for name, (shape, dtype) in found.items()]
    more = f", and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return ", ".join(lines[:_LISTED]) + more if lines else "no arrays"
