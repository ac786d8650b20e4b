"""A file of any format in, an OME-Zarr volume out, block by block.

A block is read, checked, counted into a histogram and written as whole shards; the ledger beside the store says which
are done, so that a stopped run goes on where it was and gives the same bytes. When all are there, the pyramid and
the intensity statistics follow, and only then is the volume marked complete.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.cluster import BlockResult, complete_output, open_output, run_blocks
from comir_hpc.config import IngestSettings
from comir_hpc.errors import ComirError, ConfigError, VolumeError
from comir_hpc.geometry import Block, BlockPlan, Box, Grid, Triple, plan_blocks
from comir_hpc.histogram import Histogram, as_record, constant_intensity, intensity_of
from comir_hpc.ledger import Ledger, fingerprint
from comir_hpc.memory import available_bytes, in_words
from comir_hpc.readers import Source, in_memory, open_source
from comir_hpc.volume import Kind, Volume, chunk_and_shard, planned_levels

Progress = Callable[[str, int, int], None]

_PROGRAM_BYTES = 320 << 20  # measured: the interpreter with its libraries, and what compression holds
_LARGEST_CORE = 256 << 20  # bytes of one block beyond which decoding a page twice is the lesser evil
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE = 24  # voxels along each side of the boxes that a typical value is looked for in


@dataclass(frozen=True)
class IngestResult:
    """What `ingest` did.

    Attributes
    ----------
    blocks, computed : int
        Blocks of the volume (or of this part), and those of them that this call wrote; the others were done before.
    missing : int
        Blocks that other parts have still to do; the volume is complete when it is 0.
    num_bytes : int
        Of the store on disk.
    notes : tuple of str
        What the file left open and how it was taken.
    """

    path: Path
    grid: Grid
    blocks: int
    computed: int
    missing: int
    seconds: float
    num_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def skipped(self) -> int:
        """Blocks that were done already."""
        return self.blocks - self.computed


def ingest(settings: IngestSettings, *, progress: Progress | None = None) -> IngestResult:
    """Write a file of any format as an OME-Zarr volume with a pyramid and intensity statistics.

    Running it again skips the blocks that are done; an unfinished store whose source has changed is begun anew.

    Parameters
    ----------
    progress : callable, optional
        ``progress(what, done, total)``.

    Raises
    ------
    VolumeError
        If the source is missing, damaged, no volume, constant, without a spacing, or changes while it is read; if it
        holds NaN or infinite voxels and no `non_finite` value is given; if it must be held in memory and does not
        fit; if another result is at `out`; if the disk is full.
    """
    return _ingest(open_source(settings.source, settings.dataset), settings, progress)


def ingest_array(
    array: NDArray[Any],
    grid: Grid,
    out: Path,
    *,
    name: str = "array",
    kind: Kind = "image",
    chunk: int = 64,
    shard: int = 256,
    non_finite: float | None = None,
    foreground_above: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> IngestResult:
    """Write an array (z, y, x) or (c, z, y, x) in memory as a volume: `ingest` without a file.

    Raises
    ------
    VolumeError
        As `ingest`.
    """
    if kind == "representation":
        raise ConfigError("kind representation is what `infer` writes; expected image or labels")
    settings = IngestSettings(
        source=Path(name), out=out, kind=kind, chunk=chunk, shard=shard, non_finite=non_finite,
        foreground_above=foreground_above, overwrite=overwrite,
    )  # fmt: skip
    return _ingest(in_memory(array, grid, name), settings, progress)


def plan_ingest(settings: IngestSettings) -> dict[str, Any]:
    """What `ingest` would do and need, from the source's header.

    Raises
    ------
    VolumeError
        As `ingest`, as far as the header tells.
    """
    job = _Job.of(open_source(settings.source, settings.dataset), settings)
    files, num_bytes = job.output_files_and_bytes()
    return {
        "source": f"{settings.source} ({job.source.kind})",
        "channels": job.source.num_channels,
        "grid": str(job.grid),
        "dtype": str(job.source.dtype),
        "read": "block by block" if job.source.streamed else "whole, into memory",
        "blocks": len(job.plan),
        "block": " x ".join(map(str, job.plan.core_zyx)),
        "workers": job.workers,
        "peak_memory": in_words(job.peak_bytes()),
        "available_memory": in_words(job.allowed_bytes()),
        "disk_at_most": in_words(num_bytes),
        "files_at_most": files,
        "notes": list(job.notes),
    }


# ---------------------------------------------------------------------- the job


@dataclass(frozen=True)
class _Job:
    """A source with everything that follows from it and the settings, checked before a byte is written."""

    source: Source
    settings: IngestSettings
    grid: Grid
    plan: BlockPlan
    workers: int
    source_fingerprint: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, source: Source, settings: IngestSettings) -> _Job:
        _require_volume(source)
        grid = source.grid(settings.spacing, settings.unit)
        if settings.non_finite is not None:
            _require_fitting(settings.non_finite, source.dtype)
        _, shard = chunk_and_shard(grid.shape_zyx, settings.chunk, settings.shard)
        plan = plan_blocks(grid.shape_zyx, shard, core_zyx=_core(source, shard))
        notes, workers = source.notes, settings.workers
        if workers > 1 and (not source.streamed or source.digest is not None):
            # Every process would hold the volume; compression runs in threads anyway.
            notes, workers = (*notes, f"{source.kind} is held in memory: one process reads it"), 1
        return cls(source, settings, grid, plan, workers, source.fingerprint(), notes)

    def record(self) -> dict[str, Any]:
        """What the result depends on; kept in the volume's metadata, so that a refusal can name what differs."""
        return {
            "source": str(self.source.path if self.source.digest else self.source.path.resolve()),
            "source_size_and_time": self.source_fingerprint,
            "grid": self.grid.as_dict(),
            **self.settings.model_dump(
                mode="json", include={"dataset", "kind", "chunk", "shard", "non_finite", "foreground_above"}
            ),
        }

    def ledger(self) -> Ledger:
        # A block's number means something only together with the plan.
        return Ledger(self.settings.out, fingerprint(ingest=self.record(), core=self.plan.core_zyx))

    def block_bytes(self) -> int:
        """Bytes of the largest block's voxels."""
        core = [min(c, n) for c, n in zip(self.plan.core_zyx, self.grid.shape_zyx, strict=True)]
        return math.prod(core) * self.source.num_channels * self.source.dtype.itemsize

    def peak_bytes(self) -> int:
        """Predicted memory of all processes: each holds its block, and again while it is packed into shards."""
        return (
            self.source.load_bytes
            + (self.workers > 1) * _PROGRAM_BYTES
            + self.workers * (_PROGRAM_BYTES + 3 * self.block_bytes())
        )

    def allowed_bytes(self) -> int:
        limit = self.settings.max_memory
        return available_bytes() if limit is None else min(available_bytes(), int(limit * 2**30))

    def output_files_and_bytes(self) -> tuple[int, int]:
        """Upper bounds for the store: nothing compresses, and every shard is stored."""
        files, num_bytes = 1, 0
        levels = planned_levels(self.grid)
        for factors in levels:
            shape = self.grid.downsampled(factors).shape_zyx
            _, shard = chunk_and_shard(shape, self.settings.chunk, self.settings.shard)
            files += 1 + self.source.num_channels * len(plan_blocks(shape, shard))
            num_bytes += math.prod(shape) * self.source.num_channels * self.source.dtype.itemsize
        return files, int(num_bytes * 1.01) + files * 4096


def _require_volume(source: Source) -> None:
    """The single place that refuses what has no depth."""
    if 0 in source.shape:
        raise VolumeError(
            f"{source.path}: shape {source.shape} (c, z, y, x) has no voxels; expected a volume"
        )
    if 1 in source.shape_zyx:
        raise VolumeError(
            f"{source.path}: shape {source.shape_zyx} (z, y, x) is a single slice; expected a volume of at least "
            "two voxels along each axis: give the whole stack"
        )


def _require_fitting(value: float, dtype: np.dtype[Any]) -> None:
    if not math.isfinite(value) or (dtype.kind == "f" and abs(value) > float(np.finfo(dtype).max)):
        raise ConfigError(f"--non-finite {value} is not a finite {dtype} value; give one, e.g. 0")


def _core(source: Source, shard: Triple) -> Triple:
    """Voxels of a block: one shard, or as many as hold what the format decodes at once, while that stays small."""
    wide = [s * -(-min(a, n) // s) for s, a, n in zip(shard, source.atom_zyx, source.shape_zyx, strict=True)]
    core: Triple = (wide[0], wide[1], wide[2])
    size = math.prod(min(c, n) for c, n in zip(core, source.shape_zyx, strict=True))
    return core if size * source.num_channels * source.dtype.itemsize <= _LARGEST_CORE else shard


# ---------------------------------------------------------------------- carrying it out


def _ingest(source: Source, settings: IngestSettings, progress: Progress | None) -> IngestResult:
    start = time.perf_counter()
    job = _Job.of(source, settings)
    ledger = job.ledger()
    try:
        volume = _open_output(job, ledger)
        work = _Work(
            settings.source, settings.dataset, settings.non_finite, job.source_fingerprint,
            float(volume.metadata["centre"]), ledger.folder / f"histograms-{ledger.fingerprint}",
            settings.kind == "image", source,
        )  # fmt: skip
        if len(ledger.done()) < len(job.plan) or settings.verify:
            _require_memory(job)
        ran = run_blocks(
            job.plan, job.plan.part(*settings.part), work, ledger, workers=job.workers, cluster=settings.cluster,
            verify=settings.verify, progress=progress, what=f"ingest {settings.out.name}",
        )  # fmt: skip
        if ran.computed:
            _require_unchanged(source, job.source_fingerprint)
        missing = complete_output(
            volume, job.plan, ledger, lambda: _finish(volume, job, work), parts=settings.part[1]
        )
    except OSError as error:
        if isinstance(error, ComirError):  # a request to stop is an InterruptedError, and so an OSError
            raise
        raise VolumeError(f"{settings.out} cannot be written ({error.strerror}); {_room(job)}") from error
    except VolumeError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
            raise VolumeError(f"{error}; {_room(job)}") from error
        raise
    return IngestResult(
        path=settings.out, grid=job.grid, blocks=ran.blocks, computed=ran.computed, missing=missing,
        seconds=time.perf_counter() - start, num_bytes=_stored_bytes(settings.out), notes=job.notes,
    )  # fmt: skip


def _open_output(job: _Job, ledger: Ledger) -> Volume:
    settings = job.settings

    def make(path: Path) -> Volume:
        _require_memory(job)
        return Volume.create(
            path, job.grid, job.source.dtype, channels=job.source.num_channels, kind=settings.kind,
            chunk=settings.chunk, shard=settings.shard, metadata={"centre": _typical_value(job.source)},
        )  # fmt: skip

    overwrite = _nobody_misses(job) or settings.overwrite
    return open_output(
        settings.out, ledger, make, record=job.record(), overwrite=overwrite, parts=settings.part[1]
    )


def _nobody_misses(job: _Job) -> bool:
    """Whether what is at `out` is an unfinished ingest of this very source, by this command alone."""
    out = job.settings.out
    if not out.exists():
        return False
    try:
        found = Volume.open(out, allow_incomplete=True)
    except VolumeError as error:
        raise VolumeError(
            f"{out} exists and is no volume of ours, so it is never replaced; choose another name"
        ) from error
    same = found.metadata.get("made_from", {}).get("source") == job.record()["source"]
    return same and not found.complete and job.settings.part[1] == 1


def _require_memory(job: _Job) -> None:
    needed, allowed = job.peak_bytes(), job.allowed_bytes()
    if needed <= allowed:
        return
    given = " (--max-memory)" if job.settings.max_memory else ""
    remedy = (
        "use fewer --workers or a smaller --shard"
        if job.source.streamed
        else f"{job.source.kind} of this kind cannot be read block by block: store it uncompressed "
        "(NIfTI: gunzip it; NRRD, MetaImage: encoding raw), or use a larger machine"
    )
    raise VolumeError(
        f"{job.source.path} needs {in_words(needed)} of memory, {in_words(allowed)} may be used{given}; {remedy}"
    )


def _require_unchanged(source: Source, before: str) -> None:
    if source.fingerprint() != before:
        raise VolumeError(
            f"{source.path} changed while it was read (size or time); run the same command again when it is at rest"
        )


def _typical_value(source: Source) -> float:
    """Median over nine small boxes: where the bins of wide types are finest."""
    if source.dtype.itemsize <= 2:
        return 0.0
    pieces = []
    for share in (0.25, 0.5, 0.75):
        for across in (0.25, 0.5, 0.75):
            middle = [int(n * s) for n, s in zip(source.shape_zyx, (share, across, 0.5), strict=True)]
            start = tuple(max(0, m - _PROBE // 2) for m in middle)
            stop = tuple(min(n, a + _PROBE) for n, a in zip(source.shape_zyx, start, strict=True))
            values = source.read(Box(start, stop)).astype(np.float64)  # type: ignore[arg-type]
            pieces.append(values[np.isfinite(values)])
    found = np.concatenate(pieces)
    return float(np.float32(np.median(found))) if found.size else 0.0


@lru_cache(maxsize=1)
def _reopened(path: Path, dataset: str | None) -> Source:
    return open_source(path, dataset)


@dataclass(frozen=True)
class _Work:
    """Reads, checks and counts one block; a worker process opens the source itself."""

    path: Path
    dataset: str | None
    non_finite: float | None
    source_fingerprint: str
    centre: float
    histograms: Path
    counted: bool
    source: Source | None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": None}

    def __call__(self, block: Block) -> BlockResult:
        source = self.source or _reopened(self.path, self.dataset)
        values = _finite(source.read(block.read), block.read, source.path, self.non_finite)
        if len(source.files) <= 2:  # for thousands of slices, once at the end must do
            _require_unchanged(source, self.source_fingerprint)
        if self.counted:
            self._store(block.index, [self._count(channel) for channel in values])
        return BlockResult(values)

    def _count(self, values: NDArray[Any]) -> Histogram:
        histogram = Histogram(values.dtype, self.centre)
        histogram.add(values)
        return histogram

    def _file(self, index: int) -> Path:
        return self.histograms / f"{index}.npz"

    def _store(self, index: int, histograms: list[Histogram]) -> None:
        self.histograms.mkdir(parents=True, exist_ok=True)
        parts = {f"{name}{c}": a for c, h in enumerate(histograms) for name, a in h.record().items()}
        spare = self._file(index).with_suffix(f".{os.getpid()}.tmp")
        with spare.open("wb") as file:
            np.savez(file, allow_pickle=False, **parts)
        spare.replace(self._file(index))

    def total(self, volume: Volume, plan: BlockPlan) -> list[Histogram]:
        """Histograms of the channels over all blocks; a block whose counts are lost is read again."""
        total = [Histogram(volume.dtype, self.centre) for _ in range(volume.num_channels)]
        for block in plan:
            stored = self._stored(block.index)
            values = None if stored else volume.read(block.write)
            for channel, histogram in enumerate(total):
                if stored:
                    histogram.merge({k: stored[f"{k}{channel}"] for k in ("keys", "counts", "range")})
                elif values is not None:
                    histogram.add(values[channel])
        return total

    def _stored(self, index: int) -> dict[str, NDArray[Any]] | None:
        file = self._file(index)
        if not file.is_file():
            return None
        with np.load(file, allow_pickle=False) as parts:
            return dict(parts)

    def forget(self) -> None:
        """Remove the counts of the blocks."""
        for file in self.histograms.glob("*"):
            file.unlink(missing_ok=True)
        if self.histograms.is_dir():
            self.histograms.rmdir()


def _finite(values: NDArray[Any], box: Box, path: Path, replacement: float | None) -> NDArray[Any]:
    if values.dtype.kind != "f":
        return values
    bad = ~np.isfinite(values)
    count = int(np.count_nonzero(bad))
    if not count:
        return values
    if replacement is None:
        first = np.argwhere(bad)[0][1:] + box.start
        raise VolumeError(
            f"{path}: {count} voxels of box {box} are NaN or infinite, the first at z, y, x = "
            f"{', '.join(map(str, first))}; give a value for them with --non-finite VALUE, or repair the file"
        )
    return np.where(bad, values.dtype.type(replacement), values)


def _finish(volume: Volume, job: _Job, work: _Work) -> None:
    entries: dict[str, Any] = {}
    if work.counted:
        histograms = work.total(volume, job.plan)
        # Before the pyramid: what is refused needs none.
        entries = _statistics(histograms, job)
    volume.build_pyramid()
    volume.finish(**entries)
    work.forget()


def _statistics(histograms: list[Histogram], job: _Job) -> dict[str, Any]:
    """Entries ``intensity`` and ``value_range`` of the metadata, one item a channel."""
    path, above = job.settings.source, job.settings.foreground_above
    if all(h.constant for h in histograms):
        raise VolumeError(
            f"{path}: all voxels have the value {histograms[0].minimum:g}; expected an image with contrast: check the "
            "file, or pass --labels"
        )
    records = []
    for channel, histogram in enumerate(histograms):
        try:
            # A constant channel beside others (an alpha channel) is kept: it becomes zero, and disturbs nothing.
            found = constant_intensity(histogram) if histogram.constant else intensity_of(histogram, above)
        except VolumeError as error:
            raise VolumeError(f"{path}, channel {channel}: {error}") from error
        records.append(as_record(found))
    return {"intensity": records, "value_range": [[h.minimum, h.maximum] for h in histograms]}


def _room(job: _Job) -> str:
    _, needed = job.output_files_and_bytes()
    there = shutil.disk_usage(job.settings.out.parent).free
    return f"the whole store takes up to {in_words(needed)}, {in_words(there)} are free there"


def _stored_bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
