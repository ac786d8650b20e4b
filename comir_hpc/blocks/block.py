"""One block carried out: computed, written and recorded, tried twice."""

from __future__ import annotations

import errno
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from comir_hpc.blocks.coarse import CoarseBlocks
from comir_hpc.blocks.ledger import Ledger
from comir_hpc.errors import CheckpointError, ConfigError, HeldError, StopRequested, VolumeError
from comir_hpc.host.locks import Permit
from comir_hpc.host.memory import peak_bytes
from comir_hpc.space.plan import Block, BlockPlan
from comir_hpc.volumes.volume import Volume

ATTEMPTS = 2  # a fault of the network or the disk may be gone at the second, a fault of the block is not
Settle = Callable[[int, str | None], None]
"""Called with the number of each block and why it failed; None: it is done."""
Outcome = TypeVar("Outcome")
_STORAGE_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


@dataclass
class BlockResult:
    """The voxels of one block, and figures about it that are kept in the ledger.

    Parameters
    ----------
    values : (c, z, y, x) array
        Values of the output volume's dtype, which fill the block's written box.
    note : mapping, optional
        JSON-ready, small; seconds of computing and peak memory are added. `Ledger.notes` gives them all back, those of
        an earlier, interrupted run too.
    """

    values: NDArray[Any]
    note: Mapping[str, Any] | None = None


class Work(Protocol):
    """Computes blocks; pickled once for every process, so it opens what it needs when first called."""

    def __call__(self, block: Block) -> BlockResult:
        """Read what the block needs and return its voxels."""


class Carrier:
    """Computes, writes and records blocks of one output, keeping open what it opened.

    Parameters
    ----------
    plan, work, ledger, permit
        Plan, work, ledger and permit that `run_blocks` was given.
    """

    def __init__(self, plan: BlockPlan, work: Work, ledger: Ledger, permit: Permit | None = None) -> None:
        self.plan, self.work, self.ledger, self.permit = plan, work, ledger, permit
        self.volume = Volume.open(ledger.store, writable=True)
        self.coarse = CoarseBlocks(self.volume, plan, ledger)

    @classmethod
    def unpack(cls, payload: bytes) -> Carrier:
        """Make one in another process from what `pack` gave."""
        return cls(*pickle.loads(payload))

    def __call__(self, index: int, attempts: int | None = None) -> str | None:
        """Compute one block and store it; each of the two is tried a second time if it fails.

        Parameters
        ----------
        index : int
            Number of the block in the plan, from 0.
        attempts : int, optional
            Number of times the block was tried in earlier runs. Give it where this process has not read the ledger.

        Returns
        -------
        str or None
            Why it failed twice; None when it is done.

        Raises
        ------
        ComirError
            If no other block could do better either: settings that cannot work, a full disk.
        """
        if attempts is not None:
            self.ledger.attempt_after(attempts, index)
        result = self.compute(index)
        return result if isinstance(result, str) else self.store(index, result)

    def compute(self, index: int) -> BlockResult | str:
        """Return a block's voxels, or why they cannot be had."""
        start = time.perf_counter()
        result = self._twice(index, lambda: self.work(self.plan[index]))
        if isinstance(result, str):
            return result
        seconds = round(time.perf_counter() - start, 3)
        return BlockResult(result.values, {**(result.note or {}), "seconds": seconds})

    def store(self, index: int, result: BlockResult) -> str | None:
        """Write and record a block; return why it cannot be, or None."""
        block = self.plan[index]

        def write() -> None:
            note = dict(result.note or {})
            turn = self.permit.turn(index) if self.permit else nullcontext()
            # The lock of the piece first: a worker whose run was killed may still be at this block.
            with turn, self.ledger.writing(index, self.volume.shard_files(block.write), note):
                self.volume.write(block.write, np.ascontiguousarray(result.values))
                # Before the block is recorded as done: whoever finds it done finds its coarse voxels, too.
                self.coarse.keep(block, result.values)
                note["peak_mib"] = -(-peak_bytes() // 2**20)

        return self._twice(index, write)

    def _twice(self, index: int, act: Callable[[], Outcome]) -> Outcome | str:
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                return act()
            except (ConfigError, CheckpointError, HeldError, StopRequested):
                raise  # meant for the whole run
            except Exception as error:  # one bad block must not cost the others; all are reported at the end
                if isinstance(error, OSError) and error.errno in _STORAGE_FULL:
                    raise VolumeError(
                        f"{self.volume.path}: block {index}, {self.plan[index].write}, cannot be written "
                        f"({error.strerror}); make room or get access, and run the same command again: it goes on there"
                    ) from error
                reason = f"{type(error).__name__}: {error}"
        return reason


@dataclass(frozen=True)
class Orders:
    """What workers are told, on whatever machine they are.

    Attributes
    ----------
    payload : bytes
        The work for a worker, packed by `pack`.
    todo : sequence of int
        Numbers of the blocks that are to be done, in this order.
    attempts : callable
        Function that returns how often a block was tried in earlier runs.
    stop : Event
        Signal to end: once it is set, no further block is begun.
    settle : callable
        Called with each block's number and why it failed (None: done).
    """

    payload: bytes
    todo: Sequence[int]
    attempts: Callable[[int], int]
    stop: threading.Event
    settle: Settle


def pack(plan: BlockPlan, work: Work, ledger: Ledger, permit: Permit | None = None) -> bytes:
    """Pack everything a worker needs to know, once; afterwards it is told block numbers only."""
    return pickle.dumps((plan, work, ledger, permit))
