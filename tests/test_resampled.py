"""A volume on another grid: known values, nothing folded in, and the same bytes for any cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from registration_cases import OBLIQUE

from comir_hpc.errors import VolumeError
from comir_hpc.ingest import ingest_array
from comir_hpc.space.grid import Box, Grid
from comir_hpc.volumes.padding import Padding, Unpadded
from comir_hpc.volumes.resampled import Resampled, covering
from comir_hpc.volumes.volume import Volume


def stored(path: Path, values: np.ndarray, grid: Grid, **settings: Any) -> Volume:
    ingest_array(values, grid, path, chunk=16, shard=32, **settings)
    return Volume.open(path)


def wave(grid: Grid) -> np.ndarray:
    """A smooth field of the world, 100 to 300, with waves of 18 to 26 mm along x, y and z."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape_zyx], indexing="ij"), axis=-1)
    x, y, z = np.moveaxis(grid.world_mm(index), -1, 0)
    return (200 + 100 * np.sin(x / 3) * np.cos(y / 4) * np.sin(z / 3.5 + 0.5)).astype(np.float32)


def inner(values: np.ndarray, margin: int) -> np.ndarray:
    return values[..., margin:-margin, margin:-margin, margin:-margin]


@pytest.mark.parametrize("spacing", [0.7, 1.25, 1.9, 2.6])
@pytest.mark.parametrize("direction", [None, OBLIQUE])
def test_a_smooth_field_has_its_own_values_on_any_grid(tmp_path: Path, spacing: float, direction) -> None:
    more = {} if direction is None else {"direction": direction, "origin_xyz": (4.0, -30.0, 11.0)}
    volume = stored(tmp_path / "v.zarr", wave(Grid((40, 44, 48), (1.0, 1.0, 1.0), **more)), Grid(
        (40, 44, 48), (1.0, 1.0, 1.0), **more))  # fmt: skip
    grid = covering(volume.grid, (spacing,) * 3)
    assert grid.centre_mm == pytest.approx(volume.grid.centre_mm)
    seen = Resampled(volume, grid)
    # Waves of 7 to 10 voxels of the coarsest grid lose a little of their height by its antialiasing.
    error = inner(seen.read()[0] - wave(grid), 3)
    assert np.abs(error).max() < {0.7: 0.5, 1.25: 1.5, 1.9: 5, 2.6: 14}[spacing]
    assert seen.level == {0.7: 0, 1.25: 0, 1.9: 0, 2.6: 1}[spacing]


def test_thick_slices_are_read_from_the_level_that_is_fine_enough(tmp_path: Path) -> None:
    thick = Grid((12, 48, 48), (5.0, 1.0, 1.0))
    volume = stored(tmp_path / "v.zarr", wave(thick), thick)
    grid = covering(volume.grid, (2.1, 2.1, 2.1))
    seen = Resampled(volume, grid)
    assert volume.level_factors(seen.level) == (1, 2, 2)
    assert grid.shape_zyx == (29, 23, 23)
    assert np.corrcoef(inner(seen.read()[0], 3).ravel(), inner(wave(grid), 3).ravel())[0, 1] > 0.97


def test_a_grid_of_its_own_is_read_as_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4000, (40, 36, 44)).astype(np.uint16)
    volume = stored(tmp_path / "v.zarr", values, Grid(values.shape, (1.0, 1.0, 1.0), unit="um"))
    for level in range(volume.num_levels):
        for place in (level, volume.level_grid(level)):
            seen = Resampled(volume, place)
            assert (seen.direct, seen.level) == (True, level)
            box = Box((1, 2, 3), (9, 10, 11))
            np.testing.assert_array_equal(seen.read(box), volume.read(box, level=level))
            assert seen.read(box).dtype == np.uint16
            assert seen.known(box).all()


def test_it_is_the_cubic_convolution_of_pillow(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(30, 60, 60)).astype(np.float32)
    volume = stored(tmp_path / "v.zarr", values, Grid(values.shape, (1.0, 1.0, 1.0)))
    for spacing, size in ((1.5, (20, 40, 40)), (0.75, (40, 80, 80))):
        found = Resampled(volume, covering(volume.grid, (spacing,) * 3)).read()[0]
        flat = [Image.fromarray(plane).resize(size[1:], Image.Resampling.BICUBIC) for plane in values]
        planes = np.stack([np.asarray(one) for one in flat]).reshape(30, -1)
        expected = np.asarray(
            Image.fromarray(planes).resize((planes.shape[1], size[0]), Image.Resampling.BICUBIC)
        )
        # Pillow leaves weights beyond the border out, where the outermost voxel is continued here.
        np.testing.assert_allclose(inner(found, 4), inner(expected.reshape(size), 4), atol=2e-6)


def test_what_is_finer_than_the_grid_is_not_folded_into_it(tmp_path: Path) -> None:
    stripes = np.tile(np.array([0.0, 1000.0], np.float32), 30)  # two voxels are a period
    values = np.broadcast_to(stripes, (20, 20, 60)).copy()
    volume = stored(tmp_path / "v.zarr", values, Grid(values.shape, (1.0, 1.0, 1.0)))
    coarse = Resampled(volume, covering(volume.grid, (1.9, 1.9, 1.9))).read()[0]
    assert np.abs(inner(coarse, 3) - 500).max() < 25
    every = values[10, 10, np.rint(np.arange(3, 55, 1.9)).astype(int)]  # what picking voxels would give
    assert np.ptp(every) == 1000


def padded(path: Path) -> Volume:
    """A noisy specimen of two channels, cut by a bright constant in one corner, and another in the other channel."""
    rng = np.random.default_rng(2)
    values = rng.integers(90, 110, (2, 40, 42, 44)).astype(np.int16)
    where = np.zeros((40, 42, 44), dtype=np.bool_)
    where[:, :14, :17] = True
    other = np.roll(where, 5, axis=2)
    values[0][where], values[1][other] = 4000, -3000
    grid = Grid(values.shape[1:], (1.0, 1.0, 1.0), (3.0, 4.0, 5.0), OBLIQUE)
    ingest_array(values, grid, path, chunk=16, shard=32, padding="none")
    volume = Volume.open(path, writable=True)
    paddings = [
        Padding((float(v),), 5.0, float(w.mean()), w, (1, 1, 1)) for v, w in ((4000, where), (-3000, other))
    ]
    volume.finish(padding=[padding.as_record() for padding in paddings])
    return Volume.open(path)


@pytest.mark.parametrize("spacing", [(0.8, 0.8, 0.8), (1.7, 1.7, 1.7), (1.0, 1.3, 2.2)])
def test_any_cut_gives_the_same_bytes(tmp_path: Path, spacing: tuple[float, float, float]) -> None:
    volume = padded(tmp_path / "v.zarr")
    seen = Resampled(volume, covering(volume.grid, spacing))
    whole, known = seen.read(), seen.known()
    assert whole.dtype == np.float32
    rng = np.random.default_rng(0)
    for _ in range(12):
        ends = np.sort([rng.choice(n + 1, 2, replace=False) for n in seen.grid.shape_zyx], axis=1)
        box = Box(tuple(ends[:, 0]), tuple(ends[:, 1]))
        assert seen.read(box).tobytes() == np.ascontiguousarray(whole[(slice(None), *box.slices)]).tobytes()
        np.testing.assert_array_equal(seen.known(box), known[box.slices])


def test_a_box_is_cut_into_pieces_that_are_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = padded(tmp_path / "v.zarr")
    seen = Resampled(volume, covering(volume.grid, (1.3, 1.3, 1.3)))
    whole, at_once = seen.read(), seen.working_bytes(seen.grid.box)
    monkeypatch.setattr("comir_hpc.volumes.resampled._PIECE", 20_000)
    np.testing.assert_array_equal(seen.read(), whole)
    assert seen.working_bytes(seen.grid.box) < at_once


def test_padding_is_background_and_nothing_of_it_is_mixed_into_the_specimen(tmp_path: Path) -> None:
    volume = padded(tmp_path / "v.zarr")
    for spacing in (0.7, 1.7):
        seen = Resampled(volume, covering(volume.grid, (spacing,) * 3))
        values, known = seen.read()[0], Resampled(volume, seen.grid).known()
        place = seen.grid.world_mm(np.argwhere(np.ones(values.shape, bool)))
        _, y, x = np.moveaxis(volume.grid.index_zyx(place), -1, 0).reshape(3, *values.shape)
        # One voxel beside the padding counts as mixed with it (`volumes.padding`).
        far, deep = (y > 15.5 + spacing) | (x > 18.5 + spacing), (y < 13) & (x < 16)
        assert values[far].min() > 85
        assert values[far].max() < 115
        assert (values[deep] == 5).all()
        between = ~(values == 5)
        assert values[between].min() > 70  # no air of 5, no 4000, mixed in at the border of the padding
        assert values[between].max() < 130
        # Padding of both channels is unknown, that of one is not.
        assert not known[(y < 13) & (x < 16) & (x > 7)].any()
        assert known[(x < 3) | (y > 17)].all()


def test_without_padding_in_reach_the_values_are_those_of_a_volume_without_any(tmp_path: Path) -> None:
    volume = padded(tmp_path / "v.zarr")
    plain = stored(tmp_path / "plain.zarr", volume.read(), volume.grid, padding="none")
    assert Unpadded(volume).padded
    assert not Unpadded(plain).padded
    grid = covering(volume.grid, (1.3, 1.3, 1.3))
    far = Box((0, 20, 0), (grid.shape_zyx[0], grid.shape_zyx[1], grid.shape_zyx[2]))
    assert Resampled(volume, grid).read(far)[0].tobytes() == Resampled(plain, grid).read(far)[0].tobytes()


def test_a_slice_stays_a_slice(tmp_path: Path) -> None:
    flat = Grid((1, 40, 44), (9.0, 1.0, 1.0))
    volume = stored(tmp_path / "v.zarr", wave(flat), flat)
    grid = covering(volume.grid, (1.6, 1.6, 1.6))
    assert (grid.shape_zyx, grid.spacing_mm) == ((1, 25, 28), (9.0, 1.6, 1.6))
    error = Resampled(volume, grid).read()[0] - wave(grid)
    assert np.abs(error[:, 3:-3, 3:-3]).max() < 3


def test_other_axes_and_boxes_outside_are_refused(tmp_path: Path) -> None:
    grid = Grid((20, 20, 20), (1.0, 1.0, 1.0))
    volume = stored(tmp_path / "v.zarr", wave(grid), grid)
    with pytest.raises(VolumeError, match=r"v\.zarr is wanted on a grid whose axes are not its own.*warp"):
        Resampled(volume, Grid((20, 20, 20), (1.5, 1.5, 1.5), direction=OBLIQUE))
    seen = Resampled(volume, covering(grid, (1.5, 1.5, 1.5)))
    with pytest.raises(VolumeError, match="not inside the grid"):
        seen.read(Box((0, 0, 0), (14, 14, 15)))
