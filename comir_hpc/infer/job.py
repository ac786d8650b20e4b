"""One `infer` as a job, and the work on one block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.blocks.block import BlockResult
from comir_hpc.blocks.cost import Figures
from comir_hpc.blocks.job import Execution
from comir_hpc.blocks.ledger import Ledger, fingerprint
from comir_hpc.blocks.output import Output
from comir_hpc.config.infer import InferSettings
from comir_hpc.errors import VolumeError
from comir_hpc.infer.inputs import Inputs, core_of
from comir_hpc.infer.prediction import coarse_foreground, prediction
from comir_hpc.representations.encoding.grid import WindowGrid
from comir_hpc.representations.encoding.sweep import Sweep
from comir_hpc.representations.seams import seam_figure
from comir_hpc.space.grid import Box
from comir_hpc.space.plan import Block, BlockPlan, plan_blocks
from comir_hpc.volumes.volume import Volume, chunk_and_shard

_SAMPLED = 24  # windows that the scale of a quantised representation is taken from
_LARGEST = 1e300  # size of a number in a note: a larger one, infinity or NaN was not written by us
_HEADROOM = 1.25  # times the largest value in these windows: others may go beyond it


class Job(Inputs):
    """One `infer`: what its output is made from, how a block of it is computed and how it is finished."""

    verb = "infer"

    @property
    def out(self) -> Path:
        """Folder of the store that is written."""
        return self.settings.out

    @property
    def execution(self) -> Execution:
        """How the job is carried out."""
        return Execution.from_settings(self.settings)

    @property
    def command(self) -> tuple[str, ...]:
        """Words of the command line that make the output again."""
        paths = str(self.settings.zarr.resolve()), "--model", str(self.settings.model.resolve())
        return ("--zarr", *paths, "--modality", self.settings.modality, "--out")

    def ledger(self) -> Ledger:
        """Return the ledger of the output, for results of this job."""
        return Ledger(self.out, fingerprint(**self.record), partial(_is_note, self.encoder.latent_channels))

    def work(self, out: Volume) -> Work:
        """Return what encodes one block."""
        del out
        return Work(self)

    def needs(self, plan: BlockPlan, blocks: int) -> Figures:
        """Predict what a call needs for `blocks` blocks of the plan."""
        return prediction(self, plan, blocks)

    def finish(self, output: Output) -> dict[str, Any]:
        """Build the pyramid, look at the seams, and gather what the blocks noted."""
        noted = _Noted(self.encoder.latent_channels)
        for _, note in output.ledger.notes():
            noted.add(note)
        output.build_pyramid()
        faces = {"blocks": _block_faces(output.plan), "windows": _window_faces(self.windows)}
        return {
            "seam": seam_figure(output.volume, faces, self.encoder.network.total_stride_zyx),
            "value_range": noted.value_range.tolist(),
            "measured": noted.measured,
        }

    @cached_property
    def record(self) -> dict[str, Any]:
        """Settings and inputs that the voxels and their layout depend on; how the work is split is not among them."""
        shared = {"window", "overlap", "blend", "dtype", "chunk", "shard", "skip_background"}
        # On a GPU the shape of the batch may change last bits.
        if self.encoder.device.type != "cpu":
            shared.add("batch")
        return {
            "source_fingerprint": self.source_fingerprint,
            "level": self.level,
            **self._working_grid,
            "encoder": self.encoder.identity(),
            **self.settings.model_dump(mode="json", include=shared),
            **({"checksums": True} if self.settings.checksums else {}),
        }

    @property
    def _working_grid(self) -> dict[str, Any]:
        """Grid that the volume is seen on, if that is no level of its own."""
        return {} if self.reader.seen.direct else {"working_grid": self.grid.as_dict()}

    def create(self, path: Path) -> Volume:
        """Make the empty output; what parts and reruns must agree on is decided here and kept in it."""
        settings = self.settings
        _, shard = chunk_and_shard(self.grid.shape_zyx, settings.chunk, settings.shard)
        metadata = {
            "source": {
                "path": str(settings.zarr.resolve()),
                "fingerprint": self.source_fingerprint,
                "level": self.level,
                **self._working_grid,
            },
            "model": {"run": str(settings.model.resolve()), **self.encoder.identity()},
            # Whoever begins decides on the blocks: parts and reruns must agree on their numbers.
            "core_zyx": list(core_of(settings, self.windows, shard)),
        }
        integers = np.dtype(settings.dtype).kind == "i"
        return Volume.create(
            path, self.grid, np.dtype(settings.dtype), channels=self.encoder.latent_channels,
            kind="representation", chunk=settings.chunk, shard=settings.shard, checksums=settings.checksums,
            metadata=metadata,
            scale=_scale(self, np.iinfo(settings.dtype).max) if integers else None,
        )  # fmt: skip

    def plan(self, out: Volume) -> BlockPlan:
        """Return the blocks of the output, as whoever made it decided."""
        return plan_blocks(out.grid.shape_zyx, out.shard_zyx, core_zyx=out.metadata["core_zyx"])


def _is_note(channels: int, note: Mapping[str, Any] | None) -> bool:
    """Return whether a block's note in the ledger is what `Work` and the block's carrier leave there."""
    if note is None or not {"windows", "empty", "seconds", "peak_mib", "range"} <= note.keys():
        return False
    ranges = note["range"]
    if not isinstance(ranges, list) or len(ranges) != channels:
        return False
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in ranges):
        return False
    counts = [note.get(key, 0) for key in ("windows", "empty", "clipped", "seconds", "peak_mib")]
    return all(type(n) in (int, float) and -_LARGEST < n < _LARGEST for n in (*counts, *chain(*ranges)))


class _Noted:
    """Sums up the notes of all blocks, one after the other: those of a million blocks are gigabytes."""

    def __init__(self, channels: int) -> None:
        self.value_range = np.tile([np.inf, -np.inf], (channels, 1))
        self.peak_mib = 0
        self.sums = dict.fromkeys(("seconds", "windows", "empty", "clipped"), 0)

    def add(self, note: Mapping[str, Any]) -> None:
        """Count one more block."""
        low, high = np.asarray(note["range"]).T
        np.minimum(self.value_range[:, 0], low, out=self.value_range[:, 0])
        np.maximum(self.value_range[:, 1], high, out=self.value_range[:, 1])
        self.peak_mib = max(self.peak_mib, note["peak_mib"])
        for name in self.sums:
            self.sums[name] += note.get(name, 0)

    @property
    def measured(self) -> dict[str, float]:
        """What the blocks needed, and how many values were clipped; a record, JSON-ready."""
        sums = self.sums
        return {
            "block_seconds": round(sums["seconds"], 3),
            "peak_mib": self.peak_mib,
            "windows": sums["windows"],
            "empty_windows": sums["empty"],
            "clipped_values": sums["clipped"],
        }


def _block_faces(plan: BlockPlan) -> tuple[list[int], list[int], list[int]]:
    z, y, x = (list(range(c, n, c)) for c, n in zip(plan.core_zyx, plan.shape_zyx, strict=True))
    return z, y, x


def _window_faces(windows: WindowGrid) -> tuple[list[int], list[int], list[int]]:
    """Return where windows begin and end, and the middles of their overlaps, where one takes over from the other."""
    z, y, x = (
        sorted(
            {p for s in starts for p in (s, s + w) if 0 < p < n}
            | {(before + w + after) // 2 for before, after in pairwise(starts)}
        )
        for starts, w, n in zip(windows.starts, windows.window_zyx, windows.shape_zyx, strict=True)
    )
    return z, y, x


class Work:
    """Encodes one block; a worker process loads the network and opens the volume itself."""

    def __init__(self, job: Job) -> None:
        self.settings = job.settings
        self._job: Job | None = job

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_job": None}

    @cached_property
    def scale(self) -> NDArray[np.float32] | None:
        """Size of one step of a quantised output, for each channel, (c, 1, 1, 1); None if the output is not quantised.

        It is read from the output, since the process that created it has chosen it for all others.
        """
        kept = Volume.open(self.settings.out, allow_incomplete=True).metadata.get("quantised")
        return np.asarray(kept["scale"], dtype=np.float32)[:, None, None, None] if kept else None

    @cached_property
    def sweep(self) -> Sweep:
        """The windows of this process, in its own copy of the network."""
        job = self._job or Job.from_settings(self.settings)
        background = job.reader.background if self.settings.skip_background else None
        # One sweep for all blocks of a process: neighbours hand on the windows that they share.
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
    # An overflow is no surprise here. It is counted below, and said with its box.
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
    """Round to the nearest multiples of the scale, and count the values that were beyond the largest one."""
    if not np.isfinite(encoded).all():
        raise VolumeError(
            f"values of the representation are not finite in box {box} of {settings.zarr}; use --precision fp32"
        )
    largest = np.iinfo(settings.dtype).max
    # Rounded and not cut off: cutting would pull every value towards zero by half a step on average.
    steps = np.rint(encoded / scale)
    beyond = int(np.count_nonzero(np.abs(steps) > largest))
    # The range is symmetric, without the one negative number more that integers have: a sign must not change a size.
    return np.clip(steps, -largest, largest).astype(settings.dtype), beyond


def _scale(job: Job, largest: int) -> list[float]:
    """Choose the size of one integer step for each channel, from windows spread over the specimen.

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
    """Choose windows of specimen, evenly spread; the coarsest level of the volume says where specimen is."""
    mask = coarse_foreground(job)
    if mask is None or not mask.any():
        mask = np.ones((4, 4, 4), dtype=np.bool_)
    found = np.argwhere(mask)
    shape, window = np.asarray(job.windows.shape_zyx), np.asarray(job.windows.window_zyx)
    middles = (found[:: max(1, len(found) // _SAMPLED)][:_SAMPLED] + 0.5) * shape / mask.shape
    starts = np.clip(np.rint(middles - window / 2), 0, np.maximum(shape - window, 0)).astype(int)
    stride = np.asarray(job.encoder.network.total_stride_zyx)
    # On the stride, as the real windows are, so that the same voxels are pooled together. A dict keeps the order and
    # drops equal corners.
    corners = dict.fromkeys(map(tuple, (starts // stride * stride).tolist()))
    boxes = [Box(corner, tuple(np.add(corner, window).tolist())) for corner in corners]
    return [box.intersect(Box((0, 0, 0), job.windows.shape_zyx)) for box in boxes]
