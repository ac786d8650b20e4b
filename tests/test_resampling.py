import itertools

import pytest
import torch
from torch.nn import functional as F

from comir_hpc.networks.resampling import Resample

FACTORS = [factors for factors in itertools.product((1, 2), repeat=3) if factors != (1, 1, 1)]


@pytest.mark.parametrize("factors", FACTORS)
def test_mean_pool_and_linear_upsample_are_torchs(factors: tuple[int, int, int]) -> None:
    x = torch.randn(2, 3, 4, 6, 8)
    torch.testing.assert_close(Resample(factors, "mean")(x), F.avg_pool3d(x, factors))
    scale = [float(factor) for factor in factors]
    want = F.interpolate(x, scale_factor=scale, mode="trilinear", align_corners=False)
    torch.testing.assert_close(Resample(factors, "linear")(x), want)


@pytest.mark.parametrize("kind", ["mean", "linear"])
@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2), (2, 1, 1)])
def test_gradients(kind: str, factors: tuple[int, int, int]) -> None:
    x = torch.randn(1, 2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Resample(factors, kind), (x,))


def test_one_voxel_stays_itself() -> None:
    x = torch.randn(1, 1, 1, 1, 1)
    assert torch.equal(Resample((2, 2, 2), "linear")(x), x.expand(1, 1, 2, 2, 2))


def test_down_and_up_again_does_not_shift_a_ramp() -> None:
    ramp = torch.arange(16.0).expand(1, 1, 4, 4, 16)
    there_and_back = Resample((2, 2, 2), "linear")(Resample((2, 2, 2), "mean")(ramp))
    torch.testing.assert_close(there_and_back[..., 1:-1], ramp[..., 1:-1])


def test_max_and_nearest_do_shift_it() -> None:
    # The published network's pair: half a voxel, which is why it is not ours.
    ramp = torch.arange(16.0).expand(1, 1, 4, 4, 16)
    there_and_back = Resample((2, 2, 2), "nearest")(Resample((2, 2, 2), "max")(ramp))
    assert (there_and_back - ramp).mean() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["mean", "linear", "max", "nearest"])
def test_autocast_keeps_the_type(kind: str) -> None:
    x = torch.randn(1, 2, 4, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = Resample((2, 2, 2), kind)(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
