"""Which blocks of a store are done: what makes every run resumable and every result verifiable.

An absent chunk is not an unfinished one (all-zero chunks are not stored), so done-ness is kept beside the store, in
``OUT.zarr.ledger/``, where readers of OME-Zarr never look. A block goes through: started (recorded) - its shard
files unlinked - written - flushed to disk - done (recorded, with size and checksum of every file). A crash
between any two of these leaves a block that is not done, never one that looks done.

Every writing process appends to its own file of lines. One file for all would need appends to be atomic between nodes,
which parallel file systems do not promise. One file a block would double the number of files, the very thing that
sharding avoids. Every resume would have to open all of them. A line counts only when it is whole: its end plays the
part that a rename plays for a file. Which of two lines about a block is the later one is told by the attempt's number,
not by clocks, which differ between nodes.

A level of the pyramid is kept like a block, under the number of the level with a minus: level 2 is block -2.

Why a block that looks done is done, at whichever line a process is killed (``kill -9``; the same holds for a loss of
power, because every step is flushed before the next): before "started" is recorded nothing is touched, and the last
line about the block is still true. From then on the last line says "started", which is not done, until the line "done"
is there whole. That line is written when the files are on the disk. Two processes are never in one block
(`host.locks`), so no line "done" describes files that somebody else writes meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from comir_hpc import __version__
from comir_hpc.blocks.journal import Entry, ShardFile, attempt_of, checksum, rank, read_journal
from comir_hpc.host.files import flush
from comir_hpc.host.locks import exclusive
from comir_hpc.volumes.shards import remove_unfinished

Note = Mapping[str, Any] | None


def fingerprint(**parts: Any) -> str:
    """Return a digest, 16 hex digits, of everything that a result depends on.

    That is its inputs, the model, the parameters, and our version.

    Parameters
    ----------
    **parts
        JSON-ready values, or ones whose text says what they are (paths, tuples).
    """
    # Another version may compute other values: its blocks do not count as done.
    record = json.dumps({**parts, "version": __version__}, sort_keys=True, default=str)
    return hashlib.sha256(record.encode()).hexdigest()[:16]


class Ledger:
    """Done-ness of the blocks of one store, for results of one fingerprint.

    Cheap to make and to pickle; nothing is read or written before it is asked. Threads of one process must not
    share one.

    Parameters
    ----------
    store : Path
        Folder of the store, which need not exist yet.
    fingerprint : str
        Digest of the job, from `fingerprint`; entries of another one count as not done.
    accepts : callable, optional
        Whether what was noted with a block is what it should be; a block with another note counts as not done.
        Picklable.
    """

    def __init__(self, store: Path, fingerprint: str, accepts: Callable[[Note], bool] | None = None) -> None:
        self.store = Path(store)
        self.fingerprint = fingerprint
        self.accepts = accepts
        self._journal: Path | None = None
        self._attempts: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attempts": {}, "_journal": None}

    @property
    def folder(self) -> Path:
        """Folder of the lines, which lies beside the store."""
        return self.store.with_name(self.store.name + ".ledger")

    # ------------------------------------------------------------------ what is done

    def entries(self) -> Iterator[Entry]:
        """Yield the latest line about every block, whatever its fingerprint; torn lines do not count.

        The lines are read twice: first to learn which one is the latest about each block, then to yield those. So the
        memory of a block is that of a number, and not that of its files and its note.
        """
        paths = sorted(self.folder.glob("*.jsonl"))
        latest: dict[int, int] = {}
        for journal, path in enumerate(paths):
            for place, entry in read_journal(path):
                latest[entry.block] = max(latest.get(entry.block, 0), rank(entry, journal, place))
        self._attempts = {block: attempt_of(number) for block, number in latest.items()}
        for journal, path in enumerate(paths):
            for place, entry in read_journal(path):
                # A line that another process has appended meanwhile has a place that is not among them.
                if latest.get(entry.block) == rank(entry, journal, place):
                    yield entry

    def done(self) -> set[int]:
        """Return the blocks that are done with this fingerprint and whose files are all there in full size.

        A deleted or truncated shard is noticed here, at the price of one `stat` a file; a changed one by `verify`.
        """
        return {entry.block for entry in self._whole() if entry.block >= 0}

    def levels(self) -> set[int]:
        """Return the levels of the pyramid, from 1, that are done in the same sense."""
        return {-entry.block for entry in self._whole() if entry.block < 0}

    def notes(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield number and note of each finished block that has one, in no order (figures gathered over the blocks)."""
        return (
            (entry.block, entry.note)
            for entry in self._whole()
            if entry.block >= 0 and entry.note is not None
        )

    def _whole(self) -> Iterator[Entry]:
        for entry in self.entries():
            if self._counts(entry) and not any(f.damage(self.store, content=False) for f in entry.files):
                yield entry

    def _counts(self, entry: Entry) -> bool:
        known = entry.state == "done" and entry.fingerprint == self.fingerprint
        return known and (entry.block < 0 or self.accepts is None or self.accepts(entry.note))

    def level_files(self, level: int) -> tuple[ShardFile, ...]:
        """Return what the files of a level were when it was last written whole, () where that is not known."""
        files = (entry.files for entry in self.entries() if entry.block == -level and self._counts(entry))
        return next(files, ())

    def verify(self, blocks: Iterable[int] | None = None) -> dict[int, str]:
        """Read every file of the finished ones of `blocks` (of all) again; return what is damaged, by block.

        Without `blocks` the levels of the pyramid are among them, under negative numbers.
        """
        found, wanted = {}, None if blocks is None else set(blocks)
        for entry in self.entries():
            if self._counts(entry) and (wanted is None or entry.block in wanted):
                damage = [d for file in entry.files if (d := file.damage(self.store, content=True))]
                if damage:
                    found[entry.block] = "; ".join(damage)
        return dict(sorted(found.items()))

    # ------------------------------------------------------------------ doing

    @contextmanager
    def writing(
        self, block: int, files: Iterable[Path], note: Note = None, *, keep: Iterable[Path] = ()
    ) -> Iterator[None]:
        """Surround the writing of one block.

        On entry the block is recorded as started and its files are unlinked; on a normal exit they are flushed and
        recorded as done. After an exception the block is not done.

        Parameters
        ----------
        block : int
            Number of the block in the plan, from 0.
        files : iterable of Path
            Every shard file of the block (`Volume.shard_files`).
        note : mapping, optional
            JSON-ready figures about the block, kept with it; it may be filled inside the ``with``.
        keep : iterable of Path
            Those of `files` that stay as they are.
        """
        paths, kept = list(files), set(keep)
        attempt = self._attempts.get(block, 0) + 1
        self._attempts[block] = attempt
        self._append({"block": block, "attempt": attempt, "state": "started"})
        for path in paths:
            if path not in kept:
                path.unlink(missing_ok=True)
                remove_unfinished(path)
        yield
        written = [_flushed(path, self.store) for path in paths]
        for folder in {
            path.parent for path, file in zip(paths, written, strict=True) if file.size is not None
        }:
            flush(folder)
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
        self.tidy()
        self._journal, self._attempts = None, {}

    def tidy(self) -> None:
        """Remove what others keep in folders beside the lines until the store is complete."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path)

    def exclusive(self, *, needed: bool = True) -> AbstractContextManager[None]:
        """Wait until no other process, on any node, is in the same ``with`` for this store; see `host.locks`."""
        return exclusive(self.folder / "lock", needed=needed)

    def _append(self, record: dict[str, Any]) -> None:
        if self._journal is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A number of a process comes again, on other nodes and after a restart: the random part keeps the files
            # apart.
            self._journal = self.folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        line = json.dumps({**record, "fingerprint": self.fingerprint}, separators=(",", ":"))
        fresh = not self._journal.exists()
        with self._journal.open("ab", buffering=0) as file:
            # The first newline ends what a full disk may have left of the line before.
            file.write(f"\n{line}\n".encode())
            os.fsync(file.fileno())
        if fresh:
            flush(self.folder)


def _flushed(path: Path, store: Path) -> ShardFile:
    name = path.relative_to(store).as_posix()
    try:
        flush(path)
    except FileNotFoundError:
        # Nothing but zeros was written: then there is no file, and it must not appear later.
        return ShardFile(name, None, None)
    return ShardFile(name, path.stat().st_size, checksum(path))
