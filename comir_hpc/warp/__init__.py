"""A transform applied: the moving original onto the fixed grid, as a zarr or one file, or points either way."""

from __future__ import annotations

import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from comir_hpc.blocks.block import BlockResult
from comir_hpc.blocks.cost import (
    Figures,
    about_seconds,
    recording_seconds,
    side_by_side,
    together,
    writing_bytes,
)
from comir_hpc.blocks.job import Execution, carry_out, require_same
from comir_hpc.blocks.ledger import Ledger, fingerprint
from comir_hpc.blocks.output import Output
from comir_hpc.config.warp import WarpSettings
from comir_hpc.errors import ConfigError, RegistrationError
from comir_hpc.host.memory import available_bytes, expected_in_worker, expected_peak, in_words
from comir_hpc.host.places import require_apart
from comir_hpc.host.progress import Progress
from comir_hpc.runs.html import table
from comir_hpc.space.grid import Box, Grid
from comir_hpc.space.plan import Block, BlockPlan, plan_blocks
from comir_hpc.transforms.composite import notes_on
from comir_hpc.transforms.conventions.grids import GridPair
from comir_hpc.transforms.files import content_digest, read_transform
from comir_hpc.transforms.stored import require_over
from comir_hpc.volumes.volume import Volume, chunk_and_shard, planned_levels
from comir_hpc.warp.files import file_format
from comir_hpc.warp.one_file import LIBRARY_BYTES, make_file, plan_file
from comir_hpc.warp.points import carry_points, require_table_name, write_text
from comir_hpc.warp.resampling import Interpolation, Resampler, share_inside
from comir_hpc.warp.result import WarpResult

__all__ = ["Grid", "WarpResult", "plan_warp", "side_by_side", "table", "warp"]


_PROBE = 64  # voxels along each side of what is resampled to tell the time


def warp(settings: WarpSettings, *, progress: Progress | None = None) -> WarpResult:
    """Apply a transform of `register` to the moving volume, or to points.

    Running it again skips finished blocks; with ``settings.part`` it does one part of them, and whichever part is the
    last completes the volume. The result has the moving volume's dtype, channels and intensity statistics.

    Parameters
    ----------
    settings : WarpSettings
        The transform, what it is applied to, and where the result is written.
    progress : Progress, optional
        Called as ``progress("warp NAME", done, total)`` when blocks of the result NAME are written; not for points.

    Raises
    ------
    ConfigError
        If volume and points are both given, or neither, labels are to be interpolated, or the output's name is of no
        known format or that of an input.
    VolumeError
        If an input is missing or damaged or changes while it is read, the output exists and was made from something
        else, or blocks fail.
    RegistrationError
        If the transform cannot be read, or sends the whole fixed grid outside the moving volume.
    StopRequested
        After SIGTERM or SIGUSR2. The same call, made again, continues the work.
    """
    start = time.perf_counter()
    if _wants_points(settings):
        assert settings.points is not None
        transform = read_transform(settings.transform, settings.form)
        carried = carry_points(settings.points, transform, settings.direction)
        write_text(settings.out, carried.text, overwrite=settings.overwrite)
        notes = (*carried.notes, *notes_on(transform, settings.transform.name))
        return WarpResult(settings.out, carried.count, notes, seconds=time.perf_counter() - start)
    if file_format(settings.out) is not None:
        return _warp_to_file(settings, progress, start)
    job = _Job(settings)
    filled = carry_out(job, begun=start, progress=progress)
    notes = (*notes_on(job.transform, settings.transform.name), *job.resampler.notes)
    return WarpResult(settings.out, notes=notes, grid=job.fixed, inside=job.inside, **vars(filled))


def plan_warp(settings: WarpSettings) -> dict[str, Any]:
    """Predict what `warp` would do and need; a piece of a block in the middle is resampled to tell the time.

    Raises
    ------
    ConfigError, VolumeError, RegistrationError
        For those reasons of `warp` that show before it writes.
    """
    if _wants_points(settings):
        assert settings.points is not None
        carried = carry_points(
            settings.points, read_transform(settings.transform, settings.form), settings.direction
        )
        return {"points": carried.count, "direction": settings.direction, "disk": in_words(len(carried.text))}
    job = _Job(settings)
    about = {
        "moving": f"{settings.zarr}: {job.moving.grid}",
        "grid": str(job.fixed),
        "inside_the_moving_volume": f"{job.inside:.0%}",
        "interpolation": job.interpolation,
    }
    if file_format(settings.out) is not None:
        return about | plan_file(settings, job.resampler)
    _, shard = chunk_and_shard(job.fixed.shape_zyx, settings.chunk, settings.shard)
    plan = plan_blocks(job.fixed.shape_zyx, shard)
    part = plan.part(*settings.part)
    predicted = _prediction(job, plan, len(part))
    return {
        **about,
        "blocks": len(plan),
        "block": " x ".join(map(str, plan.core_zyx)),
        "blocks_of_this_part": len(part),
        "workers": settings.workers,
        "peak_memory": in_words(together(predicted.peak_bytes, settings.workers, LIBRARY_BYTES)),
        "available_memory": in_words(available_bytes()),
        "disk_at_most": in_words(predicted.num_bytes or 0),
        "files_at_most": predicted.files,
        "time_expected": about_seconds(predicted.seconds or 0.0),
    }


def _prediction(job: _Job, plan: BlockPlan, blocks: int) -> Figures:
    """Predict what a call needs for `blocks` blocks; a piece of the middle one is resampled to tell the time."""
    settings, fixed = job.settings, job.fixed
    # In the middle: at the rim much may lie outside of the moving volume, where nothing is read.
    probe = _part_of(plan[len(plan) // 2].write)
    start = time.perf_counter()
    job.resampler(probe)
    per_voxel = (time.perf_counter() - start) / probe.size
    voxel = job.moving.num_channels * job.moving.dtype.itemsize
    shapes = [fixed.downsampled(factors).shape_zyx for factors in planned_levels(fixed)]
    shards = [chunk_and_shard(shape, settings.chunk, settings.shard)[1] for shape in shapes]
    files = sum(
        1 + job.moving.num_channels * len(plan_blocks(n, s)) for n, s in zip(shapes, shards, strict=True)
    )
    computing = per_voxel * math.prod(fixed.shape_zyx) * blocks / len(plan) / settings.workers
    return Figures(
        blocks=blocks,
        seconds=computing + recording_seconds(settings.out, blocks, files * blocks / len(plan)),
        peak_bytes=_block_memory(job, plan),
        num_bytes=voxel * sum(map(math.prod, shapes)),
        files=1 + files,
    )


def _block_memory(job: _Job, plan: BlockPlan) -> int:
    """Return the bytes of a process that does blocks.

    It holds one block that is computed, one that waits to be written, and what is packed of it.
    """
    voxel = job.moving.num_channels * job.moving.dtype.itemsize
    held = writing_bytes(max(block.write.size for block in plan) * voxel, len(plan))
    more = LIBRARY_BYTES + held + job.resampler.needed_bytes([block.write for block in plan])
    return expected_in_worker(more) if job.settings.workers > 1 else expected_peak(more)


def _warp_to_file(settings: WarpSettings, progress: Progress | None, start: float) -> WarpResult:
    job = _Job(settings)
    resampler = job.resampler
    blocks, limits = make_file(
        settings, resampler, require_unchanged=job.require_unchanged, progress=progress
    )
    notes = (*notes_on(job.transform, settings.transform.name), *resampler.notes, *limits)
    return WarpResult(
        settings.out, notes=notes, grid=job.fixed, blocks=blocks,
        computed=blocks, inside=job.inside, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _wants_points(settings: WarpSettings) -> bool:
    """Return whether points are to be carried, and not a volume.

    Raises
    ------
    ConfigError
        If the settings name both a volume and points, neither, or a volume without its grid.
    """
    if (settings.points is None) == (settings.zarr is None):
        found = "both are given" if settings.points else "neither is given"
        raise ConfigError(f"warp takes --zarr M.zarr --like F.zarr, or --points P.csv; {found}")
    if settings.zarr is not None and settings.like is None:
        raise ConfigError("--zarr needs --like F.zarr, the volume whose grid the result gets")
    if settings.points is not None:
        require_table_name(settings.out, (settings.points, settings.transform))
    return settings.points is not None


def _part_of(box: Box) -> Box:
    z, y, x = (min(b, a + _PROBE) for a, b in zip(box.start, box.stop, strict=True))
    return Box(box.start, (z, y, x))


class _Job:
    """Volumes and transform, found to fit each other before anything is written."""

    verb = "warp"

    def __init__(self, settings: WarpSettings) -> None:
        assert settings.zarr is not None
        assert settings.like is not None
        require_apart(settings.out, settings.zarr, settings.like, settings.transform)
        self.settings = settings
        self.moving = Volume.open(settings.zarr)
        # Of the fixed volume only the grid counts; none of its voxels is read.
        self.fixed = Volume.open(settings.like).grid
        self.transform = read_transform(
            settings.transform, settings.form, GridPair(self.fixed, self.moving.grid)
        )
        require_over(self.transform, self.fixed)
        self.inside = share_inside(self.transform, self.fixed, self.moving.grid)
        if self.inside == 0:
            raise RegistrationError(
                f"{settings.transform} sends the whole of {settings.like} outside of {settings.zarr}; expected a "
                "transform from fixed to moving points (ITK's resampling direction): are the two volumes exchanged?"
            )
        self.interpolation = self._interpolation()
        self.outside = [self._outside(channel) for channel in range(self.moving.num_channels)]

    def _interpolation(self) -> Interpolation:
        wanted, labels = self.settings.interpolation, self.moving.metadata["kind"] == "labels"
        if wanted == "auto":
            return "nearest" if labels else "linear"
        if labels and wanted != "nearest":
            raise ConfigError(
                f"{self.settings.zarr} holds labels, between which there is nothing to interpolate; leave "
                f"--interpolation {wanted} out, or use nearest"
            )
        return wanted

    def _outside(self, channel: int) -> float:
        """Return zero, or the smallest value of an image in which zero is a value of the specimen (CT)."""
        metadata = self.moving.metadata
        measured = "intensity" in metadata and "value_range" in metadata
        if measured and self.moving.intensity(channel).foreground_above < 0:
            return float(metadata["value_range"][channel][0])
        return 0.0

    @property
    def resampler(self) -> Resampler:
        return Resampler(self.moving, self.transform, self.fixed, self.interpolation, self.outside)

    @property
    def out(self) -> Path:
        return self.settings.out

    @property
    def execution(self) -> Execution:
        return Execution.from_settings(self.settings)

    @property
    def command(self) -> tuple[str, ...]:
        settings = self.settings
        assert settings.zarr is not None
        assert settings.like is not None
        given = {"--zarr": settings.zarr, "--transform": settings.transform, "--like": settings.like}
        form = ("--from", settings.form) if settings.form else ()
        return (
            *(word for name, path in given.items() for word in (name, str(path.resolve()))),
            *form,
            "--out",
        )

    def ledger(self) -> Ledger:
        return Ledger(self.out, fingerprint(**self.record))

    def plan(self, out: Volume) -> BlockPlan:
        return plan_blocks(out.grid.shape_zyx, out.shard_zyx)

    def work(self, out: Volume) -> _Work:
        del out
        return _Work(self)

    def needs(self, plan: BlockPlan, blocks: int) -> Figures:
        return _prediction(self, plan, blocks)

    def finish(self, output: Output) -> dict[str, Any]:
        output.build_pyramid()
        return {}

    @cached_property
    def source_fingerprint(self) -> str:
        return self.moving.fingerprint()

    @cached_property
    def record(self) -> dict[str, Any]:
        """Settings and inputs that the voxels and their layout depend on."""
        return {
            "source_fingerprint": self.source_fingerprint,
            # The content and not the path: `register` may have written another transform to the same place since.
            "transform": content_digest(self.settings.transform, self.transform, self.fixed),
            "grid": self.fixed.as_dict(),
            "interpolation": self.interpolation,
            **self.settings.model_dump(mode="json", include={"chunk", "shard"}),
            **({"checksums": True} if self.settings.checksums else {}),
            **({"form": self.settings.form} if self.settings.form else {}),
        }

    def create(self, path: Path) -> Volume:
        settings, source = self.settings, self.moving.metadata
        assert settings.zarr is not None
        assert settings.like is not None
        metadata: dict[str, Any] = {
            "source": {"path": str(settings.zarr.resolve()), "fingerprint": self.source_fingerprint},
            "transform": str(settings.transform.resolve()),
            "like": str(settings.like.resolve()),
            "inside": self.inside,
            "outside_value": self.outside,
            # The values are the moving volume's, so what was measured on all of them holds.
            **{key: source[key] for key in ("intensity", "value_range") if key in source},
        }
        return Volume.create(
            path, self.fixed, self.moving.dtype, channels=self.moving.num_channels, kind=source["kind"],
            chunk=settings.chunk, shard=settings.shard, checksums=settings.checksums, metadata=metadata,
        )  # fmt: skip

    def require_unchanged(self) -> None:
        require_same(self.moving, self.source_fingerprint)


class _Work:
    """Resamples one block; a worker process opens volumes and transform itself."""

    def __init__(self, job: _Job) -> None:
        self.settings = job.settings
        self._job: _Job | None = job

    def __getstate__(self) -> dict[str, Any]:
        # Other processes get the settings only, and open volumes and transform themselves.
        return {"settings": self.settings, "_job": None}

    @cached_property
    def resampler(self) -> Resampler:
        return (self._job or _Job(self.settings)).resampler

    def __call__(self, block: Block) -> BlockResult:
        return BlockResult(self.resampler(block.write))
