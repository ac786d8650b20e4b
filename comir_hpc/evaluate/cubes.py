"""Place cubes in the specimen, and read them with what is around them.

Axes: n cubes, c image channels, z y x space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from comir_hpc.learning.patches import specimen_mask
from comir_hpc.learning.specimens import Specimen
from comir_hpc.space.grid import Box, Triple

_NEARLY_FULL = 0.8  # a place is good enough with this share of the specimen that the fullest place holds
_SPLINE_REACH = 4  # voxels beyond a turned corner that spline interpolation reads


@dataclass(frozen=True)
class Places:
    """Cubes of one size in one specimen.

    Attributes
    ----------
    starts : tuple of three int
        First voxel (z, y, x) of each cube. It is a multiple of the network's stride, and may lie outside the volume.
    side_zyx : three int
        Sides of every cube in voxels.
    trim_zyx : three int
        Voxels that are cut off each face before anything is compared.
    around_zyx : three int
        Sides, in voxels, of the surroundings that a cube needs to be turned by any angle.
    """

    starts: tuple[Triple, ...]
    side_zyx: Triple
    trim_zyx: Triple
    around_zyx: Triple


def choose_sides(side: int, stride_zyx: Triple, halo_zyx: Triple, *, planar: bool) -> tuple[Triple, Triple]:
    """Choose the sides of a cube, and how much is trimmed off each of its faces; both in voxels (z, y, x).

    The side is rounded up to a multiple of the strides of all axes. A quarter of it is trimmed, or the reach of the
    network where that is less. In the second case no padding is seen at all.
    """
    step = int(np.lcm.reduce(stride_zyx))
    side = -(-side // step) * step
    along = [1 if planar and axis == 0 else side for axis in range(3)]
    trim = [0 if n == 1 else min(halo, n // 4) for n, halo in zip(along, halo_zyx, strict=True)]
    return _triple(along), _triple(trim)


def place_cubes(
    specimen: Specimen, count: int, side_zyx: Triple, trim_zyx: Triple, stride_zyx: Triple
) -> Places:
    """Choose cubes whose cores are full of specimen and far from each other; the same ones every time.

    Parameters
    ----------
    specimen : Specimen
        Specimen made for patches of the size of a trimmed cube, so that it knows the share of specimen in each.
    count : int
        Largest number of cubes.
    side_zyx, trim_zyx : three int
        Sides of a cube, and what is trimmed off each face, in voxels (`choose_sides`).
    stride_zyx : three int
        Stride of the network in voxels. Cubes start at multiples of it, as the windows of `infer` do.
    """
    share = specimen.share
    full = np.argwhere(share.values >= _NEARLY_FULL * share.values.max())
    best = np.unravel_index(int(share.values.argmax()), share.values.shape)
    centres = share.first_zyx + full * share.step_zyx
    chosen = [share.first_zyx + np.asarray(best) * share.step_zyx]
    # The first cube is the fullest. Each next one is as far as possible from all that are chosen already.
    while len(chosen) < min(count, len(full)):
        away = np.linalg.norm(centres[:, None] - np.stack(chosen)[None], axis=-1).min(axis=1)
        if away.max() < max(stride_zyx):
            break  # the specimen is no larger than the cubes placed already
        chosen.append(centres[int(away.argmax())])
    stride = np.asarray(stride_zyx)
    # Rounded to the stride: a cube then pools the same voxels together as the whole volume does.
    starts = [np.rint((centre - (np.asarray(side_zyx) - 1) / 2) / stride) * stride for centre in chosen]
    return Places(tuple(map(_triple, starts)), side_zyx, trim_zyx, _around(side_zyx, specimen))


def read_cubes(
    specimen: Specimen, modality: int, places: Places, side_zyx: Triple
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read cubes about the middles of `places`, as a network sees them, and find where the specimen is.

    Parameters
    ----------
    specimen : Specimen
        The volumes to read from.
    modality : int
        Number of the modality in the specimen.
    places : Places
        Where the cubes lie.
    side_zyx : three int
        Sides of the cubes in voxels: those of the places, or larger by an even number.

    Returns
    -------
    (n, c, z, y, x) float32
        Images, normalised by the volume's statistics, with air outside the volume.
    (n, z, y, x) bool
        Masks of the specimen: True where most neighbours are above the threshold in any channel. `register` masks
        volumes in the same way.
    """
    images, masks = [], []
    for start in places.starts:
        grow = (np.asarray(side_zyx) - np.asarray(places.side_zyx)) // 2
        image, above = _read(specimen, modality, _triple(np.asarray(start) - grow), side_zyx)
        images.append(image)
        masks.append(specimen_mask(torch.from_numpy(above)[None, None])[0, 0].numpy())
    return np.stack(images), np.stack(masks)


def _read(
    specimen: Specimen, modality: int, start: Triple, side_zyx: Triple
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    wanted = Box(start, _triple(np.add(start, side_zyx)))
    inside = wanted.intersect(specimen.grid.box)
    intensities = specimen.intensities[modality]
    image = np.empty((len(intensities), *side_zyx), dtype=np.float32)
    above = np.zeros(side_zyx, dtype=np.bool_)
    for channel, intensity in enumerate(intensities):
        # Air everywhere; the part inside the volume is filled in below.
        image[channel] = intensity.normalise(np.array(intensity.low))
    if inside.size:
        place = inside.slices_in(wanted)
        for channel, values in enumerate(specimen.read((inside,) * len(specimen.volumes))[modality]):
            image[(channel, *place)] = intensities[channel].normalise(values)
            above[place] |= intensities[channel].foreground(values)
    return image, above


def _around(side_zyx: Triple, specimen: Specimen) -> Triple:
    """Find the sides of the ball about a cube's corners, in voxels of each axis.

    They are odd where the cube's are odd, so that the cube lies in the middle of whole voxels.
    """
    spacing, side = np.asarray(specimen.grid.spacing_mm), np.asarray(side_zyx)
    flat = side == 1
    # A corner is half a diagonal from the middle, in whichever direction it is turned.
    diagonal = np.linalg.norm(np.where(flat, 0.0, side * spacing))
    grow = np.ceil((diagonal / spacing - side) / 2 + _SPLINE_REACH)
    return _triple(np.where(flat, 1, side + 2 * grow))


def _triple(values: NDArray[np.generic] | list[int]) -> Triple:
    z, y, x = (int(v) for v in values)
    return z, y, x
