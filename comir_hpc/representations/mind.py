"""MIND-SSC: the self-similarity context of intensities, compared by correlation. It needs no training.

Heinrich, Jenkinson, Papiez, Brady and Schnabel, "Towards realtime multimodal fusion for image-guided interventions
using self-similarities", MICCAI 2013. A voxel is described by how alike the patches around it are to each other. Of its
six neighbours, two are compared if they are sqrt(2) steps apart: these are 12 pairs (4 in a single slice). A pair's
channel is exp(-D / V). D is the mean squared difference of the patches about both neighbours, less the smallest one of
the pairs; V is the mean of D over the pairs. Only differences of neighbours enter, and their sign is lost. So a change
of brightness or contrast changes nothing, and neither does its inversion.

The channels look along the axes of the grid: they are not those of another volume that lies turned. So what is kept
here is the intensity, and `self_similarity` is applied after a volume was turned onto the other one's grid, by the
global search for every rotation, and by the refinement at every step (`Features.describe`). It is made on cubic voxels
of the search and of every level of the refinement, so that it describes structures of that level's own scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from comir_hpc.representations.features import Features
from comir_hpc.representations.intensity import Intensity
from comir_hpc.representations.measures import CORRELATION, Measure
from comir_hpc.representations.protocol import Array
from comir_hpc.space.grid import Grid, Triple

_RADIUS = 1  # of a patch, in voxels
_STEP = 1  # distance of the six neighbours, in voxels
# V is kept within these multiples of its mean, as in the authors' code: in empty air it is nearly 0.
_LEAST, _MOST = 1e-3, 1e3
_BYTES_PER_VOXEL = 4 * 12 * 6  # channels of both volumes, and the gradients of one


@dataclass(frozen=True, eq=False)
class Mind(Intensity):
    """Normalised intensities of the first channel, to be described by their self-similarity."""

    # Twelve channels need 15 transforms for a rotation, one channel needs 9: the search takes a coarser grid for them.
    measure: ClassVar[Measure] = replace(CORRELATION, search_grid=0.75)
    origin: ClassVar[str] = "self-similarity of the intensity"
    noun: ClassVar[str] = "self-similarities"
    checked_described: ClassVar[bool] = True

    def features(self, level: int) -> tuple[Features, Array]:
        """Make the intensities that are described once they are turned, and show the same."""
        features, image = super().features(level)
        return replace(features, describe=self_similarity), image

    def represented(self, image: Array, mask: NDArray[np.bool_], grid: Grid) -> Features | None:
        """Take another image, to be described once it is turned."""
        return Features(image[None], mask, grid, describe=self_similarity)

    def working_bytes(self, level: int) -> float:
        """Predict the memory, in bytes, of the channels at the refinement's finest level."""
        z, y, x = self.grid(level).shape_zyx
        return float(_BYTES_PER_VOXEL * min(z * y * x, 128**3))


def self_similarity(image: Array) -> Array:
    """Describe every voxel by the likeness of patches around it.

    Parameters
    ----------
    image : (z, y, x) float32
        Intensities on cubic voxels. Beyond its border the nearest value counts; an axis of one voxel is left out.

    Returns
    -------
    (12, z, y, x) float32, or (4, 1, y, x) for a single slice
        exp(-D / V) of each pair of neighbours, in (0, 1].
    """
    axes = [axis for axis in range(3) if image.shape[axis] > 1]
    margin = [_RADIUS + _STEP if axis in axes else 0 for axis in range(3)]
    padded = np.pad(image.astype(np.float32, copy=False), [(m, m) for m in margin], mode="edge")
    distances = np.stack([_patch_distance(padded, one, other, axes) for one, other in neighbour_pairs(axes)])
    distances -= distances.min(axis=0)
    scale = distances.mean(axis=0)
    typical = float(scale.mean(dtype=np.float64))
    if not typical > 0:
        return np.ones_like(distances)
    distances /= -np.clip(scale, _LEAST * typical, _MOST * typical)
    found: Array = np.exp(distances, out=distances)
    return found


def neighbour_pairs(axes: list[int]) -> list[tuple[Triple, Triple]]:
    """List the pairs of a voxel's neighbours along `axes` that are sqrt(2) steps apart, as offsets in voxels."""
    steps = [tuple(sign * (k == axis) * _STEP for k in range(3)) for axis in axes for sign in (-1, 1)]
    return [
        ((a[0], a[1], a[2]), (b[0], b[1], b[2]))
        for a, b in combinations(steps, 2)
        if sum(x * y for x, y in zip(a, b, strict=True)) == 0
    ]


def _patch_distance(padded: Array, one: Triple, other: Triple, axes: list[int]) -> Array:
    """Average (a - b)^2 over the patches about two neighbours of every voxel."""
    parts = []
    for offset in (one, other):
        cut = tuple(
            slice(_STEP + o, n - _STEP + o) if axis in axes else slice(None)
            for axis, (o, n) in enumerate(zip(offset, padded.shape, strict=True))
        )
        parts.append(padded[cut])
    total = np.square(parts[0] - parts[1])
    for axis in axes:
        length = total.shape[axis] - 2 * _RADIUS
        windows = [total[(slice(None),) * axis + (slice(k, k + length),)] for k in range(2 * _RADIUS + 1)]
        total = sum(windows[1:], start=windows[0])
    mean: Array = total / np.float32((2 * _RADIUS + 1) ** len(axes))
    return mean
