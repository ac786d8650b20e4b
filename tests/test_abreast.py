from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from comir_hpc.learning.engine import lockstep as abreast
from comir_hpc.learning.engine.lockstep import Lockstep, encode_in_lockstep, of_all_ranks


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each exchange carried; the second of two ranks answers with twice what the first asked."""
    sizes: list[int] = []

    def gather(values: Tensor) -> Tensor:
        sizes.append(values.numel())
        return torch.stack([values, 2 * values])

    monkeypatch.setattr(abreast, "_gather", gather)
    return sizes


def asking(*values: float) -> Callable[[], list[list[float]]]:
    """A job that needs the other ranks once for each value."""
    return lambda: [of_all_ranks(torch.full((2, 1), value)).flatten(1).tolist() for value in values]


def test_one_exchange_serves_all_networks_and_each_gets_its_answers(exchanges: list[int]) -> None:
    first, second, third = Lockstep(3).run([asking(1, 2), asking(10, 20, 30), asking()])
    assert first == [[[1, 1], [2, 2]], [[2, 2], [4, 4]]]
    assert second == [[[10, 10], [20, 20]], [[20, 20], [40, 40]], [[30, 30], [60, 60]]]
    assert third == []
    assert exchanges == [4, 4, 2]


def test_one_network_at_a_time_in_a_fixed_order(exchanges: list[int]) -> None:
    seen: list[str] = []

    def job(name: str) -> None:
        for step in range(3):
            seen.append(f"{name}{step}")
            of_all_ranks(torch.zeros(1))

    both = Lockstep(2)
    both.run([lambda: job("a"), lambda: job("b")])
    assert seen == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_failure_ends_all_and_the_next_run_is_whole(exchanges: list[int]) -> None:
    def broken() -> None:
        of_all_ranks(torch.zeros(1))
        raise ValueError("broken here")

    both = Lockstep(2)
    for jobs in ([asking(1, 2, 3), broken], [broken, asking(1, 2, 3)]):
        with pytest.raises(ValueError, match="broken here"):
            both.run(jobs)
    assert both.run([asking(1), asking(2)]) == [[[[1, 1], [2, 2]]], [[[2, 2], [4, 4]]]]


def test_an_exchange_that_fails_is_raised_and_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(_: Tensor) -> Tensor:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(abreast, "_gather", gather)
    both = Lockstep(2)
    for jobs in ([asking(1), asking(2)], [asking(1), asking()], [asking(), asking(1)]):
        with pytest.raises(RuntimeError, match="closed by peer"):
            both.run(jobs)


class MeanOfRanks(torch.autograd.Function):
    """Something that needs the other ranks in both passes."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x + of_all_ranks(x.mean()).mean()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad + of_all_ranks(grad.mean()).mean()


def test_maps_and_gradients_are_those_of_one_network_after_the_other(exchanges: list[int]) -> None:
    torch.manual_seed(0)
    networks = [nn.Linear(3, 3), nn.Linear(3, 3)]
    images = [torch.randn(4, 3), torch.randn(4, 3)]

    def encode(number: int) -> Tensor:
        return MeanOfRanks.apply(networks[number](images[number])).square()

    def gradients(maps: tuple[Tensor, ...]) -> list[Tensor]:
        for one in networks:
            one.zero_grad()
        (maps[0] * maps[1]).sum().backward()
        return [weight.grad.clone() for one in networks for weight in one.parameters()]

    one_by_one = (encode(0), encode(1))
    expected = gradients(one_by_one)
    together = encode_in_lockstep(Lockstep(2), networks, [lambda: encode(0), lambda: encode(1)])
    assert all(torch.equal(a, b) for a, b in zip(together, one_by_one, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(together), expected, strict=True))
    assert exchanges == [1] * 4 + [2] * 2
    with torch.no_grad():
        (first, _) = encode_in_lockstep(Lockstep(2), networks, [lambda: encode(0), lambda: encode(1)])
    assert not first.requires_grad
