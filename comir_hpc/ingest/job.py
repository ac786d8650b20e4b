"""What an ingest will do and need, known from the source's header before a byte is written."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from comir_hpc.blocks.cost import Figures, recording_seconds
from comir_hpc.blocks.job import Execution
from comir_hpc.blocks.ledger import Ledger, fingerprint
from comir_hpc.blocks.output import Output, metadata_at
from comir_hpc.config.ingest import IngestSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.host.memory import available_bytes, in_words, resident_bytes
from comir_hpc.ingest.blocks import Work, require_unchanged, typical_value
from comir_hpc.ingest.memory import Memory
from comir_hpc.ingest.padding import without_padding
from comir_hpc.space.grid import Box, Grid, Triple
from comir_hpc.space.plan import BlockPlan, plan_blocks
from comir_hpc.volumes.histogram import Histogram, as_record, constant_intensity, intensity_of
from comir_hpc.volumes.pyramid import planned_levels
from comir_hpc.volumes.readers import Source
from comir_hpc.volumes.volume import Volume, best_shuffle, chunk_and_shard, compressed_bytes

_LARGEST_CORE = 256 << 20  # bytes of one block beyond which decoding a page twice is the lesser evil
_SAMPLE = 96  # voxels along each side of the box that time and size are judged by
# About how many voxels are counted to find percentiles. In larger volumes only every second, third, ... row is counted.
# Percentiles stay accurate (67,000 counted voxels lie above percentile 99.9), and ingest is a third faster.
_COUNTED = 1 << 26
_PYRAMID_TIME = 1.4  # measured: whole ingest against its blocks


@dataclass(frozen=True)
class Job:
    """A source with everything that follows from it and the settings.

    Attributes
    ----------
    blocks : BlockPlan
        Blocks into which the output is split.
    workers : int
        Processes: one where each would hold the whole volume.
    source_fingerprint : str
        Fingerprint that the source had when the job began.
    notes : tuple of str
        Sentences on what the source leaves open and how it is taken.
    """

    source: Source
    settings: IngestSettings
    grid: Grid
    blocks: BlockPlan
    workers: int
    source_fingerprint: str
    notes: tuple[str, ...]
    verb: str = "ingest"

    @classmethod
    def from_source(cls, source: Source, settings: IngestSettings) -> Job:
        """Check source and settings against each other.

        Raises
        ------
        VolumeError, ConfigError
            If they cannot work together.
        """
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

    @property
    def out(self) -> Path:
        """Folder of the store that is written."""
        return self.settings.out

    @property
    def execution(self) -> Execution:
        """How the job is carried out; an unfinished store that nobody misses is replaced unasked."""
        overwrite = self.settings.overwrite or self._nobody_misses()
        return replace(Execution.from_settings(self.settings), workers=self.workers, overwrite=overwrite)

    @property
    def command(self) -> tuple[str, ...]:
        """Words of the command line that make the output again."""
        return (self.record["source"],)

    @property
    def record(self) -> dict[str, Any]:
        """Source and settings that the result depends on; kept in the metadata, so that a refusal says what differs."""
        return {
            "source": str(self.source.path if self.source.digest else self.source.path.resolve()),
            "source_size_and_time": self.source_fingerprint,
            "grid": self.grid.as_dict(),
            # Left out where it is the default, so that stores of before have the same record.
            **({} if self.settings.padding == "auto" else {"padding": self.settings.padding}),
            **self.settings.model_dump(
                mode="json", include={"dataset", "kind", "chunk", "shard", "non_finite", "foreground_above"}
            ),
            **({"checksums": True} if self.settings.checksums else {}),
        }

    def ledger(self) -> Ledger:
        """Return the ledger of the output, for results of this job."""
        # A block's number means something only together with the plan.
        return Ledger(self.settings.out, fingerprint(ingest=self.record, core=self.blocks.core_zyx))

    @property
    def memory(self) -> Memory:
        """What the job takes of memory."""
        return Memory(self.source, self.blocks, self.settings, self.workers)

    def _nobody_misses(self) -> bool:
        """Return whether what is at `out` is an unfinished ingest of this very source, by this command alone."""
        found = metadata_at(self.out) or {"complete": True}
        made_from = found.get("made_from")
        same = isinstance(made_from, dict) and made_from.get("source") == self.record["source"]
        return same and not found.get("complete") and self.settings.part[1] == 1

    def create(self, path: Path) -> Volume:
        """Make the empty output."""
        require_memory(self)
        settings, source = self.settings, self.source
        return Volume.create(
            path, self.grid, source.dtype, channels=source.num_channels, kind=settings.kind,
            chunk=settings.chunk, shard=settings.shard, checksums=settings.checksums,
            shuffle=best_shuffle(source.read(self.probe())),
            metadata={"centre": typical_value(source)},
        )  # fmt: skip

    def plan(self, out: Volume) -> BlockPlan:
        """Return the blocks of the output, which follow from source and settings."""
        del out
        return self.blocks

    def work(self, out: Volume) -> Work:
        """Return what reads, checks and counts one block.

        Raises
        ------
        VolumeError
            If that does not fit into memory.
        """
        require_memory(self)
        return self._work(out)

    def _work(self, out: Volume) -> Work:
        settings, ledger = self.settings, self.ledger()
        return Work(
            settings.source, settings.dataset, settings.non_finite, self.source_fingerprint,
            float(out.metadata["centre"]), ledger.folder / f"histograms-{ledger.fingerprint}",
            settings.kind == "image", max(1, math.prod(self.grid.shape_zyx) // _COUNTED), self.source,
        )  # fmt: skip

    def require_unchanged(self) -> None:
        """Refuse a source that is not what it was when the job began.

        Raises
        ------
        VolumeError
            If its fingerprint differs.
        """
        require_unchanged(self.source, self.source_fingerprint)

    def finish(self, output: Output) -> dict[str, Any]:
        """Gather the statistics, then build the pyramid: what is refused needs none.

        Statistics that the volume has already are kept: they are those of the same source and settings.
        """
        work = self._work(output.volume)
        if not work.counted or "intensity" in output.volume.metadata:
            output.build_pyramid()
            return {}
        histograms = work.total(output.volume, output.plan)
        entries = self._statistics(histograms)
        output.build_pyramid()
        # On a coarse level: padding is found by looking at the whole border.
        return entries | without_padding(output.volume, histograms, self.settings, entries["intensity"])

    def _statistics(self, histograms: list[Histogram]) -> dict[str, Any]:
        """Make the entries ``intensity`` and ``value_range`` of the metadata, one item a channel."""
        path, above = self.settings.source, self.settings.foreground_above
        if all(h.constant for h in histograms):
            raise VolumeError(
                f"{path}: all voxels have the value {histograms[0].minimum:g}; expected an image with contrast: check "
                "the file, or pass --labels"
            )
        records = []
        for channel, histogram in enumerate(histograms):
            try:
                # A constant channel beside others (an alpha channel) is kept: it becomes zero, and disturbs nothing.
                found = (
                    constant_intensity(histogram) if histogram.constant else intensity_of(histogram, above)
                )
            except VolumeError as error:
                raise VolumeError(f"{path}, channel {channel}: {error}") from error
            records.append(as_record(found))
        return {"intensity": records, "value_range": [[h.minimum, h.maximum] for h in histograms]}

    def needs(self, plan: BlockPlan, blocks: int) -> Figures:
        """Predict what a call needs for `blocks` blocks of the plan."""
        files, num_bytes = self.output_files_and_bytes()
        seconds = self.seconds(self.calibrate()[0], blocks) if self.source.streamed and blocks else None
        return Figures(blocks, seconds, self.memory.process_bytes(), num_bytes, files)

    def seconds(self, computing: float, blocks: int) -> float:
        """Predict the seconds of `blocks` blocks, if all of them take so many to compute.

        A few flushes are tried to learn the rest.
        """
        share = blocks / len(self.blocks)
        files = self.output_files_and_bytes()[0] * share
        return computing * share + recording_seconds(self.out, blocks, files)

    def allowed_bytes(self) -> int:
        """Return the bytes that may be held: what is free and what we hold already, or less where the user says so."""
        limit, most = self.settings.max_memory_gib, available_bytes() + resident_bytes()
        return most if limit is None else min(most, int(limit * 2**30))

    def output_files_and_bytes(self) -> tuple[int, int]:
        """Return upper bounds for files and bytes of the store: nothing compresses, and every shard is stored."""
        files, num_bytes = 1, 0
        levels = planned_levels(self.grid)
        for factors in levels:
            shape = self.grid.downsampled(factors).shape_zyx
            _, shard = chunk_and_shard(shape, self.settings.chunk, self.settings.shard)
            files += 1 + self.source.num_channels * len(plan_blocks(shape, shard))
            num_bytes += math.prod(shape) * self.source.num_channels * self.source.dtype.itemsize
        return files, int(num_bytes * 1.01) + files * 4096

    def probe(self) -> Box:
        """Return a box in the middle, as large as what is decoded at once."""
        sides = [
            min(n, max(_SAMPLE, a)) for n, a in zip(self.grid.shape_zyx, self.source.atom_zyx, strict=True)
        ]
        start = [(n - s) // 2 for n, s in zip(self.grid.shape_zyx, sides, strict=True)]
        stop = [a + s for a, s in zip(start, sides, strict=True)]
        return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def calibrate(self) -> tuple[float, int]:
        """Predict seconds and stored bytes from one box that is read, counted and compressed.

        Nothing is written.
        """
        box = self.probe()
        values = np.nan_to_num(self.source.read(box), posinf=0, neginf=0)
        shuffle = best_shuffle(values)  # tried once, not for every block: it stays outside
        begin = time.perf_counter()
        self.source.read(box)
        for channel in values:
            Histogram(values.dtype).add(channel)
        share = compressed_bytes(values, shuffle) / values.nbytes
        seconds = (time.perf_counter() - begin) * math.prod(self.grid.shape_zyx) / box.size
        return seconds * _PYRAMID_TIME / self.workers, int(share * self.output_files_and_bytes()[1])


def _require_volume(source: Source) -> None:
    """Refuse what is neither a volume nor a slice; this is the single place that does."""
    if 0 in source.shape:
        raise VolumeError(
            f"{source.path}: shape {source.shape} (c, z, y, x) has no voxels; expected a volume"
        )
    if sum(size == 1 for size in source.shape_zyx) > 1:
        raise VolumeError(
            f"{source.path}: shape {source.shape_zyx} (z, y, x) is a line; expected a volume or a single slice of at "
            "least two voxels along y and x"
        )


def _require_fitting(value: float, dtype: np.dtype[Any]) -> None:
    if not math.isfinite(value) or (dtype.kind == "f" and abs(value) > float(np.finfo(dtype).max)):
        raise ConfigError(f"--non-finite {value} is not a finite {dtype} value; give one, e.g. 0")


def _core(source: Source, shard: Triple) -> Triple:
    """Choose the voxels of a block along z, y, x.

    A block is one shard, or as many as hold what the format decodes at once, while that stays small.
    """
    wide = [s * -(-min(a, n) // s) for s, a, n in zip(shard, source.atom_zyx, source.shape_zyx, strict=True)]
    core: Triple = (wide[0], wide[1], wide[2])
    size = math.prod(min(c, n) for c, n in zip(core, source.shape_zyx, strict=True))
    return core if size * source.num_channels * source.dtype.itemsize <= _LARGEST_CORE else shard


def require_memory(job: Job) -> None:
    """Raise `VolumeError` for a job that will not fit, before it takes the memory; it says what to do."""
    needed, allowed = job.memory.peak_bytes(), job.allowed_bytes()
    if needed <= allowed:
        return
    given = " (--max-memory-gib)" if job.settings.max_memory_gib else ""
    remedy = (
        "use fewer --workers or a smaller --shard"
        if job.source.streamed
        else f"{job.source.kind} of this kind cannot be read block by block: store it uncompressed "
        "(NIfTI: gunzip it; NRRD, MetaImage: encoding raw), or use a larger machine"
    )
    raise VolumeError(
        f"{job.source.path} needs {in_words(needed)} of memory, {in_words(allowed)} may be used{given}; {remedy}"
    )
