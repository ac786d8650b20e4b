"""Keypoints: descriptors that no rotation changes, matches, what they agree on, and registrations that start there."""

import json
from dataclasses import replace

import numpy as np
import pytest
from registration_cases import errors_vox, features_pair, specimen, turn
from scipy import ndimage
from test_register import CENTRE, GRIDS, error, only_volumes, pair, settings, turned

from comir_hpc.config import RegisterSettings
from comir_hpc.register import plan_register, register
from comir_hpc.register.coarse import coarsen
from comir_hpc.register.inputs import open_inputs
from comir_hpc.register.keypoints import KeypointFinder
from comir_hpc.register.keypoints.consensus import agreed, distinct, fit
from comir_hpc.register.keypoints.extrema import keypoints
from comir_hpc.register.keypoints.matches import Matches, best_pairs
from comir_hpc.register.keypoints.sift import slice_keypoints
from comir_hpc.register.keypoints.spheres import DEGREE, invariants, spheres, turned_likeness
from comir_hpc.register.starts import Scale
from comir_hpc.representations import CORRELATION, INFORMATION
from comir_hpc.representations.features import Features
from comir_hpc.representations.mind import self_similarity
from comir_hpc.space.grid import Grid
from comir_hpc.space.rotations import angle_deg
from comir_hpc.transforms import Transform

CHOSEN = RegisterSettings(fixed="f", moving="m", representation="mind", initial="features")


def found(fixed, moving, measure=CORRELATION, **more):
    """What keypoints say of a pair on one scale."""
    points = fixed.grid.world_mm(np.argwhere(fixed.mask)[::37])
    longest = max(np.ptp(np.argwhere(fixed.mask), axis=0) * fixed.grid.spacing_mm)
    finder = KeypointFinder(CHOSEN.model_copy(update=more), measure, points, "maps")
    return finder.find([Scale(fixed, moving)], float(longest) / 32, None)


# ------------------------------------------------------------------------------------------- spheres


def waves(directions, coefficients):
    """A smooth function on spheres: polynomials of degree 0 to 4 that no rotation leaves alone."""
    x, y, z = np.moveaxis(directions, -1, 0)
    terms = np.stack([np.ones_like(x), x, y * z, x * x - z, x * y * z, x**3 * y - z * z])
    return np.tensordot(coefficients, terms, axes=(-1, 0))


@pytest.mark.parametrize("degrees", [0, 70, 180])
def test_no_rotation_changes_a_descriptor_and_the_rotation_is_found(degrees):
    rng = np.random.default_rng(1)
    rotation, some = turn(degrees), rng.normal(size=(3, 4, 6))  # three points, four spheres
    directions = spheres().directions_xyz
    sides = []
    for seen_from in (directions, directions @ rotation):  # g(x) = f(R^T x)
        values = waves(seen_from, some)
        coefficients = values @ spheres().analysis
        sides.append(
            (coefficients / np.linalg.norm(coefficients, axis=(1, 2), keepdims=True)).astype(np.float32)
        )
    fixed, moving = sides
    same = invariants(fixed) @ invariants(moving).T
    np.testing.assert_allclose(np.diag(same), 1, atol=1e-4)
    assert same[~np.eye(3, dtype=bool)].max() < 0.98
    likeness, rotations = turned_likeness(fixed, moving, np.array([[0, 0], [1, 1], [2, 2]]))
    assert (likeness > 0.85).all()
    assert (angle_deg(rotations @ rotation.T) < 20).all()  # the grid of rotations is that fine


def test_harmonics_are_orthonormal():
    basis = np.linalg.pinv(spheres().analysis)
    np.testing.assert_allclose(basis @ spheres().analysis, np.eye((DEGREE + 1) ** 2), atol=1e-12)
    turned_by = spheres().mixtures[:, 1:10].reshape(-1, 3, 3)  # the block of degree 1: rotations themselves
    np.testing.assert_allclose(turned_by @ turned_by.transpose(0, 2, 1), np.tile(np.eye(3), (len(turned_by), 1, 1)),
                               atol=1e-5)  # fmt: skip


# ------------------------------------------------------------------------------------------- matches


def test_pairs_are_mutual_and_clear_and_a_neighbour_is_no_rival():
    likeness = np.array([[0.9, 0.89, 0.1], [0.2, 0.95, 0.1], [0.94, 0.1, 0.3], [0.1, 0.2, 0.6]])
    places = np.array([[0.0, 0, 0], [1, 0, 0], [50, 0, 0]])
    # 0 prefers 0, which prefers 2; 1 and 1 are each other's; so are 2 and 0, 3 and 2.
    assert best_pairs(likeness, places, 3.0, 1.0).tolist() == [[1, 1], [2, 0], [3, 2]]
    # The second best of 3 has (1 - 0.2) = 2 times the squared distance: sqrt(1 / 2) = 0.71.
    assert best_pairs(likeness, places, 3.0, 0.7).tolist() == [[1, 1], [2, 0]]
    assert best_pairs(np.array([[0.9, 0.88, 0.0]]), places, 3.0, 0.5).tolist() == [[0, 0]]  # 1 lies beside 0
    assert best_pairs(np.array([[0.9, 0.0, 0.88]]), places, 3.0, 0.5).tolist() == []
    assert best_pairs(np.zeros((0, 3)), places, 3.0, 0.9).shape == (0, 2)


# ------------------------------------------------------------------------------------------- consensus


def some_matches(transform, right=12, wrong=60, flat=False, noise=0.3):
    """Matches of which a few agree on a map, in a box of 80 mm."""
    rng = np.random.default_rng(3)
    fixed = rng.uniform(-40, 40, (right + wrong, 3))
    if flat:
        fixed[:, 2] = 0
    moving = transform.apply(fixed) + rng.normal(size=fixed.shape) * noise
    moving[right:] = rng.uniform(-40, 40, (wrong, 3))
    if flat:
        moving[:, 2] = 0
    axes = [(0, 0, 1)] * (right + wrong) if flat else rng.normal(size=(right + wrong, 3))
    off = np.stack([turn(12, axis) for axis in axes]) @ transform.rotation_xyz
    off[right:] = np.stack([turn(rng.uniform(0, 360), axis) for axis in axes[right:]])
    return Matches(fixed, moving, off, np.ones(len(fixed)), 100, 100)


def test_a_sixth_of_right_matches_is_found_among_wrong_ones():
    truth = Transform.rigid(turn(150), (5.0, -8.0, 3.0), (1.0, 2.0, 3.0))
    answers = agreed(some_matches(truth), 2.0)
    corners = 30.0 * np.stack(np.meshgrid(*[[-1, 1]] * 3), -1).reshape(-1, 3)
    assert answers[0].transform.distance_mm(truth, corners).max() < 0.6
    assert answers[0].transform.is_rigid
    assert answers[0].count >= 11
    assert len(distinct(answers, corners, 4.0, 8)) == 1  # all the right samples lead to one place
    assert agreed(some_matches(truth, right=3), 2.0) == []


def test_an_affine_fit_needs_enough_matches():
    matrix = np.eye(4)
    matrix[:3, :3] = turn(40) @ np.diag([1.08, 0.95, 1.0])
    matrix[:3, 3] = (3, 4, 5)
    truth = Transform(matrix)
    corners = 30.0 * np.stack(np.meshgrid(*[[-1, 1]] * 3), -1).reshape(-1, 3)
    many = agreed(some_matches(truth, right=40), 2.0, kind="affine")[0].transform
    assert many.distance_mm(truth, corners).max() < 1
    few = agreed(some_matches(truth, right=8, wrong=10), 2.0, kind="affine")[0].transform
    assert few.is_rigid


def test_slices_are_never_turned_over():
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(-40, 40, (30, 2)), np.zeros(30)])
    mirrored = points * [-1, 1, 1]
    assert fit(points, mirrored, 2, "rigid").matrix_mm[2, 2] == 1
    truth = Transform.rigid(turn(-75, (0, 0, 1)), (4.0, 2.0, 0.0), (0.0, 0.0, 0.0))
    best = agreed(some_matches(truth, flat=True), 2.0, axes=2)[0].transform
    assert best.distance_mm(truth, points).max() < 0.6
    np.testing.assert_allclose(best.matrix_mm[2], (0, 0, 1, 0))


# ------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("degrees", [0, 100, 180])
def test_any_rotation_is_found(degrees):
    truth = Transform.rigid(turn(degrees), (1.0, -2.0, 1.5) if degrees else (0.0, 0.0, 0.0), CENTRE)
    fixed, moving = features_pair(truth)
    said = found(fixed, moving)
    assert errors_vox(said.answers[0], truth, fixed) < 0.4
    assert "agree on one motion" in said.note


def test_half_of_a_specimen_is_found_in_the_whole():
    truth = turned()
    fixed, moving = features_pair(truth)
    upper = np.zeros(fixed.mask.shape, bool)
    upper[20:] = True
    part = replace(fixed, values=np.where(upper, fixed.values, 0), mask=fixed.mask & upper)
    assert errors_vox(found(part, moving).answers[0], truth, fixed) < 1


def test_several_channels_and_those_that_look_along_the_axes():
    truth = turned(degrees=60)
    (fixed, moving), (other, turned_other) = features_pair(truth), features_pair(truth, seed=5)
    mixture = (
        np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    )  # 7 channels of two kinds of structure
    both = [
        replace(one, values=np.tensordot(mixture, np.concatenate([one.values, two.values]), axes=1))
        for one, two in ((fixed, other), (moving, turned_other))
    ]
    assert errors_vox(found(*both).answers[0], truth, fixed) < 0.4
    described = [replace(one, describe=self_similarity) for one in (fixed, moving)]
    assert errors_vox(found(*described).answers[0], truth, fixed) < 1


def test_an_inverted_contrast_has_the_same_edges():
    truth = turned(degrees=60)
    fixed, moving = features_pair(truth)
    inverted = replace(moving, values=np.where(moving.mask, -moving.values, 0).astype(np.float32))
    assert errors_vox(found(fixed, inverted, INFORMATION).answers[0], truth, fixed) < 0.4


def test_the_strongest_keypoints_are_kept_inside_the_specimen():
    fixed, _ = features_pair(Transform.identity())
    coarse = coarsen(fixed, 1.0)
    every, some = keypoints(coarse, 1000), keypoints(coarse, 20)
    assert len(some.points_mm) == 20
    np.testing.assert_array_equal(some.points_mm, every.points_mm[:20])
    index = np.round(fixed.grid.index_zyx(every.points_mm)).astype(int)
    assert ndimage.binary_dilation(fixed.mask)[tuple(index.T)].all()


def test_too_few_keypoints_matches_and_no_agreement_are_told_apart():
    shape = (30, 26, 22)  # of equal sides, a quarter turn would be as right as none
    ramp = np.broadcast_to(np.arange(30, dtype=np.float32)[:, None, None], shape)[None]
    smooth = Features(ramp.copy(), np.ones(shape, bool), Grid(shape, (1.0, 1.0, 1.0)))
    said = found(smooth, smooth)
    assert said.answers == []
    assert "expected at least 12 in each: these maps show too few distinct structures" in said.failure
    one, _ = features_pair(Transform.identity(), seed=1)
    _, other = features_pair(Transform.identity(), seed=2)
    said = found(one, other)
    assert said.answers == []
    assert "keypoints (fixed)" in said.failure
    assert said.failure.endswith("use --initial global, which compares the whole volumes")


# ------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("direction", [((1, 0, 0), (0, 1, 0), (0, 0, 1)), ((-1, 0, 0), (0, 1, 0), (0, 0, 1))])
def test_a_slice_turned_by_any_angle_is_found_on_a_flipped_grid_too(direction):
    values, mask = specimen((1, 120, 112), seed=3)
    grid = Grid(values.shape, (1.0, 1.0, 1.0))
    truth = Transform.rigid(turn(130, (0, 0, 1)), (4.0, -6.0, 0.0), grid.centre_mm)
    corner = truth.apply(grid.centre_mm) - np.asarray(direction) @ (63.5, 63.5, 0.0)
    onto = Grid((1, 128, 128), (1.0, 1.0, 1.0), (corner[0], corner[1], 0.0), direction)
    moved = seen_slice(values, grid, onto, truth)
    inside = seen_slice(mask.astype(np.float32), grid, onto, truth) > 0.5
    fixed = Features(values[None], mask, grid)
    said = found(fixed, Features(moved[None], inside, onto))
    assert errors_vox(said.answers[0], truth, fixed) < 1


def seen_slice(values, grid, onto, truth):
    """`seen` for a slice: interpolation in the plane only."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in onto.shape_zyx], indexing="ij"), axis=-1)
    place = grid.index_zyx(truth.inverse().apply(onto.world_mm(index)))
    return ndimage.map_coordinates(values[0], np.moveaxis(place[..., 1:], -1, 0), order=1).astype(np.float32)


def test_a_tiny_slice_has_no_keypoints():
    values = np.random.default_rng(0).normal(size=(1, 1, 8, 9)).astype(np.float32)
    tiny = coarsen(Features(values, np.ones((1, 8, 9), bool), Grid((1, 8, 9), (1.0, 1.0, 1.0))), 1.0)
    assert len(slice_keypoints(tiny, 100).points_mm) == 0


# ------------------------------------------------------------------------------------------- registrations


@pytest.mark.parametrize("onto", ["oblique", "anisotropic"])
def test_a_registration_that_starts_from_keypoints(onto, tmp_path):
    truth = turned(GRIDS[onto])
    chosen = settings(tmp_path, pair(tmp_path, truth, GRIDS[onto]), initial="features")
    result = register(chosen)
    assert error(result, truth) < 0.15
    assert "agree on one motion" in result.record["notes"][-1]
    assert not (tmp_path / "result" / "search.npz").exists()
    again = register(chosen.model_copy(update={"out": tmp_path / "again", "threads": 1}))
    assert again.record["matrix_lps_mm"] == result.record["matrix_lps_mm"]
    assert register(chosen).skipped


def test_without_agreement_the_verdict_is_fail_and_says_what_to_do(tmp_path):
    one = pair(tmp_path / "one", Transform.identity(), seed=1)
    other = pair(tmp_path / "other", Transform.identity(), seed=2)
    paths = {"fixed": one["fixed"], "moving": other["moving"]}
    result = register(settings(tmp_path, paths, representation="mind", initial="features"))
    assert result.verdict == "FAIL"
    assert result.transform is None
    assert "use --initial global" in result.reasons[0]
    assert json.loads((tmp_path / "result" / "result.json").read_text(encoding="utf-8"))["candidates"] == []


def test_a_dry_run_says_what_is_looked_for(tmp_path):
    paths = only_volumes(pair(tmp_path, Transform.identity()))
    plan = plan_register(settings(tmp_path, paths, representation="mind", initial="features", keypoints=99))
    assert plan["search"] == "up to 99 keypoints a side, matched"
    assert plan["refine"] == "4 starts, rigid"
    assert "search.npz" not in plan["files"]


def test_settings_of_keypoints_count_only_where_there_are_keypoints(tmp_path):
    paths = only_volumes(pair(tmp_path, Transform.identity()))
    prints = {
        (initial, count): open_inputs(
            settings(tmp_path, paths, representation="mind", initial=initial, keypoints=count)
        ).fingerprint
        for initial in ("global", "features")
        for count in (500, 600)
    }
    assert prints["global", 500] == prints["global", 600]
    assert prints["features", 500] != prints["features", 600]
