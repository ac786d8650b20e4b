"""Measure how much memory this process may take, so that a stage can refuse before it is killed; keep freed memory."""

from __future__ import annotations

import ctypes
import math
import resource
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number close to 2^63

WORKER_HEAP = 120 << 20
"""Heap of a worker's interpreter before its first block: measured 91 to 112 MiB without torch."""

# Share of the mapped files (libraries) that is predicted on top: how many of their pages come along with one that is
# touched, and how heaps are cut, differs with the kernel, with what is cached, and with the C library. The same calls
# needed up to 3 % more on one machine than on another.
_ELSEWHERE = 0.12

# Names of malloc.h, for mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def available_bytes() -> int:
    """Return how many bytes can be allocated without swapping.

    It is the smallest of three limits: the machine's, the cgroup's and the process's. A batch job reaches the limit of
    its cgroup long before the machine is full, and MemAvailable does not show that limit.
    """
    limits = [_machine_bytes(), _cgroup_bytes(), _process_bytes()]
    return max(0, min(limit for limit in limits if limit is not None))


def peak_bytes() -> int:
    """Return the most memory that this process has held, in bytes."""
    # Not `getrusage`, which gives too much for a process that was started by a larger one: the larger one's peak.
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds now."""
    return _status_bytes("VmRSS") or peak_bytes()


def expected_peak(more: float) -> int:
    """Return the most bytes that this process will have held once it took so many more than now.

    What it held before counts: a peak does not go down, and what the caller of a verb keeps in memory stays there.
    """
    return max(peak_bytes(), resident_bytes() + math.ceil(more + _ELSEWHERE * _mapped_bytes()))


def expected_in_worker(more: float, heap: int = WORKER_HEAP) -> int:
    """Return the most bytes of a process that we start, once it took so many more than it begins with.

    It maps the libraries that this process has mapped, and has a heap of its own. What else is in our memory it does
    not get.

    Parameters
    ----------
    more : float
        Bytes that the process takes beyond what it begins with.
    heap : int
        Bytes that its interpreter holds beside the files it maps, before its first block.
    """
    return heap + math.ceil(more + (1 + _ELSEWHERE) * _mapped_bytes())


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next allocation, for the rest of the process's life.

    glibc gives every large block back to the kernel, which has to clear its pages for the next block. This takes a
    tenth to a quarter of a training step on CPUs (benchmarks/training/allocator.csv). All threads share one heap, so
    that each can use what another one has freed. With another C library nothing happens.
    """
    share_one_heap()
    _mallopt(_M_MMAP_MAX, 0)
    _mallopt(_M_TRIM_THRESHOLD, -1)


def share_one_heap() -> None:
    """Let all threads that start from now on use one heap, so that each can use what another one has freed.

    glibc gives threads heaps of their own, and which thread gets which heap depends on the order in which they run.
    The same registration then needed 720 to 835 MiB. With one heap it needs 600, each time. A thread that runs
    already keeps its heap, so call this before threads start. With another C library nothing happens.
    """
    _mallopt(_M_ARENA_MAX, 1)


def in_words(num_bytes: float) -> str:
    """Write a number of bytes for a person, e.g. ``3.2 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"


def _mallopt(name: int, value: int) -> None:
    """Set one of the C library's options for its heaps, where it has such options."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(name, value)


def _mapped_bytes() -> int:
    """Return the bytes of files, such as libraries, that are mapped and in memory; all of it where that is not told."""
    return _status_bytes("RssFile") or resident_bytes()


def _status_bytes(name: str) -> int | None:
    """Return a size that the kernel tells of this process; None where it does not."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _machine_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _UNLIMITED


def _cgroup_bytes() -> int | None:
    """Return how many bytes the process's cgroup, or one above it, leaves; cgroups of version 2 and of version 1."""
    lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    left: list[int] = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / place.lstrip("/")
        # A container sees its own cgroup as the root: the named folder may not exist inside it.
        for level in (folder, *folder.parents):
            if not level.is_relative_to(root):
                break
            limit, used = (_number(level / name) for name in names)
            if limit is not None and used is not None and limit < _UNLIMITED:
                # Page cache counts as used there, but the kernel gives it back before it kills anybody.
                left.append(limit - used + _reclaimable(level))
    return min(left, default=None)


def _reclaimable(folder: Path) -> int:
    """Return the bytes of page cache that the kernel gives back before it kills a process."""
    try:
        text = (folder / "memory.stat").read_text(encoding="ascii")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _process_bytes() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    # The limit is on addresses, not on memory in use: the first number of statm, in pages.
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return soft - pages * resource.getpagesize()
