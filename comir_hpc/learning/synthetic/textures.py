"""Lend real volumes to made-up pairs: the anatomy is real, both contrasts are random."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from comir_hpc.learning.synthetic.fields import Floats, sampled
from comir_hpc.space.grid import Triple
from comir_hpc.volumes.volume import Volume

_BLURRED = (1.0, 1.5, 2.0, 3.0)  # sizes of a voxel for which a low-passed copy is kept
_SPECIMEN = 0.08  # brightness, as a share of the brightest, from which a patch may be centred on a voxel


@dataclass(frozen=True, eq=False)
class Texture:
    """Volumes of one specimen on one grid, with values from 0 to 1.

    Attributes
    ----------
    maps : tuple of (1, V, Z, Y, X) tensors
        All volumes, low-passed for each size of `_BLURRED`.
    places : (N, 3)
        Voxels that show the specimen.
    """

    maps: tuple[Tensor, ...]
    places: Floats

    @classmethod
    def from_values(cls, values: Floats) -> Texture:
        """Take volumes (V, z, y, x) on one grid of cubic voxels, any unit; what is 0 is air."""
        top = np.percentile(values, 99.9, axis=(1, 2, 3), keepdims=True)
        scaled = np.clip(values / np.maximum(top, 1e-6), 0, 1).astype(np.float32)
        maps = []
        for size in _BLURRED:
            # What is missing between the blur of voxels of size 1 and that of voxels of this size: variances add up.
            sigma = 0.5 * np.sqrt(size**2 - 1)
            maps.append(np.stack([ndimage.gaussian_filter(one, sigma) if sigma else one for one in scaled]))
        places = np.argwhere((scaled > _SPECIMEN).any(axis=0)).astype(np.float32)
        return cls(tuple(torch.from_numpy(one[None]) for one in maps), places)

    @property
    def count(self) -> int:
        """Number of volumes."""
        return int(self.maps[0].shape[1])

    @property
    def shape_zyx(self) -> Triple:
        """Voxels along each axis."""
        z, y, x = self.maps[0].shape[2:]
        return z, y, x

    def centre(self, rng: np.random.Generator, scale: float) -> Floats:
        """Draw where a patch lies: on the specimen, and the nearer to its middle the larger the voxels are."""
        place = self.places[rng.integers(len(self.places))]
        middle = (np.asarray(self.shape_zyx, dtype=np.float32) - 1) / 2
        return np.asarray(middle + (place - middle) / np.float32(max(1.0, scale)), dtype=np.float32)

    def sample(self, points: Floats, centre: Floats, scale: float) -> Floats:
        """Interpolate all volumes at points (z, y, x, 3) around a centre, (V, z, y, x); air lies beyond the grid."""
        size = max(number for number, least in enumerate(_BLURRED) if least <= max(1.0, scale))
        sides = np.asarray(self.shape_zyx, dtype=np.float32) - 1
        return sampled(self.maps[size], 2 * (points + centre) / sides - 1, padding="zeros")


@cache
def load_textures(paths: tuple[Path, ...]) -> tuple[Texture, ...]:
    """Read the volumes that lend their anatomy; the embedded brain pair if none is named.

    Parameters
    ----------
    paths : tuple of Path
        Stores of `comir-hpc ingest` with cubic voxels. Each is a specimen of its own.

    Raises
    ------
    VolumeError
        If a store cannot be read.
    """
    if not paths:
        return (Texture.from_values(_embedded()),)
    return tuple(Texture.from_values(_isotropic(Volume.open(path))) for path in paths)


def _embedded() -> Floats:
    from comir_hpc.data.embedded import (  # it loads SimpleITK, which a training does not need
        EMBEDDED,
        embedded_volume,
    )

    images: list[Any] = [nibabel.load(embedded_volume(name)) for name in EMBEDDED]
    return np.stack([np.asarray(one.dataobj, dtype=np.float32).transpose(2, 1, 0) for one in images])


def _isotropic(volume: Volume) -> Floats:
    """Read a volume's first channel as brightness above its darkest, on cubic voxels."""
    intensity = volume.intensity()
    values = np.clip(volume.read(volume.grid.box)[0].astype(np.float32) - intensity.low, 0, None)
    spacing = np.asarray(volume.grid.spacing_mm)
    return np.asarray(ndimage.zoom(values, spacing / spacing.max(), order=1)[None], dtype=np.float32)
