"""What an `infer` reads: volume, encoder and windows, and the blocks that follow from them."""

from __future__ import annotations

import math
from functools import cached_property
from itertools import product
from typing import Self

import numpy as np
from numpy.typing import NDArray

from comir_hpc.config import InferSettings
from comir_hpc.errors import VolumeError
from comir_hpc.geometry import Triple
from comir_hpc.host.places import require_apart
from comir_hpc.padding import Unpadded
from comir_hpc.volume import Volume
from comir_hpc.windows import Encoder, NormalisedReader, WindowGrid, load_encoder, nearest_level

# Shards of a block along z, y, x, at most: longer blocks evaluate fewer windows twice and take more memory.
_CORE_SHARDS = (2, 2, 2)
_COARSE = 1 << 20  # voxels of a level that may be read at once to see where specimen is


class Inputs:
    """Volume, encoder and windows, found to fit each other before anything is written."""

    def __init__(self, settings: InferSettings, volume: Volume, encoder: Encoder, level: int) -> None:
        self.settings, self.volume, self.encoder, self.level = settings, volume, encoder, level
        self.grid = volume.level_grid(level)
        self.reader = NormalisedReader(volume, level)
        self.windows = encoder.windows(
            self.grid.shape_zyx, window=settings.window, overlap=settings.overlap, blend=settings.blend
        )

    @classmethod
    def from_settings(cls, settings: InferSettings) -> Self:
        """Open volume and encoder.

        Raises
        ------
        VolumeError, CheckpointError, ConfigError
            If one of them is missing, or they do not fit each other.
        """
        require_apart(settings.out, settings.zarr)
        volume = Volume.open(settings.zarr)
        encoder = load_encoder(
            settings.model,
            settings.modality,
            device=settings.device,
            precision=settings.precision,
            symmetrise=settings.symmetrise,
        )
        encoder.require_fitting(volume)
        return cls(settings, volume, encoder, nearest_level(volume, encoder.spacing_mm))

    @cached_property
    def source_fingerprint(self) -> str:
        """Of the volume when the job began."""
        return self.volume.fingerprint()

    def require_unchanged(self) -> None:
        """Refuse a volume that is not what it was when the job began.

        Raises
        ------
        VolumeError
            If its fingerprint differs.
        """
        if self.volume.fingerprint() != self.source_fingerprint:
            raise VolumeError(
                f"{self.volume.path} changed while it was read; run the same command again with --overwrite when it is "
                "at rest"
            )


def core_of(settings: InferSettings, windows: WindowGrid, shard: Triple) -> Triple:
    """Voxels of a block along z, y, x: of those of up to 2 x 2 x 2 shards, the one with which the work is done first.

    Windows across faces along z are evaluated by both neighbours, those along y too if other processes do them; along x
    they are handed on. As many blocks as there are processes are done at a time.
    """
    if settings.core is not None:
        return (settings.core,) * 3
    processes = settings.workers * settings.part[1]
    counts = [-(-n // s) for n, s in zip(windows.shape_zyx, shard, strict=True)]

    def cost(shards: tuple[int, ...]) -> tuple[float, int]:
        z, y, _ = (windows.positions(axis, k * shard[axis]) for axis, k in enumerate(shards))
        blocks = math.prod(-(-n // k) for n, k in zip(counts, shards, strict=True))
        return z * y * math.ceil(blocks / processes) / blocks, blocks

    z, y, x = min(
        product(*(range(1, min(n, k) + 1) for n, k in zip(counts, _CORE_SHARDS, strict=True))), key=cost
    )
    return z * shard[0], y * shard[1], x * shard[2]


def coarse_foreground(inputs: Inputs) -> NDArray[np.bool_] | None:
    """Where specimen is, (z, y, x), on the coarsest level of the volume; None if that is too large to look at."""
    coarsest = inputs.volume.level_grid(inputs.volume.num_levels - 1)
    if math.prod(coarsest.shape_zyx) > _COARSE:
        return None
    values = Unpadded(inputs.volume).read(level=inputs.volume.num_levels - 1)
    channels = [inputs.volume.intensity(c).foreground(channel) for c, channel in enumerate(values)]
    found: NDArray[np.bool_] = np.any(channels, axis=0)
    return found
