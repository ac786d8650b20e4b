"""Volume, encoder and windows of one `infer`, and the work on one block."""

from __future__ import annotations

import math
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.cluster import BlockResult
from comir_hpc.config import InferSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.geometry import Block, BlockPlan, Box, Triple, plan_blocks
from comir_hpc.padding import Unpadded
from comir_hpc.volume import Volume, chunk_and_shard
from comir_hpc.windows import Encoder, NormalisedReader, Sweep, WindowGrid, load_encoder, nearest_level

# Shards of a block along z, y, x, at most: longer blocks evaluate fewer windows twice and take more memory.
_CORE_SHARDS = (2, 2, 2)
_SAMPLED = 24  # windows that the scale of a quantised representation is taken from
_COARSE = 1 << 20  # voxels of a level that may be read at once to see where specimen is
_HEADROOM = 1.25  # of the largest value in them


class Job:
    """Volume, encoder and windows, found to fit each other before anything is written."""

    def __init__(self, settings: InferSettings, volume: Volume, encoder: Encoder, level: int) -> None:
        self.settings, self.volume, self.encoder, self.level = settings, volume, encoder, level
        self.grid = volume.level_grid(level)
        self.reader = NormalisedReader(volume, level)
        self.windows = encoder.windows(
            self.grid.shape_zyx, window=settings.window, overlap=settings.overlap, blend=settings.blend
        )

    @classmethod
    def of(cls, settings: InferSettings) -> Job:
        """Open volume and encoder.

        Raises
        ------
        VolumeError, CheckpointError, ConfigError
            If one of them is missing, or they do not fit each other.
        """
        if settings.out.resolve() == settings.zarr.resolve():
            raise ConfigError(f"--out is the volume that is read, {settings.zarr}; choose another name")
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

    @cached_property
    def record(self) -> dict[str, Any]:
        """Everything that the voxels and their layout depend on; the split of the work is not part of it."""
        shared = {"window", "overlap", "blend", "dtype", "chunk", "shard", "skip_background"}
        # On a GPU the shape of the batch may change last bits.
        if self.encoder.device.type != "cpu":
            shared.add("batch")
        return {
            "source_fingerprint": self.source_fingerprint,
            "level": self.level,
            "encoder": self.encoder.identity(),
            **self.settings.model_dump(mode="json", include=shared),
        }

    def create(self, path: Path) -> Volume:
        """Make the empty output; what parts and reruns must agree on is decided here and kept in it."""
        settings = self.settings
        _, shard = chunk_and_shard(self.grid.shape_zyx, settings.chunk, settings.shard)
        metadata = {
            "source": {
                "path": str(settings.zarr.resolve()),
                "fingerprint": self.source_fingerprint,
                "level": self.level,
            },
            "model": {"run": str(settings.model.resolve()), **self.encoder.identity()},
            # Whoever begins decides on the blocks: parts and reruns must agree on their numbers.
            "core_zyx": list(core_of(settings, self.windows, shard)),
        }
        integers = np.dtype(settings.dtype).kind == "i"
        return Volume.create(
            path, self.grid, np.dtype(settings.dtype), channels=self.encoder.latent_channels,
            kind="representation", chunk=settings.chunk, shard=settings.shard, metadata=metadata,
            scale=_scale(self, np.iinfo(settings.dtype).max) if integers else None,
        )  # fmt: skip

    def plan(self, out: Volume) -> BlockPlan:
        """Blocks of the output, as whoever made it decided."""
        return plan_blocks(out.grid.shape_zyx, out.shard_zyx, core_zyx=out.metadata["core_zyx"])

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


class Work:
    """Encodes one block; a worker process loads the network and opens the volume itself."""

    def __init__(self, job: Job) -> None:
        self.settings = job.settings
        self._job: Job | None = job

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_job": None}

    @cached_property
    def scale(self) -> NDArray[np.float32] | None:
        """What one step of a quantised output means, (c, 1, 1, 1), as whoever made it decided."""
        kept = Volume.open(self.settings.out, allow_incomplete=True).metadata.get("quantised")
        return np.asarray(kept["scale"], dtype=np.float32)[:, None, None, None] if kept else None

    @cached_property
    def sweep(self) -> Sweep:
        """The windows of this process, in its own copy of the network."""
        job = self._job or Job.of(self.settings)
        background = job.reader.background if self.settings.skip_background else None
        return Sweep(job.encoder, job.reader, job.windows, background=background, batch=self.settings.batch)

    def __call__(self, block: Block) -> BlockResult:
        """Encode one block."""
        sweep = self.sweep
        before = sweep.evaluated, sweep.skipped
        encoded = sweep.encode(block.write)
        note: dict[str, Any] = {
            "windows": sweep.evaluated - before[0],
            "empty": sweep.skipped - before[1],
            "range": [[float(c.min()), float(c.max())] for c in encoded],
        }
        if self.scale is not None:
            values, note["clipped"] = _quantised(encoded, self.scale, self.settings, block.write)
        else:
            values = _stored(encoded, self.settings, block.write)
        return BlockResult(values, note)


def _stored(encoded: NDArray[np.float32], settings: InferSettings, box: Box) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        values = encoded.astype(settings.dtype, copy=False)
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        reason = f"exceed {settings.dtype}" if np.isfinite(encoded).all() else "are not finite"
        raise VolumeError(
            f"{bad} values of the representation {reason} in box {box} of {settings.zarr}; use --dtype float32, or "
            "--precision fp32 if it is set already"
        )
    return values


def _quantised(
    encoded: NDArray[np.float32], scale: NDArray[np.float32], settings: InferSettings, box: Box
) -> tuple[NDArray[Any], int]:
    """The nearest multiples of the scale, and how many values were beyond the largest one."""
    if not np.isfinite(encoded).all():
        raise VolumeError(
            f"values of the representation are not finite in box {box} of {settings.zarr}; use --precision fp32"
        )
    largest = np.iinfo(settings.dtype).max
    steps = np.rint(encoded / scale)
    beyond = int(np.count_nonzero(np.abs(steps) > largest))
    return np.clip(steps, -largest, largest).astype(settings.dtype), beyond


def _scale(job: Job, largest: int) -> list[float]:
    """What one step of an integer means, for each channel, from windows spread over the specimen.

    It depends on volume, model and windows alone, so that every part and every rerun finds the same. Zero, which is
    the background, stays zero.
    """
    peak = np.zeros(job.encoder.latent_channels)
    for box in _sampled(job):
        alone = job.encoder.windows(box.shape, window=job.settings.window, overlap=0.0)
        encoded = job.encoder.encode(
            lambda part, start=box.start: job.reader(part.shifted(start)),  # type: ignore[misc]
            alone,
            Box((0, 0, 0), box.shape),
        )
        peak = np.maximum(peak, np.abs(encoded).max(axis=(1, 2, 3)))
    return [float(np.float32(_HEADROOM * p / largest)) if p > 0 else 1.0 for p in peak]


def _sampled(job: Job) -> list[Box]:
    """Windows of specimen, evenly spread; the coarsest level of the volume says where specimen is."""
    mask = coarse_foreground(job)
    if mask is None or not mask.any():
        mask = np.ones((4, 4, 4), dtype=np.bool_)
    found = np.argwhere(mask)
    shape, window = np.asarray(job.windows.shape_zyx), np.asarray(job.windows.window_zyx)
    middles = (found[:: max(1, len(found) // _SAMPLED)][:_SAMPLED] + 0.5) * shape / mask.shape
    starts = np.clip(np.rint(middles - window / 2), 0, np.maximum(shape - window, 0)).astype(int)
    stride = np.asarray(job.encoder.network.total_stride_zyx)
    corners = dict.fromkeys(map(tuple, (starts // stride * stride).tolist()))
    boxes = [Box(corner, tuple(np.add(corner, window).tolist())) for corner in corners]
    return [box.intersect(Box((0, 0, 0), job.windows.shape_zyx)) for box in boxes]


def coarse_foreground(job: Job) -> NDArray[np.bool_] | None:
    """Where specimen is, (z, y, x), on the coarsest level of the volume; None if that is too large to look at."""
    coarsest = job.volume.level_grid(job.volume.num_levels - 1)
    if math.prod(coarsest.shape_zyx) > _COARSE:
        return None
    values = Unpadded(job.volume).read(level=job.volume.num_levels - 1)
    channels = [job.volume.intensity(c).foreground(channel) for c, channel in enumerate(values)]
    found: NDArray[np.bool_] = np.any(channels, axis=0)
    return found
