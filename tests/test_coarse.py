"""Level 1 made with the blocks equals level 1 made from level 0, whatever of it was kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from comir_hpc.blocks import BlockResult, build_pyramid, run_blocks
from comir_hpc.blocks.coarse import CoarseBlocks
from comir_hpc.blocks.ledger import Ledger
from comir_hpc.space.grid import Grid
from comir_hpc.space.plan import Block, plan_blocks
from comir_hpc.volumes.volume import Volume

SHAPE = (37, 70, 45)


class Cut:
    """Blocks of an array."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __call__(self, block: Block) -> BlockResult:
        return BlockResult(self.values[(slice(None), *block.write.slices)])


def made(
    path: Path, values: np.ndarray, kind: str, shard: int, lost: tuple[int, ...], spacing: float = 1.0
) -> Volume:
    grid = Grid(values.shape[1:], (spacing, 1.0, 1.0))
    volume = Volume.create(
        path, grid, values.dtype, channels=len(values), kind=kind, chunk=shard // 2, shard=shard
    )
    plan, ledger = plan_blocks(grid.shape_zyx, volume.shard_zyx), Ledger(path, "f")
    run_blocks(plan, range(len(plan)), Cut(values), ledger)
    folder = CoarseBlocks(volume, plan, ledger).folder
    for index in lost:
        (folder / f"{index}.npy").unlink()

    build_pyramid(volume, plan, ledger)
    volume.finish()
    assert not folder.exists()
    return Volume.open(path)


def reference(path: Path, volume: Volume, values: np.ndarray) -> Volume:
    same = Volume.create(
        path, volume.grid, values.dtype, channels=len(values), kind=volume.metadata["kind"], chunk=8, shard=8
    )
    same.write(volume.grid.box, values)
    same.build_pyramid()
    return same


@pytest.mark.parametrize(
    ("kind", "dtype", "channels", "shard", "spacing", "lost"),
    [
        ("image", "uint16", 2, 16, 1.0, ()),
        ("image", "float32", 1, 16, 1.0, (0, 5)),
        ("labels", "uint8", 1, 16, 1.0, (3,)),
        ("image", "int32", 1, 16, 4.0, ()),  # z is not halved
    ],
)
def test_level_1_is_the_same(
    tmp_path: Path, kind: str, dtype: str, channels: int, shard: int, spacing: float, lost: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).integers(0, 100, (channels, *SHAPE)).astype(dtype)
    volume = made(tmp_path / "v.zarr", values, kind, shard, lost, spacing)
    same = reference(tmp_path / "w.zarr", volume, values)
    assert volume.num_levels == same.num_levels > 1
    for level in range(volume.num_levels):
        np.testing.assert_array_equal(volume.read(level=level), same.read(level=level))


def test_blocks_of_odd_sides_are_not_kept(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 100, (1, 40, 20, 20)).astype(np.uint8)
    volume = Volume.create(tmp_path / "v.zarr", Grid((40, 20, 20), (1.0,) * 3), np.uint8, chunk=5, shard=5)
    plan, ledger = plan_blocks((40, 20, 20), volume.shard_zyx), Ledger(volume.path, "f")
    run_blocks(plan, range(len(plan)), Cut(values), ledger)
    assert not CoarseBlocks(volume, plan, ledger).folder.exists()
    build_pyramid(volume, plan, ledger)
    np.testing.assert_array_equal(
        volume.read(level=1), reference(tmp_path / "w.zarr", volume, values).read(level=1)
    )
