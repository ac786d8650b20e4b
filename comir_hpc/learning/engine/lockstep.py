"""Run several networks in step, so that one exchange between the ranks serves the norms of all of them.

A batch norm over all ranks needs the other ranks twice a layer, and each time everyone waits for the slowest rank. The
networks of a training step do not depend on each other. So each network runs in a thread of its own until it needs the
other ranks. Only one thread runs at a time, and the order is fixed. When all networks wait, the other ranks are asked
once for all of them. The results are, to the bit, those of one network after another. docs/log.md says what it saves.
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

# A norm deep inside a network has no way to know of the threads: it finds their `exchange` here. In any other thread
# there is none, and the norm asks the other ranks by itself.
_HERE = threading.local()


def of_all_ranks(values: Tensor) -> Tensor:
    """Gather every rank's values, stacked (K, ...), without gradient.

    With gloo this is faster than a sum over the ranks, since there are so few numbers.
    """
    exchange: Callable[[Tensor], Tensor] = getattr(_HERE, "exchange", _gather)
    return exchange(values)


def _gather(values: Tensor) -> Tensor:
    every = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(every, values)
    return torch.stack(every)


class Lockstep:
    """Threads that work for different networks and ask the other ranks together.

    Parameters
    ----------
    count : int
        Number of networks, the same on every rank.
    """

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="network")
        # These fields need no lock: only the thread that has the turn reads or writes them.
        self._turns: list[threading.Semaphore] = []  # one a network; its thread runs when it is released
        self._working: list[int] = []  # numbers of the networks that are not done, ascending
        self._asked: dict[int, Tensor] = {}  # what each network wants to send to the other ranks
        self._answers: dict[int, Tensor] = {}  # what came back for each network, until its turn comes
        self._failed = False

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run one job for each network and return the results; if one fails, all end (collective)."""
        self._turns = [threading.Semaphore(0) for _ in jobs]
        self._working = list(range(len(jobs)))
        self._asked, self._answers, self._failed = {}, {}, False
        grad = torch.is_grad_enabled()
        tasks = [self._threads.submit(self._work, number, job, grad) for number, job in enumerate(jobs)]
        self._turns[0].release()
        wait(tasks)
        # One job has failed for a reason of its own, and the others because of it: the reason is what to report.
        problems = [problem for problem in (task.exception() for task in tasks) if problem is not None]
        for problem in problems:
            if not isinstance(problem, _Abandoned):
                raise problem
        return [task.result() for task in tasks]

    def _work(self, number: int, job: Callable[[], T], grad: bool) -> T:
        # Whether gradients are recorded is a state of each thread: it is handed over from the one that called `run`.
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
        """Give the turn to the next network; after the last one, ask the other ranks first."""
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


def encode_in_lockstep(
    lockstep: Lockstep, networks: Sequence[nn.Module], jobs: Sequence[Callable[[], Tensor]]
) -> tuple[Tensor, ...]:
    """Compute the maps of all networks in step, in the forward and in the backward pass (collective).

    A wrapper such as DistributedDataParallel sees one node of autograd for all networks. This node hands all weights
    their gradients at the end, so that the order of the gradients is the same on every rank.

    Parameters
    ----------
    lockstep : Lockstep
        Threads for as many networks.
    networks : sequence of M modules
        The networks, whose weights get gradients.
    jobs : sequence of M callables
        Functions without arguments, one for each network. Each computes one float32 map (n, l, z, y, x).

    Returns
    -------
    M float32 maps (n, l, z, y, x), in the order of the jobs.

    Raises
    ------
    Whatever a job or an exchange raises; the other jobs end with it.
    """
    if not torch.is_grad_enabled():
        return tuple(lockstep.run(jobs))
    weights = [[weight for weight in one.parameters() if weight.requires_grad] for one in networks]
    maps: tuple[Tensor, ...] = _Encode.apply(lockstep, jobs, weights, *(w for some in weights for w in some))  # type: ignore[no-untyped-call]
    return maps


class _Encode(torch.autograd.Function):
    """Run all forward passes, and later all backward passes; each network keeps a graph of its own in between."""

    @staticmethod
    def forward(ctx: Any, lockstep: Lockstep, jobs: Any, weights: Any, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.lockstep, ctx.weights = lockstep, weights
        with torch.enable_grad():
            ctx.maps = lockstep.run(jobs)
        return tuple(one.detach() for one in ctx.maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        jobs = [
            partial(torch.autograd.grad, one, some, grad, allow_unused=True)
            for one, some, grad in zip(ctx.maps, ctx.weights, grads, strict=True)
        ]
        ctx.maps = None
        found = ctx.lockstep.run(jobs)
        return (None, None, None, *(gradient for some in found for gradient in some))
