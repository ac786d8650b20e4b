"""Small aligned volumes of two modalities, as `ingest` leaves them, for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.data.embedded import phantom_pair
from comir_hpc.space.grid import Grid
from comir_hpc.space.plan import plan_blocks
from comir_hpc.volumes.volume import Volume


def statistics(values: NDArray[Any], above: float) -> dict[str, float]:
    specimen = values[values > above].astype(np.float64)
    low, high = np.percentile(specimen, (0.1, 99.9))
    return {
        "low": min(float(low), above),
        "high": float(high),
        "mean": float(specimen.mean()),
        "std": float(specimen.std()),
        "foreground_above": above,
    }


def store(
    path: Path,
    values: NDArray[Any],
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    *,
    above: float = 0.0,
    pyramid: bool = True,
    chunk: int = 16,
    shard: int = 32,
) -> Path:
    """Write (z, y, x) or (c, z, y, x) values as a finished volume."""
    values = values if values.ndim == 4 else values[None]
    grid = Grid(values.shape[1:], spacing)
    volume = Volume.create(path, grid, values.dtype, channels=len(values), chunk=chunk, shard=shard)
    for block in plan_blocks(grid.shape_zyx, volume.shard_zyx):
        volume.write(block.write, values[(slice(None), *block.write.slices)])
    if pyramid:
        volume.build_pyramid()
    volume.finish(intensity=[statistics(channel, above) for channel in values])
    return path


def store_pair(
    folder: Path,
    shape: tuple[int, int, int] = (40, 44, 48),
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    seed: int = 0,
    **options: Any,
) -> dict[str, Path]:
    """Write a generated pair; the paths by modality, "one" and "two"."""
    pair = zip(("one", "two"), phantom_pair(shape, seed=seed), strict=True)
    options = {"above": 20.0, **options}
    return {name: store(folder / f"{name}.zarr", values, spacing, **options) for name, values in pair}
