"""Which blocks of a store are done: what makes every run resumable and every result verifiable.

An absent chunk is not an unfinished one (all-zero chunks are not stored), so done-ness is kept beside the store, in
``OUT.zarr.ledger/``, where readers of OME-Zarr never look. A block goes through: started (recorded) - its shard
files unlinked - written - flushed to disk - done (recorded, with size and checksum of every file). A crash
between any two of these leaves a block that is not done, never one that looks done.

Every writing process appends to its own file of lines. One file for all would need appends to be atomic between
nodes, which parallel file systems do not promise; one file a block would double the number of files, the very thing
that sharding avoids, and make every resume open all of them. A line counts only when it is whole: its end plays
the part that a rename plays for a file. Which of two lines about a block is the later one is told by the attempt's
number, not by clocks, which differ between nodes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from comir_hpc import __version__
from comir_hpc.errors import VolumeError
from comir_hpc.shards import remove_unfinished

_BUFFER = 1 << 20
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def fingerprint(**parts: Any) -> str:
    """Digest, 16 hex digits, of everything that a result depends on: inputs, model, parameters, and our version.

    Parameters
    ----------
    **parts
        JSON-ready values, or ones whose text says what they are (paths, tuples).
    """
    record = json.dumps({**parts, "version": __version__}, sort_keys=True, default=str)
    return hashlib.sha256(record.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ShardFile:
    """What one file of a finished block looked like when it was written.

    Parameters
    ----------
    name : str
        Path below the store.
    size : int or None
        Bytes; None when nothing was stored, because every voxel is zero.
    checksum : int or None
        CRC-32 of the content.
    """

    name: str
    size: int | None
    checksum: int | None

    def damage(self, store: Path, *, content: bool) -> str | None:
        """Say what differs from the file now on disk (its checksum is compared if `content`); None if nothing."""
        path = store / self.name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return None if self.size is None else f"{self.name} is missing"
        if self.size is None:
            return f"{self.name} holds {size} bytes where nothing was stored"
        if size != self.size:
            return f"{self.name} has {size} bytes, {self.size} were written"
        if content and _checksum(path) != self.checksum:
            return f"{self.name} is not what was written (checksum)"
        return None


@dataclass(frozen=True)
class Entry:
    """The latest line about one block."""

    block: int
    attempt: int
    state: Literal["started", "done"]
    fingerprint: str
    files: tuple[ShardFile, ...] = ()
    note: dict[str, Any] | None = None


class Ledger:
    """Done-ness of the blocks of one store, for results of one fingerprint.

    Cheap to make and to pickle; nothing is read or written before it is asked. Threads of one process must not
    share one.

    Parameters
    ----------
    store : Path
        The store, which need not exist yet.
    fingerprint : str
        From `fingerprint`; entries of another one count as not done.
    """

    def __init__(self, store: Path, fingerprint: str) -> None:
        self.store = Path(store)
        self.fingerprint = fingerprint
        self._journal: Path | None = None
        self._attempts: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "fingerprint": self.fingerprint, "_attempts": {}, "_journal": None}

    @property
    def folder(self) -> Path:
        """Where the lines are kept: beside the store."""
        return self.store.with_name(self.store.name + ".ledger")

    # ------------------------------------------------------------------ what is done

    def entries(self) -> dict[int, Entry]:
        """Return the latest line about every block, whatever its fingerprint; torn lines do not count."""
        latest: dict[int, Entry] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for entry in _read_journal(path):
                known = latest.get(entry.block)
                if known is None or (entry.attempt, entry.state == "done") >= (
                    known.attempt,
                    known.state == "done",
                ):
                    latest[entry.block] = entry
        return latest

    def done(self) -> dict[int, Entry]:
        """Return the blocks that are done with this fingerprint and whose files are all there in full size.

        A deleted or truncated shard is noticed here, at the price of one `stat` a file; a changed one by `verify`.
        """
        entries = self.entries()
        self._attempts = {block: entry.attempt for block, entry in entries.items()}
        return {
            block: entry
            for block, entry in entries.items()
            if entry.state == "done"
            and entry.fingerprint == self.fingerprint
            and not any(file.damage(self.store, content=False) for file in entry.files)
        }

    def verify(self, blocks: Iterable[int] | None = None) -> dict[int, str]:
        """Read every file of the finished ones of `blocks` (of all) again; return what is damaged, by block."""
        found, wanted = {}, None if blocks is None else set(blocks)
        for block, entry in sorted(self.entries().items()):
            if wanted is not None and block not in wanted:
                continue
            if entry.state == "done" and entry.fingerprint == self.fingerprint:
                damage = [d for file in entry.files if (d := file.damage(self.store, content=True))]
                if damage:
                    found[block] = "; ".join(damage)
        return found

    def notes(self) -> dict[int, dict[str, Any]]:
        """Return what was noted with each finished block (figures gathered over the blocks)."""
        return {block: entry.note for block, entry in sorted(self.done().items()) if entry.note is not None}

    # ------------------------------------------------------------------ doing

    @contextmanager
    def writing(
        self, block: int, files: Iterable[Path], note: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """Surround the writing of one block.

        On entry the block is recorded as started and its files are unlinked; on a normal exit they are flushed and
        recorded as done. After an exception the block is not done.

        Parameters
        ----------
        block : int
            Its number in the plan.
        files : iterable of Path
            Every shard file of the block (`Volume.shard_files`).
        note : mapping, optional
            JSON-ready figures about the block, kept with it; it may be filled inside the ``with``.
        """
        paths = list(files)
        attempt = self._attempts.get(block, 0) + 1
        self._attempts[block] = attempt
        self._append({"block": block, "attempt": attempt, "state": "started"})
        for path in paths:
            path.unlink(missing_ok=True)
            remove_unfinished(path)
        yield
        written = [_flushed(path, self.store) for path in paths]
        for folder in {
            path.parent for path, file in zip(paths, written, strict=True) if file.size is not None
        }:
            _flush(folder)
        record = {
            "files": [[f.name, f.size, f.checksum] for f in written],
            "note": dict(note) if note else None,
        }
        self._append({"block": block, "attempt": attempt, "state": "done", **record})

    def forget(self, blocks: Iterable[int]) -> None:
        """Record blocks as not done, so that they are computed again."""
        self.done()
        for block in blocks:
            self._attempts[block] = self._attempts.get(block, 0) + 1
            self._append({"block": block, "attempt": self._attempts[block], "state": "started"})

    def attempt_after(self, attempt: int, block: int) -> None:
        """Tell a worker's ledger how often a block was tried before, instead of having it read every line."""
        self._attempts[block] = max(attempt, self._attempts.get(block, 0))

    def attempts(self, block: int) -> int:
        """Return how often the block was tried, as of the last look at the lines."""
        return self._attempts.get(block, 0)

    def clear(self) -> None:
        """Forget everything (the store is replaced)."""
        for path in self.folder.glob("*.jsonl"):
            path.unlink(missing_ok=True)
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.is_dir():  # what others keep beside the lines
                shutil.rmtree(path)
        self._journal, self._attempts = None, {}

    @contextmanager
    def exclusive(self, *, needed: bool = True) -> Iterator[None]:
        """Keep every other process, on any node, out of the same ``with`` for this store; a killed holder lets go.

        Parameters
        ----------
        needed : bool
            Whether several processes may really be at work; otherwise a file system without locks is accepted.

        Raises
        ------
        VolumeError
            If the lock is needed and the file system has none.
        """
        _make_folder(self.folder)
        with (self.folder / "lock").open("a") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                if needed:
                    raise VolumeError(
                        f"{self.folder}: this file system has no file locks ({error.strerror}), which several parts "
                        "need when they begin and end; mount it with locks (Lustre: -o flock) or run one part only"
                    ) from error
            yield

    def _append(self, record: dict[str, Any]) -> None:
        if self._journal is None:
            _make_folder(self.folder)
            self._journal = self.folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        line = json.dumps({**record, "fingerprint": self.fingerprint}, separators=(",", ":"))
        fresh = not self._journal.exists()
        with self._journal.open("ab", buffering=0) as file:
            # The first newline ends what a full disk may have left of the line before.
            file.write(f"\n{line}\n".encode())
            os.fsync(file.fileno())
        if fresh:
            _flush(self.folder)


def _read_journal(path: Path) -> Iterator[Entry]:
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
            files = tuple(ShardFile(*file) for file in record.pop("files", ()))
            yield Entry(**record, files=files)
        except (ValueError, TypeError, AttributeError):
            continue  # torn by a crash: the block it was about is not done


def _flushed(path: Path, store: Path) -> ShardFile:
    name = path.relative_to(store).as_posix()
    try:
        _flush(path)
    except FileNotFoundError:
        return ShardFile(name, None, None)
    return ShardFile(name, path.stat().st_size, _checksum(path))


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(_BUFFER):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(
            f"{path} cannot be made ({error.strerror}); choose a folder that you may write to"
        ) from error
