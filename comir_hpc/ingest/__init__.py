"""A file of any format in, an OME-Zarr volume out, block by block.

A block is read, checked, counted into a histogram and written as whole shards. The ledger beside the store says which
blocks are done. So a stopped run goes on where it was, and gives the same bytes. When all are there, the pyramid and
the intensity statistics follow, and only then is the volume marked complete.
"""

from __future__ import annotations

import errno
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from comir_hpc.blocks.cost import Figures, about_seconds, side_by_side
from comir_hpc.blocks.job import carry_out
from comir_hpc.config.ingest import IngestSettings
from comir_hpc.errors import ComirError, ConfigError, VolumeError
from comir_hpc.host.memory import in_words
from comir_hpc.host.places import require_apart
from comir_hpc.host.progress import Progress
from comir_hpc.ingest.job import Job
from comir_hpc.runs.html import table
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.padding import padding_notes
from comir_hpc.volumes.readers import Source, in_memory, open_source
from comir_hpc.volumes.volume import Kind, Volume

__all__ = ["IngestResult", "ingest", "ingest_array", "plan_ingest", "table"]


_FULL = (errno.ENOSPC, errno.EDQUOT)


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
        Size of the store on disk, in bytes.
    notes : tuple of str
        Sentences on what the file left open and how it was taken.
    predicted, measured : Figures
        Time, memory and size that this call was expected to need, and those that it needed.
    """

    path: Path
    grid: Grid
    blocks: int
    computed: int
    missing: int
    seconds: float
    num_bytes: int
    predicted: Figures
    measured: Figures
    notes: tuple[str, ...] = ()

    @property
    def skipped(self) -> int:
        """Number of blocks that were done before this call."""
        return self.blocks - self.computed

    @property
    def summary(self) -> str:
        """Summary for the user: one line, and one that puts what was expected beside what was needed."""
        waiting = f"; {self.missing} blocks wait for other parts" if self.missing else ""
        line = f"{self.path}: {self.grid}, {self.seconds:.1f} s{waiting}"
        return f"{line}\n{side_by_side(self.predicted, self.measured)}" if self.computed else line

    def _repr_html_(self) -> str:
        """Show grid, notes and middle slices in a notebook."""
        from comir_hpc.runs.volume_html import volume_html

        rows: dict[str, object] = {
            "grid": self.grid,
            "seconds": f"{self.seconds:.1f}",
            "notes": "; ".join(self.notes),
        }
        rows |= {"blocks of other parts": self.missing} if self.missing else {}
        return volume_html("Volume", rows, self.path)


def ingest(settings: IngestSettings, *, progress: Progress | None = None) -> IngestResult:
    """Write a file of any format as an OME-Zarr volume with a pyramid and intensity statistics.

    Running it again skips the blocks that are done; an unfinished store whose source has changed is begun anew.

    Parameters
    ----------
    settings : IngestSettings
        The source, the store to write, and what the source does not say of itself.
    progress : Progress, optional
        Called as ``progress("ingest NAME", done, total)`` when blocks of the store NAME are written.

    Raises
    ------
    VolumeError
        If the source is missing, damaged, no volume, constant, without a spacing, or changes while it is read; if it
        holds NaN or infinite voxels and no `non_finite` value is given; if it must be held in memory and does not
        fit; if another result is at `out`; if the disk is full.
    """
    return _ingest(_opened(settings), settings, progress)


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
    padding: float | Literal["auto", "none"] = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> IngestResult:
    """Write an array (z, y, x) or (c, z, y, x) in memory as a volume: `ingest` without a file.

    Raises
    ------
    VolumeError
        For the same reasons as `ingest`.
    """
    if kind == "representation":
        raise ConfigError("kind representation is what `infer` writes; expected image or labels")
    settings = IngestSettings(
        source=Path(name), out=out, kind=kind, chunk=chunk, shard=shard, non_finite=non_finite,
        foreground_above=foreground_above, padding=padding, overwrite=overwrite,
    )  # fmt: skip
    return _ingest(in_memory(array, grid, name), settings, progress)


def plan_ingest(settings: IngestSettings) -> dict[str, Any]:
    """Predict what `ingest` would do and need, from the source's header and one box of it.

    Raises
    ------
    VolumeError
        For those reasons of `ingest` that the header shows.
    """
    job = Job.from_source(_opened(settings), settings)
    files, num_bytes = job.output_files_and_bytes()
    plan = {
        "source": f"{settings.source} ({job.source.kind})",
        "channels": job.source.num_channels,
        "grid": str(job.grid),
        "dtype": str(job.source.dtype),
        "read": "block by block" if job.source.streamed else "whole, into memory",
        "blocks": len(job.blocks),
        "block": " x ".join(map(str, job.blocks.core_zyx)),
        "workers": job.workers,
        "peak_memory": in_words(job.memory.peak_bytes()),
        "available_memory": in_words(job.allowed_bytes()),
        "disk_at_most": in_words(num_bytes),
        "files_at_most": files,
        "notes": list(job.notes),
    }
    if job.source.streamed:  # the others would be read whole to learn it
        computing, stored = job.calibrate()
        seconds = job.seconds(computing, len(job.blocks))
        plan |= {"disk_expected": in_words(stored), "time_expected": about_seconds(seconds)}
    return plan


# ---------------------------------------------------------------------- carrying it out


def _opened(settings: IngestSettings) -> Source:
    # Before anything is read: a folder that holds its own output would never come to rest.
    require_apart(settings.out, settings.source)
    source = open_source(settings.source, settings.dataset)
    require_apart(settings.out, *source.files)  # voxels beside a header, parts in other files
    return source


def _ingest(source: Source, settings: IngestSettings, progress: Progress | None) -> IngestResult:
    start = time.perf_counter()
    job = Job.from_source(source, settings)
    try:
        filled = carry_out(job, begun=start, progress=progress)
    except OSError as error:
        if isinstance(error, ComirError):  # a request to stop is an InterruptedError, and so an OSError
            raise
        raise VolumeError(f"{job.out} cannot be written ({error.strerror}); {_room(job)}") from error
    except VolumeError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
            raise VolumeError(f"{error}; {_room(job)}") from error
        raise
    return IngestResult(
        path=job.out,
        grid=job.grid,
        num_bytes=_stored_bytes(job.out),
        notes=(*job.notes, *padding_notes(Volume.open(job.out, allow_incomplete=True))),
        **vars(filled),
    )


def _room(job: Job) -> str:
    _, needed = job.output_files_and_bytes()
    there = shutil.disk_usage(job.out.parent).free
    return f"the whole store takes up to {in_words(needed)}, {in_words(there)} are free there"


def _stored_bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
