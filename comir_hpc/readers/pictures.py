"""Pictures of one slice: PNG and JPEG, decoded whole."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from comir_hpc.readers.source import Source, cut, reading, shape_of, storable

# Pillow's modes that are arrays of numbers as they are; the others (palettes, CMYK, one bit) become colours or greys.
_PLAIN = {"L", "LA", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L", "F"}


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

    notes = ("JPEG has changed the values of its pixels",) if path.suffix.lower() != ".png" else ()
    return Source(
        path=path, kind="PNG" if path.suffix.lower() == ".png" else "JPEG", shape=shape, dtype=dtype,
        read_box=lambda box: cut(values(), axes, box), files=(path,),
        load_bytes=2 * int(np.prod(shape)) * dtype.itemsize, notes=tuple(f"{path.name}: {note}" for note in notes),
    )  # fmt: skip


def _mode(mode: str) -> str:
    """Pillow's mode that the pixels are read in."""
    if mode in _PLAIN:
        return mode
    return "L" if mode == "1" else "RGB"
