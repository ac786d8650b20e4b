"""Arrays without a header: in memory, and in .npy files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.readers.raw import RawLayout, cut, shape_of
from comir_hpc.volumes.readers.source import Source, axes_of, reading, storable, upright


def in_memory(array: NDArray[Any], grid: Grid, name: str = "array") -> Source:
    """Make a source of an array (z, y, x) or (c, z, y, x), with the grid that it is given.

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
    with reading(path, "npy array", TokenError, SyntaxError):  # the header is a Python literal
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
