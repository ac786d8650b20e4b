"""Normalised gradient magnitude: what it is, however the grid lies, and that padding is no edge."""

import numpy as np
import pytest
from registration_cases import specimen, store, turn

from comir_hpc.config import RegisterSettings
from comir_hpc.representations import open_representation
from comir_hpc.representations.gradient import SCALE_VOXELS, Gradient, gradient_magnitude, normalised
from comir_hpc.space.grid import Grid
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
