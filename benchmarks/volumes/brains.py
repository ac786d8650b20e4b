"""A volume of any size that compresses like a real one: the embedded brain, enlarged, tiled and given a camera's noise.

Zeros flatter every store and pure noise none. Here the background is a camera's offset with read noise, and the
specimen has shot noise that grows with the root of its brightness, in 16 bits of which 12 are used.
"""

from __future__ import annotations

import nibabel
import numpy as np
from numpy.typing import NDArray

from comir_hpc.data.embedded import embedded_volume

_ENLARGED = 2
_OFFSET, _GAIN, _READ_NOISE = 100.0, 12.0, 3.0


def brains(shape_zyx: tuple[int, int, int], *, seed: int = 0) -> NDArray[np.uint16]:
    """Tiled brains (z, y, x), uint16; every slice of its own noise, so that no tile equals another."""
    image = nibabel.load(embedded_volume("t1w"))
    tile = np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0)
    for axis in range(3):
        tile = tile.repeat(_ENLARGED, axis)
    rng = np.random.default_rng(seed)
    rows, columns = (np.arange(n) % m for n, m in zip(shape_zyx[1:], tile.shape[1:], strict=True))
    volume = np.empty(shape_zyx, dtype=np.uint16)
    for z, plane in enumerate(volume):
        clean = _GAIN * tile[z % len(tile)][np.ix_(rows, columns)]
        noise = rng.standard_normal(clean.shape, dtype=np.float32) * np.sqrt(_READ_NOISE**2 + clean / 4)
        plane[...] = np.clip(np.rint(_OFFSET + clean + noise), 0, 65535)
    return volume
