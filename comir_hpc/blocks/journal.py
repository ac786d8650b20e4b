"""Lines of a ledger: what a whole one says of a block, and which of two is the later one."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_BUFFER = 1 << 20  # bytes of a file read at once, so that a checksum takes little memory
_NAME = re.compile(r"\d{1,4}/c(/\d{1,12}){1,4}")  # path of a shard file below the store
_PLACE_BITS, _ATTEMPT_BIT = 44, 65  # of the number of `rank`: 16 TB a file, a million files


# With slots: one is made of every line, and a volume of terabytes has a million blocks.
@dataclass(frozen=True, slots=True)
class ShardFile:
    """What one file of a finished block looked like when it was written.

    Parameters
    ----------
    name : str
        Path of the file, relative to the store.
    size : int or None
        Bytes; None when nothing was stored, because every voxel is zero.
    checksum : int or None
        CRC-32 of the content; None where it was not recorded.
    """

    name: str
    size: int | None
    checksum: int | None

    def damage(self, store: Path, *, content: bool) -> str | None:
        """Say what differs from the file now on disk (its checksum is compared if `content`); None if nothing."""
        path = store / self.name
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None if self.size is None else f"{self.name} is missing"
        if self.size is None:
            return f"{self.name} holds {size} bytes where nothing was stored"
        if size != self.size:
            return f"{self.name} has {size} bytes, {self.size} were written"
        if content and checksum(path) != self.checksum:
            return f"{self.name} is not what was written (checksum)"
        return None


@dataclass(frozen=True, slots=True)
class Entry:
    """The latest line about one block."""

    block: int
    attempt: int
    state: Literal["started", "done"]
    fingerprint: str
    files: tuple[ShardFile, ...] = ()
    note: dict[str, Any] | None = None


def rank(entry: Entry, journal: int, place: int) -> int:
    """Pack what says which of two lines about a block is the later one, and where it is, into one number.

    A later attempt comes after an earlier one, "done" after "started", and what is read later after what is read
    before.
    """
    return (entry.attempt << 1 | (entry.state == "done")) << _ATTEMPT_BIT - 1 | journal << _PLACE_BITS | place


def attempt_of(number: int) -> int:
    """Return the attempt that `rank` has packed."""
    return number >> _ATTEMPT_BIT


def read_journal(path: Path) -> Iterator[tuple[int, Entry]]:
    """Yield the lines of a file that are whole, each with the place of its first byte."""
    place = 0
    with path.open("rb") as file:
        for line in file:
            start, place = place, place + len(line)
            try:
                entry = _entry(json.loads(line))
            except (
                ValueError,
                RecursionError,
            ):  # torn by a crash, or not ours: the block it was about is not done
                continue
            if entry is not None:
                yield start, entry


def _entry(record: Any) -> Entry | None:
    """Make an entry of a line; None where it is none, whatever it holds instead."""
    if not isinstance(record, dict):
        return None
    block, attempt, note = record.get("block"), record.get("attempt"), record.get("note")
    state, made, files = record.get("state"), record.get("fingerprint"), record.get("files", [])
    # bool is an int to isinstance, but no number of a block.
    if type(block) is not int or type(attempt) is not int or not isinstance(made, str):
        return None
    if state not in ("started", "done") or not (note is None or isinstance(note, dict)):
        return None
    if not isinstance(files, list) or not all(map(_is_file, files)):
        return None
    return Entry(block, attempt, state, made, tuple(ShardFile(*file) for file in files), note)


def _is_file(found: Any) -> bool:
    if not isinstance(found, list) or len(found) != 3 or not isinstance(found[0], str):
        return False
    numbers = type(found[1]) is type(found[2]) is int and found[1] >= 0
    return _NAME.fullmatch(found[0]) is not None and (numbers or found[1:] == [None, None])


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file's content."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(_BUFFER):
            found = zlib.crc32(part, found)
    return found
