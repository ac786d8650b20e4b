import numpy as np
import pytest
from registration_cases import OBLIQUE, errors_vox, features_pair, seen, specimen, stretched_pair, turn

from comir_hpc.errors import RegistrationError
from comir_hpc.register.checks.cross_check import halves_distance_mm
from comir_hpc.register.pictures import make_panels
from comir_hpc.register.ranking import COARSE, FINE, rank
from comir_hpc.register.refine import Refiner
from comir_hpc.register.similarity import Similarity
from comir_hpc.representations import CORRELATION, INFORMATION
from comir_hpc.representations.features import Features, one_channel, surrounded
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform

CENTRE = (22.0, 13.0, 39.0)


def near(truth, degrees=6.0, shift=(2.0, -1.0, 1.0)):
    """A start that is off by a small rotation and shift."""
    off = Transform.rigid(turn(degrees, (1, -1, 2)), shift, CENTRE)
    return truth.compose(off)


@pytest.mark.parametrize("degrees", [0.0, 90.0, 137.0, 180.0])
def test_refinement_finds_a_known_displacement(degrees):
    truth = Transform.rigid(turn(degrees), (3.0, -2.0, 1.0), CENTRE)
    fixed, moving = features_pair(truth)
    refined = Refiner(fixed, moving, measure=CORRELATION).refine(near(truth), COARSE + FINE)
    assert errors_vox(refined.transform, truth, fixed) < 0.05
    assert refined.transform.is_rigid
    assert refined.iterations > 5


def test_identical_volumes_stay_where_they_are():
    fixed, moving = features_pair(Transform.identity())
    refined = Refiner(fixed, moving, measure=CORRELATION).refine(Transform.identity(), FINE)
    assert errors_vox(refined.transform, Transform.identity(), fixed) < 0.01
    assert refined.value == pytest.approx(1, abs=1e-3)


def test_the_unit_does_not_matter():
    """A cell and a planet: the same voxels at another scale give the same answer in voxels."""
    ends = []
    for scale in (1.0, 1e-4, 1e4):
        grid = Grid((40, 44, 36), (scale, scale, scale), (5.0 * scale, -8.0 * scale, 20.0 * scale), OBLIQUE)
        truth = Transform.rigid(turn(50), np.array([3.0, -2.0, 1.0]) * scale, grid.centre_mm)
        fixed, moving = features_pair(truth, grid)
        start = Transform.rigid(turn(54), np.array([1.5, -1.0, 2.0]) * scale, grid.centre_mm)
        refined = Refiner(fixed, moving, measure=CORRELATION).refine(start, COARSE + FINE)
        ends.append(errors_vox(refined.transform, truth, fixed))
    assert max(ends) < 0.05


def test_information_refines_an_inverted_volume():
    truth = Transform.rigid(turn(137), (3.0, -2.0, 1.0), CENTRE)
    fixed, moving = features_pair(truth)
    inverted = Features(
        np.where(moving.mask, 2 - moving.values, -5).astype(np.float32), moving.mask, moving.grid
    )
    refined = Refiner(fixed, inverted, measure=INFORMATION).refine(near(truth), COARSE + FINE)
    assert errors_vox(refined.transform, truth, fixed) < 0.25


def test_affine_finds_a_stretch():
    truth, fixed, moving, start = stretched_pair(CENTRE)
    refiner = Refiner(fixed, moving, measure=CORRELATION)
    rigid, affine = (refiner.refine(start, COARSE + FINE, kind).transform for kind in ("rigid", "affine"))
    assert errors_vox(affine, truth, fixed) < 0.1 < errors_vox(rigid, truth, fixed)


def test_an_affine_motion_sees_the_size_of_a_specimen_that_shows_nothing_inside():
    """An ellipsoid of one grey value: only the air around it says how large it is."""
    grid = Grid((44, 40, 48), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    z, y, x = np.indices(grid.shape_zyx) - np.array([22, 20, 24])[:, None, None, None]
    noise = np.random.default_rng(0).normal(0, 0.02, (2, *grid.shape_zyx))
    sides = []
    for number, longer in enumerate((1.0, 1.1)):
        inside = (z / 12) ** 2 + (y / 10) ** 2 + (x / (13 * longer)) ** 2 <= 1
        sides.append(Features((inside + noise[number]).astype(np.float32)[None], inside, grid))
    truth = Transform(np.diag([1.1, 1.0, 1.0, 1.0]) + np.array([[0, 0, 0, -2.4]] + [[0] * 4] * 3))
    refiner = Refiner(*sides, measure=INFORMATION)
    inside_alone, found = (
        refiner.refine(Transform.identity(), FINE[-1:], "affine", within).transform
        for within in (sides[0].mask, None)
    )
    assert errors_vox(found, truth, sides[0]) < 0.15 < 0.4 < errors_vox(inside_alone, truth, sides[0])


def test_a_margin_is_counted_in_mm_and_leaves_out_what_was_not_measured():
    grid = Grid((5, 9, 9), (4.0, 1.0, 2.0), (0.0, 0.0, 0.0))
    mask = np.zeros(grid.shape_zyx, dtype=bool)
    mask[2, 4, 4] = True
    assert np.argwhere(surrounded(mask, None, grid, 4.0)).min(axis=0).tolist() == [1, 0, 2]
    assert surrounded(mask, None, grid, 0.5).sum() == 27  # at least one voxel
    known = np.ones_like(mask)
    known[:, :, 5:] = False
    assert not surrounded(mask, known, grid, 4.0)[:, :, 5:].any()
    plane = Grid((1, 9, 9), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert surrounded(mask[2:3], None, plane, 2.0).sum() == 25


def test_one_seed_gives_one_result_on_any_number_of_threads():
    truth = Transform.rigid(turn(30), (1.0, 0.5, 0.2), CENTRE)
    fixed, moving = features_pair(truth)
    ends = [
        Refiner(fixed, moving, measure=CORRELATION, seed=3, threads=threads)
        .refine(near(truth), COARSE + FINE)
        .transform.matrix_mm
        for threads in (1, 1, 2)
    ]
    assert np.array_equal(ends[0], ends[1])
    assert np.allclose(ends[0], ends[2], atol=1e-9)


def test_volumes_apart_are_refused():
    fixed, moving = features_pair(Transform.identity())
    away = Transform.rigid(np.eye(3), (500.0, 0, 0), CENTRE)
    with pytest.raises(RegistrationError, match="optimiser stopped"):
        Refiner(fixed, moving, measure=CORRELATION).refine(away, COARSE)


# ------------------------------------------------------------------------------------------- the yardstick


def test_agreement_of_known_pairs():
    fixed, moving = features_pair(Transform.identity())
    same = Similarity(fixed, moving).at(Transform.identity())
    assert same.correlation == pytest.approx(1, abs=1e-6)
    assert same.information > 0.9
    assert same.overlap == pytest.approx(1, abs=1e-6)
    opposite = Features(-moving.values, moving.mask, moving.grid)
    other = Similarity(fixed, opposite).at(Transform.identity())
    assert other.correlation == pytest.approx(-1, abs=1e-6)
    assert other.information > 0.9
    turned = Similarity(fixed, moving).at(Transform.rigid(turn(90), (0, 0, 0), fixed.centroid_mm))
    assert abs(turned.correlation) < 0.5
    assert 0.5 < turned.overlap < 1
    away = Similarity(fixed, moving).at(Transform.rigid(np.eye(3), (500.0, 0, 0), CENTRE))
    assert (away.correlation, away.overlap) == (0.0, 0.0)


def test_overlap_is_a_share_of_the_smaller_specimen():
    fixed, moving = features_pair(Transform.identity())
    part = moving.mask.copy()
    part[: part.shape[0] // 2] = False
    half = Features(moving.values, part, moving.grid)
    assert Similarity(fixed, half).at(Transform.identity()).overlap == pytest.approx(1, abs=0.02)
    assert Similarity(half, fixed).at(Transform.identity()).overlap == pytest.approx(1, abs=0.02)


def test_channels_count_together():
    fixed, moving = features_pair(Transform.identity())
    noise = np.random.default_rng(0).normal(size=(2, *moving.values.shape[1:])).astype(np.float32)
    one = Features(np.concatenate([fixed.values, noise[:1]]), fixed.mask, fixed.grid)
    two = Features(np.concatenate([moving.values, noise[1:]]), moving.mask, moving.grid)
    found = Similarity(one, two).at(Transform.identity()).correlation
    energy = fixed.values[0][fixed.mask].var()
    assert found == pytest.approx(energy / (energy + 1), abs=0.03)
    mixed = one_channel(one, two)
    assert mixed[0].values.shape == fixed.values.shape
    only = one_channel(fixed, moving)
    assert only[0] is fixed


def test_mixing_channels_keeps_what_varies():
    values, mask = specimen()
    grid = Grid(values.shape, (1.0, 1.0, 1.0))
    both = Features(np.stack([0.1 * values, values]).astype(np.float32), mask, grid)
    mixed, _ = one_channel(both, both)
    assert abs(np.corrcoef(mixed.values[0][mask], values[mask])[0, 1]) > 0.999


# ------------------------------------------------------------------------------------------- ranking


def test_ranking_puts_the_right_start_first_and_counts_who_agrees():
    truth = Transform.rigid(turn(60), (2.0, 1.0, 0.0), CENTRE)
    fixed, moving = features_pair(truth)
    wrong = Transform.rigid(turn(170), (0, 0, 0), CENTRE)
    away = Transform.rigid(np.eye(3), (500.0, 0, 0), CENTRE)
    starts = [(wrong, 0.9), (near(truth), 0.5), (away, 0.4), (near(truth, -6.0, (-1.0, 1.0, 0)), 0.3)]
    calls = []
    ranking = rank(
        Refiner(fixed, moving, measure=CORRELATION),
        Similarity(fixed, moving),
        starts,
        measure=CORRELATION,
        progress=lambda *a: calls.append(a),
    )
    assert errors_vox(ranking.best.transform, truth, fixed) < 0.05
    assert ranking.consensus == 2
    assert ranking.runner_up is not None
    assert ranking.runner_up.coarse_score == 0.9
    assert ranking.runner_up.score < 0.6 * ranking.best.score
    assert [c.failure is None for c in ranking.candidates] == [True, True, True, False]
    assert "overlaps" in ranking.candidates[-1].failure
    assert calls[-1][0] == calls[-1][1]


def test_ranking_without_an_answer_is_refused():
    fixed, moving = features_pair(Transform.identity())
    away = Transform.rigid(np.eye(3), (500.0, 0, 0), CENTRE)
    with pytest.raises(RegistrationError, match="none of 1 starts led to an answer"):
        rank(
            Refiner(fixed, moving, measure=CORRELATION),
            Similarity(fixed, moving),
            [(away, None)],
            measure=CORRELATION,
        )


def test_halves_agree_on_a_right_answer_and_not_on_a_wrong_one():
    truth = Transform.rigid(turn(60), (2.0, 1.0, 0.0), CENTRE)
    fixed, moving = features_pair(truth)
    refiner = Refiner(fixed, moving, measure=CORRELATION)
    points = fixed.grid.world_mm(np.argwhere(fixed.mask)[::50])
    assert halves_distance_mm(refiner, fixed, truth, FINE[:1], points) < 0.2
    wrong = refiner.refine(Transform.rigid(turn(170), (0, 0, 0), CENTRE), COARSE).transform
    assert halves_distance_mm(refiner, fixed, wrong, FINE[:1], points) > 1


# ------------------------------------------------------------------------------------------- panels


def test_panels_show_the_middle_of_the_specimen():
    truth = Transform.rigid(turn(30), (2.0, 1.0, 0.0), CENTRE)
    grid = Grid((40, 44, 36), (2.0, 1.0, 0.5), (5.0, -8.0, 20.0))
    fixed, moving = features_pair(truth, grid, Grid((44, 44, 44), (1.0, 1.0, 1.0), (-2.0, -5.0, 30.0)))
    images = fixed.values[0], moving.values[0]
    panels = make_panels(fixed, moving, Transform.identity(), truth, images, representation=True)
    shapes = {"axial": (44, 36), "coronal": (40, 36), "sagittal": (40, 44)}
    for plane, shape in shapes.items():
        for kind in ("fixed", "before", "after"):
            for suffix in ("", "_representation"):
                assert panels[f"{plane}_{kind}{suffix}"].shape == shape
                assert panels[f"{plane}_{kind}{suffix}"].dtype == np.float32
    assert panels["axial_spacing_mm"].tolist() == [1.0, 0.5]
    assert panels["coronal_spacing_mm"].tolist() == [2.0, 0.5]
    centre = [round(c) for c in grid.index_zyx(fixed.centroid_mm)]
    assert np.array_equal(panels["axial_fixed"], fixed.values[0][centre[0]])
    assert np.array_equal(panels["sagittal_fixed"], fixed.values[0][:, :, centre[2]])
    mask = fixed.mask[centre[0]] & np.isfinite(panels["axial_after"])
    after, before = panels["axial_after"][mask], np.nan_to_num(panels["axial_before"][mask])
    assert np.corrcoef(panels["axial_fixed"][mask], after)[0, 1] > 0.9
    assert np.corrcoef(panels["axial_fixed"][mask], before)[0, 1] < 0.5
    plain = make_panels(fixed, moving, truth, truth, images, representation=False)
    assert not any(name.endswith("representation") for name in plain)


def test_a_moving_volume_without_voxels_there_is_nan():
    values, mask = specimen()
    grid = Grid(values.shape, (1.0, 1.0, 1.0))
    small = Grid((10, 10, 10), (1.0, 1.0, 1.0), (13.0, 17.0, 15.0))
    moved = seen(values, grid, small, Transform.identity())
    fixed, moving = Features(values[None], mask, grid), Features(moved[None], moved != 0, small)
    still = Transform.identity()
    panels = make_panels(fixed, moving, still, still, (values, moved), representation=False)
    assert np.isfinite(panels["axial_after"]).sum() == 100
