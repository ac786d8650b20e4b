import itertools

import numpy as np
import pytest
from registration_cases import FLIPPED, OBLIQUE, errors_vox, features_pair, specimen, turn

from comir_hpc.errors import RegistrationError
from comir_hpc.register.coarse import CoarseFeatures, Turner, coarsen
from comir_hpc.register.global_search import Search, choose_starts, distinct, search
from comir_hpc.representations import INFORMATION
from comir_hpc.representations.criteria import Correlator, MaskedCorrelation, MutualInformation
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import Grid
from comir_hpc.space.rotations import reverse_axes, so3_grid
from comir_hpc.transforms import Transform


def coarse(shape, channels, seed):
    rng = np.random.default_rng(seed)
    weights = np.clip(rng.normal(0.6, 0.5, size=shape), 0, 1).astype(np.float32)
    values = rng.normal(size=(channels, *shape)).astype(np.float32)
    return CoarseFeatures(values, weights, np.eye(3), np.zeros(3))


def overlapping(fixed, moving, shift):
    """Weights and values (c, N) of both where the moving map, moved by `shift` voxels, lies on the fixed one."""
    pairs = []
    for place in itertools.product(*[range(n) for n in moving.weights.shape]):
        on = tuple(p + s for p, s in zip(place, shift, strict=True))
        if all(0 <= o < n for o, n in zip(on, fixed.weights.shape, strict=True)):
            weight = fixed.weights[on] * moving.weights[place]
            pairs.append((weight, fixed.values[(slice(None), *on)], moving.values[(slice(None), *place)]))
    if not pairs:
        return np.zeros(0), np.zeros((len(fixed.values), 0)), np.zeros((len(fixed.values), 0))
    weight, f, m = zip(*pairs, strict=True)
    return np.asarray(weight, float), np.stack(f, axis=1).astype(float), np.stack(m, axis=1).astype(float)


def plain_correlation(weight, f, m):
    total = weight.sum()
    f = f - (f * weight).sum(axis=1, keepdims=True) / total
    m = m - (m * weight).sum(axis=1, keepdims=True) / total
    return (weight * f * m).sum() / np.sqrt((weight * f**2).sum() * (weight * m**2).sum())


def plain_information(weight, f, m, edges):
    joint = np.zeros([len(e) + 1 for e in edges])
    np.add.at(joint, (np.digitize(f[0], edges[0]), np.digitize(m[0], edges[1])), weight)
    joint /= joint.sum()

    def entropy(p):
        return -(p[p > 0] * np.log(p[p > 0])).sum()

    return (entropy(joint.sum(0)) + entropy(joint.sum(1))) / entropy(joint) - 1


@pytest.mark.parametrize("channels", [1, 3])
def test_masked_correlation_equals_a_plain_loop_at_every_shift(channels):
    fixed, moving = coarse((6, 5, 7), channels, 0), coarse((5, 5, 5), channels, 1)
    needed = 0.1 * float(fixed.weights.sum())
    correlator = Correlator.plan(fixed.weights, (5, 5, 5), needed)
    criterion = MaskedCorrelation(fixed)
    flat = criterion.moving_maps(moving.values.reshape(channels, -1), moving.weights.ravel())
    scores, overlap = criterion.score(correlator.spectra(flat.reshape(-1, 5, 5, 5)), correlator)
    checked = 0
    for shift in itertools.product(range(-4, 6), range(-4, 5), range(-4, 7)):
        weight, f, m = overlapping(fixed, moving, shift)
        place = tuple(s - first for s, first in zip(shift, correlator.first, strict=True))
        inside = all(0 <= p < n for p, n in zip(place, correlator.counts, strict=True))
        assert inside or weight.sum() < needed, "the window misses a shift with enough overlap"
        if inside and weight.sum() < 0.999 * needed:
            assert scores[place] == -np.inf
        if inside and weight.sum() > 1.001 * needed:
            assert overlap[place] == pytest.approx(weight.sum(), rel=1e-4)
            assert scores[place] == pytest.approx(plain_correlation(weight, f, m), abs=2e-4)
            checked += 1
    assert checked > 100


def test_mutual_information_equals_a_plain_histogram_at_every_shift():
    fixed, moving = coarse((6, 5, 7), 1, 0), coarse((5, 5, 5), 1, 1)
    correlator = Correlator.plan(fixed.weights, (5, 5, 5), 0.4 * float(fixed.weights.sum()))
    criterion = MutualInformation(fixed, moving, classes=4)
    flat = criterion.moving_maps(moving.values.reshape(1, -1), moving.weights.ravel())
    scores, _ = criterion.score(correlator.spectra(flat.reshape(-1, 5, 5, 5)), correlator)
    edges = [np.quantile(s.values[0][s.weights > 0.5], (0.25, 0.5, 0.75)) for s in (fixed, moving)]
    for place in itertools.product(*[range(n) for n in correlator.counts]):
        shift = tuple(p + first for p, first in zip(place, correlator.first, strict=True))
        weight, f, m = overlapping(fixed, moving, shift)
        if weight.sum() > 1.001 * correlator.needed:
            assert scores[place] == pytest.approx(plain_information(weight, f, m, edges), abs=1e-4)


def test_turned_samples_come_from_where_the_rotation_points():
    moving = coarse((9, 9, 9), 1, 0)
    ramp = np.stack(np.meshgrid(*[np.arange(9.0)] * 3, indexing="ij"))[:1].astype(np.float32)
    moving = CoarseFeatures(ramp, np.ones((9, 9, 9), np.float32), np.eye(3)[:, ::-1], np.zeros(3))
    turner = Turner(moving, np.eye(3)[:, ::-1])
    straight, weights = turner.sample(np.eye(3))
    cube = turner.cube(np.concatenate([straight, weights[None]]))
    inside = cube[1] > 0.99
    centre = (turner.shape[0] - 1) // 2
    assert np.allclose(
        cube[0][inside], (4 + np.arange(turner.shape[0]) - centre)[np.nonzero(inside)[0]], atol=1e-4
    )
    quarter, _ = turner.sample(turn(90, (0, 1, 0)))  # carries x onto -z
    turned = turner.cube(quarter)[0]
    assert np.allclose(
        turned[inside], (4 - np.arange(turner.shape[0]) + centre)[np.nonzero(inside)[2]], atol=1e-4
    )


@pytest.mark.parametrize("direction", [OBLIQUE, FLIPPED])
def test_coarse_maps_lie_where_the_volume_does(direction):
    values, mask = specimen()
    grid = Grid(values.shape, (2.0, 1.0, 0.5), (5.0, -8.0, 20.0), direction)
    features = Features(np.full((1, *values.shape), 5, np.float32), mask, grid)
    features.values[0, ~mask] = -1000
    ramp = grid.world_mm(np.argwhere(mask))[:, 0]
    features.values[0][mask] = ramp
    small = coarsen(features, 4.0)
    assert np.allclose(np.linalg.norm(small.frame, axis=0), 4.0)
    assert np.allclose(small.centroid_mm, features.centroid_mm, atol=0.2)
    index = np.argwhere(small.weights > 0.95)
    x = small.origin_mm[0] + index @ small.frame[0]
    found = small.values[0][tuple(index.T)]
    # Air (-1000) is not averaged in, and the ramp's slope is the world's.
    assert np.corrcoef(x, found)[0, 1] > 0.999
    assert np.polyfit(x, found, 1)[0] == pytest.approx(1 / ramp.std(), rel=0.15)


def grids():
    shape = (40, 44, 36)
    origin = (5.0, -8.0, 20.0)
    return {
        "plain": Grid(shape, (1.0, 1.0, 1.0), origin),
        "oblique": Grid((44, 44, 44), (1.1, 1.1, 1.1), (30.0, 10.0, 60.0), OBLIQUE),
        "flipped": Grid((44, 46, 44), (1.0, 1.0, 1.0), (45.0, -8.0, 18.0), FLIPPED),
        "anisotropic": Grid((18, 46, 40), (2.5, 1.0, 1.0), (3.0, -9.0, 18.0)),
    }


@pytest.mark.parametrize("onto", ["plain", "oblique", "flipped", "anisotropic"])
def test_search_finds_a_known_displacement_on_any_grid(onto):
    fixed_grid, moving_grid = grids()["plain"], grids()[onto]
    shift = moving_grid.centre_mm - fixed_grid.centre_mm + np.array([2.0, -1.5, 1.0])
    truth = Transform.rigid(turn(137), shift, fixed_grid.centre_mm)
    fixed, moving = features_pair(truth, fixed_grid, moving_grid)
    rotations = np.concatenate([reverse_axes(so3_grid(300)), turn(137 - 6)[None], np.eye(3)[None]])
    found = search(fixed, moving, rotations, voxels=20, threads=2)
    best = int(found.scores.argmax())
    assert best == 300
    assert errors_vox(found.transform(best), truth, fixed) < 2.5
    assert found.overlaps[best] > 0.9
    wrong = [k for k in range(302) if errors_vox(found.transform(k), truth, fixed) > 5]
    assert found.scores[best] > found.scores[wrong].max() + 0.2


def test_information_search_finds_an_inverted_volume():
    truth = Transform.rigid(turn(100), (1.0, 2.0, -2.0), (20.0, 10.0, 40.0))
    fixed, moving = features_pair(truth)
    inverted = Features(
        np.where(moving.mask, 8 - moving.values, 0).astype(np.float32), moving.mask, moving.grid
    )
    rotations = np.concatenate([reverse_axes(so3_grid(200)), turn(95)[None]])
    found = search(fixed, inverted, rotations, voxels=16, measure=INFORMATION, threads=2)
    assert int(found.scores.argmax()) == 200
    assert errors_vox(found.transform(200), truth, fixed) < 3


def test_a_rough_look_by_fewer_classes_leaves_the_best_rotations_as_they_are():
    """What is looked at closely has the exact scores; of the others none comes before, and none is lost."""
    fixed, moving = features_pair(Transform.rigid(turn(100), (1.0, 2.0, -2.0), (20.0, 10.0, 40.0)))
    rotations = np.concatenate([reverse_axes(so3_grid(200)), turn(95)[None]])
    exact, rough = (
        search(fixed, moving, rotations, voxels=16, measure=INFORMATION, closer=closer)
        for closer in (len(rotations), 20)
    )
    same = rough.scores == exact.scores
    assert 20 <= same.sum() < 40
    assert int(rough.scores.argmax()) == int(exact.scores.argmax()) == 200
    assert np.array_equal(rough.pivots_mm[same], exact.pivots_mm[same])
    assert rough.scores[~same].max() <= rough.scores[same].min()
    assert np.array_equal(np.isfinite(rough.scores), np.isfinite(exact.scores))
    assert 0.8 < np.median(rough.scores[~same] / exact.scores[~same]) < 1.25  # on one scale


def test_sparse_structures_on_a_dark_ground_are_looked_at_with_all_classes():
    """Two thirds of the voxels are 0: three classes would put all into one, and tell nothing apart."""
    values = np.zeros((1, 6, 6, 6), dtype=np.float32)
    values[0, 4:] = np.random.default_rng(0).random((2, 6, 6)) + 1
    weights = np.ones((6, 6, 6), dtype=np.float32)
    sparse = CoarseFeatures(values, weights, np.eye(3), np.zeros(3))
    varied = np.random.default_rng(1).random((1, 6, 6, 6), dtype=np.float32)
    full = CoarseFeatures(varied, weights, np.eye(3), np.zeros(3))
    criterion = MutualInformation(full, full)
    assert criterion.rough is not criterion
    for fixed, moving in ((sparse, full), (full, sparse), (sparse, sparse)):
        criterion = MutualInformation(fixed, moving)
        assert criterion.rough is criterion
    correlator = Correlator.plan(weights, weights.shape, 100.0)
    scores, _ = criterion.score(correlator.spectra(criterion.moving_maps(values, weights)), correlator)
    assert scores.max() == scores[tuple(-np.asarray(correlator.first))] > 0.9


def test_search_does_not_depend_on_threads():
    fixed, moving = features_pair(Transform.rigid(turn(40), (1, 0, 0), (0, 0, 0)))
    rotations = reverse_axes(so3_grid(60))
    one, two = (search(fixed, moving, rotations, voxels=16, threads=n) for n in (1, 3))
    assert np.array_equal(one.scores, two.scores)
    assert np.array_equal(one.pivots_mm, two.pivots_mm)


def test_progress_reaches_the_end():
    fixed, moving = features_pair(Transform.identity())
    calls = []
    search(fixed, moving, reverse_axes(so3_grid(40)), voxels=10, progress=lambda *a: calls.append(a))
    assert calls[-1] == (40, 40)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_distinct_answers_lie_apart_and_come_best_first():
    rotations = np.stack([turn(a, (0, 0, 1)) for a in (0, 3, 90, 94, 180)])
    found = Search(
        rotations_xyz=rotations,
        pivots_mm=np.zeros((5, 3)),
        scores=np.array([0.5, 0.9, 0.3, 0.8, -np.inf]),
        overlaps=np.ones(5),
        moving_centre_mm=np.zeros(3),
        spacing_mm=1.0,
    )
    points = np.random.default_rng(0).normal(size=(200, 3)) * 20
    assert distinct(found, points, 5, 3.0) == [1, 3]
    assert distinct(found, points, 5, 0.5) == [1, 3, 0, 2]
    assert distinct(found, points, 1, 0.5) == [1]
    assert choose_starts(found, points, 2) == [1, 3]


def test_nothing_to_compare_is_refused():
    fixed, moving = features_pair(Transform.identity())
    empty = Features(moving.values, np.zeros_like(moving.mask), moving.grid)
    with pytest.raises(RegistrationError, match="no foreground"):
        search(fixed, empty, np.eye(3)[None], voxels=10)
    flat = Features(np.ones_like(moving.values), moving.mask, moving.grid)
    with pytest.raises(RegistrationError, match="do not vary"):
        search(fixed, flat, np.eye(3)[None], voxels=10)
    two = Features(np.repeat(moving.values, 2, axis=0), moving.mask, moving.grid)
    with pytest.raises(RegistrationError, match="1 channels"):
        search(fixed, two, np.eye(3)[None], voxels=10)
