"""Blocks: the same bytes whoever computes them, however often they are stopped; failures named, never hidden."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comir_hpc.blocks import (
    BlockResult,
    Execution,
    Figures,
    Filled,
    Output,
    carry_out,
    open_output,
    run_blocks,
)
from comir_hpc.blocks.ledger import Ledger
from comir_hpc.blocks.processes import _Queue
from comir_hpc.errors import ConfigError, StopRequested, VolumeError
from comir_hpc.space.grid import Grid
from comir_hpc.space.plan import Block, plan_blocks
from comir_hpc.volumes.volume import Volume

SHAPE = (24, 20, 40)
GRID = Grid(SHAPE, (1.0, 1.0, 1.0))


@dataclass
class Ramp:
    """Every voxel gets its own number, so any voxel from a wrong place is seen; keeps a diary of what it computed."""

    diary: Path | None = None
    fail: tuple[int, ...] = ()
    fail_once: Path | None = None
    die: Path | None = None
    pause: float = 0.0
    stay: int | None = None

    def __call__(self, block: Block) -> BlockResult:
        if self.diary is not None:
            with self.diary.open("a") as file:
                file.write(f"{block.index} {os.getpid()}\n")
        time.sleep(60 if block.index == self.stay else self.pause)
        if block.index in self.fail:
            raise ValueError("bad voxels")
        if block.index == 2 and self.fail_once and not self.fail_once.exists():
            self.fail_once.touch()
            raise ValueError("once")
        if block.index == 1 and self.die and not self.die.exists():
            self.die.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        z, y, x = (np.arange(a, b) for a, b in zip(block.write.start, block.write.stop, strict=True))
        values = (z[:, None, None] * 1000 + y[:, None]) * 1000 + x
        return BlockResult(values[None].astype(np.float64), {"first": int(values.min())})

    def computed(self) -> list[int]:
        assert self.diary is not None
        return [int(line.split()[0]) for line in self.diary.read_text(encoding="utf-8").splitlines()]


@dataclass
class Ramped:
    """The smallest job: every voxel its own number."""

    out: Path
    execution: Execution = field(default_factory=Execution)
    ramp: Ramp = field(default_factory=Ramp)
    core: int = 8
    finished: list[tuple[int, int]] = field(default_factory=list)
    verb: str = "ramp"
    record: dict[str, str] = field(default_factory=lambda: {"what": "ramp"})
    command: tuple[str, ...] = ("--out",)
    checksums: bool = False

    def ledger(self) -> Ledger:
        return Ledger(self.out, "one")

    def create(self, path: Path) -> Volume:
        return Volume.create(path, GRID, np.float64, chunk=4, shard=8, checksums=self.checksums)

    def plan(self, out: Volume):
        return plan_blocks(SHAPE, out.shard_zyx, core_zyx=(self.core,) * 3)

    def work(self, out: Volume) -> Ramp:
        return self.ramp

    def needs(self, plan, blocks: int) -> Figures:
        return Figures(blocks, None, 0, None, None)

    def require_unchanged(self) -> None:
        pass

    def finish(self, output: Output) -> dict[str, int]:
        self.finished.append(self.execution.part)
        output.build_pyramid()
        return {"finished": 1}


def ramped(path: Path, **changes) -> Filled:
    how = {k: changes.pop(k) for k in ("part", "workers", "verify", "overwrite") if k in changes}
    return carry_out(Ramped(path, Execution(**how), **changes), begun=time.perf_counter())


WHOLE = Ramp()(Block(0, GRID.box, GRID.box)).values


def make(path: Path) -> Volume:
    return Volume.create(path, GRID, np.float64, chunk=4, shard=8)


def prepare(path: Path, core: int = 8):
    ledger = Ledger(path, "one")
    volume = open_output(path, ledger, make)
    return volume, ledger, plan_blocks(SHAPE, volume.shard_zyx, core_zyx=(core,) * 3)


def test_every_block_is_computed_once_and_lands_in_its_place(tmp_path: Path) -> None:
    volume, ledger, plan = prepare(tmp_path / "out.zarr")
    work = Ramp(diary=tmp_path / "diary")
    seen: list[tuple[str, int, int]] = []
    run = run_blocks(plan, range(len(plan)), work, ledger, progress=lambda *a: seen.append(a), what="ramp")
    assert (run.blocks, run.computed, run.skipped) == (len(plan), len(plan), 0)
    assert sorted(work.computed()) == list(range(len(plan)))
    assert seen == [("ramp", n, len(plan)) for n in range(len(plan) + 1)]
    np.testing.assert_array_equal(volume.read(), WHOLE)
    note = dict(ledger.notes())[0]
    assert note["first"] == 0
    assert note["seconds"] >= 0
    assert note["peak_mib"] > 0

    again = run_blocks(plan, range(len(plan)), work, ledger)
    assert (again.computed, again.skipped) == (0, len(plan))


def test_processes_write_the_same_files_and_a_killed_one_loses_its_block_only(tmp_path: Path) -> None:
    _, ledger, plan = prepare(tmp_path / "here.zarr")
    run_blocks(plan, range(len(plan)), Ramp(), ledger)
    _, ledger, _ = prepare(tmp_path / "there.zarr")
    work = Ramp(diary=tmp_path / "diary", die=tmp_path / "died", fail=(5,))
    with pytest.raises(
        VolumeError, match=r"1 of 45 blocks failed twice.*block 5, z\[0:8\] y\[8:16\] x\[0:8\].*bad"
    ):
        run_blocks(plan, range(len(plan)), work, ledger, workers=2)
    assert (tmp_path / "died").exists()
    assert sorted(work.computed()) == sorted([*range(len(plan)), 1, 5]), (
        "twice: the killed one and the bad one"
    )
    assert sorted(ledger.done()) == sorted(set(range(len(plan))) - {5})
    repaired = Ramp(diary=tmp_path / "diary2")
    run_blocks(plan, range(len(plan)), repaired, ledger)
    assert repaired.computed() == [5]
    assert _bytes(tmp_path / "there.zarr") == _bytes(tmp_path / "here.zarr")


@dataclass
class Deadly(Ramp):
    """A block that kills whoever tries it."""

    def __call__(self, block: Block) -> BlockResult:
        if block.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(block)


@given(
    todo=st.lists(st.integers(0, 60), unique=True, min_size=1).map(sorted),
    workers=st.integers(1, 6),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_the_queue_gives_every_block_once_and_neighbours_to_one_worker(todo, workers: int, order) -> None:
    queue = _Queue(todo, workers)
    last: list[int | None] = [None] * workers
    given_out, changes = [], 0
    while True:
        worker = order.randrange(workers)
        block = queue.take(last[worker])
        if block is None:
            break
        changes += last[worker] is None or block != last[worker] + 1
        given_out.append(block)
        last[worker] = block
    assert sorted(given_out) == todo
    if todo == list(range(len(todo))) and workers == 1:
        assert changes == 1


def test_a_block_that_kills_every_worker_is_reported_after_two(tmp_path: Path) -> None:
    _, ledger, plan = prepare(tmp_path / "out.zarr", core=24)
    with pytest.raises(
        VolumeError, match=r"1 of 2 blocks.*block 1, .*worker process was killed by SIGKILL each time"
    ):
        run_blocks(plan, range(len(plan)), Deadly(), ledger, workers=2)
    assert ledger.done() == {0}


def test_blocks_on_a_dask_scheduler(tmp_path: Path) -> None:
    from distributed import LocalCluster

    _, ledger, plan = prepare(tmp_path / "here.zarr", core=16)
    run_blocks(plan, range(len(plan)), Ramp(), ledger)
    _, ledger, _ = prepare(tmp_path / "there.zarr")
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp://", dashboard_address=None
    ) as site:
        address = site.scheduler_address.replace("tcp://", "dask://")
        with pytest.raises(VolumeError, match=r"1 of 12 blocks failed twice"):
            run_blocks(plan, range(len(plan)), Ramp(fail=(5,)), ledger, cluster=address)
        assert len(ledger.done()) == len(plan) - 1
        run_blocks(plan, range(len(plan)), Ramp(), ledger, cluster=address)
    assert _bytes(tmp_path / "there.zarr") == _bytes(tmp_path / "here.zarr")


def _bytes(store: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(store)): p.read_bytes()
        for p in store.rglob("*")
        if p.is_file() and p.suffix != ".json"
    }


@given(parts=st.integers(1, 9), core=st.sampled_from([8, 16, 24]))
@settings(max_examples=5, deadline=None)
def test_any_parts_and_any_core_make_the_same_voxels(tmp_path_factory, parts: int, core: int) -> None:
    path = tmp_path_factory.mktemp("parts") / "out.zarr"
    finished: list[tuple[int, int]] = []
    for number in range(1, parts + 1):
        done = ramped(path, part=(number, parts), core=core, finished=finished)
        assert done.missing == len(Ramped(path, core=core).plan(make(path.parent / f"{number}.zarr"))) - len(
            Ledger(path, "one").done()
        )
    last_with_work = max(n for n in range(1, parts + 1) if prepare(path, core)[2].part(n, parts))
    assert finished == [(last_with_work, parts)]
    np.testing.assert_array_equal(Volume.open(path).read(), WHOLE)


def test_a_block_is_tried_twice_then_reported_with_its_box_while_the_others_go_on(tmp_path: Path) -> None:
    _, ledger, plan = prepare(tmp_path / "out.zarr")
    work = Ramp(diary=tmp_path / "diary", fail=(0, 44), fail_once=tmp_path / "once")
    with pytest.raises(VolumeError, match=r"2 of 45 blocks failed twice") as caught:
        run_blocks(plan, range(len(plan)), work, ledger)
    assert "block 44, z[16:24] y[16:20] x[32:40]: ValueError: bad voxels" in str(caught.value)
    assert len(ledger.done()) == len(plan) - 2
    assert work.computed().count(0) == work.computed().count(2) == 2


def test_a_full_disk_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ledger, plan = prepare(tmp_path / "out.zarr")
    written: list[str] = []
    write = Volume.write

    def until_full(self: Volume, box, values, **options) -> None:
        written.append(str(box))
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, box, values, **options)

    monkeypatch.setattr(Volume, "write", until_full)
    with pytest.raises(VolumeError, match=r"block 3, .*No space left on device.*goes on"):
        run_blocks(plan, range(len(plan)), Ramp(), ledger)
    assert len(written) == 4
    assert sorted(ledger.done()) == [0, 1, 2]


def test_settings_that_no_block_can_work_with_are_not_tried_on_each(tmp_path: Path) -> None:
    _, ledger, plan = prepare(tmp_path / "out.zarr")
    calls: list[int] = []

    def refuse(block: Block) -> BlockResult:
        calls.append(block.index)
        raise ConfigError("window too large")

    with pytest.raises(ConfigError, match="window too large"):
        run_blocks(plan, range(len(plan)), refuse, ledger)
    assert calls == [0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stop_signal_ends_between_blocks_and_the_same_call_goes_on(tmp_path: Path, number: int) -> None:
    volume, ledger, plan = prepare(tmp_path / "out.zarr")
    ramp = Ramp()

    def stopping(block: Block) -> BlockResult:
        if block.index == 3:
            os.kill(os.getpid(), number)
        return ramp(block)

    before = signal.getsignal(number)
    with pytest.raises(StopRequested, match="4 of 45 blocks done"):
        run_blocks(plan, range(len(plan)), stopping, ledger)
    assert signal.getsignal(number) == before
    run = run_blocks(plan, range(len(plan)), ramp, ledger)
    assert run.computed == len(plan) - 4
    np.testing.assert_array_equal(volume.read(), WHOLE)


def test_kill_at_any_moment_then_the_same_bytes_and_no_finished_block_twice(tmp_path: Path) -> None:
    reference = tmp_path / "reference.zarr"
    _, ledger, plan = prepare(reference)
    run_blocks(plan, range(len(plan)), Ramp(), ledger)
    path, diary = tmp_path / "out.zarr", tmp_path / "diary"
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_cluster import Ramp, prepare, run_blocks
        _, ledger, plan = prepare(Path({str(path)!r}))
        print("begin", flush=True)
        run_blocks(plan, range(len(plan)), Ramp(diary=Path({str(diary)!r}), pause=0.01), ledger)
    """
    rng = np.random.default_rng(0)
    for _ in range(3):
        finished = set(Ledger(path, "one").done())
        diary.write_text("", encoding="utf-8")
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.4))
        process.kill()
        process.wait()
        assert not finished & set(Ramp(diary=diary).computed())
    _, ledger, plan = prepare(path)
    run_blocks(plan, range(len(plan)), Ramp(), ledger)
    assert _bytes(path) == _bytes(reference)


def test_workers_do_not_outlive_a_killed_run(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_cluster import Ramp, prepare, run_blocks
        if __name__ == "__main__":
            _, ledger, plan = prepare(Path({str(tmp_path / "out.zarr")!r}))
            run_blocks(plan, range(len(plan)), Ramp(diary=Path({str(diary)!r}), pause=0.2), ledger, workers=2)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(code), encoding="utf-8")
    process = subprocess.Popen([sys.executable, tmp_path / "script.py"])
    _wait_until(lambda: diary.exists() and len(diary.read_text(encoding="utf-8").splitlines()) >= 3)
    process.kill()
    process.wait()
    workers = {int(line.split()[1]) for line in diary.read_text(encoding="utf-8").splitlines()}
    _wait_until(lambda: not any(map(_alive, workers)))


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_verify_finds_a_torn_shard_and_does_its_block_again(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    ramped(path)
    before, volume = _bytes(path), Volume.open(path)
    shard = next(volume.shard_files(prepare(path)[2][7].write))
    flip(shard)
    assert ramped(path).computed == 0
    assert Volume.open(path).complete
    assert ramped(path, verify=True).computed == 1
    assert _bytes(path) == before
    np.testing.assert_array_equal(Volume.open(path).read(), WHOLE)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_an_output_of_other_inputs_is_refused_then_replaced_on_request(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    volume, ledger, plan = prepare(path)
    run_blocks(plan, range(len(plan)), Ramp(), ledger)
    other = Ledger(path, "two")
    with pytest.raises(
        VolumeError, match=r"exists and was made from something else \(no record.*--overwrite"
    ):
        open_output(path, other, make)
    open_output(path, other, make, overwrite=True)
    assert other.done() == set()
    assert not volume.read().any()
    assert not list(other.folder.iterdir())
    # A deleted store with its ledger left behind starts afresh.
    run_blocks(plan, range(len(plan)), Ramp(), other)
    path.rename(tmp_path / "elsewhere.zarr")
    open_output(path, other, make)
    assert other.done() == set()


def test_a_refusal_names_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    record = {"window": 64, "spacing": (1.0, 2.0), "source": Path("a.zarr")}
    open_output(path, Ledger(path, "one"), make, record=record)
    assert open_output(path, Ledger(path, "one"), make, record=record).path == path
    with pytest.raises(VolumeError, match=r"something else \(window: 64, now 32\); choose another name"):
        open_output(path, Ledger(path, "two"), make, record={**record, "window": 32})


def test_a_folder_that_is_no_volume_of_ours_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "home"
    path.mkdir()
    (path / "thesis.tex").touch()
    with pytest.raises(VolumeError):
        open_output(path, Ledger(path, "one"), make, overwrite=True)
    assert (path / "thesis.tex").exists()


def test_a_cluster_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ledger, plan = prepare(tmp_path / "out.zarr")
    with pytest.raises(ConfigError, match=r"'pbs' is unknown; expected dask://HOST:PORT or slurm"):
        run_blocks(plan, [0], Ramp(), ledger, cluster="pbs")
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ConfigError, match="pip install"):
        run_blocks(plan, [0], Ramp(), ledger, cluster="slurm")
