"""A displacement field that lies in a store and is read box by box, so that its size does not matter.

It acts on coordinates along the axes of its own lattice, as every field of OME-NGFF does (`conventions.ngff_fields`).
A scene turns world points into these and back. Between its points the field is trilinear, and outside of the lattice
nothing is displaced.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.space.grid import Box, FloatArray, Grid, Triple
from comir_hpc.transforms.composite import Composite
from comir_hpc.transforms.protocol import PointMap

if TYPE_CHECKING:
    from comir_hpc.transforms.itk import ItkTransform
    from comir_hpc.volumes.volume import Volume

FIELD_KEY = "comir_field"
"""Entry of the attributes of a store that holds a field and the scene that says how it is used."""
KIND = "displacements"
"""Kind of a store that holds a field, in its own metadata."""
_CELL = 32  # lattice points along each side of what is read at once
_SAMPLED = 9  # points along each side of a grid that is looked up in the lattice
_KEPT = 27  # boxes of the lattice that are kept: a block of voxels and its neighbours


class StoredField(PointMap):
    """A displacement field in a store of ours: three channels (z, y, x) in mm along the axes of its lattice.

    Parameters
    ----------
    path : Path
        Folder of the store.

    Raises
    ------
    RegistrationError
        If it is not finished, damaged, or no field.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.volume = _opened(path)
        self._cells: OrderedDict[Triple, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def apply(self, points_mm: ArrayLike) -> FloatArray:
        """Displace points (..., 3): (z, y, x) in mm from the first point of the lattice, along its axes."""
        points = np.asarray(points_mm, dtype=np.float64)
        flat = points.reshape(-1, 3)
        index = flat / np.asarray(self.volume.grid.spacing_mm)
        moved = flat.copy()
        inside = np.flatnonzero(self._covers(index))
        cells = (
            np.maximum(np.floor(index[inside]), 0).astype(np.int64) // _CELL
        )  # the fading before the first point
        numbers = np.ravel_multi_index(tuple(cells.T), self._counts)
        order = np.argsort(numbers, kind="stable")
        first = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        # A cell after the other: only the part of the field that the points need is read.
        for group in np.split(order, first[1:]) if len(order) else ():
            z, y, x = (int(n) for n in cells[group[0]])
            chosen = inside[group]
            # One point of zeros lies before the cell's first one, and one after its last.
            place = (index[chosen] - np.array([z, y, x]) * _CELL + 1).T
            for axis, one in enumerate(self._cell((z, y, x))):
                moved[chosen, axis] += ndimage.map_coordinates(one, place, order=1, mode="nearest")
        return moved.reshape(points.shape)

    def covers(self, points_mm: ArrayLike) -> NDArray[np.bool_]:
        """Say which points (..., 3) lie within the lattice; the others are not displaced."""
        return self._covers(np.asarray(points_mm, dtype=np.float64) / np.asarray(self.volume.grid.spacing_mm))

    def loaded(self) -> ItkTransform:
        """Read the whole field, as ITK keeps it.

        Raises
        ------
        RegistrationError
            If it does not fit into memory.
        """
        from comir_hpc.transforms.conventions.ngff_fields import read_displacements

        return read_displacements(self.path, "linear")

    @property
    def _counts(self) -> Triple:
        z, y, x = (-(-n // _CELL) for n in self.volume.grid.shape_zyx)
        return z, y, x

    def _covers(self, index: FloatArray) -> NDArray[np.bool_]:
        return np.asarray(((index > -1) & (index < self.volume.grid.shape_zyx)).all(axis=-1), dtype=np.bool_)

    def _cell(self, place: Triple) -> NDArray[np.float32]:
        """Read one cell with a point more on each side, (3, z, y, x); zero beyond the lattice."""
        with self._lock:
            if place in self._cells:
                self._cells.move_to_end(place)
                return self._cells[place]
        z, y, x = (p * _CELL for p in place)
        wanted = Box((z, y, x), (z + _CELL, y + _CELL, x + _CELL)).grown((1, 1, 1))
        there = wanted.intersect(self.volume.grid.box)
        values = np.zeros((3, *wanted.shape), dtype=np.float32)
        try:
            values[(slice(None), *there.slices_in(wanted))] = self.volume.read(there)
        except VolumeError as error:
            raise RegistrationError(str(error)) from error
        with self._lock:
            self._cells[place] = values
            while len(self._cells) > _KEPT:
                self._cells.popitem(last=False)
        return values


def in_memory(transform: PointMap) -> PointMap:
    """Return a transform whose fields are in memory, as other tools need them.

    Raises
    ------
    RegistrationError
        If a field does not fit into memory.
    """
    if not any(isinstance(part, StoredField) for part in transform.parts):
        return transform
    return Composite(
        tuple(part.loaded() if isinstance(part, StoredField) else part for part in transform.parts)
    )


def require_over(transform: PointMap, grid: Grid) -> None:
    """Refuse a field that lies elsewhere than the volume: it would displace nothing, without a word.

    Raises
    ------
    RegistrationError
        If no place of the grid comes to lie inside the lattice of a field.
    """
    axes = [np.linspace(-0.5, n - 0.5, _SAMPLED) for n in grid.shape_zyx]
    points = grid.world_mm(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)).reshape(-1, 3)
    for part in transform.parts:
        if isinstance(part, StoredField) and not part.covers(points).any():
            raise RegistrationError(
                f"{part.path} is a field on another grid: no part of the volume, {grid}, lies inside it; expected "
                "the fixed volume that it was made for: give that, or one in the same place, with --like"
            )
        points = part.apply(points)


def is_field(path: Path) -> bool:
    """Say whether a folder is a field that `refine` made, with its scene, finished or not."""
    return FIELD_KEY in _attributes(path)


def is_stored_field(path: Path) -> bool:
    """Say whether a folder is the store of a field's vectors, finished or not."""
    found = _attributes(path).get("comir")
    return isinstance(found, dict) and found.get("kind") == KIND


def _attributes(path: Path) -> dict[str, object]:
    try:
        found = json.loads((path / "zarr.json").read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _opened(path: Path) -> Volume:
    from comir_hpc.volumes.volume import Volume

    try:
        volume = Volume.open(path)
    except VolumeError as error:
        raise RegistrationError(str(error)) from error
    if volume.num_channels != 3 or volume.metadata.get("kind") != KIND:
        raise RegistrationError(
            f"{path} holds {volume.num_channels} channels of kind {volume.metadata.get('kind')}; expected a "
            "displacement field of three that `comir-hpc refine` wrote"
        )
    return volume
