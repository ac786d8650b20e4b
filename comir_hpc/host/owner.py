"""Who holds a lock: a process of a machine, told from every other one, also from a later one with its number."""

from __future__ import annotations

import json
import os
import socket
import uuid
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Owner:
    """Whoever holds a lock, as its record says.

    Parameters
    ----------
    doing : str
        Command that the process carries out, for people: ``comir-hpc ingest``.
    host, machine : str
        The machine's name, and what tells it from others with the same name: the kernel's boot and the space of
        process numbers (containers may have their own).
    pid, born : int
        Number of the process, and its start in clock ticks after the boot: a number is given out again.
    since : str
        Date and time at which the lock was taken.
    token : str
        Text that is different each time a lock is taken.
    first, behind : int
        First byte of the lock file that the process holds, and the byte behind the last one.
    """

    doing: str
    host: str
    machine: str
    pid: int
    born: int
    since: str
    token: str
    first: int
    behind: int

    @classmethod
    def of_this_process(cls, doing: str, first: int, behind: int) -> Owner:
        """Describe this process, holding from now on."""
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
        born = started_at(os.getpid()) or 0
        token = uuid.uuid4().hex
        return cls(doing, socket.gethostname(), this_machine(), os.getpid(), born, now, token, first, behind)

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """Read a record; None where there is none or it is damaged."""
        try:
            found: Any = json.loads(path.read_bytes())
            owner = cls(**found)
            # Types, too: a record that another program wrote, or that a full disk cut, must not be taken for an
            # owner.
            same = {name: type(value) for name, value in asdict(owner).items()} == cls.__types()
        except (OSError, ValueError, TypeError):
            return None
        return owner if same else None

    @classmethod
    def __types(cls) -> dict[str, type]:
        return {name: int if kind == "int" else str for name, kind in cls.__annotations__.items()}

    def __str__(self) -> str:
        return f"`{self.doing}` on host {self.host}, process {self.pid}, since {self.since}"


def this_machine() -> str:
    """Return a name that two processes share when each can see whether the other one runs."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def started_at(pid: int) -> int | None:
    """Read when a process started, in clock ticks after the boot; None when it is gone or waits to be buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name, which may hold blanks and brackets.
    state, *others = fields.rpartition(")")[2].split()
    return None if state in "ZX" else int(others[18])
