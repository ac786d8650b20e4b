"""The exact groups, their action on arrays and tensors, and rotations between them."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from comir_hpc.errors import ConfigError
from comir_hpc.space.groups import GROUP_NAMES, act, act_each, group_for_spacing, rotation_group
from comir_hpc.space.rotations import (
    angle_deg,
    covering_radius_deg,
    from_quaternions,
    random_rotation,
    reverse_axes,
    rotation_by,
    so3_grid,
    to_quaternions,
)

SIZES = {"trivial": 1, "D2": 4, "D4": 8, "O": 24, "D2h": 8, "D4h": 16, "Oh": 48, "C2": 2, "C4": 4, "C4v": 8}
SUBGROUPS = [
    ("D2", "D4"),
    ("D4", "O"),
    ("D2h", "D4h"),
    ("D4h", "Oh"),
    ("O", "Oh"),
    ("C4", "D4"),
    ("C4", "C4v"),
]


def ramp(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def test_the_names_are_the_ones_tested_here() -> None:
    assert set(GROUP_NAMES) == set(SIZES)


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_group_has_its_size_and_distinct_orthogonal_elements(name: str, size: int) -> None:
    group = rotation_group(name)
    assert len(group) == size
    assert len({matrix.tobytes() for matrix in group.matrices}) == size
    for matrix in group.matrices:
        assert np.array_equal(matrix @ matrix.T, np.eye(3))
        assert set(np.unique(matrix)) <= {-1, 0, 1}
    determinants = np.round(np.linalg.det(group.matrices))
    assert (determinants == 1).all() == (not name.endswith(("h", "v")))
    assert len(group.rotations) == (determinants == 1).sum()


@pytest.mark.parametrize("name", SIZES)
def test_group_axioms_hold_for_all_elements(name: str) -> None:
    group = rotation_group(name)
    count = range(len(group))
    assert np.array_equal(group.matrices[0], np.eye(3))
    for i in count:
        assert group.compose(0, i) == group.compose(i, 0) == i
        assert group.compose(i, group.inverse(i)) == group.compose(group.inverse(i), i) == 0
        for j in count:
            assert np.array_equal(group.matrices[group.compose(i, j)], group.matrices[i] @ group.matrices[j])
    table = group.table
    assert np.array_equal(table[table], table[:, table])  # (ij)k == i(jk)


@pytest.mark.parametrize(("small", "large"), SUBGROUPS)
def test_subgroups_are_contained(small: str, large: str) -> None:
    for matrix in rotation_group(small).matrices:
        rotation_group(large).index(matrix)


def test_octahedral_group_has_its_classes() -> None:
    angles = np.round(angle_deg(rotation_group("O").matrices)).astype(int)
    assert dict(zip(*np.unique(angles, return_counts=True), strict=True)) == {0: 1, 90: 6, 120: 8, 180: 9}
    carries_z_away = rotation_group("O").matrices[:, 0, 0] == 0
    assert carries_z_away.sum() == 16


def test_octahedral_and_dihedral_elements_do_not_commute() -> None:
    table = rotation_group("O").table
    assert not np.array_equal(table, table.T)


def test_matrices_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        rotation_group("O").matrices[0, 0, 0] = 5


@pytest.mark.parametrize(
    ("name", "angle"),
    [("O", 62.7994), ("D4", 98.4211), ("D2", 120.0), ("trivial", 180.0), ("C4", 45.0), ("Oh", 62.7994)],
)
def test_farthest_angle_is_the_largest_misorientation_of_crystallography(name: str, angle: float) -> None:
    assert rotation_group(name).farthest_angle_deg == pytest.approx(angle, abs=1e-3)


def test_needs_cubic_and_planar() -> None:
    assert {name for name in SIZES if rotation_group(name).needs_cubic} == {"O", "Oh"}
    assert {name for name in SIZES if rotation_group(name).is_planar} == {"trivial", "C2", "C4", "C4v"}


def test_require_invariant_names_the_axes_and_the_remedy() -> None:
    rotation_group("O").require_invariant((32, 32, 32), "patch")
    rotation_group("D4").require_invariant((16, 32, 32), "patch")
    rotation_group("D2").require_invariant((16, 32, 48), "patch")
    with pytest.raises(ConfigError, match=r"patch is \(16, 32, 32\).*z, y, x.*D4 or D2 or trivial"):
        rotation_group("O").require_invariant((16, 32, 32), "patch")
    with pytest.raises(ConfigError, match=r"axes y, x onto.*D2 or trivial"):
        rotation_group("D4").require_invariant((16, 32, 48), "patch")
    with pytest.raises(ConfigError, match="C2 or trivial"):
        rotation_group("C4").require_invariant((1, 32, 48), "patch")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("o", "O"), ("d4", "D4"), ("D4z", "D4"), ("Trivial", "trivial"), ("octahedral", None)],
)
def test_unknown_group_names_the_nearest(wrong: str, meant: str | None) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {meant}" if meant else "known groups: trivial"):
        rotation_group(wrong)


@pytest.mark.parametrize(
    ("spacing", "name"),
    [((1, 1, 1), "O"), ((2.0, 2.02, 1.98), "O"), ((3, 1, 1), "D4"), ((1, 1, 1.2), "D2"), ((3, 2, 1), "D2")],
)
def test_auto_follows_the_spacing(spacing: tuple[float, ...], name: str) -> None:
    assert group_for_spacing(spacing).name == name


def test_auto_in_the_plane_and_its_tolerance() -> None:
    assert group_for_spacing((5, 1, 1), planar=True).name == "C4"
    assert group_for_spacing((5, 1, 2), planar=True).name == "C2"
    assert group_for_spacing((1.2, 1, 1), tolerance=0.3).name == "O"
    with pytest.raises(ConfigError, match="three positive"):
        group_for_spacing((1, 0, 1))
    with pytest.raises(ConfigError, match="three positive"):
        group_for_spacing((1, float("nan"), 1))


def test_quarter_turn_about_z_is_the_known_array() -> None:
    image = np.array([[[1, 2], [3, 4]]])  # (z, y, x): 1 at y=0, x=0
    # x is carried onto y: the voxel at (y, x) = (-, +), which holds 2, comes to (+, +).
    turned = act(
        image, rotation_group("C4").matrices[rotation_group("C4").index(np.round(rotation_by("z", 90)))]
    )
    assert turned.tolist() == [[[3, 1], [4, 2]]]


@pytest.mark.parametrize("name", SIZES)
def test_action_moves_every_voxel_as_the_matrix_says(name: str) -> None:
    side = 3
    volume = ramp(side, side, side)
    centre = (side - 1) / 2
    places = np.indices(volume.shape).reshape(3, -1) - centre
    for matrix in rotation_group(name).matrices:
        came_from = np.round(matrix.T @ places + centre).astype(int)
        assert np.array_equal(act(volume, matrix).ravel(), volume[tuple(came_from)])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_action_is_a_homomorphism_and_undone_by_the_inverse(name: str, kind) -> None:
    group = rotation_group(name)
    volume = kind(ramp(2, 3, 4, 5))  # a leading axis, and sides that all differ
    for i, g in enumerate(group.matrices):
        back = act(act(volume, g), group.matrices[group.inverse(i)])
        assert back.shape == volume.shape
        assert bool((back == volume).all())
        for j, h in enumerate(group.matrices):
            once, twice = act(volume, group.matrices[group.compose(i, j)]), act(act(volume, h), g)
            assert once.shape == twice.shape
            assert bool((once == twice).all())


def test_arrays_and_tensors_agree_and_shapes_follow() -> None:
    volume = ramp(3, 4, 5)
    for g in rotation_group("Oh").matrices:
        turned = act(volume, g)
        assert turned.shape == tuple(np.abs(g) @ volume.shape)
        assert np.array_equal(turned, act(torch.as_tensor(volume), g).numpy())
        assert np.shares_memory(turned, volume)


def test_action_agrees_with_numpy_rot90_in_each_plane() -> None:
    volume = ramp(3, 3, 3)
    # Planes as (from, to) array axes: +90 about z carries x onto y, about y carries z onto x, about x carries y onto z.
    for axis, plane in {"z": (2, 1), "y": (0, 2), "x": (1, 0)}.items():
        assert np.array_equal(act(volume, np.round(rotation_by(axis, 90))), np.rot90(volume, axes=plane))


def test_action_passes_gradients() -> None:
    volume = torch.randn(1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    g = rotation_group("O").matrices[17]
    weight = torch.randn(1, 3, 3, 3, dtype=torch.float64)
    (act(volume, g) * weight).sum().backward()
    assert volume.grad is not None
    assert torch.equal(volume.grad, act(weight, g.T))


def test_act_each_turns_every_sample_by_its_own_element() -> None:
    group = rotation_group("O")
    batch = torch.randn(24, 2, 3, 3, 3)
    turned = act_each(batch, group.matrices)
    for n, g in enumerate(group.matrices):
        assert torch.equal(turned[n], act(batch[n], g))
    assert torch.equal(act_each(turned, group.matrices[group.inverses]), batch)
    assert np.array_equal(act_each(batch.numpy(), group.matrices), turned.numpy())


def test_act_refuses_what_is_not_exact() -> None:
    with pytest.raises(ConfigError, match="no signed permutation"):
        act(ramp(3, 3, 3), rotation_by("z", 45))
    with pytest.raises(ConfigError, match=r"expected \(\.\.\., z, y, x\)"):
        act(ramp(3, 3), np.eye(3))
    with pytest.raises(ConfigError, match="change shape"):
        act_each(ramp(24, 2, 3, 3), rotation_group("O").matrices)
    with pytest.raises(ConfigError, match="23 matrices for 24 samples"):
        act_each(ramp(24, 3, 3, 3), rotation_group("O").matrices[1:])


def test_rotation_by_is_right_handed_in_world_order() -> None:
    z, y, x = np.eye(3)
    assert rotation_by("z", 90) @ x == pytest.approx(y)
    assert rotation_by("x", 90) @ y == pytest.approx(z)
    assert rotation_by("y", 90) @ z == pytest.approx(x)
    assert rotation_by((0, 0, 3.0), 90) == pytest.approx(rotation_by("x", 90))
    with pytest.raises(ConfigError, match="unknown axis"):
        rotation_by("w", 90)
    with pytest.raises(ConfigError, match="not zero"):
        rotation_by((0, 0, 0), 90)


def test_reverse_axes_is_its_own_inverse_and_a_homomorphism() -> None:
    a, b = random_rotation(np.random.default_rng(0)), random_rotation(np.random.default_rng(1))
    assert np.array_equal(reverse_axes(reverse_axes(a)), a)
    assert reverse_axes(a @ b) == pytest.approx(reverse_axes(a) @ reverse_axes(b))
    world = reverse_axes(rotation_by("z", 30))  # the textbook matrix about the last axis
    assert world[:2, :2] == pytest.approx(np.array([[math.sqrt(3) / 2, -0.5], [0.5, math.sqrt(3) / 2]]))


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1.0, 90.0, 179.9999999, 180.0])
def test_angle_is_accurate_at_both_ends(angle: float) -> None:
    assert angle_deg(rotation_by((1, 2, -3), angle)) == pytest.approx(angle, abs=1e-9)


def test_quaternions_round_trip_at_every_angle() -> None:
    matrices = np.concatenate([so3_grid(50), rotation_group("O").matrices])
    assert from_quaternions(to_quaternions(matrices)) == pytest.approx(matrices, abs=1e-12)


def test_random_rotations_are_rotations_and_uniform() -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([random_rotation(rng) for _ in range(4000)])
    assert drawn @ np.swapaxes(drawn, 1, 2) == pytest.approx(
        np.broadcast_to(np.eye(3), drawn.shape), abs=1e-12
    )
    assert np.linalg.det(drawn) == pytest.approx(np.ones(len(drawn)))
    # Haar measure: the angle has density (1 - cos a) / pi, so its distribution function is (a - sin a) / pi.
    angles = np.sort(np.radians(angle_deg(drawn)))
    assert np.abs((angles - np.sin(angles)) / np.pi - np.linspace(0, 1, len(angles))).max() < 0.03
    # The image of an axis is uniform on the sphere: no mean, second moments of one third.
    assert np.abs(drawn.mean(axis=0)).max() < 0.05
    assert np.einsum("nij,nkj->ik", drawn[..., :1], drawn[..., :1]) / len(drawn) == pytest.approx(
        np.eye(3) / 3, abs=0.03
    )


@pytest.mark.parametrize(("count", "radius"), [(60, 66.0), (576, 29.0), (4608, 14.0)])
def test_even_grid_covers_all_rotations(count: int, radius: float) -> None:
    grid = so3_grid(count)
    assert grid.shape == (count, 3, 3)
    assert np.linalg.det(grid) == pytest.approx(np.ones(count))
    measured = covering_radius_deg(grid)
    assert measured < radius
    # No grid does better than `count` equal caps that tile SO(3): (a - sin a) / pi of its volume each.
    cap = np.radians(measured)
    assert (cap - np.sin(cap)) / np.pi * count > 1


def test_covering_radius_bounds_random_probes_tightly() -> None:
    grid = so3_grid(200)
    rng = np.random.default_rng(0)
    probes = np.stack([random_rotation(rng) for _ in range(20000)])
    cosines = np.abs(to_quaternions(probes) @ to_quaternions(grid).T).max(axis=1)
    farthest_probe = float(np.degrees(2 * np.arccos(cosines.min())))
    radius = covering_radius_deg(grid)
    assert farthest_probe <= radius + 1e-9
    assert farthest_probe > 0.93 * radius


def test_covering_radius_of_few_rotations() -> None:
    assert covering_radius_deg(so3_grid(1)) == covering_radius_deg(so3_grid(3)) == 180.0
    with pytest.raises(ConfigError, match="at least 1"):
        so3_grid(0)


def test_import_loads_no_torch() -> None:
    code = "import sys, comir_hpc.space.rotations; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
