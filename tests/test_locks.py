"""One writer at a time, named to whoever comes second, and free again however the first one ends."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from comir_hpc.errors import HeldError, VolumeError
from comir_hpc.host import locks
from comir_hpc.host.locks import exclusive, require_alone, writer
from comir_hpc.host.owner import Owner

HOLDER = """
import sys, time
from pathlib import Path
from comir_hpc.host.locks import writer
folder, first, parts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with writer(folder, Path("out.zarr"), "comir-hpc ingest", part=(first, parts)) as permit:
    with permit.turn(7):
        print("held", flush=True)
        time.sleep(float(sys.argv[4]))
"""


class Holder:
    """Another process that holds the lock of a part, and block 7."""

    def __init__(self, folder: Path, part: tuple[int, int] = (1, 1), seconds: float = 60) -> None:
        words = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder), *map(str, part), str(seconds)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out.zarr.ledger"


@pytest.fixture
def holder(folder: Path) -> Iterator[Holder]:
    holder = Holder(folder)
    yield holder
    holder.end()


def take(folder: Path, part: tuple[int, int] = (1, 1)):
    return writer(folder, Path("out.zarr"), "comir-hpc warp", part=part)


def test_the_second_says_who_holds_it_and_a_killed_holder_lets_go(folder: Path, holder: Holder) -> None:
    with pytest.raises(HeldError) as refused, take(folder):
        pass
    said = str(refused.value)
    assert f"out.zarr is being written by `comir-hpc ingest` on host {os.uname().nodename}" in said
    assert f"process {holder.process.pid}, since 20" in said
    assert "wait until that ends, or stop it" in said
    holder.end()
    with take(folder):
        assert "comir-hpc warp" in next(folder.glob("writer-*.json")).read_text(encoding="utf-8")
    assert not list(folder.glob("writer-*.json")), "a holder that ends removes its record"


def test_two_threads_of_one_process_are_two_writers(folder: Path) -> None:
    with take(folder), pytest.raises(HeldError, match=f"process {os.getpid()}"), take(folder):
        pass


def test_parts_of_one_number_go_together_and_whatever_overlaps_does_not(folder: Path) -> None:
    with take(folder, (1, 3)), take(folder, (3, 3)):
        with take(folder, (2, 3)):
            pass
        for part in ((1, 3), (1, 1), (1, 2), (2, 2), (5, 5)):
            with pytest.raises(HeldError, match="comir-hpc warp"), take(folder, part):
                pass
        with pytest.raises(HeldError):
            require_alone(folder, Path("out.zarr"), (3, 3))
    with take(folder, (3, 3)):
        require_alone(folder, Path("out.zarr"), (3, 3))
    with take(folder, (1, 3)), take(folder, (1000, 1000)):
        pass


def test_a_piece_of_a_dead_holders_worker_is_waited_for(folder: Path) -> None:
    """Its lock belongs to the worker, which may live on for a moment: nobody enters its piece before it ends."""
    holder = Holder(folder, seconds=0.7)
    old = Owner.read(next(folder.glob("writer-*.json")))
    assert old is not None
    # As if the first process had died and the worker not yet.
    (folder / "writer.lock").unlink()
    next(folder.glob("writer-*.json")).unlink()
    begun = time.monotonic()
    with take(folder) as permit:
        with permit.turn(6):
            assert time.monotonic() - begun < 0.5
        with permit.turn(7):
            assert holder.process.poll() is not None or time.monotonic() - begun > 0.3
        stale = replace(permit, token=old.token)
        with pytest.raises(HeldError, match=r"no longer holds the lock .*comir-hpc warp"), stale.turn(8):
            pass
    holder.process.wait()
    with pytest.raises(HeldError, match="was removed"):
        pickle.loads(pickle.dumps(permit)).require()


def test_a_lock_of_another_number_with_the_same_process_number_is_a_dead_one(folder: Path) -> None:
    """Process numbers are given out again: the start of the process tells."""
    folder.mkdir()
    left = Owner.of_this_process("comir-hpc ingest", 0, 1 << 40)
    for owner in (replace(left, born=left.born - 1), replace(left, pid=2**22 + 1)):
        (folder / "writer-1-of-1.json").write_text(json.dumps(asdict(owner)), encoding="utf-8")
        with take(folder):
            pass
    # The same process that lives, on a file system whose locks say nothing: the record counts.
    (folder / "writer-1-of-1.json").write_text(json.dumps(asdict(left)), encoding="utf-8")
    with pytest.raises(HeldError, match="comir-hpc ingest"), take(folder):
        pass


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_on_another_machine_is_judged_by_its_signs_of_life(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    folder.mkdir()
    left = replace(Owner.of_this_process("comir-hpc ingest", 0, 1 << 40), machine="other", host="node7")
    record = folder / "writer-1-of-1.json"
    record.write_text(json.dumps(asdict(left)), encoding="utf-8")
    monkeypatch.setattr(locks, "_SILENCE_S", 0.6)
    end = threading.Event()

    def renew() -> None:
        while not end.wait(0.05):
            os.utime(record)

    thread = threading.Thread(target=renew)
    if lives:
        thread.start()
    try:
        if lives:
            with pytest.raises(HeldError, match="on host node7"), take(folder):
                pass
            assert Owner.read(record) == left
        else:
            with take(folder):
                pass
    finally:
        end.set()
        if lives:
            thread.join()


def test_a_holder_renews_its_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_BEAT_S", 0.02)
    with take(folder) as permit:
        os.utime(permit.record, (1, 1))
        deadline = time.monotonic() + 10
        while permit.record.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert permit.record.stat().st_mtime > 2


def test_without_locks_of_the_file_system_the_record_decides(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("comir_hpc.host.locks.fcntl.fcntl", refuse)
    with take(folder) as permit:
        with pytest.raises(HeldError, match=f"process {os.getpid()}"), take(folder):
            pass
        with permit.turn(1):
            pass
        # Another one, that came at the same moment, wrote its record after this one.
        other = Owner.of_this_process("comir-hpc infer", 0, 1 << 40)
        permit.record.write_text(json.dumps(asdict(other)), encoding="utf-8")
        with pytest.raises(HeldError, match="it is now held by `comir-hpc infer`"), permit.turn(2):
            pass
    assert Owner.read(permit.record) == other, "what others wrote is not removed"
    with pytest.raises(VolumeError, match="no file locks"), exclusive(folder / "lock"):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff\xfe", b'{"doing": 1}'])
def test_a_damaged_record_holds_nothing(folder: Path, content: bytes) -> None:
    folder.mkdir()
    (folder / "writer-1-of-1.json").write_bytes(content)
    with take(folder):
        pass


def test_a_folder_that_cannot_be_written_is_one_sentence(folder: Path) -> None:
    folder.parent.joinpath("file").write_text("in the way", encoding="utf-8")
    with pytest.raises(VolumeError, match="cannot be made"), take(folder.parent / "file" / "ledger"):
        pass


def test_one_after_the_other_in_the_same_with(folder: Path) -> None:
    seen: list[str] = []

    def enter(name: str) -> None:
        with exclusive(folder / "lock"):
            seen.append(f"{name} in")
            time.sleep(0.05)
            seen.append(f"{name} out")

    threads = [threading.Thread(target=enter, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen in (["a in", "a out", "b in", "b out"], ["b in", "b out", "a in", "a out"])
