"""Normalised gradient magnitude: what it is, that turning and contrast do not matter, and that a volume is found."""

import numpy as np
import pytest
from registration_cases import errors_vox, seen, specimen, store, turn
from scipy import ndimage

from comir_hpc.config import RegisterSettings
from comir_hpc.register import plan_register, register
from comir_hpc.representations import open_representation
from comir_hpc.representations.features import Features
from comir_hpc.representations.gradient import SCALE_VOXELS, Gradient, gradient_magnitude, normalised
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform
from comir_hpc.volumes.padding import Padding
from comir_hpc.volumes.volume import Volume

CENTRES = np.random.default_rng(3).uniform(-8, 8, size=(12, 3))
HEIGHTS = np.random.default_rng(4).normal(size=12)
WIDTH = 3.0  # standard deviation in mm of each blob


def blobs(points_mm):
    """A sum of Gaussian blobs at points (..., 3)."""
    away = ((points_mm[..., None, :] - CENTRES) ** 2).sum(-1)
    return (HEIGHTS * np.exp(-away / (2 * WIDTH**2))).sum(-1)


def smoothed_slope(points_mm, scale):
    """Length of the gradient of the blobs after a Gaussian of `scale` mm, in closed form."""
    variance = WIDTH**2 + scale**2
    offset = points_mm[..., None, :] - CENTRES
    value = HEIGHTS * (WIDTH**2 / variance) ** 1.5 * np.exp(-(offset**2).sum(-1) / (2 * variance))
    return np.linalg.norm((-offset / variance * value[..., None]).sum(-2), axis=-1)


def sampled(grid):
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape_zyx], indexing="ij"), axis=-1)
    return grid.world_mm(index)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.25)])
@pytest.mark.parametrize("degrees", [0, 37, 141])
def test_it_is_the_gradient_of_a_gaussian_of_the_stated_scale_however_the_grid_lies(spacing, degrees):
    """The known answer at every voxel, which knows nothing of the grid: so a turned volume gives the turned map."""
    direction = tuple(map(tuple, turn(degrees).tolist()))
    shape = tuple(round(32 / s) for s in spacing)
    grid = Grid(shape, spacing, (0.0, 0.0, 0.0), direction)
    grid = Grid(shape, spacing, tuple((-grid.centre_mm).tolist()), direction)
    points = sampled(grid)
    scale = SCALE_VOXELS * max(spacing)
    found = gradient_magnitude(blobs(points).astype(np.float32), grid, scale)
    inner = tuple(slice(int(np.ceil(4 * scale / s)), -int(np.ceil(4 * scale / s))) for s in spacing)
    wanted = smoothed_slope(points, scale)[inner]
    assert wanted.max() > 0.1
    assert np.abs(found[inner] - wanted).max() < 0.01 * wanted.max()


def test_a_ramp_has_its_slope_per_millimetre():
    grid = Grid((9, 9, 9), (0.5, 2.0, 3.0))
    ramp = np.broadcast_to((7.0 * 0.5 * np.arange(9))[:, None, None], (9, 9, 9)).astype(np.float32)
    np.testing.assert_allclose(gradient_magnitude(ramp, grid, 0.5)[4], 7.0, rtol=1e-4)


@pytest.mark.parametrize(("gain", "offset"), [(3.0, 7.0), (-1.0, 0.0), (-0.2, 100.0)])
def test_brightness_contrast_and_inversion_change_nothing(gain, offset):
    grid, mask = Grid((12, 13, 14), (1.0, 1.0, 1.0)), np.ones((12, 13, 14), bool)
    image = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=grid.shape_zyx), 1).astype(
        np.float32
    )
    one, other = (
        normalised(gradient_magnitude(values.astype(np.float32), grid, 1.2), mask)
        for values in (image, gain * image + offset)
    )
    assert one.min() >= 0
    assert 0.5 < one.max() < 1
    np.testing.assert_allclose(other, one, atol=2e-3)


def test_a_slice_has_no_gradient_across_it_and_a_constant_image_none_at_all():
    grid = Grid((1, 9, 9), (40.0, 1.0, 1.0))
    ramp = np.broadcast_to(2.0 * np.arange(9)[None, :, None], (1, 9, 9)).astype(np.float32)
    np.testing.assert_allclose(gradient_magnitude(ramp, grid, 1.0)[0, 4], 2.0, rtol=1e-4)
    assert not normalised(np.zeros((4, 4, 4), np.float32), np.ones((4, 4, 4), bool)).any()


def opened(volume, partner):
    settings = RegisterSettings(fixed=volume.path, moving=partner.path, representation="gradient")
    return open_representation(volume, settings, "fixed", partner)


def test_both_volumes_of_a_pair_get_the_scale_of_the_coarser_one(tmp_path):
    values, _ = specimen(brightness=4.0)
    fine = store(tmp_path / "fine.zarr", values, Grid(values.shape, (1.0, 1.0, 1.0)))
    coarse = store(tmp_path / "coarse.zarr", values, Grid(values.shape, (2.0, 2.0, 2.5)))
    for one, other in ((fine, coarse), (coarse, fine)):
        found = opened(one, other)
        assert isinstance(found, Gradient)
        assert found.scale_mm == pytest.approx(2.5 * SCALE_VOXELS)
    assert opened(fine, coarse).identity() != opened(fine, fine).identity()
    assert "3 mm" in opened(fine, coarse).notes(0)[-1]


def test_the_step_to_padding_is_no_edge(tmp_path):
    """Half of the field of view was never measured: near it nothing counts, and the rest is as it was."""
    values, _ = specimen(brightness=4.0)
    grid = Grid(values.shape, (1.0, 1.0, 1.0))
    cut = values.copy()
    cut[..., 18:] = -1000.0
    padding = Padding((-1000.0,), 0.0, 0.5, cut == -1000.0, (1, 1, 1))
    store(tmp_path / "whole.zarr", values, grid)
    volume = store(tmp_path / "cut.zarr", cut, grid, padding=[padding.as_record()])
    whole = Volume.open(tmp_path / "whole.zarr")
    (found, _), (wanted, _) = opened(volume, whole).features(0), opened(whole, whole).features(0)
    assert found.known is not None
    kept = np.flatnonzero(found.known.any(axis=(0, 1)))
    # The voxel that touches the padding, and those within two standard deviations of 1.2 voxels of it.
    assert kept.max() == 14
    assert not (found.mask & ~found.known).any()
    edge = found.values[0][found.mask].max()
    assert edge <= 1.05 * wanted.values[0][wanted.mask].max()


def test_a_turned_and_inverted_volume_is_registered(tmp_path):
    grid = Grid((40, 44, 36), (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))
    truth = Transform.rigid(turn(12), (2.0, -1.5, 1.0), grid.centre_mm)
    values, mask = specimen(brightness=4.0)
    moved = seen(values, grid, grid, truth)
    store(tmp_path / "fixed.zarr", values, grid)
    store(tmp_path / "moving.zarr", np.where(moved > 0.5, 9 - moved, 0).astype(np.float32), grid)
    settings = RegisterSettings(
        fixed=tmp_path / "fixed.zarr",
        moving=tmp_path / "moving.zarr",
        out=tmp_path / "out",
        representation="gradient",
        initial="identity",  # the search by correlation is that of test_representation_door
        threads=1,
    )
    assert "gradient magnitude" in plan_register(settings)["fixed"]
    result = register(settings)
    assert errors_vox(result.transform, truth, Features(values[None], mask, grid)) < 0.3
    # No calibration has seen how well gradients of a right answer agree.
    assert result.verdict != "PASS"
    assert any("not been calibrated for --representation gradient" in reason for reason in result.reasons)
