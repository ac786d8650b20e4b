from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import store, store_pair

from comir_hpc.config import SamplingSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.learning.augmentation import IntensityChange
from comir_hpc.learning.feed import feed
from comir_hpc.learning.patches import Draw, PatchSampler
from comir_hpc.learning.specimens import Specimen, prepare_specimens, specimen_share
from comir_hpc.space.groups import act, rotation_group
from comir_hpc.space.rotations import angle_deg
from comir_hpc.volumes.volume import Volume

CPU = torch.device("cpu")
PLAIN = IntensityChange.plain(0)


def sampling(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"patch": (16, 16, 16), "workers": 0, **changes})


def sampler_of(paths: Sequence[Path], *, augment: bool = True, seed: int = 0, **changes: Any) -> PatchSampler:
    options = sampling(**changes)
    group = rotation_group("O") if options.group == "auto" else rotation_group(options.group)
    return PatchSampler(
        prepare_specimens([[Volume.open(p) for p in paths]], options), options, group, seed, augment=augment
    )


def draw_at(centre: Sequence[float], matrix: Any = None, modalities: int = 2) -> Draw:
    turn = np.eye(3) if matrix is None else np.asarray(matrix, dtype=float)
    elements = np.zeros(modalities, dtype=np.int64)
    return Draw(0, np.asarray(centre, dtype=float), turn, elements, (PLAIN,) * modalities)


def patch_of(sampler: PatchSampler, draw: Draw) -> Any:
    return sampler.resample([draw], [sampler.read(draw)], CPU)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(store_pair(tmp_path_factory.mktemp("pair")).values())


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume whose value is a linear function of the position: interpolation must be exact."""
    z, y, x = np.meshgrid(np.arange(30), np.arange(32), np.arange(34), indexing="ij")
    values = (10 + 3 * z + 2 * y + x).astype(np.float32)
    return store(tmp_path_factory.mktemp("ramp") / "ramp.zarr", values, (3.0, 1.0, 2.0))


# ---------------------------------------------------------------------- known answers


def test_patch_on_the_grid_is_the_volume_normalised(pair: list[Path]) -> None:
    sampler = sampler_of(pair, augment=False)
    draw = sampler.draw(0, 3)
    start = (draw.centre_zyx - 7.5).astype(int)
    batch = patch_of(sampler, draw)
    for path, image in zip(pair, batch.images, strict=True):
        volume = Volume.open(path)
        whole = volume.intensity().normalise(volume.read())
        lower, upper = np.maximum(start, 0), np.minimum(start + 16, volume.grid.shape_zyx)
        expected = whole[(slice(None), *map(slice, lower, upper))]
        found = image[0].numpy()[(slice(None), *map(slice, lower - start, upper - start))]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_quarter_turn_by_resampling_equals_the_exact_rotation(pair: list[Path]) -> None:
    sampler = sampler_of(pair)
    straight = patch_of(sampler, draw_at((20.5, 20.5, 23.5)))
    for matrix in rotation_group("O").matrices:
        turned = patch_of(sampler, draw_at((20.5, 20.5, 23.5), matrix.T))
        for one, other in zip(straight.images, turned.images, strict=True):
            torch.testing.assert_close(other[0], act(one[0], matrix), atol=1e-4, rtol=0)


def test_interpolation_of_a_ramp_is_exact_under_any_turn(ramp: Path) -> None:
    sampler = sampler_of([ramp, ramp], group="D2")
    intensity = Volume.open(ramp).intensity()
    offsets = np.stack(np.meshgrid(*[np.arange(16) - 7.5] * 3, indexing="ij"), axis=-1)
    for index in range(4):
        drawn = sampler.draw(5, index)
        draw = draw_at(drawn.centre_zyx, drawn.matrix)
        position = draw.centre_zyx + offsets @ draw.matrix.T
        truth = intensity.normalise(10 + position @ np.array([3.0, 2.0, 1.0]))
        batch = patch_of(sampler, draw)
        # Between the outer voxel centres and the volume's edge the edge voxel is held.
        held = ((position >= 0) & (position <= np.array([29, 31, 33]))).all(axis=-1)
        assert held.any()
        np.testing.assert_allclose(batch.images[0][0, 0].numpy()[held], truth[held], atol=2e-3)
        edge = ((position >= -0.5) & (position <= np.array([29.5, 31.5, 33.5]))).all(axis=-1)
        np.testing.assert_array_equal(batch.valid[0, 0].numpy(), edge)


def test_outside_the_volume_is_air_and_invalid(pair: list[Path]) -> None:
    batch = patch_of(sampler_of(pair), draw_at((-0.5, 20, 20)))
    assert not batch.valid[0, 0, :8].any()
    assert batch.valid[0, 0, 8:].all()
    for path, image in zip(pair, batch.images, strict=True):
        intensity = Volume.open(path).intensity()
        air = (intensity.low - intensity.mean) / intensity.std
        torch.testing.assert_close(image[0, 0, :8], torch.full((8, 16, 16), air))


def test_ignore_matrix_counts_patch_sides(pair: list[Path]) -> None:
    sampler = sampler_of(pair, ignore_radius=0.5)
    draws = [draw_at((20, 20, 20)), draw_at((20, 20, 27.9)), draw_at((20, 20, 28.1))]
    expected = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=bool)
    np.testing.assert_array_equal(sampler.ignore(draws), expected)
    other = Draw(1, draws[0].centre_zyx, draws[0].matrix, draws[0].elements, draws[0].changes)
    assert not sampler.ignore([draws[0], other])[0, 1]


def test_turns_keep_physical_lengths(ramp: Path) -> None:
    sampler = sampler_of([ramp, ramp], group="D2", scale=0.1, rotate=1.0)
    spacing = np.array([3.0, 1.0, 2.0])
    sizes = []
    for index in range(50):
        physical = sampler.draw(0, index).matrix * spacing[:, None] / spacing
        size = np.cbrt(np.linalg.det(physical))
        np.testing.assert_allclose(physical.T @ physical, size**2 * np.eye(3), atol=1e-9)
        sizes.append(size)
    assert 1 / 1.1 <= min(sizes) < 0.97
    assert 1.03 < max(sizes) <= 1.1


def test_share_of_specimen_is_that_of_the_patch(tmp_path: Path) -> None:
    values = np.zeros((48, 48, 48), dtype=np.uint8)
    values[:, :, 24:] = 200
    values[:, :, 40:] = 100
    volumes = [Volume.open(store(tmp_path / "half.zarr", values))]
    share = specimen_share(volumes, 0, (16, 16, 16))
    np.testing.assert_array_equal(share.step_zyx, [2, 2, 2])
    # A patch centred at x is [x - 7.5, x + 7.5]: half of it is specimen where x is 23.5.
    position = share.first_zyx[2] + 2 * np.arange(24)
    expected = np.clip((position - 15.5) / 16, 0, 1)
    np.testing.assert_allclose(share.values[12, 12, :20], expected[:20], atol=1e-6)
    flat = [Volume.open(store(tmp_path / "flat.zarr", values, pyramid=False))]
    np.testing.assert_allclose(specimen_share(flat, 0, (16, 16, 16)).values, share.values, atol=1e-6)


# ---------------------------------------------------------------------- properties


def test_draws_depend_on_seed_step_and_index_only(pair: list[Path]) -> None:
    one, two = sampler_of(pair, seed=3), sampler_of(pair, seed=3)
    for index in (5, 0, 2):
        a, b = one.draw(7, index), two.draw(7, index)
        np.testing.assert_array_equal(a.matrix, b.matrix)
        np.testing.assert_array_equal(a.centre_zyx, b.centre_zyx)
        np.testing.assert_array_equal(a.elements, b.elements)
        assert a.changes == b.changes
    assert one.draw(7, 0).changes != one.draw(7, 1).changes != one.draw(8, 1).changes
    assert one.draw(7, 0).changes != sampler_of(pair, seed=4).draw(7, 0).changes
    assert one.draw(7, 0).changes != one.draw(7, 0, stream=1).changes


def test_a_batch_does_not_depend_on_its_split(pair: list[Path]) -> None:
    sampler = sampler_of(pair)
    whole = sampler.batch(2, range(6), CPU)
    parts = [sampler.batch(2, range(a, a + 2), CPU) for a in (0, 2, 4)]
    for modality in range(2):
        joined = torch.cat([p.images[modality] for p in parts])
        assert torch.equal(whole.images[modality], joined)
        assert torch.isfinite(joined).all()
    assert torch.equal(whole.valid, torch.cat([p.valid for p in parts]))


def test_modalities_are_aligned_and_varied_independently(pair: list[Path]) -> None:
    twin = [pair[0], pair[0]]
    same = sampler_of(twin, intensity=0.0).batch(0, range(4), CPU)
    assert torch.equal(same.images[0], same.images[1])
    varied = sampler_of(twin).batch(0, range(4), CPU)
    assert not torch.equal(varied.images[0], varied.images[1])
    assert (varied.elements[0] != varied.elements[1]).any()


def test_group_elements_and_turns_are_uniform(pair: list[Path]) -> None:
    sampler = sampler_of(pair, rotate=1.0, scale=0.0)
    draws = [sampler.draw(step, index) for step in range(40) for index in range(12)]
    elements = np.stack([d.elements for d in draws])
    counts = np.stack([np.bincount(column, minlength=24) for column in elements.T])
    assert counts.min() > 5
    assert (elements[:, 0] == elements[:, 1]).mean() < 0.1
    # Angles of uniform rotations have density (1 - cos a) / pi: mean 126.5 degrees.
    assert abs(np.mean([angle_deg(d.matrix) for d in draws]) - 126.5) < 5


def test_patches_hold_the_foreground_quota(pair: list[Path]) -> None:
    sampler = sampler_of(pair, augment=False, foreground=0.8)
    volume = Volume.open(pair[0])
    mask = volume.intensity().foreground(volume.read()[0])
    shares = []
    for index in range(30):
        start = np.rint(sampler.draw(1, index).centre_zyx - 7.5).astype(int)
        box = tuple(slice(max(a, 0), max(a + 16, 0)) for a in start)
        shares.append(mask[box].sum() / 16**3)
    # Drawn within half a lattice step, a sixteenth of the patch, of a point that meets the quota.
    assert min(shares) > 0.7
    assert max(shares) > 0.9


def test_patches_that_keep_to_a_box(pair: list[Path]) -> None:
    specimen = Specimen([Volume.open(path) for path in pair], 0, (8, 8, 8))
    settings = SamplingSettings(patch=(8, 8, 8), within=((0, 4, 0), (16, 24, 32)), foreground=0.1, rotate=0)
    sampler = PatchSampler([specimen], settings, rotation_group("O"), seed=0)
    centres = np.stack([sampler.draw(0, index).centre_zyx for index in range(200)])
    assert (centres >= np.array([3.5, 7.5, 3.5])).all()
    assert (centres <= np.array([11.5, 19.5, 27.5])).all()
    assert np.ptp(centres, axis=0).min() > 5
    too_small = settings.model_copy(update={"within": ((0, 0, 0), (6, 8, 8))})
    with pytest.raises(ConfigError, match="no patch"):
        PatchSampler([specimen], too_small, rotation_group("O"), seed=0)


def test_share_of_turned_pairs_follows_the_setting(pair: list[Path]) -> None:
    sampler = sampler_of(pair, rotate=0.25)
    straight = [np.array_equal(sampler.draw(0, i).matrix, np.eye(3)) for i in range(200)]
    assert 0.65 < np.mean(straight) < 0.85
    mirrored = sampler_of(pair, mirror=True)
    signs = [np.linalg.det(mirrored.draw(0, i).matrix) < 0 for i in range(100)]
    assert 0.3 < np.mean(signs) < 0.7


@settings(max_examples=30, deadline=None)
@given(step=st.integers(0, 2**40), index=st.integers(0, 2**20))
def test_boxes_hold_every_voxel_that_interpolation_needs(pair: list[Path], step: int, index: int) -> None:
    sampler = _shared_sampler(tuple(pair))
    draw = sampler.draw(step, index)
    box = sampler.box(draw)
    corners = sampler._corners(draw)
    shape = np.array((40, 44, 48))
    inner = np.clip(corners, 0, shape - 1)
    assert (np.floor(inner) >= box.start).all()
    assert (np.minimum(np.floor(inner) + 1, shape - 1) < box.stop).all()
    assert min(box.shape) >= 1
    batch = patch_of(sampler, draw)
    assert all(torch.isfinite(image).all() for image in batch.images)
    assert bool(batch.valid.all()) == sampler.inside(draw)


_SAMPLERS: dict[tuple[Path, ...], PatchSampler] = {}


def _shared_sampler(paths: tuple[Path, ...]) -> PatchSampler:
    return _SAMPLERS.setdefault(paths, sampler_of(paths, foreground=0.0, intensity=1.0))


def test_single_slices_turn_in_their_plane(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(1, 255, (1, 40, 40)).astype(np.float32)
    path = store(tmp_path / "slice.zarr", values)
    sampler = sampler_of([path, path], patch=(1, 16, 16), group="C4", rotate=1.0)
    for index in range(5):
        draw = sampler.draw(0, index)
        assert draw.centre_zyx[0] == 0
        np.testing.assert_allclose(draw.matrix[1:, 0], 0, atol=1e-12)
    assert sampler.batch(0, range(3), CPU).images[0].shape == (3, 1, 1, 16, 16)


# ---------------------------------------------------------------------- twins


def test_reading_boxes_equals_reading_from_memory(pair: list[Path]) -> None:
    cached, uncached = sampler_of(pair), sampler_of(pair, cache_mib=0)
    assert cached.specimens[0].cached
    assert not uncached.specimens[0].cached
    a, b = cached.batch(0, range(4), CPU), uncached.batch(0, range(4), CPU)
    for one, other in zip(a.images, b.images, strict=True):
        assert torch.equal(one, other)


def test_reader_processes_deliver_the_same_boxes_in_order(pair: list[Path]) -> None:
    sampler = sampler_of(pair, cache_mib=0)
    here = list(feed(sampler, range(3, 6), [0, 2], workers=0))
    there = list(feed(sampler, range(3, 6), [0, 2], workers=1))
    assert len(here) == len(there) == 3
    for (_, a), (_, b) in zip(here, there, strict=True):
        for one, other in zip(a, b, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_channels_and_integer_types_are_kept_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(1, 60000, (2, 24, 24, 24)).astype(np.uint16)
    values[1] //= 2
    path = store(tmp_path / "two.zarr", values)
    sampler = sampler_of([path, path], augment=False, foreground=0.0)
    draw = draw_at((11.5, 11.5, 11.5))
    image = patch_of(sampler, draw).images[0][0].numpy()
    volume = Volume.open(path)
    for channel in range(2):
        expected = volume.intensity(channel).normalise(values[channel, 4:20, 4:20, 4:20])
        np.testing.assert_allclose(image[channel], expected, atol=1e-5)


# ---------------------------------------------------------------------- refusals


def test_quota_that_no_patch_meets_is_refused_with_the_best_share(tmp_path: Path) -> None:
    values = np.zeros((40, 40, 40), dtype=np.float32)
    values[18:22, 18:22, 18:22] = 100
    values[20, 20, 20] = 120
    path = store(tmp_path / "small.zarr", values)
    with pytest.raises(ConfigError, match=r"the fullest one holds \d\.\d%; lower sampling\.foreground"):
        sampler_of([path, path], foreground=0.5)


def test_volume_without_specimen_is_refused(tmp_path: Path) -> None:
    values = np.ones((24, 24, 24), dtype=np.float32)
    path = store(tmp_path / "air.zarr", values, above=0.5)
    volume = Volume.open(path, writable=True)
    volume.update_metadata(intensity=[{**volume.metadata["intensity"][0], "foreground_above": 5.0}])
    with pytest.raises(VolumeError, match="is above the foreground threshold, there is no specimen"):
        Specimen([volume], 0, (16, 16, 16))
