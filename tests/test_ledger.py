"""The ledger: a block is done when its last line says so and its files are what was written, and never otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comir_hpc.blocks.ledger import Ledger, fingerprint
from comir_hpc.errors import VolumeError


def _files(store: Path, block: int, count: int = 2) -> list[Path]:
    return [store / "0" / "c" / str(block) / str(n) for n in range(count)]


def _write(
    ledger: Ledger, block: int, content: bytes = b"voxels", note: dict[str, int] | None = None
) -> None:
    first, second = _files(ledger.store, block)
    with ledger.writing(block, (first, second), note):
        first.parent.mkdir(parents=True, exist_ok=True)
        first.write_bytes(content + bytes([block]))  # the second file stays absent: an empty shard


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "out.zarr"


def test_a_written_block_is_done_for_its_own_fingerprint_only(store: Path) -> None:
    ledger = Ledger(store, "one")
    assert ledger.done() == set()
    _write(ledger, 3, note={"sum": 7})
    assert Ledger(store, "one").done() == {3}
    assert dict(Ledger(store, "one").notes()) == {3: {"sum": 7}}
    assert Ledger(store, "two").done() == set()
    assert not list(store.glob("*ledger*")), "readers of the store must not meet the ledger"


def test_the_fingerprint_changes_with_every_part_and_is_stable() -> None:
    parts = {"source": Path("a.zarr"), "window": 64, "shape": (1, 2, 3)}
    assert fingerprint(**parts) == fingerprint(**dict(reversed(parts.items())))
    assert len({fingerprint(**{**parts, key: "other"}) for key in parts} | {fingerprint(**parts)}) == 4


def test_files_are_unlinked_before_a_block_is_written_again(store: Path) -> None:
    ledger = Ledger(store, "one")
    _write(ledger, 0)
    with ledger.writing(0, _files(store, 0)):
        assert not any(path.exists() for path in _files(store, 0))
    assert ledger.done() == {0}, "a block may become empty"


def test_a_block_whose_writing_raised_is_not_done_even_if_it_was_before(store: Path) -> None:
    ledger = Ledger(store, "one")
    _write(ledger, 0)
    with pytest.raises(RuntimeError, match="boom"), ledger.writing(0, _files(store, 0)):
        raise RuntimeError("boom")
    assert Ledger(store, "one").done() == set()


@pytest.mark.parametrize(
    ("damage", "found_by_size"),
    [
        (lambda path: path.unlink(), True),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), True),
        (lambda path: path.write_bytes(b"VOXELS" + path.read_bytes()[6:]), False),
    ],
    ids=["deleted", "truncated", "torn"],
)
def test_damage_is_found_and_named(store: Path, damage, found_by_size: bool) -> None:
    ledger = Ledger(store, "one")
    for block in range(3):
        _write(ledger, block)
    damage(_files(store, 1)[0])
    assert (1 not in ledger.done()) == found_by_size
    found = ledger.verify()
    assert list(found) == [1]
    assert "0/c/1/0" in found[1]
    assert ledger.verify([0, 2]) == {}
    ledger.forget(found)
    assert Ledger(store, "one").done() == {0, 2}


def test_a_file_where_nothing_was_stored_is_damage(store: Path) -> None:
    ledger = Ledger(store, "one")
    _write(ledger, 0)
    _files(store, 0)[1].write_bytes(b"stale")
    assert ledger.done() == set()
    assert "nothing was stored" in ledger.verify()[0]


def test_the_later_attempt_counts_whichever_file_names_sort_first(store: Path) -> None:
    """Done by one process, started again by another that died: whatever the order of their files, not done."""
    for first, second in (("a", "b"), ("b", "a")):
        ledger = Ledger(store.with_name(f"{first}.zarr"), "one")
        _write(ledger, 0)
        ledger.done()
        (journal,) = ledger.folder.glob("*.jsonl")
        journal.rename(ledger.folder / f"{first}.jsonl")
        line = {"block": 0, "attempt": 2, "state": "started", "fingerprint": "one"}
        (ledger.folder / f"{second}.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        assert Ledger(ledger.store, "one").done() == set()


@given(cut=st.integers(min_value=0, max_value=10_000), junk=st.binary(max_size=8))
@settings(max_examples=60, deadline=None)
def test_lines_cut_anywhere_lose_at_most_the_blocks_behind_the_cut(
    written: Ledger, cut: int, junk: bytes
) -> None:
    journal = written.folder / "a.jsonl"
    whole = journal.with_suffix(".whole").read_bytes()
    cut = cut % len(whole)
    journal.write_bytes(whole[:cut] + junk)

    def records(text: bytes) -> list[Any]:
        found = []
        for line in text.split(b"\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    # The newline of a block's last line may be torn off, and junk may stick to the line or be what was torn off.
    kept = records(journal.read_bytes())
    complete = [one["block"] for one in records(whole) if one["state"] == "done" and one in kept]
    assert Ledger(written.store, "one").done() == set(complete)


GOOD = {"block": 0, "attempt": 9, "state": "done", "fingerprint": "one", "files": [], "note": None}


@pytest.mark.parametrize(
    "line",
    [
        7, "done", None, True, [], [[1, 2]], {}, {"block": 0},
        *({**GOOD, "block": b} for b in ("0", 0.0, None, [0], {"a": 1}, True)),
        *({**GOOD, "attempt": a} for a in ("9", None, [9], 9.5, False)),
        *({**GOOD, "state": s} for s in ("finished", None, 1, ["done"])),
        *({**GOOD, "fingerprint": f} for f in (None, 1, ["one"])),
        *({**GOOD, "note": n} for n in ("x", 1, [1], True)),
        *({**GOOD, "files": f} for f in (7, "abc", {"a": 1}, [7], ["abc"], [[1, 2, 3]], [["0/c/0/0", 1]],
          [["0/c/0/0", "1", 1]], [["0/c/0/0", 1, None]], [["0/c/0/0", None, 1]], [["0/c/0/0", True, True]],
          [["../../etc/passwd", 1, 1]], [["/etc/passwd", 1, 1]], [["0/c/0/0\ud800", 1, 1]], [["x" * 9999, 1, 1]],
          [["0/c/0/0", -1, 1]], None)),
    ],
    ids=repr,
)  # fmt: skip
def test_a_line_of_wrong_types_is_ignored_like_random_bytes(store: Path, line: Any) -> None:
    ledger = Ledger(store, "one")
    _write(ledger, 0, note={"sum": 7})
    (ledger.folder / "z.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    again = Ledger(store, "one")
    assert dict(again.notes()) == {0: {"sum": 7}}
    assert again.verify() == {}
    assert next(again.entries()).attempt == 1
    _write(again, 0)
    assert Ledger(store, "one").done() == {0}


def test_a_block_whose_note_is_not_accepted_is_not_done(store: Path) -> None:
    ledger = Ledger(store, "one")
    _write(ledger, 0, note={"sum": 7})
    _write(ledger, 1, note={"other": 7})
    assert Ledger(store, "one", _has_a_sum).done() == {0}
    assert pickle.loads(pickle.dumps(Ledger(store, "one", _has_a_sum))).done() == {0}


def _has_a_sum(note: Any) -> bool:
    return "sum" in note


def test_levels_are_kept_beside_the_blocks(store: Path) -> None:
    ledger = Ledger(store, "one")
    _write(ledger, 3)
    level = store / "1" / "c" / "0" / "0" / "0"
    with ledger.writing(-1, [level / "0", level / "1"]):
        level.mkdir(parents=True)
        (level / "0").write_bytes(b"coarse")
    assert ledger.done() == {3}
    assert ledger.levels() == {1}
    assert [file.size for file in ledger.level_files(1)] == [6, None]
    with ledger.writing(-1, [level / "0", level / "1"], keep=[level / "0"]):
        (level / "1").write_bytes(b"more")
    assert [file.size for file in Ledger(store, "one").level_files(1)] == [6, 4]
    (level / "1").write_bytes(b"MORE")
    assert ledger.levels() == {1}
    assert list(ledger.verify()) == [-1]
    (level / "1").unlink()
    assert ledger.levels() == set()
    ledger.forget([-1])
    assert ledger.level_files(1) == ()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "out.zarr", "one")
    for block in range(4):
        _write(ledger, block)
    (journal,) = ledger.folder.glob("*.jsonl")
    (ledger.folder / "a.whole").write_bytes(journal.read_bytes())
    journal.rename(ledger.folder / "a.jsonl")
    return ledger


def test_processes_write_files_of_their_own_and_are_read_together(store: Path) -> None:
    ledger = Ledger(store, "one")
    copies = [pickle.loads(pickle.dumps(ledger)) for _ in range(3)]
    for block, copy in enumerate(copies):
        _write(copy, block)
    assert len(list(ledger.folder.glob("*.jsonl"))) == 3
    assert sorted(ledger.done()) == [0, 1, 2]
    ledger.clear()
    assert ledger.done() == set()


def test_the_lock_is_let_go_when_its_holder_is_killed(store: Path) -> None:
    code = f"""
        import time
        from pathlib import Path
        from comir_hpc.blocks.ledger import Ledger
        with Ledger(Path({str(store)!r}), "one").exclusive():
            print("held", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Ledger(store, "one").exclusive():
        pass


def test_a_file_system_without_locks_is_accepted_for_a_single_run_only(store: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("comir_hpc.host.locks.fcntl.fcntl", refuse)
    with Ledger(store, "one").exclusive(needed=False):
        pass
    with pytest.raises(VolumeError, match="no file locks"), Ledger(store, "one").exclusive():
        pass


def test_many_blocks_load_quickly_enough_to_resume(store: Path) -> None:
    ledger = Ledger(store, "one")
    ledger.folder.mkdir(parents=True)
    lines = []
    for block in range(20_000):
        record = {"block": block, "attempt": 1, "fingerprint": "one"}
        lines += [
            json.dumps({**record, "state": "started"}),
            json.dumps({**record, "state": "done", "files": [[f"0/c/{block}", None, None]], "note": None}),
        ]
    (ledger.folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert len(ledger.done()) == 20_000
