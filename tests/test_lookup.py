"""Looking maps up at many places: the same as scipy's interpolation, to what a float32 can tell apart."""

import numpy as np
import pytest
from registration_cases import turn
from scipy import ndimage

from comir_hpc.register.lookup import Lookup


@pytest.mark.parametrize("shape", [(20, 17, 23), (2, 30, 31), (41, 8, 60)])
@pytest.mark.parametrize(("beyond", "mode"), [("zeros", "grid-constant"), ("border", "nearest")])
def test_maps_are_interpolated_inside_and_beyond_their_grid(shape, beyond, mode):
    maps = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    linear, offset = turn(100) * 0.7, np.asarray(shape) / 2 + 0.3
    points = np.random.default_rng(1).uniform(-1, 1, (3, 4000)) * np.asarray(shape)[:, None]
    points[:, :50] = np.round(points[:, :50])
    found = Lookup.of(maps, beyond).at(points.astype(np.float32), linear, offset)
    places = linear @ points + offset[:, None]
    assert (places < -1).any()
    assert (places > np.asarray(shape)[:, None]).any()
    for one, values in zip(found, maps, strict=True):
        np.testing.assert_allclose(values_at(values, places, mode), one, atol=2e-3)


def values_at(values, places, mode):
    return ndimage.map_coordinates(values.astype(float), places, order=1, mode=mode)


@pytest.mark.parametrize("beyond", ["zeros", "border"])
def test_a_single_slice_is_looked_up_in_its_plane(beyond):
    plane = np.random.default_rng(0).normal(size=(1, 1, 12, 14)).astype(np.float32)
    points = np.array([[0, 0, 0], [3, 7.5, 11], [13, 2.25, 0]], dtype=np.float32)
    (found,) = Lookup.of(plane, beyond).at(points, np.eye(3), np.zeros(3))
    np.testing.assert_allclose(found, values_at(plane[0, 0], points[1:], "nearest"), atol=1e-4)


def test_a_place_is_as_exact_as_the_docstring_says():
    """The line of the picture is what a float32 tells least exactly."""
    side = 80
    lines = np.broadcast_to(np.arange(side, dtype=np.float32)[:, None], (1, side, side, side))
    points = np.random.default_rng(0).uniform(1, side - 2, (3, 100_000)).astype(np.float32)
    off = np.abs(Lookup.of(lines).at(points, np.eye(3), np.zeros(3))[0] - points[1].astype(np.float64))
    assert off.mean() < 2e-4
    assert off.max() < 1e-3
