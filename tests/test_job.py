"""Jobs: one writer, never complete while a block is in flight, and every damage of a finished store is mended."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from test_cluster import WHOLE, Ramp, Ramped, _bytes, flip, ramped

from comir_hpc.blocks import Execution, Output, carry_out
from comir_hpc.blocks.ledger import Ledger
from comir_hpc.errors import HeldError, VolumeError
from comir_hpc.host.locks import writer
from comir_hpc.volumes.volume import Volume


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output, to compare with and to copy; no test writes to it."""
    place = tmp_path_factory.mktemp("whole") / "out.zarr"
    ramped(place)
    return place


def copied(whole: Path, path: Path) -> None:
    """A finished output with its ledger, as the same job leaves it."""
    shutil.copytree(whole, path)
    shutil.copytree(whole.with_name("out.zarr.ledger"), path.with_name("out.zarr.ledger"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.zarr"


def says_complete(path: Path) -> bool:
    """What any other reader sees."""
    record = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    return bool(record["attributes"]["comir"]["complete"])


class Running:
    """The job in a process of its own; it stays for long in one block, so that something can happen meanwhile."""

    def __init__(
        self, path: Path, pause: float = 0.0, stay: int | None = None, name: str = "running", **how: object
    ) -> None:
        code = f"""
            import sys, time
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            if __name__ == "__main__":
                from test_cluster import Execution, Ramp, Ramped, carry_out
                job = Ramped(Path({str(path)!r}), Execution(**{how!r}), Ramp(pause={pause}, stay={stay}))
                carry_out(job, begun=time.perf_counter(),
                          progress=lambda what, done, total: print(done, total, flush=True))
        """
        self.script = path.with_name(f"{name}.py")
        self.script.write_text(textwrap.dedent(code), encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, str(self.script)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def until(self, more: int) -> None:
        """Wait until it has done so many more blocks than when it began."""
        assert self.process.stdout is not None
        for _ in range(more + 1):
            assert self.process.stdout.readline()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def test_the_second_process_is_refused_and_takes_over_when_the_first_is_killed(
    path: Path, whole: Path
) -> None:
    first = Running(path, stay=6)
    first.until(3)
    with pytest.raises(
        HeldError, match=rf"out\.zarr is being written by `comir-hpc ramp` .*process {first.process.pid}"
    ):
        ramped(path)
    with pytest.raises(HeldError, match="comir-hpc ramp"):
        ramped(path, part=(2, 3))
    assert not says_complete(path)
    first.kill()
    done = ramped(path)
    assert 0 < done.computed < done.blocks
    assert says_complete(path)
    assert _bytes(path) == _bytes(whole)


def test_never_complete_while_blocks_are_done_again_even_when_that_is_killed(path: Path, whole: Path) -> None:
    """A completes; B verifies, does blocks again and is killed: nobody may read the volume until they are done."""
    copied(whole, path)
    volume = Volume.open(path)
    for index in (3, 20, 30, 40):
        flip(next(volume.shard_files(Ramped(path).plan(volume)[index].write)))
    again = Running(path, stay=30, verify=True)
    again.until(1)
    assert not says_complete(path)
    again.kill()
    assert not says_complete(path)
    with pytest.raises(VolumeError, match="incomplete"):
        Volume.open(path)
    assert ramped(path).missing == 0
    assert _bytes(path) == _bytes(whole)


def test_a_part_that_ends_does_not_complete_what_another_part_does_again(path: Path, whole: Path) -> None:
    for number in (1, 2):
        ramped(path, part=(number, 2))
    volume = Volume.open(path)
    plan = Ramped(path).plan(volume)
    flip(next(volume.shard_files(plan[0].write)))
    # A block is settled when the one after it is computed: block 0 while block 3 is, long before block 7 is.
    flip(next(volume.shard_files(plan[3].write)))
    flip(next(volume.shard_files(plan[7].write)))
    again = Running(path, stay=7, verify=True, part=(1, 2))
    again.until(1)
    ended = ramped(path, part=(2, 2))
    assert ended.missing >= 1
    assert not says_complete(path)
    again.kill()
    assert not says_complete(path)
    assert ramped(path, part=(1, 2)).missing == 0
    assert says_complete(path)
    assert _bytes(path) == _bytes(whole)


def test_parts_at_the_same_moment_make_the_same_and_one_of_them_completes_it(path: Path, whole: Path) -> None:
    running = [Running(path, pause=0.005, name=f"part{n}", part=(n, 3)) for n in (1, 2, 3)]
    for one in running:
        one.process.communicate()  # a pipe that nobody reads would fill
    assert [one.process.returncode for one in running] == [0, 0, 0]
    assert says_complete(path)
    assert _bytes(path) == _bytes(whole)


def test_a_run_after_a_kill_waits_for_the_workers_that_are_left(path: Path, whole: Path) -> None:
    for _ in range(2):
        first = Running(path, pause=0.02, workers=2)
        first.until(4)
        first.kill()
    ramped(path)
    assert _bytes(path) == _bytes(whole)


@pytest.mark.parametrize(
    ("lost", "verify"),
    [
        ("1/c/0/0/0/0", False),
        ("1/c/0/1/1/2", True),
        ("1/zarr.json", False),
        ("1/c", False),
        ("1", True),
        ("0/c/0/1/1/1", False),
        ("0/c/0/1/1/1", True),
        ("0/c", False),
    ],
)
def test_whatever_is_deleted_is_made_again_by_the_same_command(
    path: Path, whole: Path, lost: str, verify: bool
) -> None:
    copied(whole, path)
    target = path / lost
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(VolumeError, match=r"out\.zarr.* (ramp|comir-hpc)"):
        Volume.open(path)
    done = ramped(path, verify=verify)
    assert (done.computed > 0) == lost.startswith("0")
    assert _bytes(path) == _bytes(whole)
    np.testing.assert_array_equal(Volume.open(path).read(), WHOLE)
    assert ramped(path, verify=verify).computed == 0


def test_verify_finds_and_mends_a_flipped_bit_in_the_pyramid_and_touches_nothing_else(
    path: Path, whole: Path
) -> None:
    ramped(path, checksums=True)
    times = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file() and p.name != "zarr.json"}
    shard = path / "1" / "c" / "0" / "1" / "1" / "1"
    flip(shard)
    with pytest.raises(
        VolumeError, match=r"1/c/0/1/1/1 is damaged, box .*run `comir-hpc ramp --out .*--verify"
    ):
        Volume.open(path).read(level=1)
    assert ramped(path, verify=True, checksums=True).computed == 0
    np.testing.assert_array_equal(Volume.open(path).read(level=1), Volume.open(whole).read(level=1))
    after = {p: p.stat().st_mtime_ns for p in times}
    assert {p for p in times if after[p] != times[p]} == {shard}


def test_the_arrays_own_metadata_need_overwrite(path: Path, whole: Path) -> None:
    copied(whole, path)
    (path / "0" / "zarr.json").unlink()
    with pytest.raises(
        VolumeError, match=r"is missing \(0/zarr.json\).*again with --overwrite: comir-hpc ramp"
    ):
        ramped(path)
    ramped(path, overwrite=True)
    assert _bytes(path) == _bytes(whole)


@pytest.mark.parametrize("ledger", ["kept", "deleted"])
def test_a_finished_output_on_a_read_only_mount_is_returned(path: Path, ledger: str) -> None:
    folder = path.parent / "mount"
    folder.mkdir()
    job = Ramped(folder / "out.zarr")
    carry_out(job, begun=0.0)
    if ledger == "deleted":
        shutil.rmtree(folder / "out.zarr.ledger")
    mounted = subprocess.run(["mount", "--bind", str(folder), str(folder)], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (folder / "x").touch()
        done = carry_out(job, begun=0.0)
        assert (done.computed, done.missing, done.blocks) == (0, 0, 45)
        if ledger == "kept":
            assert ramped(job.out, verify=True).computed == 0
        with pytest.raises(VolumeError, match="Read-only file system"):
            carry_out(Ramped(folder / "other.zarr"), begun=0.0)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_line_about_a_block_that_does_not_exist_completes_nothing(path: Path) -> None:
    with pytest.raises(VolumeError, match="failed twice"):
        carry_out(Ramped(path, ramp=Ramp(fail=(5,))), begun=0.0)
    line = {"block": 999, "attempt": 1, "state": "done", "fingerprint": "one", "files": [], "note": None}
    (Ledger(path, "one").folder / "z.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(VolumeError, match="failed twice"):
        carry_out(Ramped(path, ramp=Ramp(fail=(5,))), begun=0.0)
    assert not says_complete(path)


def test_what_an_older_version_finished_is_left_as_it_is_and_verify_gives_it_a_list(
    path: Path, whole: Path
) -> None:
    copied(whole, path)
    record = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    del record["attributes"]["comir_files"]
    (path / "zarr.json").write_text(json.dumps(record), encoding="utf-8")
    for journal in Ledger(path, "one").folder.glob("*.jsonl"):
        kept = [x for x in journal.read_text(encoding="utf-8").splitlines() if '"block":-' not in x]
        journal.write_text("\n".join(kept) + "\n", encoding="utf-8")
    before = (path / "zarr.json").read_bytes()
    assert ramped(path).computed == 0
    assert (path / "zarr.json").read_bytes() == before
    assert ramped(path, verify=True).computed == 0
    assert Volume.open(path).recorded
    assert _bytes(path) == _bytes(whole)


def test_another_job_does_not_replace_what_is_being_written(path: Path) -> None:
    first = Running(path, stay=5, part=(1, 2))
    first.until(2)

    class Other(Ramped):
        def ledger(self) -> Ledger:
            return Ledger(self.out, "two")

    with pytest.raises(HeldError, match=f"process {first.process.pid}"):
        carry_out(Other(path, Execution(part=(2, 2), overwrite=True)), begun=0.0)
    first.kill()
    assert carry_out(Other(path, Execution(part=(2, 2), overwrite=True)), begun=0.0).computed > 0


def test_of_parts_that_end_together_the_last_completes(path: Path) -> None:
    """All blocks are done, but another part has not let go of its lock yet: that one completes the volume."""
    with pytest.raises(RuntimeError, match="killed here"):
        carry_out(Killed(path, Execution(part=(1, 1))), begun=0.0)
    with writer(Ledger(path, "one").folder, path, "comir-hpc ramp", part=(1, 2)):
        ended = ramped(path, part=(2, 2))
        assert (ended.computed, ended.missing) == (0, 1)
        assert not says_complete(path)
    assert ramped(path, part=(1, 2)).missing == 0
    assert says_complete(path)


class Killed(Ramped):
    """A job that ends before it is finished."""

    def finish(self, output: Output) -> dict[str, int]:
        raise RuntimeError("killed here")
