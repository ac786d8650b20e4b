"""A volume in, its representation out: from zarr to zarr, window by window, block by block.

The volume is seen on a working grid, whose spacing is that of the model (`representations.working`). The result
depends on volume, model, grid and windows only. It does not depend on how the work was split or how often it was
stopped (`windows` says why). `blocks` records what is done, and writes whole shards. What is decided here is which
level of the pyramid is read, how large a block is, what is kept in the metadata, and when the volume is complete.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comir_hpc.blocks.cost import Figures, about_seconds, recording_seconds, side_by_side
from comir_hpc.blocks.job import carry_out
from comir_hpc.config.infer import InferSettings
from comir_hpc.host.memory import available_bytes, in_words, peak_bytes
from comir_hpc.host.progress import Progress
from comir_hpc.infer.inputs import core_of
from comir_hpc.infer.job import Job
from comir_hpc.infer.prediction import calibrate, evaluations, output_files_and_bytes, total_bytes
from comir_hpc.runs.html import table
from comir_hpc.space.grid import Grid
from comir_hpc.space.plan import plan_blocks
from comir_hpc.volumes.volume import Volume, chunk_and_shard

__all__ = ["InferResult", "infer", "plan_infer", "table"]


@dataclass(frozen=True)
class InferResult:
    """What `infer` did.

    While blocks of other parts are missing, the volume is not complete and has no figure of its seams.

    Attributes
    ----------
    path : Path
        Folder of the store that holds the representation.
    grid : Grid
        Grid of the representation.
    level : int
        Number of the pyramid level that was read, 0 for the finest.
    blocks, computed, missing : int
        Blocks of this part; those it computed; those of all parts that are still to be done.
    seconds, peak_mib : float
        Wall-clock seconds of this call, and the most memory of this process in MiB.
    seam : dict or None
        Mean jump between voxels across the borders of blocks and of windows, over that beside them; about 1 where
        nothing is to be seen. None until the last block is done.
    predicted, measured : Figures
        Time, memory and size that this call was expected to need, and those that it needed.
    notes : tuple of str
        What the user should know, e.g. that the volume is too coarse to carry what the model has learned to see.
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
    predicted: Figures
    measured: Figures
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every part is done and the volume can be used."""
        return self.missing == 0

    @property
    def summary(self) -> str:
        """Summary for the user: one line, and one that puts what was expected beside what was needed."""
        skipped = f" ({self.blocks - self.computed} were done)" if self.computed < self.blocks else ""
        line = f"{self.path}: {self.grid}; {self.computed} blocks{skipped} in {self.seconds:.1f} s"
        if not self.complete:
            return f"{line}; {self.missing} blocks of other parts are missing, whichever part is last completes it"
        ratio = (self.seam or {}).get("windows")
        line = f"{line}; jump across window borders {ratio:.2f} of that inside" if ratio is not None else line
        return f"{line}\n{side_by_side(self.predicted, self.measured)}" if self.computed else line

    def _repr_html_(self) -> str:
        """Show grid and middle slices in a notebook."""
        from comir_hpc.runs.volume_html import volume_html

        rows: dict[str, object] = {"grid": self.grid, "level": self.level, "seconds": f"{self.seconds:.1f}"}
        rows |= {"blocks of other parts": self.missing} if self.missing else {}
        return volume_html("Representation", rows, self.path)


def infer(settings: InferSettings, *, progress: Progress | None = None) -> InferResult:
    """Encode one modality's volume with a trained network.

    The volume is seen on a grid of the training's spacing, or of the one in the settings. What has another spacing is
    resampled from the nearest finer level of its pyramid. Running it again skips finished blocks; with
    ``settings.part`` it does one part of them, and whichever part is the last completes the volume.

    Parameters
    ----------
    settings : InferSettings
        The volume, its modality, the model and where the representation is written.
    progress : Progress, optional
        Called as ``progress("infer NAME", done, total)`` when blocks of the representation NAME are written.

    Raises
    ------
    VolumeError
        If the volume has other channels than the model, is too small on its grid, or changes while it is read; if the
        output exists and was made from something else; if blocks fail or the disk is full.
    CheckpointError
        If the model is missing, unfinished, damaged or has no such modality.
    ConfigError
        If the window does not fit the network.
    StopRequested
        After SIGTERM or SIGUSR2. The same call, made again, continues the work.
    """
    start = time.perf_counter()
    job = Job.from_settings(settings)
    filled = carry_out(job, begun=start, progress=progress)
    out = Volume.open(job.out, allow_incomplete=True)
    seam = None if filled.missing else out.metadata.get("seam")
    return InferResult(
        path=job.out, grid=out.grid, level=job.level, peak_mib=peak_bytes() / 2**20, seam=seam, notes=job.notes,
        **vars(filled),
    )  # fmt: skip


def plan_infer(settings: InferSettings) -> dict[str, Any]:
    """Predict what `infer` would do and need; one window a thread is evaluated to tell the time.

    Raises
    ------
    VolumeError, CheckpointError, ConfigError
        For those reasons of `infer` that show before it writes.
    """
    job = Job.from_settings(settings)
    shape = job.windows.shape_zyx
    _, shard = chunk_and_shard(shape, settings.chunk, settings.shard)
    plan = plan_blocks(shape, shard, core_zyx=core_of(settings, job.windows, shard))
    part = plan.part(*settings.part)
    in_all = evaluations(job.windows, plan)
    memory = total_bytes(job, plan)  # before anything is evaluated
    per_window = calibrate(job)
    files, num_bytes = output_files_and_bytes(job, settings)
    share = len(part) / len(plan)
    return {
        "source": str(settings.zarr),
        "level": job.level,
        "grid": str(job.grid),
        "model": f"{settings.model}, {settings.modality}, step {job.encoder.step}",
        "precision": f"{job.encoder.precision} on {job.encoder.device}",
        "windows": len(job.windows),
        "window": " x ".join(map(str, job.windows.window_zyx)),
        "evaluations_at_most": in_all,
        "blocks": len(plan),
        "block": " x ".join(map(str, plan.core_zyx)),
        "blocks_of_this_part": len(part),
        "workers": settings.workers,
        "peak_memory": in_words(memory),
        "available_memory": in_words(available_bytes()),
        "disk_at_most": in_words(num_bytes),
        "files_at_most": files,
        **({"notes": list(job.notes)} if job.notes else {}),
        "seconds_a_window": round(per_window, 4),
        "time_expected": about_seconds(
            in_all * share * per_window / settings.workers
            + recording_seconds(job.out, len(part), files * share)
        )
        + (", less where there is only background" if settings.skip_background else ""),
    }
