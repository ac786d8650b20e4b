"""Zarr stores: OME-Zarr images of any version, volumes of our own, and plain arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box, Triple
from comir_hpc.volumes.readers.choice import listed, only
from comir_hpc.volumes.readers.claims import require_credible
from comir_hpc.volumes.readers.named_axes import axis_letter, named_axes
from comir_hpc.volumes.readers.ngff import placement
from comir_hpc.volumes.readers.raw import cut, shape_of
from comir_hpc.volumes.readers.source import Source, reading, storable
from comir_hpc.volumes.readers.stored_chunks import SparseArray, sparse_note, stored_chunks
from comir_hpc.volumes.volume import Volume, foreign_arrays, foreign_node

MARKS = ("zarr.json", ".zgroup", ".zarray", ".zattrs")
"""Files of which a folder in a zarr store has at least one."""
_DEEPEST_LEVEL = 4  # folders from an image down to the array of one level, at most


def zarr_array(path: Path, dataset: str | None = None) -> Source:
    """Open an image in a zarr store, streamed: OME-Zarr (its finest level), a volume of ours, or a plain array.

    The path may also be that of one level inside an image: it lies where the image's metadata put it.

    Parameters
    ----------
    dataset : str, optional
        Path of an array, of a level or of an image group inside the store.

    Raises
    ------
    VolumeError
        If the store holds several images or arrays and none is named, an image of several time points, or an array
        that claims more than can have been stored.
    """
    with reading(path, "zarr"):
        store, place = _outermost(path, (dataset or "").strip("/"))
        found = _image_of(store, place)
        if found is None and not place:
            place = _only_image(path, foreign_node(store))
            found = _image_of(store, place)
        if found is None:
            _require_no_image(path, store)
            return _plain(path, store, place)
        return _own_level(path, found) if found.own else _ome_zarr(path, found)


# ---------------------------------------------------------------------- which image, which level


@dataclass(frozen=True)
class _Image:
    """One level of a multiscale image: `group` and `level` are paths inside the store."""

    store: Path
    group: str
    attributes: dict[str, Any]
    multiscale: dict[str, Any]
    dataset: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def own(self) -> bool:
        return isinstance(self.attributes.get("comir"), dict) and "grid" in self.attributes["comir"]

    @property
    def place(self) -> str:
        return f"{self.group}/{self.dataset['path']}".strip("/")

    @property
    def number(self) -> int:
        """Number of this level in the pyramid; 0 is the finest."""
        return [d["path"] for d in self.multiscale["datasets"]].index(self.dataset["path"])


def _outermost(path: Path, place: str) -> tuple[Path, str]:
    """Store and place of what the user named: the path of a level inside an image leads up to that image."""
    if _multiscales(dict(foreign_node(path).attrs)):
        return path, place
    # Behind a symbolic link to a level, the image around it would not be found.
    real = Path(os.path.realpath(path))
    for folder in list(real.parents)[:_DEEPEST_LEVEL]:
        if any((folder / mark).is_file() for mark in MARKS):
            inside = f"{real.relative_to(folder)}/{place}".strip("/")
            if _image_of(folder, inside) is not None:
                return folder, inside
    return path, place


def _image_of(store: Path, place: str) -> _Image | None:
    """Find the image that `place` is, or is a level of."""
    root = foreign_node(store)
    parts = [p for p in place.split("/") if p]
    # From the place itself upwards: the innermost image that holds it is the one that is meant.
    for depth in range(len(parts), -1, -1):
        group, level = "/".join(parts[:depth]), "/".join(parts[depth:])
        node = _member(root, group)
        attributes = dict(node.attrs) if node is not None else {}
        for number, multiscale in enumerate(images := _multiscales(attributes)):
            for dataset in multiscale["datasets"]:
                if level in ("", str(dataset["path"]).strip("/")):
                    others = len(images) > 1 and not level
                    note = f"{store.name}: the first of {len(images)} images in one group; name a level of another " \
                        "with --dataset"  # fmt: skip
                    return _Image(
                        store, group, attributes, images[number], dataset, (note,) if others else ()
                    )
    return None


def _require_no_image(path: Path, store: Path) -> None:
    """Refuse an image whose metadata name no level: its arrays alone do not say their axes and places."""
    attributes = dict(foreign_node(store).attrs)
    said = attributes.get("ome", attributes)
    if (
        isinstance(said, dict)
        and "multiscales" in said
        and not any(m["datasets"] for m in _multiscales(attributes))
    ):
        raise VolumeError(
            f"{path}: its OME-Zarr metadata (multiscales) name no array, so axes and place are not known; correct "
            "them, or export it again"
        )


def _member(root: Any, place: str) -> Any:
    if not place:
        return root
    return root.get(place) if hasattr(root, "get") else None


def _multiscales(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    found = attributes.get("ome", attributes).get("multiscales")
    return [dict(entry) for entry in found or ()]


def _only_image(path: Path, root: Any) -> str:
    """Find the place of the one image below a group (bioformats2raw's layout, a plate), ``""`` where there is none.

    Labels that belong to an image do not count beside it.
    """
    images = [name for name, node in _groups(root) if _multiscales(dict(node.attrs))]
    images = [
        n for n in images if not any(n != other and n.startswith(f"{other}/labels/") for other in images)
    ]
    if len(images) > 1:
        more = f", and {len(images) - 20} more" if len(images) > 20 else ""
        raise VolumeError(
            f"{path} holds {len(images)} images: {', '.join(images[:20])}{more}; name one with --dataset NAME"
        )
    return images[0] if images else ""


def _groups(root: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(root, "members"):
        yield from ((n, m) for n, m in sorted(root.members(max_depth=None)) if hasattr(m, "members"))


# ---------------------------------------------------------------------- opening


def _array(path: Path, store: Path, place: str) -> Any:
    array = _member(foreign_node(store), place)
    if array is None or not hasattr(array, "chunks"):
        raise VolumeError(
            f"{path}: its metadata name the array {place!r}, which is missing; copy or export it again"
        )
    folder = store / place if place else store
    require_credible(
        path, array.shape, array.dtype, getattr(array, "shards", None) or array.chunks,
        lambda enough: _count_files(folder, enough),
    )  # fmt: skip
    return array


def _count_files(folder: Path, enough: int) -> int:
    """Count the chunk files of an array, up to `enough`."""
    count = 0
    for _, _, names in os.walk(folder):
        count += sum(name not in MARKS for name in names)
        if count >= enough:
            return enough
    return count


def _stored(path: Path, store: Path, place: str, array: Any) -> tuple[Any, tuple[str, ...]]:
    """Return what reads an array without asking for chunks that are not there, and a note where there are such."""
    stored = stored_chunks(store / place if place else store, len(array.shape))
    if stored is None:
        return array, ()
    sparse = SparseArray(array, stored)
    note = sparse_note(path.name, sparse)
    return (sparse if note else array), note


def _reader(array: Any, axes: str) -> Callable[[Box], NDArray[Any]]:
    return lambda box: cut(array, axes, box)


def _chunks(array: Any, axes: str) -> Triple:
    _, z, y, x = shape_of(array.chunks, axes)
    return z, y, x


def _files(path: Path, store: Path, group: str) -> tuple[Path, ...]:
    """Return the files that the content depends on: what was named, and the metadata that place it."""
    marks = (store / group / mark for mark in MARKS)
    return (path, *(m for m in marks if m.is_file() and path != store))


def _plain(path: Path, store: Path, place: str) -> Source:
    arrays = {name: (tuple(a.shape), str(a.dtype)) for name, a in foreign_arrays(foreign_node(store))}
    name = place or ("" if "" in arrays else only(path, arrays))
    if name not in arrays:
        raise VolumeError(f"{path} has no array or image {name!r}; it holds {listed(arrays)}")
    array = _array(path, store, name)
    axes, notes = named_axes(_dimension_names(array), array.shape, path, "dimension names")
    stored, missing = _stored(path, store, name, array)
    return Source(
        path=path, kind="zarr", shape=shape_of(array.shape, axes), dtype=storable(array.dtype, path),
        read_box=_reader(stored, axes), files=(path,), atom_zyx=_chunks(array, axes), notes=(*notes, *missing),
    )  # fmt: skip


def _dimension_names(array: Any) -> list[str]:
    """Return the names that the array itself has: zarr v3 has a place for them, xarray writes them beside v2."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    return [str(name or "") for name in names]


def _require_same_order(path: Path, names: list[str], axes: str) -> None:
    """Refuse an array whose own names give its spatial axes another order than the image's metadata."""
    own = dict(enumerate(map(axis_letter, names)))
    if any(letter in "zyx" and own.get(n) not in (None, "", letter) for n, letter in enumerate(axes)):
        raise VolumeError(
            f"{path}: its metadata order the axes ({', '.join(axes)}), its array names them ({', '.join(names)}); "
            "correct one of them"
        )


def _ome_zarr(path: Path, image: _Image) -> Source:
    array = _array(path, image.store, image.place)
    found = placement(path, image.multiscale, image.dataset, tuple(int(n) for n in array.shape))
    _require_same_order(path, _dimension_names(array), found.axes)
    labels = "image-label" in image.attributes.get("ome", image.attributes)
    note = f"{path.name}: these are labels: --labels keeps them from being averaged"
    stored, missing = _stored(path, image.store, image.place, array)
    return Source(
        path=path, kind="OME-Zarr", shape=shape_of(array.shape, found.axes), dtype=storable(array.dtype, path),
        read_box=_reader(stored, found.axes), files=_files(path, image.store, image.group),
        atom_zyx=_chunks(array, found.axes), spacing_zyx=found.spacing_zyx, unit=found.unit,
        origin_xyz=found.origin_xyz, direction=found.direction, says=found.says,
        notes=(*image.notes, *found.notes, *((note,) if labels else ()), *missing),
    )  # fmt: skip


def _own_level(path: Path, image: _Image) -> Source:
    """Make a source of one level of a volume that this package wrote: its grid knows more than the metadata."""
    _array(path, image.store, image.place)
    # The standard's metadata alone would lose the direction: OME-Zarr 0.5 has no place for one.
    volume = Volume.open(image.store / image.group)
    grid, level = volume.level_grid(image.number), image.number
    array = foreign_node(image.store / image.place)
    if tuple(array.shape[1:]) != grid.shape_zyx:
        raise VolumeError(
            f"{path}: level {level} has {tuple(array.shape[1:])} voxels (z, y, x), its grid says {grid.shape_zyx}; run "
            "the command that wrote it again"
        )
    kind = volume.metadata["kind"]
    note = f"{path.name}: these are labels: --labels keeps them from being averaged"
    return Source(
        path=path, kind="OME-Zarr", shape=(volume.num_channels, *grid.shape_zyx), dtype=np.dtype(volume.dtype),
        read_box=lambda box: volume.read(box, level=level), files=_files(path, image.store, image.group),
        spacing_zyx=grid.spacing_zyx, unit=grid.unit, origin_xyz=grid.origin_xyz, direction=grid.direction,
        atom_zyx=_chunks(array, "czyx"), notes=(note,) if kind == "labels" else (),
    )  # fmt: skip
