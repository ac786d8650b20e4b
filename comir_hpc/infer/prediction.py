"""What `infer` will need: windows, time, memory and disk."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from comir_hpc.blocks.cost import Figures, recording_seconds, together, writing_bytes
from comir_hpc.config.infer import InferSettings
from comir_hpc.host.launch import DTYPES
from comir_hpc.host.memory import expected_in_worker, expected_peak
from comir_hpc.networks import predict_encoding
from comir_hpc.representations.encoding.encoder import Encoder
from comir_hpc.representations.encoding.grid import WindowGrid
from comir_hpc.space.grid import Box
from comir_hpc.space.plan import BlockPlan, plan_blocks
from comir_hpc.volumes.padding import Unpadded
from comir_hpc.volumes.volume import chunk_and_shard, planned_levels

if TYPE_CHECKING:
    from comir_hpc.infer.inputs import Inputs

# Windows that a calibration may cost against those of the work: a twentieth.
_WORTH_CALIBRATING = 20
_LIBRARY_BYTES = 24 << 20  # measured: up to 18 MiB are loaded after the first window is encoded
_WORKER_HEAP = 200 << 20  # measured: 174 to 182 MiB with torch loaded
# Memory of a window's tensors with what the convolutions' library takes besides: measured 3.4 in the first block. Every
# block starts threads of its own, which get a heap of their own from glibc, and leave some of it behind.
_ONE_BLOCK, _MANY_BLOCKS = 3.4, 6.8

_COARSE = 1 << 20  # voxels of a level that may be read at once to see where specimen is


def evaluations(windows: WindowGrid, plan: BlockPlan) -> int:
    """Count all windows that are evaluated, those at faces between rows of blocks several times."""
    z, y = (windows.positions(axis, plan.core_zyx[axis]) for axis in (0, 1))
    return z * y * len(windows.starts[2])


def prediction(inputs: Inputs, plan: BlockPlan, blocks: int) -> Figures:
    """Predict what this call needs for `blocks` blocks of the plan."""
    peak = process_bytes(inputs, plan)  # before anything is evaluated
    share = _occupied_share(inputs)
    in_all = evaluations(inputs.windows, plan) * blocks / len(plan) * (share or 0)
    worth = in_all > _WORTH_CALIBRATING * 2 * _calibrated_windows(inputs.encoder)
    files, num_bytes = output_files_and_bytes(inputs, inputs.settings)
    recording = recording_seconds(inputs.settings.out, blocks, files * blocks / len(plan))
    return Figures(
        blocks=blocks,
        seconds=in_all * calibrate(inputs) / inputs.settings.workers + recording if worth else None,
        peak_bytes=peak,
        num_bytes=num_bytes,
        files=files,
    )


def _occupied_share(inputs: Inputs) -> float | None:
    """Return the share of windows that hold specimen, judged by the coarsest level if that is small enough."""
    if not inputs.settings.skip_background:
        return 1.0
    mask = coarse_foreground(inputs)
    if mask is None:
        return None
    total = np.pad(mask.astype(np.int64), [(1, 0)] * 3).cumsum(0).cumsum(1).cumsum(2)
    sides = zip(
        inputs.windows.starts, inputs.windows.window_zyx, inputs.windows.shape_zyx, mask.shape, strict=True
    )
    ends = [
        (np.array(starts) * m // n, np.minimum(-(-(np.array(starts) + w) * m // n), m))
        for starts, w, n, m in sides
    ]
    inside = np.zeros(tuple(len(starts) for starts, _ in ends), dtype=np.int64)
    for corner in np.ndindex(2, 2, 2):
        inside += (-1) ** (3 - sum(corner)) * total[
            np.ix_(*(end[c] for end, c in zip(ends, corner, strict=True)))
        ]
    return float((inside > 0).mean())


def _calibrated_windows(encoder: Encoder) -> int:
    return 2 * torch.get_num_threads() if encoder.device.type == "cpu" else 8


def calibrate(inputs: Inputs) -> float:
    """Measure the seconds a window takes, with as many at work as there are threads; background costs nothing."""
    encoder, windows = inputs.encoder, inputs.windows
    count = _calibrated_windows(encoder)
    shape = windows.window_zyx
    row = Box((0, 0, 0), (*shape[:2], shape[2] * count))
    neighbours = encoder.windows(row.shape, window=max(shape), overlap=0.0)
    values = np.random.default_rng(0).standard_normal((encoder.in_channels, *row.shape)).astype(np.float32)

    def seconds() -> float:
        start = time.perf_counter()
        encoder.encode(lambda box: values[(slice(None), *box.slices)], neighbours, row)
        return (time.perf_counter() - start) / len(neighbours)

    seconds()  # the first evaluation also prepares kernels
    return seconds()


def process_bytes(inputs: Inputs, plan: BlockPlan) -> int:
    """Predict the bytes of a process that does blocks, with what it holds already."""
    more = _LIBRARY_BYTES + block_bytes(inputs, plan) + encoding_bytes(inputs, len(plan))
    return expected_in_worker(more, _WORKER_HEAP) if inputs.settings.workers > 1 else expected_peak(more)


def total_bytes(inputs: Inputs, plan: BlockPlan) -> int:
    """Predict the bytes of all processes of a call."""
    pyramid = _LIBRARY_BYTES + 2 * math.prod(plan.core_zyx) * np.dtype(inputs.settings.dtype).itemsize
    return together(process_bytes(inputs, plan), inputs.settings.workers, pyramid)


def encoding_bytes(inputs: Inputs, blocks: int) -> int:
    """Predict the bytes of the windows that are encoded at once, and of those that wait before and behind them."""
    encoder, window = inputs.encoder, inputs.windows.window_zyx
    threads = torch.get_num_threads() if encoder.device.type == "cpu" else inputs.settings.batch
    if inputs.settings.workers > 1 and encoder.device.type == "cpu":
        threads = max(1, threads // inputs.settings.workers)
    waiting = 2 * threads * 4 * math.prod(window) * (encoder.in_channels + 2 * encoder.latent_channels)
    if encoder.device.type != "cpu":
        return waiting  # the tensors are on the GPU
    tensors = threads * predict_encoding(encoder.network, window, DTYPES[encoder.precision])
    return waiting + math.ceil((_ONE_BLOCK if blocks == 1 else _MANY_BLOCKS) * tensors)


def block_bytes(inputs: Inputs, plan: BlockPlan) -> int:
    """Predict the bytes of the arrays of one block.

    They are what one step of windows reads, their sums, and the voxels that are written and compressed.
    """
    window, shape = inputs.windows.window_zyx, plan.shape_zyx
    core = [min(c, n) for c, n in zip(plan.core_zyx, shape, strict=True)]
    sides = [min(c + 2 * w, n) for c, w, n in zip(core[:2], window, shape, strict=False)]
    face = math.prod(sides)
    # Two steps of input while one is joined to the next, read and normalised.
    read = 2 * face * window[2] * inputs.volume.num_channels * (8 + inputs.volume.dtype.itemsize)
    step = Box((0, 0, 0), (sides[0], sides[1], min(window[2], shape[2])))
    read += inputs.reader.seen.working_bytes(step)
    sums = 4 * math.prod(core[:2]) * (core[2] + 2 * window[2])
    size = np.dtype(inputs.settings.dtype).itemsize
    stored = writing_bytes(math.prod(core) * size, len(plan))
    # Integers are the nearest multiples of a step, found in float32, and windows were sampled for that step.
    rounded = math.prod(core) * 24 if np.dtype(inputs.settings.dtype).kind == "i" else 0
    return read + inputs.encoder.latent_channels * (sums + stored + rounded)


def output_files_and_bytes(inputs: Inputs, settings: InferSettings) -> tuple[int, int]:
    """Return upper bounds for files and bytes of the store: nothing compresses, and every shard is stored."""
    files, num_bytes = 1, 0
    for factors in planned_levels(inputs.grid):
        shape = inputs.grid.downsampled(factors).shape_zyx
        _, shard = chunk_and_shard(shape, settings.chunk, settings.shard)
        files += 1 + inputs.encoder.latent_channels * len(plan_blocks(shape, shard))
        num_bytes += math.prod(shape) * inputs.encoder.latent_channels * np.dtype(settings.dtype).itemsize
    return files, num_bytes


def coarse_foreground(inputs: Inputs) -> NDArray[np.bool_] | None:
    """Return where specimen is, (z, y, x), on the coarsest level; None if that is too large to look at."""
    coarsest = inputs.volume.level_grid(inputs.volume.num_levels - 1)
    if math.prod(coarsest.shape_zyx) > _COARSE:
        return None
    values = Unpadded(inputs.volume).read(level=inputs.volume.num_levels - 1)
    channels = [inputs.volume.intensity(c).foreground(channel) for c, channel in enumerate(values)]
    found: NDArray[np.bool_] = np.any(channels, axis=0)
    return found
