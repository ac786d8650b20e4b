"""The method is tried on the moving volume alone, so that 'it cannot see this' is told from 'the two do not match'."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from registration_cases import specimen, turn

from comir_hpc.register.checks.again import SearchAgain, known_turn
from comir_hpc.register.checks.causes import causes_of
from comir_hpc.register.checks.itself import found_itself, grid_around, turned_copy
from comir_hpc.register.checks.measured import measure
from comir_hpc.register.checks.probe import Probe
from comir_hpc.representations.features import Features
from comir_hpc.representations.mind import self_similarity
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform

GRID = Grid((24, 26, 22), (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))
AS_IT_IS = SimpleNamespace(represented=lambda image, mask, grid: Features(image[None], mask, grid))


def probe_of(values: np.ndarray, mask: np.ndarray, **described: object) -> Probe:
    side = Features(values[None], mask, GRID, **described)  # type: ignore[arg-type]
    return Probe.of(side, side, (values, values), correlates=True)


def repeated(probe: Probe) -> SearchAgain:
    return SearchAgain(100, 12, 4, probe.points_mm)


def ball() -> tuple[np.ndarray, np.ndarray]:
    z, y, x = np.indices(GRID.shape_zyx) - (np.reshape(GRID.shape_zyx, (3, 1, 1, 1)) - 1) / 2
    radius = np.sqrt(z**2 + y**2 + x**2)
    return np.clip(10 - radius, 0, None).astype(np.float32), radius < 9


def test_the_copy_lies_where_the_motion_puts_it_and_has_noise_of_its_own() -> None:
    values, mask = specimen(GRID.shape_zyx)
    motion = Transform.rigid(turn(40), (3.0, -2.0, 1.0), GRID.centre_mm)
    features = Features(values[None], mask, GRID)
    onto = grid_around(features, motion)
    copy, seen = turned_copy(values, mask, GRID, motion, onto)
    assert copy.shape == seen.shape == onto.shape_zyx
    where = motion.apply(features.centroid_mm)
    np.testing.assert_allclose(Features(copy[None], seen, onto).centroid_mm, where, atol=0.2)
    assert seen.sum() == pytest.approx(mask.sum(), rel=0.05)
    assert 0.03 < copy[~seen].std() / values[mask].std() < 0.3


@pytest.mark.parametrize("described", [{}, {"describe": self_similarity}])
def test_structure_is_found_in_a_turned_copy(described: dict[str, object]) -> None:
    probe = probe_of(*specimen(GRID.shape_zyx), **described)
    away = found_itself(probe, AS_IT_IS, repeated(probe))  # type: ignore[arg-type]
    assert away is not None
    assert away < 1.5


def test_what_looks_alike_from_all_sides_is_not_found_and_the_cause_says_so() -> None:
    probe = probe_of(*ball())
    away = found_itself(probe, AS_IT_IS, repeated(probe))  # type: ignore[arg-type]
    assert away is not None
    assert away > 3
    answer = probe.judged(Transform.identity()).transform
    found = replace(measure(probe, answer), itself=away)
    assert "blind" in [cause.name for cause in causes_of(probe, answer, found)]
    assert "blind" not in [cause.name for cause in causes_of(probe, answer, replace(found, itself=None))]


def test_a_pair_that_does_not_match_is_told_from_a_method_that_sees_nothing() -> None:
    probe = probe_of(*specimen(GRID.shape_zyx))
    found = replace(measure(probe, Transform.identity()), chance=1.0, loosest=0.5, overlap=1.0)
    words = {
        away: " ".join(
            cause.sentence for cause in causes_of(probe, Transform.identity(), replace(found, itself=away))
        )
        for away in (0.5, 9.0, None)
    }
    assert "finds it in a turned copy" in words[0.5]
    assert "cannot see this specimen" in words[9.0]
    assert "turned copy" not in words[None]


def test_what_cannot_be_made_again_is_not_measured() -> None:
    probe = probe_of(*specimen(GRID.shape_zyx))
    stored = SimpleNamespace(represented=lambda *_: None)
    assert found_itself(probe, stored, repeated(probe)) is None  # type: ignore[arg-type]


def test_nothing_that_varies_is_far_away() -> None:
    probe = probe_of(*specimen(GRID.shape_zyx))
    empty = SimpleNamespace(represented=lambda image, mask, grid: Features(0 * image[None], mask, grid))
    assert found_itself(probe, empty, repeated(probe)) == 20.0  # type: ignore[arg-type]


def test_a_slice_stays_a_slice() -> None:
    grid = Grid((1, 20, 24), (3.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    features = Features(np.ones((1, *grid.shape_zyx), np.float32), np.ones(grid.shape_zyx, np.bool_), grid)
    onto = grid_around(features, known_turn(features, planar=True))
    assert onto.shape_zyx[0] == 1
    assert onto.origin_mm[2] == pytest.approx(0)
