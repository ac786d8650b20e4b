"""What all three networks promise: reach, shape, recomputation, cost, options. Their own files test the rest."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from this_cpu import HAS_BF16
from torch import Tensor, nn

from comir_hpc.config import NetworkSettings
from comir_hpc.errors import ConfigError
from comir_hpc.networks import (
    NETWORKS,
    Network,
    build_network,
    count_parameters,
    estimate_activation_bytes,
    fold_norms,
    network_options,
    predict_step,
)
from comir_hpc.networks.borders import Padding, pad_border
from comir_hpc.networks.layers import SymmetricConv, same_conv
from comir_hpc.networks.planning import Triple, plan_pooling, receptive_halo
from comir_hpc.space.groups import act, rotation_group

SMALL = {"unet": {"widths": (4, 6, 8)}, "denseunet": {}, "gunet": {"widths": (4, 4, 8), "group": "D2"}}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def small(name: str, **options: object) -> Network:
    sizes = {"in_channels": 1, "latent_channels": 2}
    return build_network(name, **sizes | SMALL[name] | options)


# Planning


@pytest.mark.parametrize(
    ("spacing", "levels", "planar", "plan"),
    [
        ((1, 1, 1), 3, False, ((2, 2, 2), (2, 2, 2))),
        ((5, 1, 1), 4, False, ((1, 2, 2), (1, 2, 2), (2, 2, 2))),
        ((2, 1, 1), 3, False, ((1, 2, 2), (2, 2, 2))),
        ((1, 1, 3), 3, False, ((2, 2, 1), (2, 2, 1))),
        ((1, 1, 1), 3, True, ((1, 2, 2), (1, 2, 2))),
    ],
)
def test_pooling_waits_for_the_fine_axes(
    spacing: tuple[float, ...], levels: int, planar: bool, plan: tuple[tuple[int, ...], ...]
) -> None:
    assert plan_pooling(spacing, levels, planar=planar) == plan


@given(st.tuples(*[st.floats(0.01, 100)] * 3), st.integers(2, 8))
def test_pooling_never_stretches_voxels_beyond_two(spacing: tuple[float, ...], levels: int) -> None:
    steps, ratio = list(spacing), max(spacing) / min(spacing)
    for factors in plan_pooling(spacing, levels):
        assert factors[steps.index(min(steps))] == 2
        steps = [step * factor for step, factor in zip(steps, factors, strict=True)]
        assert max(steps) / min(steps) <= max(ratio, 2) * (1 + 1e-9)
        ratio = max(steps) / min(steps)


@pytest.mark.parametrize(
    ("spacing", "levels"), [((0, 1, 1), 3), ((1, 1), 3), ((1, 1, float("nan")), 3), ((1, 1, 1), 1)]
)
def test_spacing_that_cannot_be_planned_for(spacing: tuple[float, ...], levels: int) -> None:
    with pytest.raises(ConfigError):
        plan_pooling(spacing, levels)


def test_halo_of_one_level_by_hand() -> None:
    # Two levels, one 3-tap kernel in each block. Output 0: the decoder reads 1, which is interpolated with coarse
    # voxel 1; the coarse kernel reads 2, pooled from 4 and 5; the encoder reads 6.
    assert receptive_halo([1, 1], [1], [0], [2]) == 6
    assert receptive_halo([1, 1], [1], [0], [1]) == 3


# Reach, by perturbation


def positive(network: Network) -> Network:
    """Weights without cancellation, so that every dependence shows."""
    for weight in network.parameters():
        weight.data.abs_()
    return network.eval()


def reach(network: Network, axis: int, side: int, mirrored: bool) -> int:
    """Farthest voxel along an axis that any output voxel's gradient touches."""
    # Mirroring needs two voxels on the coarsest level.
    shape = [step * (2 if mirrored else 1) for step in network.total_stride_zyx]
    shape[axis] = side
    x = torch.rand(1, network.in_channels, *shape, requires_grad=True)
    y = network(x)
    farthest = 0
    middle = side // 2
    for position in range(middle, middle + network.total_stride_zyx[axis]):
        (grad,) = torch.autograd.grad(y.select(axis + 2, position).sum(), x, retain_graph=True)
        touched = grad.abs().movedim(axis + 2, 0).flatten(1).sum(1).nonzero().flatten()
        farthest = max(farthest, position - int(touched.min()), int(touched.max()) - position)
    return farthest


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {}),
        ("unet", {"convs_per_level": (1, 2, 2), "residual": True, "padding": "replicate", "norm": "channel"}),
        ("unet", {"spacing_zyx": (3, 1, 1), "padding": "reflect"}),
        ("unet", {"planar": True}),
        ("gunet", {}),
        ("denseunet", {}),
        ("denseunet", {"antialiased": False}),
    ],
)
def test_halo_is_exactly_the_reach(name: str, options: dict[str, object]) -> None:
    network = positive(small(name, **options))
    if options.get("antialiased") is False:
        # Max pooling passes each gradient to one voxel only; means show all that can matter.
        for layer in network.modules():
            if getattr(layer, "kind", None) == "max":
                layer.kind = "mean"
    for axis in (0, 2):
        halo = network.receptive_halo_zyx[axis]
        stride = network.total_stride_zyx[axis]
        if axis == 0 and options.get("planar"):
            assert halo == 0
            continue
        side = -(-(2 * halo + 2 * stride) // stride) * stride
        assert reach(network, axis, side, options.get("padding") == "reflect") == halo


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_beyond_the_halo_changes(name: str) -> None:
    network = small(name)
    network(torch.randn(2, 1, 16, 16, 16))  # running statistics other than the initial ones
    network.eval()
    halo, stride = network.receptive_halo_zyx[2], network.total_stride_zyx
    x = torch.randn(1, 1, stride[0], stride[1], 2 * stride[2] * (1 + halo // stride[2]))
    changed = x.clone()
    changed[..., 0] += 100
    with torch.no_grad():
        before, after = network(x), network(changed)
    assert torch.equal(before[..., halo + 1 :], after[..., halo + 1 :])
    assert not torch.equal(before[..., : halo + 1], after[..., : halo + 1])


@pytest.mark.parametrize("norm", ["batch", "channel"])
def test_a_window_gives_the_whole_volumes_values_in_its_core(norm: str) -> None:
    network = small("unet", norm=norm)
    network(torch.randn(2, 1, 16, 16, 16))
    network.eval()
    x = torch.randn(1, 1, 4, 4, 160)
    halo = network.receptive_halo_zyx[2]
    with torch.no_grad():
        whole, window = network(x), network(x[..., 40:120])
    torch.testing.assert_close(whole[..., 40 + halo : 120 - halo], window[..., halo:-halo])


# Symmetry


@pytest.mark.parametrize(
    ("name", "kernel", "weights"),
    # By hand: centre, faces, edges, corners; and what remains of them where fewer axes are exchanged.
    [
        ("O", (3, 3, 3), 4),
        ("D4", (3, 3, 3), 6),
        ("D2", (3, 3, 3), 9),
        ("C4", (1, 3, 3), 3),
        ("C2", (1, 3, 3), 5),
    ],
)
@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_shared_taps_commute_with_the_group(
    name: str, kernel: Triple, weights: int, padding: Padding
) -> None:
    torch.manual_seed(0)
    group = rotation_group(name)
    layer = SymmetricConv(2, 3, kernel, group, padding)
    assert layer.weight.shape == (3, 2, weights)
    plain = same_conv(2, 3, kernel, padding)
    with torch.no_grad():
        plain.weight.copy_(layer.kernel())
    x = torch.randn(2, 2, kernel[0] if kernel[0] == 1 else 6, 6, 6)
    y = layer(x)
    torch.testing.assert_close(y, plain(x))
    for matrix in group.matrices:
        torch.testing.assert_close(layer(act(x, matrix)), act(y, matrix))


def test_shared_taps_keep_the_variance() -> None:
    torch.manual_seed(0)
    layer = SymmetricConv(64, 64, (3, 3, 3), rotation_group("O"))
    taps = layer.kernel().detach()
    assert taps.square().sum(dim=(1, 2, 3, 4)).mean() == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("norm", ["batch", "channel"])
@pytest.mark.parametrize("padding", ["zeros", "replicate", "reflect"])
def test_mirror_symmetric_weights_give_a_mirror_symmetric_network(norm: str, padding: str) -> None:
    network = small("unet", norm=norm, padding=padding, residual=True)
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            for axis in (2, 3, 4):
                layer.weight.data = (layer.weight.data + layer.weight.data.flip(axis)) / 2
    x = torch.randn(2, 1, 8, 12, 16)
    for axis in (2, 3, 4):
        torch.testing.assert_close(network(x.flip(axis)), network(x).flip(axis), atol=1e-4, rtol=1e-4)


# Recomputation


def outcome(network: Network, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    network.zero_grad()
    torch.manual_seed(1)
    y = network(x)
    (y.square().mean() + y.mean()).backward()
    grads = {key: weight.grad for key, weight in network.named_parameters() if weight.grad is not None}
    return y.detach(), grads, {key: value.clone() for key, value in network.named_buffers()}


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("unet", {}, (8, 8, 8)),
        ("unet", {"residual": True, "norm": "channel"}, (8, 8, 8)),
        ("gunet", {}, (8, 8, 8)),
        ("denseunet", {}, (8, 8, 8)),
        ("denseunet", {"configuration": "six-level", "planar": True}, (1, 64, 64)),  # the one with dropout
    ],
)
def test_checkpointing_changes_memory_only(
    name: str, options: dict[str, object], shape: tuple[int, ...]
) -> None:
    x = torch.randn(2, 1, *shape)
    plain = small(name, **options)
    want_y, want_grads, want_buffers = outcome(plain, x)
    assert want_grads.keys() == dict(plain.named_parameters()).keys()
    for levels in (1, 3):
        network = small(name, checkpoint_levels=levels, **options)
        fresh = small(name, **options)
        network.load_state_dict(fresh.state_dict())
        reference_y, reference_grads, reference_buffers = outcome(fresh, x)
        y, grads, buffers = outcome(network, x)
        torch.testing.assert_close(y, reference_y)
        for key, grad in reference_grads.items():
            torch.testing.assert_close(grads[key], grad, msg=f"{levels} levels: gradient of {key}")
        for key, value in reference_buffers.items():
            torch.testing.assert_close(buffers[key], value, msg=f"{levels} levels: {key}")
    assert torch.isfinite(want_y).all()
    assert want_buffers.keys() == buffers.keys()


def test_more_levels_than_there_are() -> None:
    with pytest.raises(ConfigError, match="checkpoint_levels is 4; the network has 3 levels"):
        small("unet", checkpoint_levels=4)


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_frees_memory(name: str) -> None:
    plain, frugal = small(name), small(name, checkpoint_levels=2)
    cost, less = predict_step(plain, (32, 32, 32), 1), predict_step(frugal, (32, 32, 32), 1)
    assert less.kept_bytes < 0.5 * cost.kept_bytes
    assert less.peak_bytes < 0.75 * cost.peak_bytes
    assert cost.flops <= less.flops < 1.4 * cost.flops


# Cost


def test_arithmetic_by_hand() -> None:
    network = small("unet")
    shapes: list[tuple[nn.Conv3d, int]] = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            layer.register_forward_hook(lambda conv, _, y: shapes.append((conv, y[0, 0].numel())))
    network(torch.zeros(1, 1, 16, 16, 16))
    each = [2 * conv.weight.numel() * voxels for conv, voxels in shapes]
    # Forward, gradient of the weights, gradient of the input; the image needs none.
    assert predict_step(network, (16, 16, 16), 1).flops == 3 * sum(each) - each[0]


def test_prediction_leaves_the_network_as_it_was() -> None:
    network = small("unet").eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    predict_step(network, (1024, 1024, 1024), 64)
    assert not network.training
    assert torch.equal(generator, torch.get_rng_state())
    assert all(weight.grad is None for weight in network.parameters())
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


def test_bf16_halves_and_every_network_adds_what_it_keeps() -> None:
    network = small("unet", widths=(16, 32))
    full = predict_step(network, (32, 32, 32), 2)
    half = predict_step(network, (32, 32, 32), 2, torch.bfloat16)
    share = half.kept_bytes / full.kept_bytes
    assert share == pytest.approx(0.5, rel=0.05) if HAS_BF16 else 0.45 < share < 0.65
    assert half.flops == full.flops
    two = estimate_activation_bytes(network, (32, 32, 32), 2, num_networks=2)
    assert two == full.peak_bytes + full.kept_bytes


MEASURE = """
import sys, torch
from comir_hpc.networks import build_network

torch.set_num_threads(1)
network = build_network(sys.argv[1], in_channels=1, latent_channels=1, checkpoint_levels=int(sys.argv[2]))

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

for _ in range(2):  # the convolution library keeps its workspace after the first
    network.zero_grad()
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM, the peak
    before = status("VmRSS")
    network(torch.randn(2, 1, 48, 48, 48)).square().mean().backward()
    taken = status("VmHWM") - before
print(taken)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "levels"), [("unet", 0), ("unet", 2)])
def test_predicted_memory_is_what_a_process_takes(name: str, levels: int) -> None:
    network = build_network(name, in_channels=1, latent_channels=1, checkpoint_levels=levels)
    # Two samples: with one, torch leaves the convolution library for a kernel with a large workspace of its own.
    # Every freed tensor goes back to the system at once, which malloc otherwise puts off.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name, str(levels)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    # With checkpoints, the workspace of convolutions takes up to a fifth more on CPUs whose vectors are shorter.
    most = 1.1 if HAS_BF16 or not levels else 1.2
    assert 0.9 <= int(done.stdout) / predict_step(network, (48, 48, 48), 2).peak_bytes <= most


# Forward pass


@pytest.mark.parametrize("norm", ["batch", "channel"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_gets_a_gradient_at_the_start(name: str, norm: str) -> None:
    network = small(name, norm=norm)
    # A plain sum would be blind to weights in front of a BatchNorm.
    network(torch.randn(2, 1, 16, 16, 16)).pow(3).sum().backward()
    for key, weight in network.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.abs().max() > 0, key


@pytest.mark.parametrize("norm", ["batch", "channel"])
@pytest.mark.parametrize("name", NETWORKS)
def test_autocast_gives_float32_near_the_exact_result(name: str, norm: str) -> None:
    network = small(name, norm=norm)
    x = torch.randn(2, 1, 16, 16, 16)
    exact = network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network(x)
    assert rough.dtype == torch.float32
    assert rough.shape == (2, 2, 16, 16, 16)
    pair = torch.stack([exact.flatten(), rough.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.98


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_maps_stay_in_channels_last_and_in_their_precision(precision: torch.dtype) -> None:
    network = small("unet")
    seen = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d | nn.BatchNorm3d) or hasattr(layer, "kind"):
            layer.register_forward_hook(lambda *event: seen.append(event[2]))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        network(torch.randn(2, 1, 16, 16, 16))
    assert len(seen) > 20
    if precision is torch.float32 or HAS_BF16:
        assert all(y.is_contiguous(memory_format=torch.channels_last_3d) for y in seen)
    assert {y.dtype for y in seen} == {precision}


@pytest.mark.parametrize("padding", ["replicate", "reflect"])
def test_a_constant_image_shows_no_border(padding: str) -> None:
    x = torch.full((1, 1, 16, 16, 16), 3.0)
    y = small("unet", padding=padding).eval()(x)
    torch.testing.assert_close(y, y[..., :1, :1, :1].expand_as(y))
    bordered = small("unet", padding="zeros").eval()(x)
    assert bordered.std() > 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = small("unet", padding=padding, convs_per_level=1).encoders[0].stages[0](x)  # type: ignore[index, union-attr]
    assert rough.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (5, 1, 3)])
def test_maps_joined_and_continued_in_one_are_torchs_two_steps(kernel: Triple) -> None:
    torch.manual_seed(0)
    parts = [
        torch.randn(2, channels, 4, 5, 3, dtype=torch.float64, requires_grad=True) for channels in (3, 1)
    ]
    ends = [size // 2 for size in reversed(kernel) for _ in range(2)]
    expected = nn.functional.pad(torch.cat(parts, dim=1), ends, mode="replicate")
    padded = pad_border(parts, kernel, "replicate")
    assert torch.equal(padded, expected)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((padded * weights).sum(), parts)
    wanted = torch.autograd.grad((expected * weights).sum(), parts)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_maps_of_two_kinds_are_joined_in_the_finer_one() -> None:
    half, single = torch.randn(1, 2, 4, 4, 4).bfloat16(), torch.randn(1, 1, 4, 4, 4)
    assert pad_border([half, single], (3, 3, 3), "replicate").dtype == torch.float32


def test_a_map_too_small_to_be_mirrored_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)reflect.*\(1, 1, 1\).*replicate"):
        small("unet", padding="reflect")(torch.zeros(2, 1, 4, 4, 4))


def test_channel_norm_is_the_same_in_training_and_at_inference() -> None:
    network = small("unet", norm="channel")
    x = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(network.train()(x), network.eval()(x))


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((1, 1, 8, 8, 10), ["(8, 8, 10)", "multiples of (4, 4, 4)"]),
        ((1, 1, 0, 8, 8), ["(0, 8, 8)"]),
        ((1, 3, 8, 8, 8), ["(1, 3, 8, 8, 8)", "1 channel(s)"]),
        ((1, 8, 8, 8), ["(1, 8, 8, 8)", "(batch, 1 channel(s), z, y, x)"]),
    ],
)
def test_input_that_does_not_fit_is_refused(shape: tuple[int, ...], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        small("unet")(torch.zeros(shape))
    assert all(part in str(caught.value) for part in parts)


def test_single_slices() -> None:
    for name in NETWORKS:
        network = small(name, planar=True, **({"group": "C4"} if name == "gunet" else {}))
        assert network.total_stride_zyx[0] == 1
        assert network(torch.randn(2, 1, 1, 16, 24)).shape == (2, 2, 1, 16, 24)


# Building


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("unett", {}, ["unknown network 'unett'", "did you mean unet?"]),
        ("unet", {"width": (4, 8)}, ["no option 'width'", "did you mean widths?"]),
        ("unet", {"norm": "instance"}, ["norm is 'instance'", "batch, channel"]),
        ("unet", {"padding": "circular"}, ["padding is 'circular'", "reflect"]),
        ("unet", {"widths": (4,)}, ["2 or more"]),
        ("unet", {"convs_per_level": (1, 2, 2, 2)}, ["(1, 2, 2, 2)", "3 levels"]),
        ("unet", {"convs_per_level": 0}, ["convs_per_level is 0"]),
        ("unet", {"latent_channels": 0}, ["latent_channels is 0"]),
        ("denseunet", {"configuration": "two-level"}, ["'two-level'", "three-level"]),
        ("gunet", {"group": "O", "spacing_zyx": (3, 1, 1)}, ["group O", "use group D4"]),
        ("gunet", {"group": "O", "planar": True}, ["group O", "use group D4"]),
    ],
)
def test_what_cannot_be_built_is_named_with_the_remedy(
    name: str, options: dict[str, object], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_network(name, **{"in_channels": 1, "latent_channels": 1} | SMALL.get(name, {}) | options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "chosen",
    [
        {"widths": [4, 8], "convs_per_level": [1, 2], "residual": True},
        {"name": "denseunet", "antialiased": False},
        {"name": "gunet", "widths": [8, 8], "norm": "channel"},
    ],
)
def test_options_survive_json_and_rebuild_the_network(tmp_path: Path, chosen: dict[str, object]) -> None:
    settings = NetworkSettings.model_validate(chosen)
    options = network_options(settings, spacing_zyx=(2.0, 1.0, 1.0), group="D4")
    first = build_network(settings.name, in_channels=1, latent_channels=1, **options)
    again = build_network(settings.name, in_channels=1, latent_channels=1, **json.loads(json.dumps(options)))
    assert first.total_stride_zyx[0] < first.total_stride_zyx[1]
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = torch.randn(1, 1, *first.total_stride_zyx)
    assert torch.equal(first.eval()(x), again.eval()(x))


@pytest.mark.parametrize(
    ("chosen", "parts"),
    [
        (
            {"name": "denseunet", "widths": [4, 8]},
            ["network.widths", "no effect on denseunet", "unet or gunet"],
        ),
        ({"antialiased": False}, ["network.antialiased is False", "network.name=denseunet"]),
    ],
)
def test_settings_without_effect_are_refused(chosen: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        network_options(NetworkSettings.model_validate(chosen), spacing_zyx=(1, 1, 1), group="O")
    assert all(part in str(caught.value) for part in parts)


def test_a_group_that_the_network_cannot_follow() -> None:
    thick = small("unet", spacing_zyx=(3, 1, 1))
    thick.require_group(rotation_group("D4"))
    with pytest.raises(ConfigError, match=r"(?s)reduction.*group O.*use group D4"):
        thick.require_group(rotation_group("O"))
    small("unet").require_group(rotation_group("O"))


def test_parameters_are_counted() -> None:
    network = small("unet", widths=(4, 4), convs_per_level=1, latent_channels=3)
    convs = 27 * (1 * 4 + 4 * 4 + 8 * 4) + 4 * 4 + 4 * 3
    norms = 2 * 4 * 4
    assert count_parameters(network) == convs + norms


# Inference


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kernels_chosen_for_inference_change_no_value(
    padding: str, precision: torch.dtype, tolerance: float
) -> None:
    # One small map: torch chooses other kernels for it when it trains.
    network = small("unet", padding=padding).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.autocast("cpu", dtype=precision, enabled=precision is not torch.float32):
        trained = network(x).detach()
        with torch.no_grad():
            inferred = network(x)
    assert (inferred - trained).abs().max() < tolerance * trained.abs().max()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {"kernels": "symmetric", "padding": "replicate", "group": "O"}),
        ("unet", {"kernels": "free", "padding": "zeros", "residual": True}),
        ("unet", {"kernels": "free", "padding": "reflect"}),
        ("unet", {"norm": "channel"}),
        ("denseunet", {}),
        ("gunet", {}),
    ],
)
def test_folded_norms_change_no_value(name: str, options: dict[str, object]) -> None:
    network = small(name, **options)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    network.eval()
    x = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        expected = network(x)
        norms = sum(isinstance(layer, nn.BatchNorm3d) for layer in network.modules())
        fold_norms(network)
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
    left = sum(isinstance(layer, nn.BatchNorm3d) for layer in network.modules())
    assert left == (0 if name == "unet" else norms)
