"""A volume in, its representation out: from zarr to zarr, window by window, block by block.

The result depends on volume, model and windows only, not on how the work was split or how often it was stopped
(`windows` says why); done-ness and the writing of whole shards are `cluster`'s. What is decided here is which level of
the pyramid is read, how large a block is, what is kept in the metadata, and when the volume is complete.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from comir_hpc.cluster import BlockResult, build_pyramid, complete_output, open_output, run_blocks
from comir_hpc.config import InferSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.geometry import Block, BlockPlan, Box, Grid, Triple, plan_blocks
from comir_hpc.ledger import Ledger, fingerprint
from comir_hpc.memory import available_bytes, in_words, peak_bytes
from comir_hpc.seams import seam_figure
from comir_hpc.volume import Volume, chunk_and_shard, planned_levels
from comir_hpc.windows import Encoder, NormalisedReader, Sweep, WindowGrid, load_encoder, nearest_level

Progress = Callable[[str, int, int], None]

# Shards of a block along z, y, x. Windows at its faces along z and y are evaluated by both neighbours, so longer is
# faster and takes more memory; along x a sweep hands them on.
_CORE_SHARDS = (2, 2, 1)


@dataclass(frozen=True)
class InferResult:
    """What `infer` did.

    Attributes
    ----------
    path : Path
        The representation.
    grid : Grid
        Of the pyramid level that was read.
    level : int
        That level.
    blocks, computed, missing : int
        Blocks of this part; those it computed; those of all parts that are still to be done.
    seconds, peak_mib : float
        Of this call; the memory is this process's.
    seam : dict or None
        Mean jump between voxels across the borders of blocks and of windows, over that beside them; about 1 where
        nothing is to be seen. None until the last block is done.
    """

    path: Path
    grid: Grid
    level: int
    blocks: int
    computed: int
    missing: int
    seconds: float
    peak_mib: float
    seam: dict[str, float | None] | None

    @property
    def complete(self) -> bool:
        """Whether every part is done and the volume can be used."""
        return self.missing == 0

    @property
    def summary(self) -> str:
        """One line."""
        skipped = f" ({self.blocks - self.computed} were done)" if self.computed < self.blocks else ""
        line = f"{self.path}: {self.grid}; {self.computed} blocks{skipped} in {self.seconds:.1f} s"
        if not self.complete:
            return f"{line}; {self.missing} blocks of other parts are missing, whichever part is last completes it"
        ratio = (self.seam or {}).get("windows")
        return f"{line}; jump across window borders {ratio:.2f} of that inside" if ratio is not None else line


def infer(settings: InferSettings, *, progress: Progress | None = None) -> InferResult:
    """Encode one modality's volume with a trained network.

    Read is the pyramid level whose spacing is nearest to that of the training. Running it again skips finished blocks;
    with ``settings.part`` it does one part of them, and whichever part is the last completes the volume.

    Parameters
    ----------
    progress : callable, optional
        ``progress(what, done, total)``.

    Raises
    ------
    VolumeError
        If the volume has other channels or another spacing than the model, or changes while it is read; if the
        output exists and was made from something else; if blocks fail or the disk is full.
    CheckpointError
        If the model is missing, unfinished, damaged or has no such modality.
    ConfigError
        If the window does not fit the network.
    StopRequested
        After SIGTERM or SIGUSR2; the same call goes on.
    """
    start = time.perf_counter()
    job = _Job.of(settings)
    ledger = Ledger(settings.out, fingerprint(**job.record))
    number, parts = settings.part
    out = open_output(
        settings.out, ledger, job.create, record=job.record, overwrite=settings.overwrite, parts=parts
    )
    plan = job.plan(out)
    ran = run_blocks(
        plan, plan.part(number, parts), _Work(job), ledger,
        workers=settings.workers, cluster=settings.cluster, verify=settings.verify,
        progress=progress, what=f"infer {settings.out.name}",
    )  # fmt: skip
    if ran.computed:
        job.require_unchanged()
    missing = complete_output(out, plan, ledger, lambda: _finish(out, job, plan, ledger), parts=parts)
    return InferResult(
        path=settings.out, grid=out.grid, level=job.level, blocks=ran.blocks, computed=ran.computed, missing=missing,
        seconds=time.perf_counter() - start, peak_mib=peak_bytes() / 2**20,
        seam=None if missing else Volume.open(settings.out).metadata.get("seam"),
    )  # fmt: skip


def plan_infer(settings: InferSettings) -> dict[str, Any]:
    """What `infer` would do and need; one window a thread is evaluated to tell the time.

    Raises
    ------
    VolumeError, CheckpointError, ConfigError
        As `infer`, before it writes.
    """
    job = _Job.of(settings)
    shape = job.windows.shape_zyx
    _, shard = chunk_and_shard(shape, settings.chunk, settings.shard)
    plan = plan_blocks(shape, shard, core_zyx=_core(settings, shape, shard))
    part = plan.part(*settings.part)
    evaluations = _evaluations(job.windows, plan)
    per_window = _calibrate(job.encoder, job.windows)
    files, num_bytes = _output_files_and_bytes(job, settings)
    share = len(part) / len(plan)
    return {
        "source": str(settings.zarr),
        "level": job.level,
        "grid": str(job.grid),
        "model": f"{settings.model}, {settings.modality}, step {job.encoder.step}",
        "precision": f"{job.encoder.precision} on {job.encoder.device}",
        "windows": len(job.windows),
        "window": " x ".join(map(str, job.windows.window_zyx)),
        "evaluations_at_most": evaluations,
        "blocks": len(plan),
        "block": " x ".join(map(str, plan.core_zyx)),
        "blocks_of_this_part": len(part),
        "workers": settings.workers,
        "peak_memory": in_words(settings.workers * (peak_bytes() + _block_bytes(job, plan))),
        "available_memory": in_words(available_bytes()),
        "disk_at_most": in_words(num_bytes),
        "files_at_most": files,
        "seconds_a_window": round(per_window, 4),
        "seconds_at_most": round(evaluations * share * per_window, 1),
    }


# ---------------------------------------------------------------------- the job


class _Job:
    """Volume, encoder and windows, found to fit each other before anything is written."""

    def __init__(self, settings: InferSettings, volume: Volume, encoder: Encoder, level: int) -> None:
        self.settings, self.volume, self.encoder, self.level = settings, volume, encoder, level
        self.grid = volume.level_grid(level)
        self.reader = NormalisedReader(volume, level)
        self.windows = encoder.windows(
            self.grid.shape_zyx, window=settings.window, overlap=settings.overlap, blend=settings.blend
        )

    @classmethod
    def of(cls, settings: InferSettings) -> _Job:
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
            "core_zyx": list(_core(settings, self.grid.shape_zyx, shard)),
        }
        return Volume.create(
            path, self.grid, np.dtype(settings.dtype), channels=self.encoder.latent_channels,
            kind="representation", chunk=settings.chunk, shard=settings.shard, metadata=metadata,
        )  # fmt: skip

    def plan(self, out: Volume) -> BlockPlan:
        return plan_blocks(out.grid.shape_zyx, out.shard_zyx, core_zyx=out.metadata["core_zyx"])

    def require_unchanged(self) -> None:
        if self.volume.fingerprint() != self.source_fingerprint:
            raise VolumeError(
                f"{self.volume.path} changed while it was read; run the same command again with --overwrite when it is "
                "at rest"
            )


def _core(settings: InferSettings, shape: Triple, shard: Triple) -> Triple:
    if settings.core is not None:
        return (settings.core,) * 3
    z, y, x = [s if s >= n else k * s for k, s, n in zip(_CORE_SHARDS, shard, shape, strict=True)]
    return z, y, x


class _Work:
    """Encodes one block; a worker process loads the network and opens the volume itself."""

    def __init__(self, job: _Job) -> None:
        self.settings = job.settings
        self._job: _Job | None = job

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_job": None}

    @cached_property
    def sweep(self) -> Sweep:
        job = self._job or _Job.of(self.settings)
        background = job.reader.background if self.settings.skip_background else None
        return Sweep(job.encoder, job.reader, job.windows, background=background, batch=self.settings.batch)

    def __call__(self, block: Block) -> BlockResult:
        start, sweep = time.perf_counter(), self.sweep
        before = sweep.evaluated, sweep.skipped
        encoded = sweep.encode(block.write)
        values = _stored(encoded, self.settings, block.write)
        note = {
            "seconds": round(time.perf_counter() - start, 3),
            "peak_mib": round(peak_bytes() / 2**20),
            "windows": sweep.evaluated - before[0],
            "empty": sweep.skipped - before[1],
            "range": [[float(c.min()), float(c.max())] for c in values],
        }
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


def _finish(out: Volume, job: _Job, plan: BlockPlan, ledger: Ledger) -> None:
    notes = list(ledger.notes().values())
    ranges = np.array([note["range"] for note in notes])
    build_pyramid(out, plan, ledger)
    out.finish(
        seam=seam_figure(out, {"blocks": _block_faces(plan), "windows": _window_faces(job.windows)}),
        value_range=np.stack([ranges[..., 0].min(axis=0), ranges[..., 1].max(axis=0)], axis=1).tolist(),
        measured={
            "block_seconds": round(sum(note["seconds"] for note in notes), 3),
            "peak_mib": max(note["peak_mib"] for note in notes),
            "windows": sum(note["windows"] for note in notes),
            "empty_windows": sum(note["empty"] for note in notes),
        },
    )


def _block_faces(plan: BlockPlan) -> tuple[list[int], list[int], list[int]]:
    z, y, x = (list(range(c, n, c)) for c, n in zip(plan.core_zyx, plan.shape_zyx, strict=True))
    return z, y, x


def _window_faces(windows: WindowGrid) -> tuple[list[int], list[int], list[int]]:
    z, y, x = (
        sorted({p for s in starts for p in (s, s + w) if 0 < p < n})
        for starts, w, n in zip(windows.starts, windows.window_zyx, windows.shape_zyx, strict=True)
    )
    return z, y, x


# ---------------------------------------------------------------------- the prediction


def _evaluations(windows: WindowGrid, plan: BlockPlan) -> int:
    """Windows evaluated in all, those at faces between rows of blocks several times."""
    z, y, _ = (
        sum(
            sum(a < min(b + c, n) and a + w > b for a in starts)
            for b in range(0, n, c)
        )
        for starts, w, n, c in zip(windows.starts, windows.window_zyx, plan.shape_zyx, plan.core_zyx, strict=True)
    )  # fmt: skip
    return z * y * len(windows.starts[2])


def _calibrate(encoder: Encoder, windows: WindowGrid) -> float:
    """Seconds a window, with as many at work as there are threads."""
    count = 2 * torch.get_num_threads() if encoder.device.type == "cpu" else 8
    shape = windows.window_zyx
    row = Box((0, 0, 0), (*shape[:2], shape[2] * count))
    side_by_side = encoder.windows(row.shape, window=max(shape), overlap=0.0)
    values = np.random.default_rng(0).standard_normal((encoder.in_channels, *row.shape)).astype(np.float32)

    def seconds() -> float:
        start = time.perf_counter()
        encoder.encode(lambda box: values[(slice(None), *box.slices)], side_by_side, row)
        return (time.perf_counter() - start) / len(side_by_side)

    seconds()  # the first evaluation also prepares kernels
    return seconds()


def _block_bytes(job: _Job, plan: BlockPlan) -> int:
    """Arrays of one block: what one step of windows reads, their sums, the voxels being written and compressed."""
    window, shape = job.windows.window_zyx, plan.shape_zyx
    core = [min(c, n) for c, n in zip(plan.core_zyx, shape, strict=True)]
    face = math.prod(min(c + 2 * w, n) for c, w, n in zip(core[:2], window, shape, strict=False))
    # Two steps of input while one is joined to the next, read and normalised.
    read = 2 * face * window[2] * job.volume.num_channels * (8 + job.volume.dtype.itemsize)
    sums = 4 * math.prod(core[:2]) * (core[2] + 2 * window[2])
    # One block is written while the next is computed.
    stored = math.prod(core) * (4 + 3 * np.dtype(job.settings.dtype).itemsize)
    return read + job.encoder.latent_channels * (sums + stored)


def _output_files_and_bytes(job: _Job, settings: InferSettings) -> tuple[int, int]:
    files, num_bytes = 1, 0
    for factors in planned_levels(job.grid):
        shape = job.grid.downsampled(factors).shape_zyx
        _, shard = chunk_and_shard(shape, settings.chunk, settings.shard)
        files += 1 + job.encoder.latent_channels * len(plan_blocks(shape, shard))
        num_bytes += math.prod(shape) * job.encoder.latent_channels * np.dtype(settings.dtype).itemsize
    return files, num_bytes
