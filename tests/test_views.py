"""Pairs whose volumes lie on different grids: a patch shows the same place of the world in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from registration_cases import OBLIQUE, store

from comir_hpc.config import SamplingSettings, TrainSettings
from comir_hpc.errors import VolumeError
from comir_hpc.learning.patches import PatchSampler
from comir_hpc.learning.specimens import prepare_specimens
from comir_hpc.learning.views import View, nearest_level
from comir_hpc.space.grid import Box, Grid
from comir_hpc.space.groups import rotation_group
from comir_hpc.train import train
from comir_hpc.volumes.volume import Volume

CPU = torch.device("cpu")
FIRST = Grid((40, 40, 40), (2.0, 2.0, 2.0), (-39.0, -39.0, -39.0))


def around_zero(shape: tuple[int, int, int], spacing: tuple[float, float, float], direction: Any) -> Grid:
    grid = Grid(shape, spacing, direction=direction)
    return Grid(shape, spacing, tuple((-grid.centre_mm).tolist()), direction)


def field(world: np.ndarray) -> np.ndarray:
    """A smooth field at points (..., 3) of the world, 50 to 150, in a ball of 34 mm; air is 0."""
    x, y, z = np.moveaxis(world, -1, 0)
    values = 100 + 50 * np.sin(x / 7 + 0.3) * np.cos(y / 9) * np.cos(z / 8 - 0.4)
    return np.where(x**2 + y**2 + z**2 < 34**2, values, 0).astype(np.float32)


def voxels(shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)


OTHERS = {
    "finer and turned": around_zero((92, 90, 88), (0.9, 0.9, 0.9), OBLIQUE),
    "thick slices": around_zero((17, 60, 60), (5.0, 1.4, 1.4), OBLIQUE),
    "a part": Grid((40, 40, 22), (2.0, 2.0, 2.0), (-39.0, -39.0, -39.0)),
}


def stored(path: Path, grid: Grid) -> Volume:
    return store(path, field(grid.world_mm(voxels(grid.shape_zyx))), grid, foreground_above=20.0)


def sampler_of(volumes: list[Volume], *, augment: bool, cache_mib: float = 100) -> PatchSampler:
    settings = SamplingSettings(
        patch=(16, 16, 16), workers=0, cache_mib=cache_mib, intensity=0.0, mirror=True
    )
    return PatchSampler(
        prepare_specimens([volumes], settings), settings, rotation_group("O"), 0, augment=augment
    )


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("augment", [False, True])
def test_both_patches_show_the_same_place(name: str, augment: bool, tmp_path: Path) -> None:
    first, other = stored(tmp_path / "a.zarr", FIRST), stored(tmp_path / "b.zarr", OTHERS[name])
    sampler = sampler_of([first, other], augment=augment)
    draws = [sampler.draw(0, number) for number in range(6)]
    batch = sampler.batch(0, range(6), CPU)
    places = [draw.centre_zyx + (voxels((16, 16, 16)) - 7.5) @ draw.matrix.T for draw in draws]
    world = FIRST.world_mm(np.stack(places))
    # Away from the surface, where each grid has steps of its own, and from faces, where the last voxel is continued.
    inside = batch.valid[:, 0].numpy() & (np.linalg.norm(world, axis=-1) < 28)
    for grid in (FIRST, OTHERS[name]):
        index = grid.index_zyx(world)
        inside &= ((index >= 0) & (index <= np.asarray(grid.shape_zyx) - 1)).all(axis=-1)
    assert inside.sum() > 2000
    for volume, image in zip((first, other), batch.images, strict=True):
        intensity = volume.intensity()
        shown = image[:, 0].numpy() * intensity.std + intensity.mean
        error = np.abs(shown - np.clip(field(world), intensity.low, intensity.high))[inside]
        # Thick slices are interpolated over 5 mm of waves of 44 mm and more.
        assert error.max() < (9 if name == "thick slices" else 3)
    if name == "a part":
        assert not batch.valid.all()
    whole = [sampler.inside(draw) for draw in draws]
    assert whole == [bool(one.all()) for one in batch.valid]


def test_the_level_nearest_to_the_patch_is_read(tmp_path: Path) -> None:
    fine = stored(tmp_path / "fine.zarr", around_zero((92, 90, 88), (0.9, 0.9, 0.9), OBLIQUE))
    thick = stored(tmp_path / "thick.zarr", around_zero((17, 90, 90), (5.0, 0.9, 0.9), OBLIQUE))
    wanted = {0.7: 0, 1.4: 0, 1.6: 1, 2.0: 1, 2.9: 1, 3.1: 2}
    for spacing, level in wanted.items():
        assert nearest_level(fine, Grid((9, 9, 9), (spacing,) * 3)) == level
    assert thick.level_factors(nearest_level(thick, Grid((9, 9, 9), (2.0,) * 3))) == (1, 2, 2)


def test_volumes_that_are_not_in_memory_give_the_same_patches(tmp_path: Path) -> None:
    volumes = [stored(tmp_path / "a.zarr", FIRST), stored(tmp_path / "b.zarr", OTHERS["thick slices"])]
    held, read = sampler_of(volumes, augment=True), sampler_of(volumes, augment=True, cache_mib=0)
    assert (held.cached, read.cached) == (True, False)
    assert held.specimens[0].num_bytes == 4 * (40**3 + 17 * 60 * 60)
    for one, two in zip(
        held.batch(3, range(3), CPU).images, read.batch(3, range(3), CPU).images, strict=True
    ):
        assert torch.equal(one, two)


def test_patches_are_drawn_where_all_volumes_are(tmp_path: Path) -> None:
    volumes = [stored(tmp_path / "a.zarr", FIRST), stored(tmp_path / "b.zarr", OTHERS["a part"])]
    share = prepare_specimens([volumes], SamplingSettings(patch=(16, 16, 16)))[0].share
    x = np.argwhere(share.values > 0.5)[:, 2] * share.step_zyx[2] + share.first_zyx[2]
    assert 8 < x.max() < 22
    view = View.of(volumes[1], volumes[0], 0)
    above, inside = view.foreground(Box((20, 18, 0), (21, 22, 40)))
    assert inside.sum(axis=2).tolist() == [[22] * 4]
    assert above.sum() == pytest.approx(4 * (22 - 3), abs=4)
    outside = view.foreground(Box((0, 0, 30), (4, 4, 40)))
    assert not np.any(outside)


def test_a_training_runs_on_two_grids_and_says_so(tmp_path: Path) -> None:
    for name, grid in (("one", FIRST), ("two", OTHERS["finer and turned"])):
        stored(tmp_path / f"{name}.zarr", grid)
    pair = {name: tmp_path / f"{name}.zarr" for name in ("one", "two")}
    small = {
        "network": {"widths": (4, 8)}, "sampling": {"patch": (16, 16, 16), "pairs_per_step": 2},
        "optimiser": {"steps": 2}, "tracking": {"mlflow": None},
    }  # fmt: skip
    result = train(TrainSettings(modalities=("one", "two"), pairs=(pair,), **small), tmp_path / "run")
    assert result.steps == 2
    (note,) = result.notes
    assert "two.zarr (92 x 90 x 88 voxels of 0.9" in note
    assert "% of the first in the second; patches have the voxels of the first" in note
    away = Grid((20, 20, 20), (2.0, 2.0, 2.0), (100.0, 0.0, 0.0))
    flat = Grid((1, 40, 40), (2.0, 2.0, 2.0), (-39.0, -39.0, 0.0))
    for grid, message in (
        (away, "do not overlap in the world"),
        (flat, "expected two volumes, or two single slices"),
    ):
        store(tmp_path / f"{grid.shape_zyx[0]}.zarr", np.full(grid.shape_zyx, 50, np.float32), grid)
        other = {**pair, "two": tmp_path / f"{grid.shape_zyx[0]}.zarr"}
        with pytest.raises(VolumeError, match=message):
            train(TrainSettings(modalities=("one", "two"), pairs=(other,), **small), tmp_path / "other")
