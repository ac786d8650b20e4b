"""Locks: one writer at a time in one folder, whoever it is, and free again however that writer ends.

Two nets lie one below the other.

1. **A lock of the kernel** on ``writer.lock`` (an open file description lock of ``fcntl``). The kernel lets go of it
   when the process ends, by whatever means, so nothing is left that somebody has to judge. NFS 4, NFS 3 with its lock
   daemon, Lustre mounted with ``flock``, GPFS and local disks all carry such locks, between nodes as well. A server
   also lets go of the locks of a node that died (NFS 4: when its lease of 90 s ends). This is why the rule here is a
   lock of the kernel, and not a file made with ``O_EXCL``. A job that was killed and put back into the queue starts on
   another node. There nobody could tell whether the file of a process elsewhere still means anything.
2. **A record** beside it says who holds the lock: machine, process, since when. It also covers file systems whose locks
   do not reach other nodes (NFS mounted with ``nolock``, Lustre with ``localflock``) or that have none. A record that
   its holder left behind is judged like this. On the same machine: the process is gone, or another one has its number
   (its start time differs). On another machine the holder renews the record every 10 s, and the next one looks for a
   minute whether that goes on. It compares two readings of the file's time, never a time with a clock, because the
   clocks of two nodes differ. It opens the file for each reading, because NFS promises fresh attributes only then.

Why it is right under ``kill -9`` at any line: between taking the kernel's lock and writing the record, a kill leaves
nothing. After that, it leaves a record whose holder is found dead by the rules above, and the lock is free. A holder
removes its record before it lets go of the lock, so a record is never that of a later holder. One case remains: a
process on another node, on a file system without real locks, is *stopped* for a minute and then goes on. It asks
`Permit` before every further block, and ends there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from comir_hpc.errors import HeldError, VolumeError
from comir_hpc.host.files import write_json
from comir_hpc.host.owner import Owner, started_at, this_machine

_log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_TAKEN = (errno.EAGAIN, errno.EACCES)
_BEAT_S = 10.0  # between two renewals of a record
_SILENCE_S = 60.0  # without a renewal, after which a holder on another machine counts as dead
_SETTLE_S = 0.5  # on a file system without locks: the later of two that came at once is known after this
_WHOLE = 1 << 40  # bytes of the lock file that stand for all work; parts hold their share of it


@dataclass(frozen=True)
class Permit:
    """What a holder shows before it writes; it may be sent to the holder's workers on any machine.

    Parameters
    ----------
    folder : Path
        Folder in which the lock lies.
    record : Path
        Path of the holder's record.
    token : str
        Text that the record contains as long as the lock is held.
    """

    folder: Path
    record: Path
    token: str

    def require(self) -> None:
        """Refuse to go on once the lock belongs to somebody else.

        Raises
        ------
        HeldError
            If the record is gone or is that of another holder.
        """
        owner = Owner.read(self.record)
        if owner is None or owner.token != self.token:
            now = f"it is now held by {owner}" if owner else f"{self.record} was removed"
            raise HeldError(
                f"this process no longer holds the lock of {self.folder}: {now}. What is written so far is kept; run "
                "the same command again when nobody else writes there"
            )

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Wait until nobody is at piece `number` of the work, and keep others out of it inside the ``with``.

        A worker may live on for a moment after the process that held the lock was killed. It still has the lock of
        its piece then, so whoever takes over waits here for it; and once it wants the next piece, its permit is no
        longer good.

        Raises
        ------
        HeldError
            For the same reason as `require`.
        """
        with _opened(self.folder / "pieces.lock") as file:
            _lock(file, number, number + 1, wait=True)
            self.require()
            yield


@contextmanager
def exclusive(path: Path, *, needed: bool = True) -> Iterator[None]:
    """Wait until no other process, on any node, is in the same ``with``; a killed holder lets go.

    Parameters
    ----------
    path : Path
        File to lock. It is made when it does not exist, and stays.
    needed : bool
        Whether several processes may really be at work; otherwise a file system without locks is accepted.

    Raises
    ------
    VolumeError
        If the lock is needed and the file system has none, or the file cannot be made.
    """
    with _opened(path) as file:
        if not _lock(file, 0, 1, wait=True) and needed:
            raise VolumeError(
                f"{path.parent}: this file system has no file locks, which several parts need when they begin and end; "
                "mount it with locks (Lustre: -o flock) or run one part only"
            )
        yield


@contextmanager
def writer(folder: Path, what: Path, doing: str, *, part: tuple[int, int] = (1, 1)) -> Iterator[Permit]:
    """Be the only writer inside the ``with``, or, of so many parts, the only one of this part.

    Parts of one number of parts do not exclude each other. Part 1 of 1 is everything and excludes every other.

    Parameters
    ----------
    folder : Path
        Folder in which lock and record are kept; it is made when it does not exist.
    what : Path
        Path of what is written, for messages.
    doing : str
        Words for what this process does, for messages.
    part : (i, n)
        Part i of n that is written, i from 1.

    Raises
    ------
    HeldError
        If another process holds it: who, since when, and what to do.
    VolumeError
        If the folder cannot be written to.
    """
    first, behind = _share(part)
    record = folder / f"writer-{part[0]}-of-{part[1]}.json"
    owner = Owner.of_this_process(doing, first, behind)
    permit = Permit(folder, record, owner.token)
    with ExitStack() as stack:
        file = stack.enter_context(_opened(folder / "writer.lock"))
        try:
            real = _lock(file, first, behind, wait=False)
        except BlockingIOError:
            raise _refusal(folder, what, _known_holder(folder, first, behind)) from None
        for other, path in _overlapping(folder, first, behind):
            if _lives(other, path):
                raise _refusal(folder, what, other)
            path.unlink(missing_ok=True)
        _write(record, owner)
        stack.callback(_remove, permit)
        if not real:
            # Without locks two may have come at once. Both have written by now, and the later record stands.
            time.sleep(_SETTLE_S)
        permit.require()
        stack.enter_context(_renewed(permit))
        yield permit


def require_alone(folder: Path, what: Path, part: tuple[int, int]) -> None:
    """Refuse to go on while another part is at work; called by a part, inside `writer`, before it replaces all.

    Raises
    ------
    HeldError
        If another part is at work; the message names one of them.
    """
    first, behind = _share(part)
    for start, stop in ((0, first), (behind, _WHOLE)):
        if start < stop:
            with _opened(folder / "writer.lock") as file:
                try:
                    _lock(file, start, stop, wait=False)
                except BlockingIOError:
                    raise _refusal(folder, what, _known_holder(folder, start, stop)) from None


def _share(part: tuple[int, int]) -> tuple[int, int]:
    """Return first byte and end of the lock file's bytes that stand for a part.

    Parts that have no block in common have no byte in common.
    """
    return _WHOLE * (part[0] - 1) // part[1], _WHOLE * part[0] // part[1]


def _refusal(folder: Path, what: Path, owner: Owner | None) -> HeldError:
    who = str(owner) if owner else "another process"
    return HeldError(
        f"{what} is being written by {who}; wait until that ends, or stop it, and run this command again. Should "
        f"nothing run there any more, delete {folder / 'writer.lock'} first"
    )


# ---------------------------------------------------------------------- the kernel's locks


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a lock file; closing it lets go of its locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(
            f"{path.parent} cannot be made ({error.strerror}); choose a folder that you may write to"
        ) from error
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise VolumeError(
            f"{path} cannot be written ({error.strerror}); get access to {path.parent}, or choose another folder"
        ) from error
    with file:
        yield file


def _lock(file: IO[bytes], first: int, behind: int, *, wait: bool) -> bool:
    """Lock bytes of a file and return True; False where the file system has no locks.

    The lock belongs to this opening of the file. The older locks of POSIX belong to the process: they are lost when any
    thread closes the same file, and they do not keep two threads apart.

    Raises
    ------
    BlockingIOError
        If somebody else holds one of the bytes and `wait` is not set.
    """
    # struct flock: type, whence, start, length, process (0 for these locks).
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, first, behind - first, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, wanted)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        if error.errno in _TAKEN:
            raise BlockingIOError(error.errno, error.strerror) from error
        raise
    return True


# ---------------------------------------------------------------------- who holds them


def _overlapping(folder: Path, first: int, behind: int) -> Iterator[tuple[Owner, Path]]:
    for path in sorted(folder.glob("writer-*-of-*.json")):
        owner = Owner.read(path)
        if owner is not None and owner.first < behind and first < owner.behind:
            yield owner, path


def _known_holder(folder: Path, first: int, behind: int) -> Owner | None:
    """Say who holds a lock that the kernel refused; the holder may be about to write its record."""
    for _ in range(10):
        for owner, path in _overlapping(folder, first, behind):
            if owner.machine != this_machine() or _lives(owner, path):
                return owner
        time.sleep(0.05)
    return None


def _lives(owner: Owner, path: Path) -> bool:
    """Return whether the process that wrote a record still runs; on another machine that takes a minute to see."""
    if owner.machine == this_machine():
        return started_at(owner.pid) == owner.born
    _log.warning(
        "%s was left by %s; looking for up to %.0f s whether that still runs", path, owner, _SILENCE_S
    )
    before, end = _touched(path), time.monotonic() + _SILENCE_S
    while time.monotonic() < end:
        time.sleep(min(_BEAT_S, _SILENCE_S) / 4)
        now = _touched(path)
        if now != before:
            return now is not None  # removed: its holder has just ended
    return False


def _touched(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _write(record: Path, owner: Owner) -> None:
    try:
        write_json(record, asdict(owner))
    except OSError as error:
        raise VolumeError(
            f"{record} cannot be written ({error.strerror}); make room or get access to {record.parent}"
        ) from error


def _remove(permit: Permit) -> None:
    owner = Owner.read(permit.record)
    if owner is not None and owner.token == permit.token:
        permit.record.unlink(missing_ok=True)


@contextmanager
def _renewed(permit: Permit) -> Iterator[None]:
    """Renew the record now and then, so that other machines see that its holder lives."""
    end = threading.Event()

    def renew() -> None:
        while not end.wait(_BEAT_S):
            owner = Owner.read(permit.record)
            if owner is not None and owner.token == permit.token:
                try:
                    os.utime(permit.record)
                except OSError as error:
                    _log.warning("%s cannot be renewed (%s)", permit.record, error.strerror)

    thread = threading.Thread(target=renew, daemon=True, name="lock")
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
