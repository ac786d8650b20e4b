"""One job: an output that is made block by block, and the one function that carries any such job out.

`ingest`, `infer` and `warp` each describe what their output is made from, how one block of it is computed and how it is
finished. Locks, the ledger, resuming, verifying, parts, the pyramid and the figures are the same for all, and here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from comir_hpc.blocks.block import Work
from comir_hpc.blocks.cost import Figures, measured
from comir_hpc.blocks.ledger import Ledger
from comir_hpc.blocks.output import Output, metadata_at, open_output, remove_unfinished_metadata
from comir_hpc.blocks.run import BlockRun, run_blocks
from comir_hpc.config.shared import Blocks
from comir_hpc.errors import HeldError, VolumeError
from comir_hpc.host.locks import Permit, require_alone, writer
from comir_hpc.host.progress import Progress
from comir_hpc.space.plan import BlockPlan
from comir_hpc.volumes.volume import Volume, planned_levels


@dataclass(frozen=True)
class Execution:
    """How a job is carried out. Nothing of it changes the result.

    Parameters
    ----------
    part : (i, n)
        Part i of n that this call does, i from 1.
    workers : int
        Number of processes that do blocks.
    cluster : str, optional
        Address of the workers, see `run_blocks`; they run on this machine when it is not given.
    verify : bool
        Compare what is there already with what was written, and make it again where it is damaged.
    overwrite : bool
        Replace a store that was made from something else.
    """

    part: tuple[int, int] = (1, 1)
    workers: int = 1
    cluster: str | None = None
    verify: bool = False
    overwrite: bool = False

    @classmethod
    def from_settings(cls, how: Blocks) -> Execution:
        """Take it from the settings that all block-wise verbs share."""
        return cls(how.part, how.workers, how.cluster, how.verify, how.overwrite)


class Job(Protocol):
    """Describes one output.

    Attributes
    ----------
    verb : str
        Command that makes the output, for messages.
    out : Path
        Folder of the store that is written.
    execution : Execution
        Part, workers and cluster with which the output is made.
    record : mapping
        Everything that the voxels and their layout depend on, JSON-ready; kept in the metadata, so that a refusal can
        name what differs.
    command : sequence of str
        Words of the command line that make it again, without its output and without what is optional.
    """

    @property
    def verb(self) -> str:
        """Command that makes the output, for messages."""

    @property
    def out(self) -> Path:
        """Folder of the store that is written."""

    @property
    def execution(self) -> Execution:
        """How the job is carried out."""

    @property
    def record(self) -> Mapping[str, Any]:
        """Settings and inputs that the result depends on, JSON-ready."""

    @property
    def command(self) -> Sequence[str]:
        """Words of the command line that make the output again."""

    def ledger(self) -> Ledger:
        """Return the ledger of the output, for results of this job."""

    def create(self, path: Path) -> Volume:
        """Make the empty output at a path; what parts and reruns must agree on is decided here and kept in it."""

    def plan(self, out: Volume) -> BlockPlan:
        """Cut the output into blocks, as whoever made it decided."""

    def work(self, out: Volume) -> Work:
        """Return what computes one block; called when there is something to compute."""

    def needs(self, plan: BlockPlan, blocks: int) -> Figures:
        """Predict what so many blocks need."""

    def require_unchanged(self) -> None:
        """Refuse inputs that are not what they were when the job began.

        Raises
        ------
        VolumeError
            If an input has changed.
        """

    def finish(self, output: Output) -> Mapping[str, Any]:
        """Build the pyramid of an output whose blocks are all done; return entries for its metadata."""


@dataclass(frozen=True)
class Filled:
    """What one call of `carry_out` did.

    Attributes
    ----------
    blocks, computed, missing : int
        Blocks of this part; those it computed; those of all parts that are still to be done.
    seconds : float
        Wall-clock seconds since `begun`.
    predicted, measured : Figures
        Time, memory and size that the call was expected to need, and those that it needed.
    """

    blocks: int
    computed: int
    missing: int
    seconds: float
    predicted: Figures
    measured: Figures


@dataclass(frozen=True)
class _Call:
    """One call of `carry_out` while it goes on."""

    job: Job
    how: Execution
    ledger: Ledger
    begun: float
    progress: Progress | None

    @property
    def alone(self) -> bool:
        return self.how.part[1] == 1

    @property
    def doing(self) -> str:
        return f"comir-hpc {self.job.verb}"


def carry_out(job: Job, *, begun: float, progress: Progress | None = None) -> Filled:
    """Do one part of the blocks of an output, and complete it if they were the last.

    Running it again goes on where it was stopped. A finished output is left as it is, and then nothing is written at
    all, so that it may lie on a file system that is mounted read-only.

    Parameters
    ----------
    job : Job
        The job that is carried out.
    begun : float
        Value of ``time.perf_counter()``, in seconds, when the call began.
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.

    Raises
    ------
    HeldError
        If another process writes the output, or this part of it.
    VolumeError
        If the output was made from something else, blocks fail, or the disk is full.
    StopRequested
        After SIGTERM or SIGUSR2. The same call, made again, continues the work.
    """
    call = _Call(job, job.execution, job.ledger(), begun, progress)
    finished = _finished(call)
    if finished is not None:
        return _nothing_to_do(call, finished)
    with _begun(call) as (permit, out):
        output = Output(out, job.plan(out), call.ledger, call.how.verify)
        ran, predicted = _fill(call, output, permit)
        missing = _complete(call, output, ran, predicted) if call.alone else 0
    if not call.alone:
        missing = _complete_if_last(call, output, ran, predicted)
    seconds = time.perf_counter() - begun
    actual = measured(out.path, call.ledger, blocks=ran.computed, seconds=seconds, complete=not missing)
    return Filled(ran.blocks, ran.computed, missing, seconds, predicted, actual)


def require_same(volume: Volume, before: str) -> None:
    """Refuse a volume whose fingerprint is not what it was before, because its blocks would not fit together.

    Raises
    ------
    VolumeError
        If it has changed.
    """
    if volume.fingerprint() != before:
        raise VolumeError(
            f"{volume.path} changed while it was read; run the same command again with --overwrite when nothing writes "
            "to it any more"
        )


def _finished(call: _Call) -> Volume | None:
    """Return the output if it is complete, made from the same and undamaged; nothing is written to find out."""
    job, ledger = call.job, call.ledger
    found = metadata_at(job.out)
    if found is None or not found.get("complete") or found.get("fingerprint") != ledger.fingerprint:
        return None
    try:
        out = Volume.open(job.out, allow_incomplete=True)
        if out.damage() or not _has_its_levels(out):
            return None
    except VolumeError:
        return None  # it is mended, or refused, by what comes after this
    plan = job.plan(out)
    if call.how.verify:
        return out if _verified(call, out, plan) else None
    # Of what an older version finished, only the ledger knows the files.
    return out if out.recorded or not Output(out, plan, ledger).missing() else None


def _has_its_levels(out: Volume) -> bool:
    """Return whether every level that the metadata name is there."""
    return out.num_levels == len(out.metadata.get("levels", [[1, 1, 1]]))


def _verified(call: _Call, out: Volume, plan: BlockPlan) -> bool:
    """Return whether the content of this part, and with the first part that of the pyramid, is what was written."""
    number, parts = call.how.part
    levels = set(range(1, len(planned_levels(out.grid)))) if number == 1 else set()
    own = set(plan.part(number, parts))
    if not (own <= call.ledger.done() and levels <= call.ledger.levels()):
        return False
    return not call.ledger.verify(own | {-level for level in levels})


def _nothing_to_do(call: _Call, out: Volume) -> Filled:
    blocks = len(call.job.plan(out).part(*call.how.part))
    seconds = time.perf_counter() - call.begun
    actual = measured(out.path, call.ledger, blocks=0, seconds=seconds, complete=True)
    return Filled(blocks, 0, 0, seconds, Figures(0, 0.0, 0, actual.num_bytes, actual.files), actual)


@contextmanager
def _begun(call: _Call) -> Iterator[tuple[Permit, Volume]]:
    """Hold the lock of this part while the ``with`` lasts, with the output open."""
    job, ledger, part = call.job, call.ledger, call.how.part
    with ExitStack() as stack:

        def hold() -> Permit:
            return stack.enter_context(writer(ledger.folder, job.out, call.doing, part=part))

        # Whoever wants all is refused at once. A part waits until no other part begins or completes the output: the
        # one that completes it holds the lock of all for a while.
        permit = hold() if call.alone else None
        with ledger.exclusive(needed=not call.alone):
            permit = permit or hold()
            out = open_output(
                job.out,
                ledger,
                job.create,
                record=job.record,
                overwrite=call.how.overwrite,
                require_alone=lambda: require_alone(ledger.folder, job.out, part),
            )
        yield permit, out


def _fill(call: _Call, output: Output, permit: Permit) -> tuple[BlockRun, Figures]:
    """Do the blocks of this part that are not done."""
    job, how, ledger, plan = call.job, call.how, call.ledger, output.plan
    indices = plan.part(*how.part)
    if how.verify:
        ledger.forget(ledger.verify(indices))
    todo = set(indices) - ledger.done()
    predicted = job.needs(plan, len(todo))
    ran = BlockRun(len(indices), 0, 0.0)
    if todo:
        ran = run_blocks(
            plan, indices, job.work(output.volume), ledger,
            workers=how.workers, cluster=how.cluster, permit=permit,
            progress=call.progress, what=f"{job.verb} {job.out.name}",
        )  # fmt: skip
        # Asked after the last block, so that the whole time of reading is covered.
        job.require_unchanged()
    elif output.volume.complete:
        volume = output.volume
        if volume.recorded or how.verify or not _has_its_levels(volume):
            volume.withdraw()  # no block is missing, so it is the pyramid, or the list of files
    return ran, predicted


def _complete_if_last(call: _Call, output: Output, ran: BlockRun, predicted: Figures) -> int:
    """Complete the output if all parts are done and nobody is at work any more; return how many blocks are missing.

    This part let go of its lock before. So of several parts that end at the same moment, one comes here last and finds
    nobody at work.
    """
    job, ledger = call.job, call.ledger
    missing = output.missing()
    if missing:
        return missing
    with ledger.exclusive():
        try:
            with writer(ledger.folder, job.out, call.doing):
                return _complete(call, output, ran, predicted)
        except HeldError:
            return max(1, output.missing())  # a part is at work again, and comes here when it ends


def _complete(call: _Call, output: Output, ran: BlockRun, predicted: Figures) -> int:
    """Finish an output if its blocks are all done; return how many are missing. The caller holds the lock of all."""
    job, ledger = call.job, call.ledger
    missing = output.missing()
    volume = Volume.open(output.volume.path, writable=True)  # as the last writer left it
    # Another part may have completed it between our last look and this lock.
    if missing or volume.complete:
        return missing
    entries = dict(job.finish(Output(volume, output.plan, ledger, output.verify)))
    remove_unfinished_metadata(volume.path)
    if ran.computed:
        seconds = time.perf_counter() - call.begun
        needed = measured(volume.path, ledger, blocks=ran.computed, seconds=seconds, complete=True)
        entries |= {"predicted": predicted.record(), "needed": needed.record()}
    volume.finish(**entries, command=[job.verb, *job.command])
    ledger.tidy()
    return 0
