"""A warp whose result is one file: resampled in memory, written whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from comir_hpc.blocks.cost import about_seconds
from comir_hpc.config.warp import WarpSettings
from comir_hpc.errors import ConfigError
from comir_hpc.host.memory import available_bytes, expected_peak, in_words
from comir_hpc.host.places import require_apart
from comir_hpc.space.grid import Box
from comir_hpc.space.plan import BlockPlan, plan_blocks
from comir_hpc.volumes.volume import Volume
from comir_hpc.warp.files import (
    predicted_bytes,
    require_fitting,
    require_free_place,
    require_memory,
    stored_bytes,
    write_file,
)
from comir_hpc.warp.resampling import Resampler

LIBRARY_BYTES = 20 << 20
"""Memory of what is loaded once a warp begins: measured 9 to 12 MiB."""
_BLOCK = 256  # voxels along each side that are resampled at once
_PROBE = 64  # voxels along each side of what is resampled to tell the time


def make_file(
    settings: WarpSettings,
    resampler: Resampler,
    *,
    require_unchanged: Callable[[], None],
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[int, tuple[str, ...]]:
    """Resample a volume and write it as the file that ``settings.out`` names.

    Parameters
    ----------
    require_unchanged : callable
        Raises if the moving volume changed while it was read.
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.

    Returns
    -------
    (blocks, notes)
        Number of blocks that were resampled, and sentences on what the format cannot keep.

    Raises
    ------
    ConfigError
        If an option is given that means nothing for a single file, or the file is an original of the volumes.
    VolumeError
        If the format cannot hold the result, memory or place for it is missing, or something else is there.
    """
    _require_possible(settings, resampler)
    shape, plan = _shape(resampler), _plan(resampler)
    require_memory(settings.out, _memory(settings.out, resampler))
    require_free_place(settings.out, overwrite=settings.overwrite)
    values = np.empty(shape, resampler.moving.dtype)
    for block in plan:
        values[(slice(None), *block.write.slices)] = resampler(block.write)
        if progress is not None:
            progress(f"warp {settings.out.name}", block.index + 1, len(plan))
    require_unchanged()
    return len(plan), write_file(settings.out, values, resampler.fixed)


def plan_file(settings: WarpSettings, resampler: Resampler) -> dict[str, Any]:
    """Predict what `make_file` would need; a piece of the block in the middle is resampled to tell the time.

    Raises
    ------
    ConfigError, VolumeError
        For the same reasons as `make_file`, if the options, the format or the originals forbid it.
    """
    _require_possible(settings, resampler)
    plan = _plan(resampler)
    block = plan[len(plan) // 2].write
    z, y, x = (min(b, a + _PROBE) for a, b in zip(block.start, block.stop, strict=True))
    probe = Box(block.start, (z, y, x))
    start = time.perf_counter()
    resampler(probe)
    seconds = (time.perf_counter() - start) * resampler.fixed.box.size / probe.size
    return {
        "peak_memory": in_words(expected_peak(_memory(settings.out, resampler))),
        "available_memory": in_words(available_bytes()),
        "disk_at_most": in_words(stored_bytes(_shape(resampler), resampler.moving.dtype)),
        "files": 1,
        "time_expected": about_seconds(seconds),
    }


def _shape(resampler: Resampler) -> tuple[int, int, int, int]:
    return (resampler.moving.num_channels, *resampler.fixed.shape_zyx)


def _plan(resampler: Resampler) -> BlockPlan:
    return plan_blocks(resampler.fixed.shape_zyx, (_BLOCK,) * 3)


def _memory(path: Path, resampler: Resampler) -> int:
    """Return the bytes of memory taken: all values with one block in the making, or all while they are written."""
    shape, dtype, plan = _shape(resampler), resampler.moving.dtype, _plan(resampler)
    voxel = shape[0] * dtype.itemsize
    block = voxel * max(block.write.size for block in plan)
    making = (
        voxel * resampler.fixed.box.size + block + resampler.needed_bytes([block.write for block in plan])
    )
    return LIBRARY_BYTES + max(making, predicted_bytes(path, shape, dtype))


def _require_possible(settings: WarpSettings, resampler: Resampler) -> None:
    """Refuse what a single file cannot be: made in parts, larger than its format, or one of the originals."""
    alone = {
        "--part": settings.part != (1, 1),
        "--workers": settings.workers > 1,
        "--cluster": settings.cluster is not None,
        "--verify": settings.verify,
    }
    if given := [name for name, is_given in alone.items() if is_given]:
        raise ConfigError(
            f"{', '.join(given)}: one process makes {settings.out.name} at once; leave that out, or write "
            "--out NAME.zarr"
        )
    require_fitting(settings.out, _shape(resampler), resampler.moving.dtype)
    like = resampler.moving if settings.like is None else Volume.open(settings.like)
    # Behind a store that was made on the way stands the user's own file, which an --out of its name would destroy.
    for volume in (resampler.moving, like):
        source = volume.metadata.get("source")
        original = source.get("path") if isinstance(source, dict) else None
        if isinstance(original, str):
            require_apart(settings.out, Path(original))
