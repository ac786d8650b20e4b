"""What an `infer` reads: volume, encoder, working grid and windows, and the blocks that follow from them."""

from __future__ import annotations

import math
from functools import cached_property
from itertools import product
from typing import Self

from comir_hpc.blocks.job import require_same
from comir_hpc.config.infer import InferSettings
from comir_hpc.host.places import require_apart
from comir_hpc.representations.encoding.encoder import Encoder
from comir_hpc.representations.encoding.grid import WindowGrid
from comir_hpc.representations.encoding.loading import load_encoder
from comir_hpc.representations.encoding.reader import NormalisedReader
from comir_hpc.representations.working import WorkingGrids
from comir_hpc.runs.model import read_model
from comir_hpc.space.grid import Triple
from comir_hpc.volumes.volume import Volume

# Shards of a block along z, y, x, at most: longer blocks evaluate fewer windows twice and take more memory.
_CORE_SHARDS = (2, 2, 2)


class Inputs:
    """Volume, encoder and windows, found to fit each other before anything is written."""

    def __init__(
        self, settings: InferSettings, volume: Volume, encoder: Encoder, working: WorkingGrids
    ) -> None:
        self.settings, self.volume, self.encoder = settings, volume, encoder
        self.reader = NormalisedReader(volume, working.grid(volume, 0))
        self.grid, self.level = self.reader.seen.grid, self.reader.seen.level
        self.notes = tuple(working.notes_on(volume, 0))
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
        working = WorkingGrids.for_model(read_model(settings.model), (volume,), settings.spacing)
        return cls(settings, volume, encoder, working)

    @cached_property
    def source_fingerprint(self) -> str:
        """Return the fingerprint that the volume had when the job began."""
        return self.volume.fingerprint()

    def require_unchanged(self) -> None:
        """Refuse a volume that is not what it was when the job began.

        Raises
        ------
        VolumeError
            If its fingerprint differs.
        """
        require_same(self.volume, self.source_fingerprint)


def core_of(settings: InferSettings, windows: WindowGrid, shard: Triple) -> Triple:
    """Choose the voxels of a block along z, y, x.

    Blocks of up to 2 x 2 x 2 shards are compared; the one with which the work is done first is taken.

    Windows across faces along z are evaluated by both neighbours, those along y too if other processes do them; along x
    they are handed on. As many blocks as there are processes are done at a time.
    """
    if settings.core is not None:
        return (settings.core,) * 3
    processes = settings.workers * settings.part[1]
    counts = [-(-n // s) for n, s in zip(windows.shape_zyx, shard, strict=True)]

    def cost(shards: tuple[int, ...]) -> tuple[float, int]:
        # Along x nothing is evaluated twice, whatever the size: a sweep hands windows on.
        z, y, _ = (windows.positions(axis, k * shard[axis]) for axis, k in enumerate(shards))
        blocks = math.prod(-(-n // k) for n, k in zip(counts, shards, strict=True))
        return z * y * math.ceil(blocks / processes) / blocks, blocks

    z, y, x = min(
        product(*(range(1, min(n, k) + 1) for n, k in zip(counts, _CORE_SHARDS, strict=True))), key=cost
    )
    return z * shard[0], y * shard[1], x * shard[2]
