"""Files that are written whole or not at all.

A program that is killed while it writes leaves half a file. All writers in this package write under a temporary name in
the same folder and then rename. A rename within one folder is atomic on POSIX file systems. So a reader sees the old
file or the new one, never a part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `path` when the block ends without an error.

    The temporary file is removed when the block fails.

    Parameters
    ----------
    path : Path
        Final name of the file. Its folder exists.
    durable : bool
        Flush the content to the disk before the rename, so that the file also survives a loss of power.

    Raises
    ------
    OSError
        If the file system refuses, e.g. because the disk is full.
    """
    # The process number keeps two writers apart. The suffix stays last, since some libraries choose the format by it.
    spare = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield spare
        if durable:
            flush(spare)
        spare.replace(path)
    finally:
        spare.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 text file whole or not at all; see `written_whole`."""
    with written_whole(path, durable=durable) as spare:
        spare.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a binary file whole or not at all; see `written_whole`."""
    with written_whole(path, durable=durable) as spare:
        spare.write_bytes(content)


def write_json(path: Path, record: Any, *, durable: bool = False) -> None:
    """Write a JSON file, indented by two spaces, whole or not at all; see `written_whole`."""
    write_text(path, json.dumps(record, indent=2) + "\n", durable=durable)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk.

    Raises
    ------
    OSError
        If the file system reports that it could not write.
    """
    # Reading is enough to flush, and the only way that works for a folder.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
