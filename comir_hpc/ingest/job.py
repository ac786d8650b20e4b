"""What an ingest will do and need, known from the source's header before a byte is written."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from comir_hpc.cluster import Figures
from comir_hpc.config import IngestSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.geometry import BlockPlan, Box, Grid, Triple, plan_blocks
from comir_hpc.histogram import Histogram
from comir_hpc.ledger import Ledger, fingerprint
from comir_hpc.memory import available_bytes, in_words
from comir_hpc.pyramid import planned_levels
from comir_hpc.readers import Source
from comir_hpc.volume import best_shuffle, chunk_and_shard, compressed_bytes

_PROGRAM_BYTES = 320 << 20  # measured: the interpreter with its libraries, and what compression holds
_LARGEST_CORE = 256 << 20  # bytes of one block beyond which decoding a page twice is the lesser evil
_SAMPLE = 96  # voxels along each side of the box that time and size are judged by
_PYRAMID_TIME = 1.4  # measured: whole ingest against its blocks


@dataclass(frozen=True)
class Job:
    """A source with everything that follows from it and the settings.

    Attributes
    ----------
    workers : int
        Processes: one where each would hold the whole volume.
    source_fingerprint : str
        Of the source when the job began.
    notes : tuple of str
        What the source leaves open and how it is taken.
    """

    source: Source
    settings: IngestSettings
    grid: Grid
    plan: BlockPlan
    workers: int
    source_fingerprint: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, source: Source, settings: IngestSettings) -> Job:
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

    def record(self) -> dict[str, Any]:
        """What the result depends on; kept in the volume's metadata, so that a refusal can name what differs."""
        return {
            "source": str(self.source.path if self.source.digest else self.source.path.resolve()),
            "source_size_and_time": self.source_fingerprint,
            "grid": self.grid.as_dict(),
            # Left out where it is the default, so that stores of before have the same record.
            **({} if self.settings.padding == "auto" else {"padding": self.settings.padding}),
            **self.settings.model_dump(
                mode="json", include={"dataset", "kind", "chunk", "shard", "non_finite", "foreground_above"}
            ),
        }

    def ledger(self) -> Ledger:
        """The ledger of the output, for results of this job."""
        # A block's number means something only together with the plan.
        return Ledger(self.settings.out, fingerprint(ingest=self.record(), core=self.plan.core_zyx))

    def block_bytes(self) -> int:
        """Bytes of the largest block's voxels."""
        core = [min(c, n) for c, n in zip(self.plan.core_zyx, self.grid.shape_zyx, strict=True)]
        return math.prod(core) * self.source.num_channels * self.source.dtype.itemsize

    def peak_bytes(self) -> int:
        """Predicted memory of all processes."""
        return (self.workers > 1) * _PROGRAM_BYTES + self.workers * self.process_bytes()

    def process_bytes(self) -> int:
        """Predicted memory of one: its block, the one that is being written, and what is packed of it."""
        return self.source.load_bytes + _PROGRAM_BYTES + 3 * self.block_bytes()

    def prediction(self, blocks: int) -> Figures:
        """What a call should need for `blocks` blocks."""
        files, num_bytes = self.output_files_and_bytes()
        seconds = self.calibrate()[0] * blocks / len(self.plan) if self.source.streamed and blocks else None
        return Figures(blocks, seconds, self.process_bytes(), num_bytes, files)

    def allowed_bytes(self) -> int:
        """Memory that may be taken: what is free, or less where the user says so."""
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

    def probe(self) -> Box:
        """A box in the middle, as large as what is decoded at once."""
        sides = [
            min(n, max(_SAMPLE, a)) for n, a in zip(self.grid.shape_zyx, self.source.atom_zyx, strict=True)
        ]
        start = [(n - s) // 2 for n, s in zip(self.grid.shape_zyx, sides, strict=True)]
        stop = [a + s for a, s in zip(start, sides, strict=True)]
        return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def calibrate(self) -> tuple[float, int]:
        """Predicted seconds and stored bytes, from one box that is read, counted and compressed; nothing is written."""
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
    """The single place that refuses what is neither a volume nor a slice."""
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
    """Voxels of a block: one shard, or as many as hold what the format decodes at once, while that stays small."""
    wide = [s * -(-min(a, n) // s) for s, a, n in zip(shard, source.atom_zyx, source.shape_zyx, strict=True)]
    core: Triple = (wide[0], wide[1], wide[2])
    size = math.prod(min(c, n) for c, n in zip(core, source.shape_zyx, strict=True))
    return core if size * source.num_channels * source.dtype.itemsize <= _LARGEST_CORE else shard


def require_memory(job: Job) -> None:
    """Refuse a job that will not fit, before it takes the memory.

    Raises
    ------
    VolumeError
        With what it needs, what it may have, and what to do.
    """
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
