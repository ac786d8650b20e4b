"""Slices as pictures, PNG and JPEG: one file, or a folder of them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from comir_hpc.errors import VolumeError
from comir_hpc.geometry import Box
from comir_hpc.readers.numbering import NumberedFiles
from comir_hpc.readers.source import Source, cut, reading, shape_of, storable

# Pillow's modes that are arrays of numbers as they are; the others (palettes, CMYK, one bit) become colours or greys.
_PLAIN = {"L", "LA", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L", "F"}
_LOSSY = "JPEG has changed the values of its pixels"


def picture(path: Path) -> Source:
    """Open a PNG or JPEG file as a single slice; colours are channels.

    Its resolution is not taken: programs write that of a screen or a printer there.
    """
    with reading(path, "picture", Image.DecompressionBombError), Image.open(path) as image:
        mode = _mode(image.mode)
        width, height = image.size
    sample = np.asarray(Image.new(mode, (1, 1)))
    axes = "yxc" if sample.ndim == 3 else "yx"
    shape = shape_of((height, width, *sample.shape[2:]), axes)
    dtype = storable(sample.dtype, path)

    @lru_cache(maxsize=1)
    def values() -> NDArray[Any]:
        with Image.open(path) as image:
            return np.asarray(image if image.mode == mode else image.convert(mode))

    notes = (_LOSSY,) if path.suffix.lower() != ".png" else ()
    return Source(
        path=path, kind="PNG" if path.suffix.lower() == ".png" else "JPEG", shape=shape, dtype=dtype,
        read_box=lambda box: cut(values(), axes, box), files=(path,),
        load_bytes=2 * int(np.prod(shape)) * dtype.itemsize, notes=tuple(f"{path.name}: {note}" for note in notes),
    )  # fmt: skip


def picture_folder(path: Path, found: NumberedFiles) -> Source:
    """Open a folder of PNG or JPEG slices of one size as a volume.

    Parameters
    ----------
    found : NumberedFiles
        The slices in their order, and what was left out.

    Raises
    ------
    VolumeError
        If slices differ in size, channels or type.
    """
    first = picture(found.files[0])
    for file in found.files[1:]:
        other = picture(file)
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise VolumeError(
                f"{file} is {other.shape} {other.dtype} (c, z, y, x), the other slices in {path} are {first.shape} "
                f"{first.dtype}; remove it or export the stack again"
            )

    def read(box: Box) -> NDArray[Any]:
        flat = Box((0, *box.start[1:]), (1, *box.stop[1:]))
        return np.concatenate(
            [picture(f).read(flat) for f in found.files[box.start[0] : box.stop[0]]], axis=1
        )

    channels, _, height, width = first.shape
    name = path.resolve().name
    lossy = [f"the slices are JPEG: {_LOSSY}"] if first.kind == "JPEG" else []
    return Source(
        path=path, kind=f"{first.kind} slices", shape=(channels, len(found.files), height, width), dtype=first.dtype,
        read_box=read, files=found.files, atom_zyx=(1, height, width),
        notes=tuple(f"{name}: {note}" for note in (*found.notes("slices"), *lossy)),
    )  # fmt: skip


def _mode(mode: str) -> str:
    """Pillow's mode that the pixels are read in."""
    if mode in _PLAIN:
        return mode
    return "L" if mode == "1" else "RGB"
