"""Known answers of the diagnostics: encoders whose error is a closed form, maps whose rank is."""

import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from comir_hpc.errors import ConfigError
from comir_hpc.networks import build_network
from comir_hpc.representations.equivariance import equivariance_errors, so3_curve
from comir_hpc.representations.quality import agreement, effective_rank, foreground_agreement, retrieval
from comir_hpc.representations.turning import inner_ball, spread_axes, turn
from comir_hpc.space.groups import act, rotation_group
from comir_hpc.space.rotations import random_rotation, rotation_by

OCTAHEDRAL = rotation_group("O")


def slope_x(images: Tensor) -> Tensor:
    """Central difference along x, periodic: the plainest filter that knows a direction."""
    return images.roll(-1, -1) - images.roll(1, -1)


def steepness(images: Tensor) -> Tensor:
    """Squared length of the gradient: equivariant exactly, and not linear."""
    slopes = [images.roll(-1, axis) - images.roll(1, axis) for axis in (-3, -2, -1)]
    return torch.stack([slope.square() for slope in slopes]).sum(dim=0)


def symmetric_noise(side: int, seed: int = 0) -> Tensor:
    """A cube that no element of O changes, so that the slope along x and along y are one pattern, turned."""
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 1, side, side, side)))
    return torch.stack([act(x, g) for g in OCTAHEDRAL.matrices]).mean(dim=0)


def smooth_noise(side: int, count: int = 2, width: float = 2.0, seed: int = 0) -> NDArray[np.float32]:
    """Noise of one isotropic spectrum with next to nothing beyond half the grid's bandwidth; (n, 1, z, y, x)."""
    white = np.random.default_rng(seed).standard_normal((count, 1, side, side, side))
    k2 = sum(np.square(k) for k in np.meshgrid(*[np.fft.fftfreq(side)] * 3, indexing="ij"))
    smooth = np.fft.ifftn(
        np.fft.fftn(white, axes=(2, 3, 4)) * np.exp(-2 * (np.pi * width) ** 2 * k2), axes=(2, 3, 4)
    )
    return np.asarray(smooth.real / smooth.real.std(), dtype=np.float32)


# ---------------------------------------------------------------------- over a group


def test_equivariant_functions_have_no_error() -> None:
    x = torch.randn(2, 1, 8, 8, 8, dtype=torch.float64)
    np.testing.assert_allclose(equivariance_errors(lambda v: 2 * v + 1, x, OCTAHEDRAL), 0, atol=1e-14)
    np.testing.assert_allclose(equivariance_errors(steepness, x, OCTAHEDRAL), 0, atol=1e-14)


def test_a_slope_along_x_has_the_error_of_the_angle_that_x_is_turned_by() -> None:
    # |d_x - d_gx|^2 is 2 d_x^2 (1 - cos), in the mean over a symmetric cube, where d_x and d_y do not correlate.
    errors = equivariance_errors(slope_x, symmetric_noise(12), OCTAHEDRAL)
    expected = [2 * (1 - g[2, 2]) for g in OCTAHEDRAL.matrices]
    np.testing.assert_allclose(errors, expected, atol=1e-12)
    assert set(np.round(errors)) == {0, 2, 4}


def test_an_error_in_a_part_is_the_share_of_that_part() -> None:
    ramp = torch.linspace(0, 1, 8, dtype=torch.float64)
    x = torch.randn(3, 1, 8, 8, 8, dtype=torch.float64) * 10
    errors = equivariance_errors(lambda v: v + ramp, x, OCTAHEDRAL)
    turned = [(act(ramp.expand(1, 1, 8, 8, 8), g.T) - ramp).square().mean() for g in OCTAHEDRAL.matrices]
    np.testing.assert_allclose(errors, np.array(turned) / float((x + ramp).var(correction=0)), rtol=1e-10)


def test_the_border_is_cut_off() -> None:
    def edge(images: Tensor) -> Tensor:
        marked = images.clone()
        marked[..., 0] += 100  # only the face at low x
        return marked

    x = torch.randn(1, 1, 8, 8, 8)
    assert equivariance_errors(edge, x, OCTAHEDRAL).max() > 1
    np.testing.assert_allclose(equivariance_errors(edge, x, OCTAHEDRAL, trim_zyx=(1, 1, 1)), 0, atol=1e-12)


def test_only_the_mask_counts_and_stays_with_the_image() -> None:
    def corner(images: Tensor) -> Tensor:
        marked = images.clone()
        marked[..., :2, :2, :2] += 100
        return marked

    x = torch.randn(1, 1, 8, 8, 8)
    middle = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    middle[:, 2:6, 2:6, 2:6] = True
    np.testing.assert_allclose(equivariance_errors(corner, x, OCTAHEDRAL, mask=middle), 0, atol=1e-12)
    low = torch.zeros_like(middle)
    low[:, :2, :2, :2] = True
    errors = equivariance_errors(corner, x, OCTAHEDRAL, mask=low)
    stays = [bool((g == np.abs(g)).all()) for g in OCTAHEDRAL.matrices]  # permutations keep that corner
    assert [error < 1e-9 for error in errors] == stays


def test_channels_weigh_by_their_variance() -> None:
    def two(images: Tensor) -> Tensor:
        return torch.cat([100 * images, slope_x(images) + 1000], dim=1)

    x = symmetric_noise(8)
    error = equivariance_errors(two, x, rotation_group("D4"))[-1]
    share = float(slope_x(x).var() / (100 * x).var())
    worst = {0.0, 2.0, 4.0}
    assert min(abs(error - w * share / (1 + share)) for w in worst) < 1e-9


def test_a_group_convolution_is_equivariant_and_a_plain_network_is_not() -> None:
    torch.manual_seed(0)
    options = {"widths": (2, 4), "norm": "channel", "spacing_zyx": (1.0, 1.0, 1.0)}
    exact = build_network("gunet", in_channels=1, latent_channels=1, group="O", **options).eval()
    plain = build_network("unet", in_channels=1, latent_channels=1, **options).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert equivariance_errors(exact, x, OCTAHEDRAL).max() < 1e-8
        assert equivariance_errors(plain, x, OCTAHEDRAL).max() > 1e-3


def test_maps_that_do_not_vary_have_no_error_to_speak_of() -> None:
    errors = equivariance_errors(lambda v: v * 0, torch.randn(1, 1, 4, 4, 4), OCTAHEDRAL)
    assert np.isnan(errors).all()


def test_cubes_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ConfigError, match="shape of the cubes"):
        equivariance_errors(lambda v: v, torch.randn(1, 1, 4, 8, 8), OCTAHEDRAL)
    with pytest.raises(ConfigError, match="leave 0 voxels"):
        equivariance_errors(lambda v: v, torch.randn(1, 1, 8, 8, 8), OCTAHEDRAL, trim_zyx=(4, 4, 4))
    nothing = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    with pytest.raises(ConfigError, match="none is in the mask"):
        equivariance_errors(lambda v: v, torch.randn(1, 1, 8, 8, 8), OCTAHEDRAL, mask=nothing)


# ---------------------------------------------------------------------- over all angles


def test_grid_rotations_resample_to_the_same_voxels() -> None:
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 6)).astype(np.float32)
    for g in OCTAHEDRAL.matrices:
        np.testing.assert_allclose(turn(x, g.astype(float)), act(x, g), atol=1e-4)
    np.testing.assert_allclose(turn(x, np.eye(3), side_zyx=(4, 2, 6)), x[:, 1:5, 2:4], atol=1e-4)


def test_turning_moves_content_the_way_the_rotation_says() -> None:
    x = np.zeros((9, 9, 9), np.float32)
    x[4, 4, 7] = 1  # 3 voxels along x
    turned = turn(x, rotation_by("z", 90))
    assert np.unravel_index(turned.argmax(), turned.shape) == (4, 7, 4)  # x is carried onto y
    stretched = turn(x, rotation_by("z", 90), spacing_zyx=(1, 3, 1))
    assert np.unravel_index(stretched.argmax(), stretched.shape) == (4, 5, 4)  # 3 mm are one voxel of 3 mm


def test_the_inner_ball_stays_in_the_core() -> None:
    ball = inner_ball((16, 16, 16), (2, 2, 2))
    z, y, x = np.nonzero(ball)
    assert (z.min(), z.max()) == (3, 12)
    rng = np.random.default_rng(0)
    offsets = np.stack([z, y, x], axis=1) - 7.5
    for _ in range(20):
        assert np.abs(offsets @ random_rotation(rng).T).max() <= 8 - 2 - 0.5
    disc = inner_ball((1, 16, 16), (0, 2, 2))
    assert disc.sum() == 80  # points of the half-integer grid within 5


def test_a_slope_has_the_closed_form_at_every_angle_and_an_equivariant_function_the_floor() -> None:
    surroundings = smooth_noise(54, count=4, width=1.4)
    angles = (40, 120)
    slope = so3_curve(slope_x, surroundings, (30, 30, 30), angles_deg=angles, axes_zyx=np.eye(3)[::2])
    # About z the slope along x becomes one at that angle; about x it stays what it is.
    np.testing.assert_allclose(slope.errors[:, 0], 2 * (1 - np.cos(np.radians(angles))), rtol=0.1)
    assert (slope.errors[:, 1] < 0.03).all()
    exact = so3_curve(steepness, surroundings, (30, 30, 30), angles_deg=angles[:1], axes_zyx=spread_axes(2))
    assert (exact.errors < 0.03).all()


@pytest.mark.parametrize("width", [0.7, 1.0, 2.0])
def test_the_floor_bounds_what_resampling_does_to_an_equivariant_function(width: float) -> None:
    noise = smooth_noise(44, count=2, width=width)  # from rough, where splines err, to smooth
    options = {"angles_deg": (20, 75), "axes_zyx": [[3.0, 2.0, 1.0]], "trim_zyx": (2, 2, 2)}
    curve = so3_curve(torch.square, noise, (24, 24, 24), **options)
    assert (curve.errors[:, 0] < curve.floor).all()
    assert (curve.floor < 20 * curve.errors[:, 0]).all()


def test_at_a_quarter_turn_the_curve_meets_the_group() -> None:
    torch.manual_seed(0)
    network = build_network(
        "unet", in_channels=1, latent_channels=2, widths=(2, 4), spacing_zyx=(1.0, 1.0, 1.0)
    ).eval()
    surroundings = smooth_noise(28, count=2)
    mask = np.random.default_rng(1).random((2, 28, 28, 28)) > 0.3
    with torch.inference_mode():
        curve = so3_curve(
            network, surroundings, (16, 16, 16), angles_deg=(90,), axes_zyx=np.eye(3)[:1], mask=mask
        )
        cubes = torch.from_numpy(surroundings[..., 6:22, 6:22, 6:22])
        kept = torch.from_numpy(mask[..., 6:22, 6:22, 6:22] & inner_ball((16, 16, 16), (0, 0, 0)))
        errors = equivariance_errors(network, cubes, OCTAHEDRAL, mask=kept)
    quarter = OCTAHEDRAL.index(np.round(rotation_by("z", 90)))
    assert curve.errors[0, 0] == pytest.approx(errors[quarter], rel=1e-3)
    assert curve.floor[0] < 1e-6


def test_single_slices_are_turned_in_their_plane() -> None:
    surroundings = smooth_noise(48, count=2)[:, :, :1]
    curve = so3_curve(slope_x, surroundings, (1, 24, 24), angles_deg=(60,), trim_zyx=(0, 2, 2))
    assert curve.axes_zyx.tolist() == [[1, 0, 0]]
    assert curve.errors[0, 0] == pytest.approx(1, rel=0.35)


def test_the_curve_is_json() -> None:
    curve = so3_curve(lambda v: v * 0, smooth_noise(16, 1), (8, 8, 8), angles_deg=(30,))
    assert json.loads(json.dumps(curve.as_dict()))["errors"] == [[None, None, None]]


def test_surroundings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="even number"):
        so3_curve(lambda v: v, smooth_noise(17, 1), (8, 8, 8))
    with pytest.raises(ConfigError, match="larger cubes"):
        so3_curve(lambda v: v, smooth_noise(16, 1), (8, 8, 8), trim_zyx=(3, 3, 3))
    with pytest.raises(ConfigError, match="no voxel of the mask"):
        so3_curve(lambda v: v, smooth_noise(16, 1), (8, 8, 8), mask=np.zeros((1, 16, 16, 16), bool))


def test_axes_are_spread_and_off_the_grid() -> None:
    axes = spread_axes(5)
    np.testing.assert_allclose(np.linalg.norm(axes, axis=1), 1)
    cosines = np.abs(axes @ axes.T) - np.eye(5)
    assert cosines.max() < np.cos(np.radians(30))
    assert np.abs(axes).max() < np.cos(np.radians(5))


# ---------------------------------------------------------------------- agreement and rank


def test_agreement_over_the_foreground_is_one_correlation() -> None:
    rng = np.random.default_rng(0)
    u = rng.standard_normal((3, 1, 4, 4, 4))
    v = -0.5 * u + 0.1 * rng.standard_normal(u.shape) + 3
    mask = rng.random(u.shape) > 0.5
    v[~mask] = 1e6
    found = foreground_agreement(torch.from_numpy(u), torch.from_numpy(v), torch.from_numpy(mask))
    assert found == pytest.approx(np.corrcoef(u[mask], v[mask])[0, 1], rel=1e-5)
    table = agreement(torch.from_numpy(u), torch.from_numpy(u))
    np.testing.assert_allclose(table.diagonal(), 1, rtol=1e-6)


def test_retrieval_counts_both_directions() -> None:
    table = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.5, 0.6], [0.1, 0.3, 0.8]])
    # Rows: 1st and 3rd find their partner; columns: all three do.
    assert retrieval(table) == pytest.approx(5 / 6)
    ignore = torch.zeros(3, 3, dtype=torch.bool)
    ignore[1, 2] = True
    assert retrieval(table, ignore | torch.eye(3, dtype=torch.bool)) == 1


@pytest.mark.parametrize(
    ("variances", "rank"),
    [((1, 1, 1, 1), 4), ((1, 1, 0, 0), 2), ((5,), 1), ((3, 1), 4 / 3**0.75), ((0, 0), 0)],
)
def test_effective_rank_of_known_covariances(variances: tuple[float, ...], rank: float) -> None:
    # Rows of a Hadamard matrix do not correlate; a rotation of the channels changes nothing.
    signs = np.array([[(-1) ** bin(i & j).count("1") for j in range(8)] for i in range(1, 5)], dtype=float)
    maps = np.sqrt(np.array(variances))[:, None] * signs[: len(variances)]
    mixed = np.linalg.qr(np.random.default_rng(0).standard_normal((len(maps), len(maps))))[0] @ maps
    assert effective_rank(torch.from_numpy(mixed).view(1, len(maps), 2, 2, 2) + 7) == pytest.approx(
        rank, rel=1e-9
    )


def test_effective_rank_of_the_mask_only() -> None:
    maps = torch.randn(1, 3, 4, 4, 4)
    maps[:, 1:, 0] = maps[:, :1, 0]
    mask = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    mask[:, :, 0] = True
    assert effective_rank(maps, mask) == pytest.approx(1, abs=1e-6)
    assert effective_rank(maps) > 1.5
