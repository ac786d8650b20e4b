"""Held-out places: maps that agree find them, maps that do not agree find them by chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from comir_hpc.representations.held_out import CELL, retrieve_places


def _map(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    noise = np.random.default_rng(seed).standard_normal((1, 46, 46, 46))
    return ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 1.5)).astype(np.float32)


def test_equal_maps_find_every_place() -> None:
    one = _map(0)
    found = retrieve_places(one, 3 * one + 1, np.ones(one.shape[1:], dtype=bool))
    assert (found.share, found.cells) == (1.0, 4**3)
    assert found.correlation == pytest.approx(1.0, abs=1e-5)


def test_unrelated_maps_find_places_by_chance() -> None:
    found = retrieve_places(_map(0), _map(1), np.ones((46, 46, 46), dtype=bool))
    assert found.share < 0.15  # 1/27 of 64 cells is 2.4 of them
    assert abs(found.correlation) < 0.1


def test_maps_that_are_off_by_a_place_find_none() -> None:
    one = _map(0)
    found = retrieve_places(one, np.roll(one, 3, axis=2), np.ones((46, 46, 46), dtype=bool))
    assert found.share < 0.05


def test_cells_without_specimen_do_not_count() -> None:
    one = _map(0)
    mask = np.zeros((46, 46, 46), dtype=bool)
    mask[3 : 3 + CELL, 3 : 3 + CELL, 3 : 3 + CELL] = True
    assert retrieve_places(one, one, mask).cells == 1
    mask[:] = False
    assert retrieve_places(one, one, mask).cells == 0
