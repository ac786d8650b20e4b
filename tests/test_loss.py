"""The contrastive loss against a slow double loop; bounds, negatives, masks, ranks and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from comir_hpc.config import LossSettings, validate
from comir_hpc.errors import ConfigError
from comir_hpc.learning.critics import CRITICS, scores
from comir_hpc.learning.loss import BOUNDS, activation_decay, check, contrastive_loss, draw_shifts
from comir_hpc.space.groups import act_each, rotation_group

SHIFTS = ((1, 0, -1), (0, 2, 0))
RANKS = 3


def settings(**changed: Any) -> LossSettings:
    plain = {
        "decay_l2": 0.0,
        "temperature": 0.5,
        "subcrops": 1,
        "displacement_negatives": 0,
        "critic": "cosine",
    }
    return validate(LossSettings, {**plain, **changed})


def draw(num_maps: int, count: int, seed: int = 0, shape: tuple[int, ...] = (2, 7, 9, 6)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return [
        shared + torch.randn(count, *shape, generator=generator, dtype=torch.float64) for _ in range(num_maps)
    ]


def draw_masks(num_maps: int, count: int, seed: int = 9, shape: tuple[int, ...] = (7, 9, 6)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 1, *shape, generator=generator) < 0.7 for _ in range(num_maps)]


def draw_ignore(count: int) -> Tensor:
    ignore = torch.zeros(count, count, dtype=torch.bool)
    ignore[0, 1] = ignore[1, 0] = ignore[2, 0] = ignore[0, 2] = True
    return ignore | torch.eye(count, dtype=torch.bool)


def crops(volume: Tensor, shift: Sequence[int], margin: Sequence[int], pieces: int) -> list[Tensor]:
    """Sub-crops of one (C, z, y, x) map by plain slicing, z slowest."""
    starts, sizes, parts = [], [], []
    for axis in range(3):
        side = volume.shape[axis + 1]
        parts.append(pieces if side > 1 else 1)
        sizes.append((side - 2 * margin[axis]) // parts[-1])
        starts.append(margin[axis] + shift[axis])
    cut = []
    for k, j, i in itertools.product(*(range(p) for p in parts)):
        z, y, x = (starts[a] + sizes[a] * n for a, n in enumerate((k, j, i)))
        cut.append(volume[:, z : z + sizes[0], y : y + sizes[1], x : x + sizes[2]])
    return cut


def reference(
    maps: list[Tensor],
    chosen: LossSettings,
    masks: list[Tensor] | None = None,
    ignore: Tensor | None = None,
    shifts: Sequence[Sequence[int]] = (),
) -> float:
    """Every anchor, positive and negative in its own loop, one pair of maps at a time."""
    margin = [max([abs(s[a]) for s in shifts], default=0) for a in range(3)]
    masks = masks or [torch.ones_like(m[:, :1], dtype=torch.bool) for m in maps]

    def cut(shift: Sequence[int]) -> list[list[tuple[Tensor, Tensor, int]]]:
        return [
            [
                (piece, valid, i)
                for i in range(len(one))
                for piece, valid in zip(
                    crops(one[i], shift, margin, chosen.subcrops),
                    crops(mask[i], shift, margin, chosen.subcrops),
                    strict=True,
                )
            ]
            for one, mask in zip(maps, masks, strict=True)
        ]

    def compare(u: tuple[Tensor, Tensor, int], v: tuple[Tensor, Tensor, int]) -> float | None:
        shared = int((u[1] & v[1]).sum())
        if shared < max(1, chosen.min_overlap * u[1].numel()):
            return None
        value = scores(u[0][None], v[0][None], chosen.critic, mask_u=u[1][None], mask_v=v[1][None])
        return float(value) / chosen.temperature

    def distinct(u: tuple[Tensor, Tensor, int], v: tuple[Tensor, Tensor, int]) -> bool:
        return u[2] == v[2] or ignore is None or not bool(ignore[u[2], v[2]])

    aligned, displaced = cut((0, 0, 0)), [cut(shift) for shift in shifts]
    losses = []
    for a, b in itertools.permutations(range(len(maps)), 2):
        for i, anchor in enumerate(aligned[a]):
            positive = compare(anchor, aligned[b][i])
            if positive is None:
                continue
            rivals = [
                compare(anchor, aligned[c][j])
                for c in (a, b)
                for j in range(len(aligned[c]))
                if j != i and distinct(anchor, aligned[c][j])
            ]
            rivals += [compare(anchor, moved[b][i]) for moved in displaced]
            losses.append(reference_bound(positive, [r for r in rivals if r is not None], chosen.bound))
    return sum(losses) / len(losses)


def reference_bound(positive: float, negatives: list[float], bound: str) -> float:
    if not negatives:
        return 0.0
    if bound == "infonce":
        return -math.log(math.exp(positive) / (math.exp(positive) + sum(math.exp(n) for n in negatives)))
    if bound == "jsd":
        return math.log1p(math.exp(-positive)) + sum(math.log1p(math.exp(n)) for n in negatives) / len(
            negatives
        )
    return -positive + sum(math.exp(n - 1) for n in negatives) / len(negatives)


CASES = {
    "plain": {},
    "masked": {"masked": True},
    "ignored": {"ignored": True},
    "displaced": {"shifts": SHIFTS},
    "subcrops": {"subcrops": 2},
    "everything": {"masked": True, "ignored": True, "shifts": SHIFTS, "subcrops": 2},
    "three modalities": {"num_maps": 3, "masked": True},
    "some whole": {"masked": True, "whole": True, "shifts": SHIFTS, "subcrops": 2},
}


def arguments(case: dict[str, Any], count: int = 3) -> tuple[list[Tensor], dict[str, Any]]:
    num_maps = case.get("num_maps", 2)
    given: dict[str, Any] = {"shifts_zyx": case.get("shifts", ())}
    if case.get("masked"):
        given["masks"] = draw_masks(num_maps, count)
        if case.get("whole"):
            # One sample is valid throughout, one in one modality only, and one sub-crop of a third.
            for mask in given["masks"]:
                mask[1] = mask[0, :, 4:] = True
            given["masks"][0][2] = True
    if case.get("ignored"):
        given["ignore"] = draw_ignore(count)
    return draw(num_maps, count), given


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("critic", "bound"), [*((c, "infonce") for c in CRITICS), ("cosine", "jsd"), ("mse", "nwj")]
)
def test_loss_equals_the_double_loop(case: str, critic: str, bound: str) -> None:
    chosen = settings(critic=critic, bound=bound, subcrops=CASES[case].get("subcrops", 1))
    maps, given = arguments(CASES[case])
    parts = contrastive_loss(maps, chosen, **given)
    expected = reference(maps, chosen, given.get("masks"), given.get("ignore"), given["shifts_zyx"])
    assert parts.loss.item() == pytest.approx(expected, rel=1e-10)
    single = contrastive_loss([one.float() for one in maps], chosen, **given)
    assert single.loss.dtype == torch.float32
    assert single.loss.item() == pytest.approx(expected, rel=1e-4)


def test_known_values_of_the_parts() -> None:
    maps = [torch.full((4, 1, 2, 2, 2), 2.0)] * 2  # all alike: every score is 1 and nothing can be told apart
    parts = contrastive_loss(maps, settings(critic="cosine", decay_l1=0.5, decay_l2=0.25)).numbers()
    assert parts["contrastive"] == pytest.approx(math.log(7))
    assert parts["ceiling"] == pytest.approx(math.log(7))
    assert parts["bound"] == pytest.approx(0, abs=1e-6)
    assert parts["num_negatives"] == 6
    assert parts["retrieval"] == 0
    assert parts["decay"] == pytest.approx(0.5 * 2 + 0.25 * 4)
    assert parts["loss"] == pytest.approx(math.log(7) + 2)
    assert parts["positive"] == parts["negative"] == pytest.approx(1)
    assert parts["used"] == 1


def test_perfect_partners_reach_the_ceiling() -> None:
    one = torch.eye(8).reshape(8, 1, 2, 2, 2) - 1 / 8
    parts = contrastive_loss([one, one], settings(critic="correlation", temperature=0.02)).numbers()
    assert parts["bound"] == pytest.approx(math.log(15), abs=1e-4)
    assert parts["retrieval"] == 1
    assert parts["positive"] == pytest.approx(1)
    assert parts["negative"] == pytest.approx(-1 / 7)


def test_displacements_and_subcrops_count_as_negatives() -> None:
    maps = draw(2, 3)
    assert contrastive_loss(maps, settings(), shifts_zyx=SHIFTS).num_negatives == 2 * 3 - 2 + 2
    assert contrastive_loss(maps, settings(subcrops=2)).num_negatives == 2 * 24 - 2
    assert (
        contrastive_loss(maps[:2], settings(subcrops=2), ignore=torch.ones(3, 3).bool()).num_negatives == 14
    )
    flat = [one[:, :, :1] for one in maps]  # one slice: cut along y and x only
    assert contrastive_loss(flat, settings(subcrops=2)).num_negatives == 2 * 12 - 2


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_never_exceed_their_ceiling_nor_the_known_information(bound: str) -> None:
    chosen = settings(critic="correlation", temperature=0.1, bound=bound)
    aligned = contrastive_loss(draw(2, 16), chosen).numbers()
    assert aligned["bound"] <= aligned["ceiling"] + 1e-6
    generator = torch.Generator().manual_seed(5)
    strangers = [torch.randn(16, 1, 4, 4, 4, generator=generator) for _ in range(2)]
    # No information is shared: the expected bound is at most zero; 0.05 is the noise of 16 samples.
    assert contrastive_loss(strangers, chosen).bound < 0.05
    assert contrastive_loss(strangers, chosen).bound < aligned["bound"]


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_gradients_are_those_of_finite_differences(critic: str, bound: str, case: str) -> None:
    shape = (1, 4, 4, 4)
    chosen = settings(critic=critic, bound=bound, decay_l2=0.3, subcrops=CASES[case].get("subcrops", 1))
    maps = [one.requires_grad_() for one in draw(2, 2, shape=shape)]
    given: dict[str, Any] = {}
    if case == "everything":
        given = {"masks": draw_masks(2, 2, shape=shape[1:]), "shifts_zyx": ((0, 1, 0), (1, 0, 0))}
    assert torch.autograd.gradcheck(
        lambda u, v: contrastive_loss([u, v], chosen, **given).loss, maps, fast_mode=True
    )


def test_the_loss_pulls_partners_together_and_pushes_displaced_ones_away() -> None:
    torch.manual_seed(0)
    fixed = torch.randn(4, 1, 8, 8, 8)
    moving = torch.randn(4, 1, 8, 8, 8, requires_grad=True)
    chosen = settings(critic="cosine", temperature=0.1)
    optimiser = torch.optim.Adam([moving], lr=0.1)
    shifts = ((0, 0, 2), (2, 0, 0))
    before = contrastive_loss([fixed, moving], chosen, shifts_zyx=shifts)
    for _ in range(40):
        optimiser.zero_grad()
        contrastive_loss([fixed, moving], chosen, shifts_zyx=shifts).loss.backward()
        optimiser.step()
    after = contrastive_loss([fixed, moving], chosen, shifts_zyx=shifts)
    assert after.retrieval == 1
    assert after.positive > before.positive + 0.5
    assert after.bound > 0.9 * after.ceiling


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bound", BOUNDS)
def test_ranks_average_to_one_rank_with_all_samples(case: str, bound: str) -> None:
    chosen = settings(
        critic="cosine", bound=bound, decay_l1=0.1, decay_l2=0.2, subcrops=CASES[case].get("subcrops", 1)
    )
    maps, given = arguments(CASES[case], count=2 * RANKS)
    if "masks" in given:
        given["masks"][0][0] = False  # an anchor is dropped on one rank only
    leaves = [one.requires_grad_() for one in maps]
    whole = contrastive_loss(leaves, chosen, **given)
    wanted = torch.autograd.grad(whole.loss, leaves)
    ranks = [contrastive_loss(leaves, chosen, rows=(2 * k, 2 * k + 2), **given) for k in range(RANKS)]
    found = torch.autograd.grad(torch.stack([part.loss for part in ranks]).mean(), leaves)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)
    mean = {key: sum(part.numbers()[key] for part in ranks) / RANKS for key in whole.numbers()}
    assert mean == pytest.approx(whole.numbers())


def test_a_rank_needs_gradients_of_all_maps_not_only_its_own() -> None:
    maps = [one.requires_grad_() for one in draw(2, 4)]
    gradient = torch.autograd.grad(contrastive_loss(maps, settings(), rows=(0, 2)).loss, maps)
    assert all((one[2:] != 0).any() for one in gradient)


def test_independent_group_elements_undone_leave_the_loss_unchanged() -> None:
    group = rotation_group("O")
    rng = np.random.default_rng(0)
    maps = draw(2, 3, shape=(2, 4, 4, 4))
    undone = []
    for one in maps:
        drawn = rng.integers(len(group), size=3)
        undone.append(act_each(act_each(one, group.matrices[drawn]), group.matrices[group.inverses[drawn]]))
    assert contrastive_loss(undone, settings()).loss == contrastive_loss(maps, settings()).loss


def test_ignored_samples_have_no_influence() -> None:
    maps, ignore = [one.requires_grad_() for one in draw(2, 3)], draw_ignore(3)
    # Samples 1 and 2 are no negatives of 0: only its partner pulls on it, which InfoNCE alone does not.
    (gradient, _) = torch.autograd.grad(contrastive_loss(maps, settings(), ignore=ignore).loss, maps)
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).any()
    parts = contrastive_loss(maps, settings(), ignore=ignore).numbers()
    assert parts["used"] == pytest.approx(2 / 3)


def test_everything_ignored_gives_zero_loss_and_finite_gradient() -> None:
    for bound in BOUNDS:
        maps = [one.requires_grad_() for one in draw(2, 3)]
        parts = contrastive_loss(maps, settings(bound=bound), ignore=torch.ones(3, 3, dtype=torch.bool))
        assert parts.loss == 0
        assert parts.used == 0
        assert all((one == 0).all() for one in torch.autograd.grad(parts.loss, maps))


def test_air_is_no_agreement() -> None:
    """Samples whose masks are empty are neither anchors nor negatives."""
    maps, masks = draw(2, 4), draw_masks(2, 4)
    for mask in masks:
        mask[3] = False
    with_air = contrastive_loss(maps, settings(), masks=masks).numbers()
    without = contrastive_loss(
        [one[:3] for one in maps], settings(), masks=[mask[:3] for mask in masks]
    ).numbers()
    assert with_air["loss"] == pytest.approx(without["loss"])
    assert with_air["num_negatives"] == without["num_negatives"]
    assert with_air["used"] == pytest.approx(0.75)


def test_min_overlap_leaves_out_thin_pairs() -> None:
    maps, masks = draw(2, 3), [torch.ones(3, 1, 7, 9, 6, dtype=torch.bool) for _ in range(2)]
    masks[0][0, :, :, :, 1:] = False  # a sixth is left
    assert contrastive_loss(maps, settings(min_overlap=0.16), masks=masks).used == 1
    assert contrastive_loss(maps, settings(min_overlap=0.17), masks=masks).used == pytest.approx(2 / 3)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("masked", [False, True])
def test_collapsed_maps_give_finite_gradients(critic: str, bound: str, masked: bool) -> None:
    maps = [
        torch.zeros(3, 1, 7, 9, 6, requires_grad=True),
        torch.full((3, 1, 7, 9, 6), 0.7, requires_grad=True),
    ]
    chosen = settings(critic=critic, bound=bound, temperature=0.1)
    parts = contrastive_loss(maps, chosen, masks=draw_masks(2, 3) if masked else None, shifts_zyx=SHIFTS)
    assert torch.isfinite(parts.loss)
    assert all(torch.isfinite(one).all() for one in torch.autograd.grad(parts.loss, maps))


def test_decay_is_the_weighted_mean_over_valid_voxels() -> None:
    maps, masks = draw(2, 3), draw_masks(2, 3)
    kept = torch.cat([one[mask.expand_as(one)] for one, mask in zip(maps, masks, strict=True)])
    chosen = settings(decay_l1=0.3, decay_l2=0.7)
    expected = 0.3 * kept.abs().mean() + 0.7 * kept.square().mean()
    assert activation_decay(maps, chosen, masks=masks).item() == pytest.approx(expected.item())
    everything = torch.cat([one.flatten() for one in maps])
    expected = 0.3 * everything.abs().mean() + 0.7 * everything.square().mean()
    assert activation_decay(maps, chosen).item() == pytest.approx(expected.item())


def test_the_loss_is_single_precision_under_autocast() -> None:
    maps = [one.bfloat16() for one in draw(2, 4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(maps, settings(), shifts_zyx=SHIFTS)
    assert inside.loss.dtype == torch.float32
    assert inside.loss == contrastive_loss([one.float() for one in maps], settings(), shifts_zyx=SHIFTS).loss


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_is_larger_than_the_maps(critic: str, masked: bool) -> None:
    shape = (1, 8, 8, 8)
    maps = [one.float().requires_grad_() for one in draw(2, 16, shape=shape)]
    masks = draw_masks(2, 16, shape=shape[1:]) if masked else None
    with Largest() as seen:
        contrastive_loss(maps, settings(critic=critic), masks=masks, shifts_zyx=((1, 0, 2),)).loss.backward()
    assert seen.elements == 16 * 8**3  # difference maps of all pairs would be 64 times as many


def test_drawn_shifts_are_distinct_in_range_and_of_even_length() -> None:
    chosen = settings(displacement_negatives=4, displacement_voxels=[2, 8])
    rng = np.random.default_rng(0)
    drawn = [draw_shifts(rng, chosen, (32, 32, 32)) for _ in range(1000)]
    assert all(len(set(shifts)) == 4 for shifts in drawn)
    vectors = np.array(drawn).reshape(-1, 3)
    lengths = np.linalg.norm(vectors, axis=1)
    assert lengths.min() >= 2
    assert lengths.max() <= 8
    assert np.histogram(lengths, bins=3, range=(2, 8))[0] / len(lengths) == pytest.approx(
        [1 / 3] * 3, abs=0.06
    )
    assert np.abs(vectors.mean(axis=0)).max() < 0.25
    assert draw_shifts(np.random.default_rng(7), chosen, (32,) * 3) == draw_shifts(
        np.random.default_rng(7), chosen, (32,) * 3
    )


def test_drawn_shifts_stay_in_a_single_slice_and_may_run_out() -> None:
    chosen = settings(displacement_negatives=4, displacement_voxels=[2, 8])
    assert all(dz == 0 for dz, _, _ in draw_shifts(np.random.default_rng(0), chosen, (1, 64, 64)))
    assert draw_shifts(np.random.default_rng(0), settings(), (8, 8, 8)) == ()
    too_many = settings(displacement_negatives=9, displacement_voxels=[1, 1])
    with pytest.raises(ConfigError, match="only 6 shifts"):
        draw_shifts(np.random.default_rng(0), too_many, (8, 8, 8))


def test_check_passes_what_works() -> None:
    check(settings(), 2, (32, 32, 32))
    check(settings(displacement_negatives=1), 1, (32, 32, 32))
    check(settings(subcrops=2), 1, (1, 32, 32))
    check(settings(displacement_negatives=2), 8, (1, 32, 32))


@pytest.mark.parametrize(
    ("changed", "count", "patch", "message"),
    [
        ({}, 1, (32, 32, 32), "no negatives; use two or more"),
        (
            {"subcrops": 2, "displacement_negatives": 1, "displacement_voxels": [2, 8]},
            4,
            (16, 32, 32),
            "do not fit into patches",
        ),
        ({"subcrops": 9}, 4, (8, 32, 32), "do not fit into patches"),
        ({"displacement_negatives": 1, "displacement_voxels": [5, 3]}, 4, (32, 32, 32), "smaller one first"),
        ({"bound": "nwj", "critic": "cosine", "temperature": 0.01}, 4, (32, 32, 32), "overflows"),
    ],
)
def test_check_refuses_before_data_is_read(changed: dict, count: int, patch: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(settings(**changed), count, patch)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="critic is 'cosin'"):
        settings(critic="cosin")
    unchecked = LossSettings.model_construct(**{**settings().model_dump(), "bound": "infonc"})
    with pytest.raises(ConfigError, match="unknown bound 'infonc'; did you mean infonce"):
        contrastive_loss(draw(2, 2), unchecked)
    with pytest.raises(ConfigError, match="unknown bound"):
        check(unchecked, 2, (8, 8, 8))


def test_refusals_of_the_loss_name_the_remedy() -> None:
    maps = draw(2, 3)
    with pytest.raises(ConfigError, match="no negatives; use two or more patches"):
        contrastive_loss([one[:1] for one in maps], settings())
    with pytest.raises(ConfigError, match=r"masks leave none of 3 aligned samples.*foreground"):
        contrastive_loss(maps, settings(), masks=[torch.zeros(3, 1, 7, 9, 6, dtype=torch.bool)] * 2)
    with pytest.raises(ConfigError, match="two or more modalities"):
        contrastive_loss(maps[:1], settings())
    with pytest.raises(ConfigError, match="two or more modalities of one shape"):
        contrastive_loss([maps[0], maps[1][:2]], settings())
    with pytest.raises(ConfigError, match="start < stop"):
        contrastive_loss(maps, settings(), rows=(2, 2))
    with pytest.raises(ConfigError, match=r"expected \(3, 3\) torch.bool"):
        contrastive_loss(maps, settings(), ignore=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="do not fit"):
        contrastive_loss(maps, settings(), shifts_zyx=((4, 0, 0),))
