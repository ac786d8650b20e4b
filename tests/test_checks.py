"""Right answers of phantoms pass; wrong ones of every kind do not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from registration_cases import features_pair, seen, specimen, turn

from comir_hpc.register.checks.again import SearchAgain, moved
from comir_hpc.register.checks.causes import causes_of
from comir_hpc.register.checks.evidence import Evidence, search_again
from comir_hpc.register.checks.measured import measure
from comir_hpc.register.checks.mirror import mirror_map, mirrored, search_mirrored
from comir_hpc.register.checks.motions import known_motions, main_motions
from comir_hpc.register.checks.null import above_chance
from comir_hpc.register.checks.probe import Probe
from comir_hpc.register.checks.verdict import judge
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform

SHAPE = (26, 30, 24)
GRID = Grid(SHAPE, (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))
TRUTH = Transform.rigid(turn(20), (1.5, -1.0, 0.5), GRID.centre_mm)


def made_probe(fixed: Features, moving: Features, **options: bool) -> Probe:
    images = fixed.values[0] + 3, 3 - moving.values[0]  # the second modality shows the structures inverted
    return Probe.of(fixed, moving, images, correlates=True, **options)


@pytest.fixture(scope="module")
def sides() -> tuple[Features, Features]:
    values, mask = specimen(SHAPE)
    moved_values = seen(values, GRID, GRID, TRUTH)
    moved_mask = seen(mask.astype(np.float32), GRID, GRID, TRUTH) > 0.5
    return Features(values[None], mask, GRID), Features(moved_values[None], moved_mask, GRID)


@pytest.fixture(scope="module")
def probe(sides: tuple[Features, Features]) -> Probe:
    return made_probe(*sides)


@pytest.fixture(scope="module")
def rivals(probe: Probe) -> list[Transform]:
    turns = [2 * np.outer(axis, axis) - np.eye(3) for axis in probe.axes[0].T]
    centre = probe.alignment.centre_mm
    return [probe.judged(TRUTH.compose(Transform.rigid(t, np.zeros(3), centre))).transform for t in turns]


def verdict_of(probe: Probe, answer: Transform, rivals: list[Transform], **known: float | None) -> str:
    scores = [probe.judging.at(one).evidence for one in rivals]
    own = probe.judging.at(answer).evidence
    found = measure(probe, answer, rivals=[s for s in scores if s < own] or [0.0], **known)
    agreement = found.agreement
    return judge(
        Evidence(measured=found, agreement=agreement, voxel_mm=probe.spacing_mm, side_mm=probe.side_mm)
    ).verdict


def test_the_right_answer_passes(probe: Probe, rivals: list[Transform]) -> None:
    answer = probe.judged(TRUTH).transform
    assert probe.apart_vox(answer, TRUTH) < 0.2
    assert verdict_of(probe, answer, rivals, mirror=0.2) == "PASS"


def test_wrong_answers_of_the_same_pair_do_not_pass(probe: Probe, rivals: list[Transform]) -> None:
    for wrong in rivals:
        assert verdict_of(probe, wrong, rivals) != "PASS"
    far = known_motions(probe, 1, 9.0, seed=3)[0]
    beside = probe.judged(TRUTH.compose(far)).transform
    if probe.apart_vox(beside, TRUTH) > 1:
        assert verdict_of(probe, beside, rivals) != "PASS"


@pytest.mark.parametrize("kind", ["other", "noise", "shuffled"])
def test_pairs_that_have_no_answer_do_not_pass(kind: str, sides: tuple[Features, Features]) -> None:
    fixed, moving = sides
    rng = np.random.default_rng(1)
    values = moving.values.copy()
    if kind == "other":
        values = specimen(SHAPE, seed=5)[0][None]
    elif kind == "noise":
        values = rng.normal(size=values.shape).astype(np.float32)
    else:
        blocks = [
            (0, slice(z, z + 5), slice(y, y + 5), slice(x, x + 5))
            for z in range(0, 25, 5)
            for y in range(0, 30, 5)
            for x in range(0, 20, 5)
        ]
        for to, source in zip(blocks, rng.permutation(len(blocks)), strict=True):
            values[to] = moving.values[blocks[source]]
    pair = made_probe(fixed, replace(moving, values=values))
    best = [
        pair.judged(one).transform for one in SearchAgain(120, 12, 4, pair.points_mm).answers(*pair.sides)[:2]
    ]
    for answer in best:
        assert verdict_of(pair, answer, best) != "PASS"


@dataclass(frozen=True)
class Found:
    """A search that finds what it is told to find."""

    answers: list[Transform]

    def answers_turned(self, fixed: Features, moving: Features) -> list[Transform]:
        assert self.answers, "this search is not needed"
        return self.answers


def test_a_short_search_that_misses_is_repeated_thoroughly(probe: Probe, rivals: list[Transform]) -> None:
    answer = probe.judged(TRUTH).transform
    nothing = min(rivals, key=lambda one: probe.judged(one).evidence)
    assert probe.judged(nothing).evidence < 0.75 * probe.judged(answer).evidence

    def ends(short: list[Transform], thorough: list[Transform]) -> tuple[float, int]:
        again, found = search_again(probe, answer, Found(short), Found(thorough))
        return probe.apart_vox(again, answer), len(found)

    assert ends([nothing], [nothing, TRUTH]) == (pytest.approx(0, abs=0.2), 3)
    assert ends([nothing, TRUTH], []) == (pytest.approx(0, abs=0.2), 2)
    far, _ = ends([nothing], [nothing])
    assert far > 3
    # Another place that agrees as well is a rival, and no miss: no other search may take its place.
    again, _ = search_again(probe, nothing, Found([TRUTH]), Found([]))
    assert probe.apart_vox(again, TRUTH) < 0.2


def test_the_mirror_agrees_better_and_its_axis_is_named(sides: tuple[Features, Features]) -> None:
    fixed = sides[0]
    small = Transform.rigid(turn(8), (0.5, 0.3, 0.0), GRID.centre_mm)
    values, mask = specimen(SHAPE)
    for array_axis, name in ((3, "x"), (2, "y")):
        seen_values = np.flip(seen(values, GRID, GRID, small), array_axis - 1)
        seen_mask = np.flip(seen(mask.astype(np.float32), GRID, GRID, small) > 0.5, array_axis - 1)
        header_wrong = Features(
            np.ascontiguousarray(seen_values)[None], np.ascontiguousarray(seen_mask), GRID
        )
        pair = made_probe(fixed, header_wrong)
        repeat = SearchAgain(200, 12, 6, pair.points_mm)
        best = pair.judged(repeat.answers(*pair.sides)[0])
        lead, axis = search_mirrored(pair, repeat, best.transform, pair.sides)
        assert lead < -0.2
        assert axis == name
        found = judge(
            Evidence(
                measured=measure(pair, best.transform, mirror=lead),
                agreement=best.correlation,
                voxel_mm=pair.spacing_mm,
                mirror_axis=axis,
            )
        )
        assert found.verdict == "FAIL"
        assert f"a flipped axis, probably the {name} axis of the moving volume" in found.reasons[0]


def test_the_mirror_is_found_from_the_answer_with_exchanged_sides(
    sides: tuple[Features, Features], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that is nearly its own mirror is found with its sides exchanged: no search is needed from there."""
    pair = made_probe(sides[0], mirrored(sides[1]))
    repeat = SearchAgain(0, 0, 0, pair.points_mm)
    monkeypatch.setattr(SearchAgain, "answers", lambda *_: [])
    normal = pair.axes[0][:, 0]
    flip = np.eye(4)
    flip[:3, :3] -= 2 * np.outer(normal, normal)
    flip[:3, 3] = pair.alignment.centre_mm - flip[:3, :3] @ pair.alignment.centre_mm
    answer = mirror_map(GRID).compose(TRUTH).compose(Transform(flip))
    assert np.linalg.det(answer.matrix_mm) > 0
    lead, axis = search_mirrored(pair, repeat, answer, pair.sides)
    assert lead < -0.2
    assert axis is not None


def test_a_known_motion_is_undone(sides: tuple[Features, Features], probe: Probe) -> None:
    found = SearchAgain(200, 12, 6, probe.points_mm).answers_turned(*sides)[0]
    assert probe.apart_vox(found, TRUTH) < 1
    motion = Transform.rigid(turn(70), (3.0, 2.0, -4.0), GRID.centre_mm)
    turned = moved(sides[1], motion)
    assert np.allclose(turned.centroid_mm, motion.apply(sides[1].centroid_mm), atol=1e-9)


def test_mirroring_a_volume_maps_its_points() -> None:
    grid = Grid((4, 5, 6), (1.0, 2.0, 3.0), (7.0, -3.0, 2.0), tuple(map(tuple, turn(33).tolist())))
    place = mirror_map(grid).apply(grid.world_mm((1, 2, 0)))
    assert np.allclose(place, grid.world_mm((1, 2, 5)))


def test_structure_is_above_chance_and_noise_is_not(probe: Probe, sides: tuple[Features, Features]) -> None:
    agreement, information = above_chance(probe, TRUTH)
    assert agreement is not None
    assert agreement > 8
    assert information is not None
    assert information > 3
    values = np.random.default_rng(0).normal(size=sides[1].values.shape).astype(np.float32)
    noise, _ = above_chance(made_probe(sides[0], replace(sides[1], values=values)), TRUTH)
    assert noise is not None
    assert abs(noise) < 4


def test_main_motions_move_points_as_far_as_they_say(probe: Probe) -> None:
    motions = main_motions(probe)
    assert len(motions) == 6
    for motion in motions:
        moved_points = motion.by(0.5).apply(probe.points_mm)
        assert np.linalg.norm(moved_points - probe.points_mm, axis=1).mean() == pytest.approx(0.5, rel=0.02)


def test_a_rod_of_rings_does_not_determine_its_turn() -> None:
    shape = (48, 16, 16)
    z, y, x = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")
    mask = (np.hypot(y, x) < 5) & (abs(z) < 20)
    rings = np.random.default_rng(2).normal(size=48)
    values = np.where(
        mask, np.interp(z, np.arange(48) - 23.5, np.convolve(rings, np.ones(3) / 3, "same")), 0
    ).astype(np.float32)
    grid = Grid(shape, (1.0, 1.0, 1.0))
    rod = Features(values[None], mask, grid)
    pair = made_probe(rod, rod)
    found = measure(pair, Transform.identity().about(pair.alignment.centre_mm))
    assert found.loosest_words == "turning about the long axis"
    assert found.loosest < 0.02
    causes = causes_of(pair, Transform.identity(), found)
    assert any(
        cause.name == "loose" and "turning about the long axis is not determined" in cause.sentence
        for cause in causes
    )


def test_another_size_is_recognised() -> None:
    fixed, moving = features_pair(Transform.identity())
    grid = Grid(moving.grid.shape_zyx, tuple(2.2 * s for s in moving.grid.spacing_mm), moving.grid.origin_mm)
    larger = replace(moving, grid=grid)
    pair = made_probe(fixed, larger)
    answer = Transform.rigid(np.eye(3), larger.centroid_mm - fixed.centroid_mm, fixed.centroid_mm)
    names = [cause.name for cause in causes_of(pair, answer, measure(pair, answer))]
    assert "size" in names
