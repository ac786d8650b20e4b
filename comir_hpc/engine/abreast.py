"""Networks side by side, layer by layer, so that one exchange between the ranks serves the norms of all of them.

Batch norms over all ranks meet the other ranks twice a layer, and at each meeting everyone waits for the slowest. The
networks of a step do not depend on each other: each runs in a thread of its own, one at a time and in a fixed order,
until it needs the other ranks; when all do, they are asked once. Results are those of one network after another, to
the bit. What it saves: docs/log.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

T = TypeVar("T")

_HERE = threading.local()  # in a thread of Abreast: `exchange`


def of_all_ranks(values: Tensor) -> Tensor:
    """Every rank's values, stacked (K, ...), without gradient: with gloo faster than a sum of so few numbers."""
    exchange: Callable[[Tensor], Tensor] = getattr(_HERE, "exchange", _gather)
    return exchange(values)


def _gather(values: Tensor) -> Tensor:
    every = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(every, values)
    return torch.stack(every)


class Abreast:
    """Threads that work for different networks and ask the other ranks together.

    Parameters
    ----------
    count : int
        Networks, as many on every rank.
    """

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="network")
        # Who has the turn; who is not done; what is asked, and the answers. Only who has the turn touches them.
        self._turns: list[threading.Semaphore] = []
        self._working: list[int] = []
        self._asked: dict[int, Tensor] = {}
        self._answers: dict[int, Tensor] = {}
        self._failed = False

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Results of one job a network; a failure of one ends all (collective)."""
        self._turns = [threading.Semaphore(0) for _ in jobs]
        self._working = list(range(len(jobs)))
        self._asked, self._answers, self._failed = {}, {}, False
        grad = torch.is_grad_enabled()
        tasks = [self._threads.submit(self._work, number, job, grad) for number, job in enumerate(jobs)]
        self._turns[0].release()
        wait(tasks)
        problems = [problem for problem in (task.exception() for task in tasks) if problem is not None]
        for problem in problems:
            if not isinstance(problem, _Abandoned):
                raise problem
        return [task.result() for task in tasks]

    def _work(self, number: int, job: Callable[[], T], grad: bool) -> T:
        self._turns[number].acquire()
        _HERE.exchange = partial(self._exchange, number)
        try:
            with torch.set_grad_enabled(grad):
                return job()
        except BaseException:
            self._failed = True
            raise
        finally:
            self._working.remove(number)
            self._pass_on(number)

    def _exchange(self, number: int, values: Tensor) -> Tensor:
        self._asked[number] = values
        self._pass_on(number)
        self._turns[number].acquire()
        if self._failed:
            raise _Abandoned
        return self._answers.pop(number)

    def _pass_on(self, number: int) -> None:
        """Let the next network go on; after the last one, ask the other ranks first. Only who has the turn is here."""
        later = [one for one in self._working if one > number]
        try:
            if self._asked and not later and not self._failed:
                self._ask()
        except BaseException:
            self._failed = True
            raise
        finally:
            for following in (later or self._working)[:1]:
                self._turns[following].release()

    def _ask(self) -> None:
        asked, self._asked = self._asked, {}
        every = _gather(torch.cat([values.flatten() for values in asked.values()]))
        sizes = [values.numel() for values in asked.values()]
        parts = torch.split(every, sizes, dim=1)
        for (number, values), part in zip(asked.items(), parts, strict=True):
            self._answers[number] = part.reshape(-1, *values.shape)


class _Abandoned(Exception):
    """Another network of this rank has failed."""


def encode_abreast(
    abreast: Abreast, networks: Sequence[nn.Module], jobs: Sequence[Callable[[], Tensor]]
) -> tuple[Tensor, ...]:
    """Maps of all networks, whose forward and backward passes run side by side (collective).

    Wrappers see one node of autograd, which hands all weights their gradients at the end, so that their order is the
    same on every rank.

    Parameters
    ----------
    abreast : Abreast
        For as many networks.
    networks : sequence of M modules
        Whose weights get gradients.
    jobs : sequence of M callables
        Each computes one float32 map (n, l, z, y, x) by the network of the same place.

    Returns
    -------
    M maps

    Raises
    ------
    Whatever a job or an exchange raises; the other jobs end with it.
    """
    if not torch.is_grad_enabled():
        return tuple(abreast.run(jobs))
    weights = [[weight for weight in one.parameters() if weight.requires_grad] for one in networks]
    maps: tuple[Tensor, ...] = _Encode.apply(abreast, jobs, weights, *(w for some in weights for w in some))  # type: ignore[no-untyped-call]
    return maps


class _Encode(torch.autograd.Function):
    """All forward passes, then all backward passes; each keeps a graph of its own between the two."""

    @staticmethod
    def forward(ctx: Any, abreast: Abreast, jobs: Any, weights: Any, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.abreast, ctx.weights = abreast, weights
        with torch.enable_grad():
            ctx.maps = abreast.run(jobs)
        return tuple(one.detach() for one in ctx.maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        jobs = [
            partial(torch.autograd.grad, one, some, grad, allow_unused=True)
            for one, some, grad in zip(ctx.maps, ctx.weights, grads, strict=True)
        ]
        ctx.maps = None
        found = ctx.abreast.run(jobs)
        return (None, None, None, *(gradient for some in found for gradient in some))
