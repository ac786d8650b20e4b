"""Group convolutions against their definition, and equivariance layer by layer and as a whole."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from comir_hpc.networks import Network, build_network
from comir_hpc.networks.gunet import GroupConv, GroupMean, LiftingConv
from comir_hpc.networks.layers import tap_permutations
from comir_hpc.networks.norms import BatchNormRelu, ChannelNormRelu
from comir_hpc.networks.recompute import merge_channels
from comir_hpc.networks.resampling import Resample
from comir_hpc.space.groups import Group, act, rotation_group

SHAPES = {"O": (6, 6, 6), "D4": (4, 6, 6), "D2": (4, 6, 8), "C4": (1, 6, 6)}
KERNELS = {"C4": (1, 3, 3)}
O_FIELDS = 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def act_on_fields(maps: Tensor, group: Group, element: int) -> Tensor:
    """(T_h F)(g, v) = F(h^-1 g, h^-1 v) for maps (B, G*C, Z, Y, X)."""
    B, channels = maps.shape[:2]
    fields = maps.reshape(B, len(group), channels // len(group), *maps.shape[2:])
    sources = [group.compose(group.inverse(element), g) for g in range(len(group))]
    return act(fields[:, sources], group.matrices[element]).reshape(
        B, channels, *act(maps, group.matrices[element]).shape[2:]
    )


@pytest.mark.parametrize("name", SHAPES)
def test_taps_turn_as_arrays_do(name: str) -> None:
    kernel = KERNELS.get(name, (3, 3, 3))
    group = rotation_group(name)
    values = torch.randn(kernel)
    for matrix, taps in zip(group.matrices, tap_permutations(group, kernel), strict=True):
        assert torch.equal(values.flatten()[taps].reshape(kernel), act(values, matrix))


def interior(shape: tuple[int, ...], kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(
        itertools.product(*[range(k // 2, side - k // 2) for side, k in zip(shape, kernel, strict=True)])
    )


def offsets(kernel: tuple[int, ...]) -> list[np.ndarray]:
    return [np.array(u) for u in itertools.product(*[range(-(k // 2), k // 2 + 1) for k in kernel])]


@pytest.mark.parametrize("name", SHAPES)
def test_lifting_is_its_definition(name: str) -> None:
    group, kernel = rotation_group(name), KERNELS.get(name, (3, 3, 3))
    layer = LiftingConv(2, 3, kernel, group)
    x = torch.randn(1, 2, *SHAPES[name])
    got = layer(x).detach().reshape(len(group), 3, *SHAPES[name])
    centre = np.array(kernel) // 2
    voxels = interior(SHAPES[name], kernel)
    for g, v in itertools.product(range(len(group)), (voxels[0], voxels[len(voxels) // 2])):
        want = torch.zeros(3)
        for u in offsets(kernel):
            tap = group.matrices[g].T @ u + centre
            want += layer.weight.detach()[(..., *tap)] @ x[(0, slice(None), *(np.array(v) + u))]
        torch.testing.assert_close(got[(g, slice(None), *v)], want)


@pytest.mark.parametrize("name", SHAPES)
def test_group_convolution_is_its_definition(name: str) -> None:
    group, kernel = rotation_group(name), KERNELS.get(name, (3, 3, 3))
    layer = GroupConv(2, 3, kernel, group)
    F = torch.randn(1, len(group) * 2, *SHAPES[name])
    fields = F.reshape(len(group), 2, *SHAPES[name])
    got = layer(F).detach().reshape(len(group), 3, *SHAPES[name])
    centre = np.array(kernel) // 2
    v = interior(SHAPES[name], kernel)[-1]
    for g in range(0, len(group), max(1, len(group) // 4)):
        want = torch.zeros(3)
        for h, u in itertools.product(range(len(group)), offsets(kernel)):
            relative = group.index(group.matrices[g].T @ group.matrices[h])
            tap = group.matrices[g].T @ u + centre
            weight = layer.weight.detach()[(slice(None), slice(None), relative, *tap)]
            want += weight @ fields[(h, slice(None), *(np.array(v) + u))]
        torch.testing.assert_close(got[(g, slice(None), *v)], want, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def escnn() -> dict[str, np.ndarray]:
    """What reference/escnn_filters.py made with escnn, its channels in the order of our rotations."""
    with np.load(Path(__file__).parent / "reference/escnn_filters.npz") as kept:
        found = dict(kept)
    # escnn's array axes are its coordinates z, y, -x (or all of them the other way round, which is the same here).
    axes = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    turns = axes @ found.pop("rotations_xyz") @ axes.T
    group = rotation_group("O")
    order = [int(np.argmin(np.abs(turns - g).max(axis=(1, 2)))) for g in group.matrices]
    assert sorted(order) == list(range(24))
    ours = {
        "image": found["image"],
        "lifting": found["lifting"][order],
        "group": found["group"][order][:, order],
    }
    return {**ours, "lifted": found["lifted"][:, order], "convolved": found["convolved"][:, order]}


def test_escnns_filters_are_ours(escnn: dict[str, np.ndarray]) -> None:
    group = rotation_group("O")
    one = int(np.argmin(np.abs(group.matrices - np.eye(3)).max(axis=(1, 2))))
    lifting, between = LiftingConv(1, 1, (3, 3, 3), group), GroupConv(1, 1, (3, 3, 3), group)
    with torch.no_grad():
        # The filters of the identity are the base filters; all others must follow from them.
        lifting.weight.copy_(torch.from_numpy(escnn["lifting"][one][None]))
        between.weight.copy_(torch.from_numpy(escnn["group"][one][None, None]))
        np.testing.assert_allclose(lifting.filters(), escnn["lifting"], atol=1e-6)
        np.testing.assert_allclose(between.filters(), escnn["group"], atol=1e-6)
        assert escnn["group"].std() > 1e-3
        lifted = lifting(torch.from_numpy(escnn["image"]))[..., 1:-1, 1:-1, 1:-1]
        np.testing.assert_allclose(lifted, escnn["lifted"], atol=1e-5)
        convolved = between(lifted)[..., 1:-1, 1:-1, 1:-1]
        np.testing.assert_allclose(convolved, escnn["convolved"], atol=1e-5)


def test_gradient_reaches_the_base_filters() -> None:
    group = rotation_group("C4")
    layer = GroupConv(1, 1, (1, 3, 3), group).double()
    lift = LiftingConv(1, 1, (1, 3, 3), group, "replicate").double()
    x = torch.randn(1, 1, 1, 4, 4, dtype=torch.float64)

    def run(first: Tensor, second: Tensor) -> Tensor:
        lifted = torch.func.functional_call(lift, {"weight": first}, (x,))
        result: Tensor = torch.func.functional_call(layer, {"weight": second}, (lifted,))
        return result

    assert torch.autograd.gradcheck(run, (lift.weight, layer.weight))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "make",
    [
        lambda group, kernel: GroupConv(O_FIELDS, 3, kernel, group),
        lambda group, kernel: GroupConv(O_FIELDS, 3, kernel, group, "replicate"),
        lambda group, kernel: GroupConv(O_FIELDS, 3, (1, 1, 1), group),
        lambda group, kernel: BatchNormRelu(O_FIELDS, len(group)),
        lambda group, kernel: ChannelNormRelu(O_FIELDS, len(group)),
    ],
    ids=["convolution", "replicate", "pointwise", "batch norm", "channel norm"],
)
def test_each_layer_commutes_with_the_group(
    name: str, make: Callable[[Group, tuple[int, ...]], nn.Module]
) -> None:
    group = rotation_group(name)
    layer = make(group, KERNELS.get(name, (3, 3, 3)))
    if isinstance(layer, BatchNormRelu | ChannelNormRelu):
        for weight in layer.parameters():
            nn.init.normal_(weight)
    F = torch.randn(2, len(group) * O_FIELDS, *SHAPES[name])
    want = layer(F)
    for element in range(len(group)):
        got = layer(act_on_fields(F, group, element))
        torch.testing.assert_close(got, act_on_fields(want, group, element), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_lifting_resampling_merging_and_mean_commute_with_the_group(name: str) -> None:
    group, kernel = rotation_group(name), KERNELS.get(name, (3, 3, 3))
    factors = (1, 2, 2) if name == "C4" else (2, 2, 2)
    lift, mean = (
        LiftingConv(1, O_FIELDS, kernel, group, "reflect" if name != "C4" else "zeros"),
        GroupMean(len(group)),
    )
    down, up = Resample(factors, "mean"), Resample(factors, "linear")

    def run(x: Tensor) -> Tensor:
        F = lift(x)
        return mean(merge_channels([F, up(down(F))], len(group)))

    x = torch.randn(1, 1, *SHAPES[name])
    want = run(x)
    assert want.shape[1] == 2 * O_FIELDS
    for matrix in group.matrices:
        torch.testing.assert_close(run(act(x, matrix)), act(want, matrix), atol=1e-5, rtol=1e-4)


def equivariance_error(network: Network, x: Tensor, group: Group) -> float:
    """Largest deviation over elements and voxels, in standard deviations of the output."""
    with torch.no_grad():
        y = network(x)
        worst = max((network(act(x, g)) - act(y, g)).abs().max().item() for g in group.matrices)
    return worst / float(y.std())


@pytest.mark.parametrize("network_name", ["gunet", "unet"])
@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("O", (16, 16, 16), {"widths": (24, 24, 48)}),
        ("O", (8, 8, 8), {"widths": (4, 8), "norm": "channel", "residual": True, "padding": "replicate"}),
        ("D4", (8, 16, 16), {"widths": (16, 16, 32)}),
        ("D4", (4, 16, 16), {"widths": (8, 16), "spacing_zyx": (3, 1, 1)}),
        ("D2", (8, 12, 16), {"widths": (8, 8, 16), "residual": True}),
        ("C4", (1, 16, 16), {"widths": (8, 8, 16), "planar": True}),
    ],
)
def test_the_network_is_equivariant_untrained_and_trained(
    network_name: str, name: str, shape: tuple[int, ...], options: dict[str, object]
) -> None:
    group = rotation_group(name)
    network = build_network(network_name, in_channels=1, latent_channels=2, group=name, **options)
    network.require_group(group)
    x = torch.randn(2, 1, *shape)
    assert equivariance_error(network.train(), x, group) < 1e-4
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    target = torch.randn(2, 2, *shape)
    before = network(x).detach()
    for _ in range(4):
        optimiser.zero_grad()
        (network(x) - target).square().mean().backward()
        optimiser.step()
    assert (network(x) - before).std() > 0.1 * before.std()
    assert equivariance_error(network.eval(), x, group) < 1e-4


def test_free_kernels_are_not() -> None:
    options = {"widths": (4, 8), "kernels": "free", "group": "O"}
    network = build_network("unet", in_channels=1, latent_channels=1, **options)
    assert equivariance_error(network, torch.randn(1, 1, 8, 8, 8), rotation_group("O")) > 0.1


def test_orientations_share_the_width() -> None:
    network = build_network("gunet", in_channels=1, latent_channels=3, widths=(16, 32, 64), group="D4")
    maps = []
    for encoder in network.encoders:  # type: ignore[union-attr]
        encoder.register_forward_hook(lambda *event: maps.append(event[2][0].shape[1]))
    network(torch.randn(1, 1, 8, 8, 8))
    # Three latent channels need three fields of eight orientations, though a width of 16 pays for two.
    assert maps == [24, 32, 64]
    assert math.ceil(16 / 8) == 2
