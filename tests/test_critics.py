"""Critics against a slow double loop, with and without masks; invariance, gradients, precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from comir_hpc.errors import ConfigError
from comir_hpc.learning.critics import CRITICS, scores
from comir_hpc.space.groups import act, act_each, rotation_group

SHAPE = (2, 3, 4, 5)  # (L, z, y, x)


def draw(count: int, seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_mask(count: int, seed: int, shape: tuple[int, ...] = SHAPE, share: float = 0.6) -> Tensor:
    noise = torch.rand(count, 1, *shape[1:], generator=torch.Generator().manual_seed(seed))
    return noise < share


def reference_pair(u: Tensor, v: Tensor, critic: str, valid: Tensor) -> float:
    """One pair (L, z, y, x), by the textbook, on the list of jointly valid voxels only."""
    u, v = u[:, valid], v[:, valid]  # (L, voxels)
    if critic == "mse":
        return -float(((u - v) ** 2).mean())
    if critic == "tanimoto":
        dot = float((u * v).sum())
        return dot / (float((u * u).sum()) + float((v * v).sum()) - dot)
    if critic == "correlation":
        u, v = u - u.mean(dim=1, keepdim=True), v - v.mean(dim=1, keepdim=True)
    return float((u * v).sum()) / math.sqrt(float((u * u).sum()) * float((v * v).sum()))


def reference(u: Tensor, v: Tensor, critic: str, mask_u: Tensor | None, mask_v: Tensor | None) -> Tensor:
    table = torch.zeros(len(u), len(v), dtype=torch.float64)
    for i in range(len(u)):
        for j in range(len(v)):
            valid = torch.ones(u.shape[2:], dtype=torch.bool)
            if mask_u is not None and mask_v is not None:
                valid = mask_u[i, 0] & mask_v[j, 0]
            table[i, j] = reference_pair(u[i], v[j], critic, valid)
    return table


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("masked", ["", "all", "some whole"])
@pytest.mark.parametrize("channels", [1, 2])
def test_scores_equal_the_double_loop(critic: str, masked: str, channels: int) -> None:
    shape = (channels, *SHAPE[1:])
    u, v = draw(4, 0, shape) + 0.3, 1.5 * draw(3, 1, shape) - 0.2
    mask_u, mask_v = (draw_mask(4, 2, shape), draw_mask(3, 3, shape)) if masked else (None, None)
    if mask_u is not None and mask_v is not None and masked == "some whole":
        mask_u[2] = mask_v[0] = True
    expected = reference(u, v, critic, mask_u, mask_v)
    assert torch.allclose(scores(u, v, critic, mask_u=mask_u, mask_v=mask_v), expected, atol=1e-12)
    single = scores(u.float(), v.float(), critic, mask_u=mask_u, mask_v=mask_v)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), expected, atol=1e-5)


@pytest.mark.parametrize("critic", CRITICS)
def test_known_answers(critic: str) -> None:
    u = draw(1, 0, (1, 4, 4, 4))
    u = u - u.mean()
    alike = scores(u, u, critic).item()
    opposite = scores(u, -u, critic).item()
    energy = u.square().mean().item()
    expected = {"mse": (0.0, -4 * energy), "cosine": (1, -1), "correlation": (1, -1), "tanimoto": (1, -1 / 3)}
    assert (alike, opposite) == pytest.approx(expected[critic], abs=1e-12)


@pytest.mark.parametrize("critic", CRITICS)
def test_critics_are_symmetric_and_unchanged_by_a_joint_rotation(critic: str) -> None:
    u, v = draw(3, 0, (2, 4, 4, 4)), draw(3, 1, (2, 4, 4, 4))
    mask_u, mask_v = draw_mask(3, 2, (2, 4, 4, 4)), draw_mask(3, 3, (2, 4, 4, 4))
    plain = scores(u, v, critic, mask_u=mask_u, mask_v=mask_v)
    assert torch.allclose(scores(v, u, critic, mask_u=mask_v, mask_v=mask_u).T, plain, atol=1e-12)
    for g in rotation_group("Oh").matrices:
        turned = scores(act(u, g), act(v, g), critic, mask_u=act(mask_u, g), mask_v=act(mask_v, g))
        assert torch.allclose(turned, plain, atol=1e-12)
    one_sided = scores(act(u, rotation_group("O").matrices[5]), v, critic, mask_u=mask_u, mask_v=mask_v)
    assert not torch.allclose(one_sided, plain, atol=1e-3)


def test_offsets_and_scales_that_each_critic_does_not_see() -> None:
    u, v = draw(3, 0), draw(3, 1)
    per_channel = torch.tensor([5.0, -7.0], dtype=torch.float64).reshape(1, 2, 1, 1, 1)
    assert torch.allclose(scores(u + per_channel, v + per_channel, "mse"), scores(u, v, "mse"))
    assert torch.allclose(scores(3 * u + per_channel, v, "correlation"), scores(u, v, "correlation"))
    assert torch.allclose(scores(3 * u, 0.1 * v, "cosine"), scores(u, v, "cosine"))
    assert not torch.allclose(scores(u + per_channel, v, "cosine"), scores(u, v, "cosine"))
    assert not torch.allclose(scores(3 * u, v, "tanimoto"), scores(u, v, "tanimoto"))


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(critic: str, masked: bool) -> None:
    shape = (2, 2, 2, 3)
    u, v = draw(2, 0, shape).requires_grad_(), (draw(3, 1, shape) + 0.5).requires_grad_()
    masks = {"mask_u": draw_mask(2, 2, shape, 0.8), "mask_v": draw_mask(3, 3, shape, 0.8)} if masked else {}
    assert torch.autograd.gradcheck(lambda a, b: scores(a, b, critic, **masks), (u, v))


@pytest.mark.parametrize("critic", CRITICS)
def test_invalid_voxels_do_not_matter_even_when_nan(critic: str) -> None:
    u, v, mask_u, mask_v = draw(3, 0), draw(3, 1), draw_mask(3, 2), draw_mask(3, 3)
    plain = scores(u, v, critic, mask_u=mask_u, mask_v=mask_v)
    spoiled = torch.where(mask_u, u, math.nan).requires_grad_()
    dirty = scores(spoiled, v, critic, mask_u=mask_u, mask_v=mask_v)
    assert torch.allclose(dirty, plain, atol=1e-12)
    dirty.sum().backward()
    assert spoiled.grad is not None
    assert torch.isfinite(spoiled.grad).all()
    assert (spoiled.grad[~mask_u.expand_as(u)] == 0).all()


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_maps_give_finite_scores_and_gradients(critic: str, value: float) -> None:
    u = torch.full((2, *SHAPE), value, requires_grad=True)
    v = draw(2, 1).float()
    for other in (v, u):
        (gradient,) = torch.autograd.grad(scores(u, other, critic).sum(), u)
        assert torch.isfinite(gradient).all()
    assert torch.isfinite(scores(u, u, critic)).all()


@pytest.mark.parametrize("critic", CRITICS)
def test_pairs_without_a_common_voxel_score_zero(critic: str) -> None:
    mask = torch.zeros(1, 1, *SHAPE[1:], dtype=torch.bool)
    u = draw(1, 0).requires_grad_()
    value = scores(u, draw(1, 1), critic, mask_u=mask, mask_v=~mask)
    assert value.item() == 0
    value.sum().backward()
    assert torch.isfinite(u.grad).all()


@pytest.mark.parametrize("critic", ["mse", "correlation"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_large_common_offset_costs_no_precision(critic: str, masked: bool) -> None:
    shape = (1, 16, 16, 16)
    u, v = draw(3, 0, shape) * 0.01, draw(3, 1, shape) * 0.01
    masks = {"mask_u": draw_mask(3, 2, shape), "mask_v": draw_mask(3, 3, shape)} if masked else {}
    plain = scores(u, v, critic, **masks)
    offset = scores((u + 10).float(), (v + 10).float(), critic, **masks).double()
    # 1e-6 of rounding at 10 in maps of size 0.01 leaves four digits; the difference of squares would leave none.
    assert torch.allclose(offset, plain, rtol=2e-3, atol=1e-3 * plain.abs().max().item())


def test_autocast_does_not_reach_the_scores() -> None:
    u, v = draw(4, 0).float(), draw(4, 1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scores(u, v, "cosine")
        assert (u[0, 0, 0] @ v[0, 0, 0].T).dtype == torch.bfloat16  # autocast is on
    assert inside.dtype == torch.float32
    assert torch.equal(inside, scores(u, v, "cosine"))
    assert scores(u.bfloat16(), v.bfloat16(), "cosine").dtype == torch.float32


def test_refusals_name_what_is_wrong() -> None:
    u, v = draw(2, 0), draw(2, 1)
    with pytest.raises(ConfigError, match="unknown critic 'cosin'; did you mean cosine"):
        scores(u, v, "cosin")
    with pytest.raises(ConfigError, match=r"alike but for n"):
        scores(u, v[..., :-1], "mse")
    with pytest.raises(ConfigError, match="both sets"):
        scores(u, v, "mse", mask_u=draw_mask(2, 0))
    with pytest.raises(ConfigError, match="expected boolean"):
        scores(u, v, "mse", mask_u=draw_mask(2, 0).float(), mask_v=draw_mask(2, 0).float())
    with pytest.raises(ConfigError, match="expected boolean ones of shapes"):
        scores(u, v, "mse", mask_u=draw_mask(2, 0)[:1], mask_v=draw_mask(2, 0))


def test_independent_elements_cost_the_spread_of_both_maps() -> None:
    """The identity from which the loss gets its pull towards equivariance (docs/theory.md, section 5)."""
    group = rotation_group("O")
    ramp = draw(1, 5, (1, 4, 4, 4))

    def undone(image: Tensor, phase: float) -> Tensor:
        """f^g(image) for every g, of a function that is far from equivariant."""
        turned = torch.cat([act(image, g) for g in group.matrices])
        return act_each(torch.sin(turned * ramp + phase), group.matrices[group.inverses])

    u, v = undone(draw(1, 6, (1, 4, 4, 4)), 0.3), undone(draw(1, 7, (1, 4, 4, 4)), 1.1)
    average_u, average_v = u.mean(dim=0, keepdim=True), v.mean(dim=0, keepdim=True)
    spread = (u - average_u).square().mean() + (v - average_v).square().mean()
    assert spread > 0.1  # the function is not equivariant, or nothing would be shown
    expected = scores(average_u, average_v, "mse").item() - spread.item()
    assert scores(u, v, "mse").mean().item() == pytest.approx(expected)
    error = torch.stack([(u - one).square().mean() for one in u]).mean()
    assert error.item() == pytest.approx(2 * (u - average_u).square().mean().item())
