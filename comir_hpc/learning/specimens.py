"""Hold aligned volumes to sample from: their voxels, in memory or read box by box, and where there is specimen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from comir_hpc.config.train import SamplingSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.learning.views import View
from comir_hpc.space.grid import Box, FloatArray, Grid, Triple
from comir_hpc.volumes.padding import Unpadded
from comir_hpc.volumes.volume import Intensity, Volume

# Specimen shares are kept on a lattice of an eighth of a patch: finer costs memory and decides nothing.
_LATTICE = 8


@dataclass(frozen=True, eq=False)
class SpecimenShare:
    """Share of specimen in the axis-aligned patch around each point of a coarse lattice.

    Attributes
    ----------
    values : (z, y, x) float32 in [0, 1]
        Share of the patch's voxels that are specimen. Voxels outside the volume are not.
    step_zyx : (3,) float64
        Distance between lattice points, in voxels.
    first_zyx : (3,) float64
        Position of the first lattice point, in voxels.
    """

    values: NDArray[np.float32]
    step_zyx: FloatArray
    first_zyx: FloatArray


class Specimen:
    """One aligned tuple of volumes at one pyramid level: what is read, and where there is specimen to sample.

    Parameters
    ----------
    volumes : sequence of M Volume
        Volumes of one specimen, one for each modality, aligned in the world. The first one's grid is the specimen's.
    level : int
        Pyramid level of the first volume that is read, and of all volumes on its grid.
    patch_zyx : three int
        Sides of a patch in voxels.
    """

    def __init__(self, volumes: Sequence[Volume], level: int, patch_zyx: Triple) -> None:
        self.volumes = tuple(volumes)
        self.level = level
        self.grid: Grid = volumes[0].level_grid(level)
        self.share = specimen_share(volumes, level, patch_zyx)
        self.intensities: tuple[tuple[Intensity, ...], ...] = tuple(
            tuple(v.intensity(c) for c in range(v.num_channels)) for v in volumes
        )
        self.views = tuple(View.of(v, volumes[0], level) for v in volumes)
        self._unpadded = tuple(Unpadded(v) for v in volumes)
        self._cache: tuple[NDArray[Any], ...] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the levels that are read of all volumes, in their own dtype."""
        return sum(view.num_bytes for view in self.views)

    @property
    def cached(self) -> bool:
        """Whether the volumes are held in memory."""
        return self._cache is not None

    def load(self) -> None:
        """Hold the volumes in memory."""
        self._cache = tuple(
            v.read(level=view.level) for v, view in zip(self._unpadded, self.views, strict=True)
        )

    def read(self, boxes: Sequence[Box]) -> list[NDArray[Any]]:
        """Read a box of each modality's grid, (c, z, y, x), in the volumes' own dtypes; padding is background."""
        if self._cache is not None:
            return [
                values[(slice(None), *box.slices)] for values, box in zip(self._cache, boxes, strict=True)
            ]
        views = zip(self._unpadded, self.views, boxes, strict=True)
        return [v.read(box, level=view.level) for v, view, box in views]


def specimen_share(volumes: Sequence[Volume], level: int, patch_zyx: Triple) -> SpecimenShare:
    """Measure how much of a patch is specimen, wherever its centre lies.

    A voxel is specimen if any modality says so, and if it lies in all volumes. The pyramid level that is read is the
    coarsest one that is fine enough for the lattice. It is read slab by slab, so that a volume larger than memory is
    never held.

    Raises
    ------
    VolumeError
        If no voxel is specimen.
    """
    wanted = np.maximum(1, np.asarray(patch_zyx) // _LATTICE)
    own = np.asarray(volumes[0].level_factors(level))
    ratios = [
        np.asarray(volumes[0].level_factors(i)) // own
        for i in range(level, min(v.num_levels for v in volumes if v.grid.agrees_with(volumes[0].grid)))
    ]
    coarse = max(i for i, ratio in enumerate(ratios) if (ratio <= wanted).all())
    # Blocks of that level's voxels make up the rest of a lattice step.
    block = wanted // ratios[coarse]
    mask = np.concatenate(list(_specimen_slabs(volumes, level + coarse, block)))
    if not mask.any():
        names = ", ".join(str(v.path) for v in volumes)
        raise VolumeError(
            f"{names}: no voxel that lies in all of them is above the foreground threshold, there is no specimen to "
            "learn from; run `comir-hpc ingest` on the right source again"
        )
    step = ratios[coarse] * block
    window = np.maximum(1, np.rint(np.asarray(patch_zyx) / step)).astype(int)
    # The constant is 0: what lies outside the volume is no specimen.
    share = uniform_filter(mask.astype(np.float64), size=window.tolist(), mode="constant")
    # The middle of an even number of blocks is the corner between two of them.
    first = (window % 2) * step / 2 - 0.5
    return SpecimenShare(share.astype(np.float32), step.astype(np.float64), first)


def _specimen_slabs(
    volumes: Sequence[Volume], level: int, block_zyx: NDArray[np.int64]
) -> Iterator[NDArray[np.float32]]:
    """Measure the share of specimen in every block of voxels, (z, y, x) float32, a slab of blocks at a time."""
    depth, height, width = volumes[0].level_grid(level).shape_zyx
    chunk = max(volumes[0].chunk_zyx[0], int(block_zyx[0]))
    # At least a chunk thick, so that few chunks are decompressed twice; and whole blocks, so that none is cut.
    thickness = int(-(-chunk // block_zyx[0]) * block_zyx[0])
    views = [View.of(volume, volumes[0], level) for volume in volumes]
    for start in range(0, depth, thickness):
        box = Box((start, 0, 0), (min(start + thickness, depth), height, width))
        mask = np.zeros(box.shape, dtype=bool)
        known = np.ones(box.shape, dtype=bool)
        for view in views:
            above, inside = view.foreground(box)
            mask |= above
            known &= inside
        # Where one volume ends, there is nothing to compare with, whatever the others show there.
        mask &= known
        pad = [(0, -n % int(b)) for n, b in zip(mask.shape, block_zyx, strict=True)]
        z, y, x = (int(b) for b in block_zyx)
        padded = np.pad(mask, pad)
        blocks = padded.reshape(padded.shape[0] // z, z, padded.shape[1] // y, y, padded.shape[2] // x, x)
        yield blocks.mean(axis=(1, 3, 5), dtype=np.float32)


def prepare_specimens(pairs: Sequence[Sequence[Volume]], settings: SamplingSettings) -> tuple[Specimen, ...]:
    """Find the specimen in training pairs. Hold all volumes in memory if they fit into `cache_mib` (MiB) together.

    Raises
    ------
    VolumeError
        If a volume holds no specimen.
    """
    specimens = tuple(Specimen(volumes, settings.level, settings.patch) for volumes in pairs)
    if sum(specimen.num_bytes for specimen in specimens) <= settings.cache_mib * 2**20:
        for specimen in specimens:
            specimen.load()
    return specimens


def patch_places(specimen: Specimen, settings: SamplingSettings) -> NDArray[np.int64]:
    """Find the lattice points (flat numbers) whose patch holds the share of specimen that the settings ask for.

    Raises
    ------
    ConfigError
        If there is none.
    """
    # With a quota of 0 a patch needs at least a trace of specimen: the smallest positive float32.
    share = specimen.share
    values = share.values
    if settings.within is not None:
        low, high = patch_centres(settings, np.asarray(specimen.grid.shape_zyx))
        lattice = np.moveaxis(np.indices(values.shape), 0, -1) * share.step_zyx + share.first_zyx
        values = np.where(((lattice >= low) & (lattice <= high)).all(axis=-1), values, 0)
    places = np.flatnonzero(values >= max(settings.foreground, float(np.finfo(np.float32).tiny)))
    if not len(places):
        best = float(values.max())
        raise ConfigError(
            f"no patch of {settings.patch} voxels (z, y, x) in {specimen.volumes[0].path} holds "
            f"{settings.foreground:.0%} specimen: the fullest one holds {best:.1%}; lower sampling.foreground "
            "or use a smaller sampling.patch"
        )
    return places


def patch_centres(settings: SamplingSettings, shape_zyx: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
    """Find between which positions a patch's centre may lie, in voxels: in the volume, or so that a box holds it."""
    if settings.within is None:
        return np.full(3, -0.5), shape_zyx.astype(np.float64) - 0.5
    start, stop = (np.asarray(end, dtype=np.float64) for end in settings.within)
    half = np.asarray(settings.patch) / 2
    return start + half - 0.5, stop - half - 0.5
