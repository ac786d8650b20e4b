"""Whether there is a file to read at all, and the files that a header names."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from comir_hpc.errors import VolumeError

_SPECIAL = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_readable(path: Path, expected: str) -> None:
    """Refuse what is neither a file with something in it nor a folder, before anything waits for it.

    Parameters
    ----------
    expected : str
        Words for what the path should be, for the error.

    Raises
    ------
    VolumeError
        If it does not exist, is a link to nothing, a circle of links, a pipe, a socket or a device, is empty, or may
        not be read.
    """
    try:
        mode = path.stat()
    except OSError as error:
        raise VolumeError(_absent(path, error, expected)) from error
    for is_kind, name in _SPECIAL:
        if is_kind(mode.st_mode):
            raise VolumeError(
                f"{path} is {name}, which cannot be read from any place: write its content to a file first"
            )
    wanted = os.R_OK | (os.X_OK if stat.S_ISDIR(mode.st_mode) else 0)
    if not os.access(path, wanted, effective_ids=os.access in os.supports_effective_ids):
        raise VolumeError(
            f"{path} may not be read (permission denied); ask its owner, or copy it where you may"
        )
    if stat.S_ISREG(mode.st_mode) and mode.st_size == 0:
        raise VolumeError(f"{path} is empty (0 bytes); copy or export it again")


def _absent(path: Path, error: OSError, expected: str) -> str:
    if error.errno == errno.ELOOP:
        return f"{path} is a symbolic link that leads back to itself; give the path of the file itself"
    if error.errno == errno.EACCES:
        return f"{path} cannot be reached (permission denied on a folder above it); ask its owner"
    if error.errno == errno.ENAMETOOLONG:
        return f"{str(path)[:80]}...: a path of {len(str(path))} characters is too long for this file system"
    if path.is_symlink():
        return f"{path} is a symbolic link to {path.readlink()}, which does not exist"
    return f"{path} does not exist; expected {expected}"


def named_file(header: Path, name: str) -> tuple[Path, tuple[str, ...]]:
    """Find the data file that a header names, and note where its letters differ in case.

    File systems that ignore case, and copies between them, change the case of names that headers do not follow.

    Raises
    ------
    VolumeError
        If it is not there, no file, or may not be read.
    """
    path = header.parent / name
    notes: tuple[str, ...] = ()
    if not os.path.lexists(path):
        folder = path.parent
        alike = (
            [f for f in folder.iterdir() if f.name.lower() == path.name.lower()] if folder.is_dir() else []
        )
        if len(alike) != 1:
            raise VolumeError(f"{header} says its voxels are in {path}, which does not exist")
        path = alike[0]
        notes = (f"{header.name}: it names the file {name}; {path.name} beside it is taken",)
    try:
        require_readable(path, "the voxels")
    except VolumeError as error:
        raise VolumeError(f"{header} says its voxels are in {path}: {error}") from error
    if path.is_dir():
        raise VolumeError(f"{header} says its voxels are in {path}, which is a folder")
    return path, notes


def sibling(path: Path, suffix: str, known: Sequence[str]) -> Path:
    """Find the other file of a pair: the same name with `suffix`, packed or not, in small or capital letters.

    Parameters
    ----------
    suffix : str
        Suffix of the other file, with its dot and in small letters.
    known : sequence of str
        Suffixes that `path` itself may have.

    Raises
    ------
    VolumeError
        If it is not there, there are two of them, or it may not be read.
    """
    name = path.name
    own = max((s for s in known if name.lower().endswith(s)), key=len)
    stem = name[: -len(own)]
    wanted = {suffix, f"{suffix}.gz"}
    found = [
        f for f in path.parent.iterdir() if f.name.startswith(stem) and f.name[len(stem) :].lower() in wanted
    ]
    # Of two that differ in capitals, the one in the same letters belongs to this one.
    same_case = [f for f in found if f.name[len(stem) :].isupper() == name[-len(own) :].isupper()]
    if len(same_case) == 1:
        found = same_case
    if len(found) != 1:
        what = f"{len(found)} such files are there" if found else "it is not there"
        raise VolumeError(f"{path} is one of a pair; expected {stem}{suffix} beside it, but {what}")
    require_readable(found[0], "the other file of the pair")
    return found[0]
