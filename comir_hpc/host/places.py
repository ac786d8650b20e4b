"""Outputs and inputs on disk, kept apart: what is read is never what is written over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from comir_hpc.errors import ConfigError

Identity = tuple[int, int]


def require_apart(out: Path, *inputs: Path) -> None:
    """Refuse an output that is an input, lies inside one, or holds one.

    Writing replaces what is at the output and adds files to it, so any of these would destroy the input or change
    it while it is read. Symbolic links, ``..`` and mounts do not hide it: folders are compared by device and inode.

    Parameters
    ----------
    out : Path
        Path that will be written; it need not exist.
    inputs : Path
        Paths of the files and folders that are read.

    Raises
    ------
    ConfigError
        If the output is an input, lies inside one, or holds one; the message has both paths. Also if a path cannot be
        reached, such as a link that leads back to itself.
    """
    for path in (out, *inputs):
        _require_reachable(path)
    for named in inputs:
        for read in (named, *_linked(named)):
            through = "" if read == named else f" (through the link {read})"
            if _same(out, read):
                raise ConfigError(
                    f"the output {out} is the input {named} itself{through}; choose another output"
                )
            if _inside(out, read):
                raise ConfigError(
                    f"the output {out} lies inside the input {named}{through}; choose a place outside of it"
                )
            if _inside(read, out):
                raise ConfigError(
                    f"the input {named}{through} lies inside the output {out}, which would replace it; choose another "
                    "output"
                )


def _require_reachable(path: Path) -> None:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return  # an output that is not there yet; a missing input is the reader's to name
    except OSError as error:
        raise ConfigError(f"{path} cannot be reached ({error.strerror or error})") from error


def _linked(folder: Path) -> Iterator[Path]:
    """Yield the entries of a folder that are links: a store or a stack can be made of what lies elsewhere."""
    if not folder.is_dir():
        return
    try:
        with os.scandir(folder) as entries:
            yield from (Path(entry.path) for entry in entries if entry.is_symlink())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({error.strerror or error})") from error


def _identity(path: Path) -> Identity | None:
    """Return device and inode of a path, or None where it does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _same(one: Path, two: Path) -> bool:
    # Paths first: an output that is not there yet has no inode to compare.
    if os.path.realpath(one) == os.path.realpath(two):
        return True
    identity = _identity(one)
    return identity is not None and identity == _identity(two)


def _inside(inner: Path, outer: Path) -> bool:
    """Return whether a folder above `inner`, links followed, is `outer`."""
    # The real path: `..` behind a link leads elsewhere than its text says.
    above = Path(os.path.realpath(inner)).parents
    identity = _identity(outer)
    if identity is None:
        return Path(os.path.realpath(outer)) in above
    return any(identity == _identity(folder) for folder in above)
