"""Pictures of one slice: PNG and JPEG, decoded whole."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers.packed import require_possible
from comir_hpc.volumes.readers.raw import cut, shape_of
from comir_hpc.volumes.readers.source import Source, reading, storable

# Pillow's modes that are arrays of numbers as they are; the others (palettes, CMYK, one bit) become colours or greys.
_PLAIN = {"L", "LA", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L", "F"}

_EXIF_ORIENTATION = 0x0112


def picture(path: Path) -> Source:
    """Open a PNG or JPEG file as a single slice; colours are channels.

    Its resolution is not taken: programs write that of a screen or a printer there.
    """
    width, height, own_mode, notes = _header(path)
    mode = _mode(own_mode)
    sample = np.asarray(Image.new(mode, (1, 1)))
    axes = "yxc" if sample.ndim == 3 else "yx"
    shape = shape_of((height, width, *sample.shape[2:]), axes)
    dtype = storable(sample.dtype, path)
    # Greys and palettes are stored in one bit a pixel at the least.
    bits = 1 if own_mode in ("1", "L", "P") else 8 * dtype.itemsize
    require_possible(path, width * height * bits // 8)

    @lru_cache(maxsize=1)
    def values() -> NDArray[Any]:
        with _open(path) as image:
            return np.asarray(image if image.mode == mode else image.convert(mode))

    if path.suffix.lower() != ".png":
        notes = ("JPEG has changed the values of its pixels", *notes)
    return Source(
        path=path, kind="PNG" if path.suffix.lower() == ".png" else "JPEG", shape=shape, dtype=dtype,
        read_box=lambda box: cut(values(), axes, box), files=(path,),
        load_bytes=2 * int(np.prod(shape)) * dtype.itemsize, notes=tuple(f"{path.name}: {note}" for note in notes),
    )  # fmt: skip


def _open(path: Path) -> Image.Image:
    """Open an image of any size that its file can hold: Pillow's own bound is that of web pages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _header(path: Path) -> tuple[int, int, str, tuple[str, ...]]:
    """Read width and height in pixels, Pillow's mode, and notes on what is not used.

    Raises
    ------
    VolumeError
        If it is no picture, or larger than Pillow decodes.
    """
    with reading(path, "picture"):
        try:
            with _open(path) as image:
                return *image.size, image.mode, _unused(image)
        except Image.DecompressionBombError as error:
            raise VolumeError(
                f"{path} claims to be larger than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, the most that is decoded "
                "at once; save it as TIFF or NRRD"
            ) from error


def _unused(image: Image.Image) -> tuple[str, ...]:
    """Note what a picture says and no reader of arrays follows."""
    # Behind the pixels of a PNG, EXIF is found by decoding them all: there it is not looked for.
    known = image.format != "PNG" or "exif" in image.info
    turned = image.getexif().get(_EXIF_ORIENTATION, 1) if known else 1
    frames = getattr(image, "n_frames", 1)
    notes = []
    if turned not in (0, 1):
        notes.append(
            f"EXIF says that it is to be shown turned or mirrored (orientation {turned}): its pixels are read as stored"
        )
    if frames > 1:
        notes.append(f"it holds {frames} pictures: the first one is read")
    return tuple(notes)


def _mode(mode: str) -> str:
    """Return the mode of Pillow in which the pixels are read."""
    if mode in _PLAIN:
        return mode
    return "L" if mode == "1" else "RGB"
