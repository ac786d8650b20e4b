"""The published CoMIR networks: parameter counts of the 2D form, and its structure against a plain 2D reference."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comir_hpc.networks import build_network, count_parameters
from comir_hpc.networks.denseunet import PUBLISHED


@pytest.mark.parametrize(
    ("configuration", "in_channels", "count"),
    [
        # Printed by train-biodata.ipynb of MIDA-group/CoMIR for its network of the one-channel modality, which
        # had three latent channels in that run.
        ("six-level", 1, 1_053_596),
        # Counted by building the published class with the notebooks' arguments.
        ("six-level", 3, 1_054_172),
        ("three-level", 3, 165_064),
        ("three-level", 1, 164_776),
    ],
)
def test_parameters_of_the_2d_form_are_those_published(
    configuration: str, in_channels: int, count: int
) -> None:
    network = build_network(
        "denseunet", in_channels=in_channels, latent_channels=3, configuration=configuration, planar=True
    )
    assert count_parameters(network) == count


def published_forward(weights: dict[str, Tensor], x: Tensor, configuration: str) -> Tensor:
    """Evaluate the tiramisu in two dimensions, in the order the paper gives, weights taken by name in turn."""
    sizes = PUBLISHED[configuration]
    values = iter(weights.items())

    def take(ending: str) -> Tensor:
        key, value = next(values)
        assert key.endswith(ending), key
        return value

    def conv(x: Tensor, *, bias: bool = True) -> Tensor:
        weight = take("weight")[:, :, 0]
        return F.conv2d(x, weight, take("bias") if bias else None, padding=weight.shape[-1] // 2)

    def norm_relu(x: Tensor) -> Tensor:
        scale, shift, mean, var = take("weight"), take("bias"), take("running_mean"), take("running_var")
        take("num_batches_tracked")
        return F.batch_norm(x, mean, var, scale, shift).relu()

    def dense(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        new = []
        for _ in range(count):
            new.append(conv(norm_relu(torch.cat([x, *new], 1))))
        return torch.cat([x, *new], 1), torch.cat(new, 1)

    # The state lists encoders, then transitions down, then decoders finest first; the pass interleaves them.
    chunks = {part: {} for part in ("encoders", "downs", "decoders", "head")}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        chunks[part].setdefault(rest.partition(".")[0] if part != "head" else "0", {})[key] = value

    skips = []
    for level, count in enumerate(sizes.layers):
        values = iter(chunks["encoders"][str(level)].items())
        x, _ = dense(conv(x) if level == 0 else x, count)
        skips.append(x)
        values = iter(chunks["downs"][str(level)].items())
        x = F.max_pool2d(conv(norm_relu(x)), 2)
    values = iter(chunks["encoders"][str(len(sizes.layers))].items())
    _, x = dense(x, sizes.bottom)
    for level in reversed(range(len(sizes.layers))):
        values = iter(chunks["decoders"][str(level)].items())
        up = conv(F.interpolate(x, scale_factor=2.0, mode="nearest")).relu()
        whole, x = dense(torch.cat([skips[level], up], 1), sizes.layers[level])
    values = iter(chunks["head"]["0"].items())
    return conv(whole, bias=False)


@pytest.mark.parametrize(("configuration", "side"), [("three-level", 16), ("six-level", 64)])
def test_the_2d_form_computes_what_the_published_network_does(configuration: str, side: int) -> None:
    torch.manual_seed(0)
    network = build_network(
        "denseunet",
        in_channels=2,
        latent_channels=3,
        configuration=configuration,
        planar=True,
        antialiased=False,
    )
    x = torch.randn(2, 2, 1, side, side)
    network(x)  # running statistics other than the initial ones
    with torch.no_grad():
        got = network.eval()(x)[:, :, 0]
        want = published_forward(network.state_dict(), x[:, :, 0], configuration)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("configuration", "stride"), [("three-level", 8), ("six-level", 64)])
def test_levels(configuration: str, stride: int) -> None:
    network = build_network("denseunet", in_channels=1, latent_channels=1, configuration=configuration)
    assert network.total_stride_zyx == (stride,) * 3


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network = build_network(
        "denseunet", in_channels=1, latent_channels=1, configuration="six-level", planar=True, norm="channel"
    )
    x = torch.randn(1, 1, 1, 64, 64)
    with torch.no_grad():
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))
