"""Memory that may be taken: never more than there is, and less under a limit."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from comir_hpc.host import memory
from comir_hpc.host.memory import available_bytes, in_words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_words(num_bytes: int, words: str) -> None:
    assert in_words(num_bytes) == words


def test_available_is_positive_and_less_than_the_machine_has() -> None:
    total = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1]) * 1024
    assert 0 < available_bytes() < total


def test_a_limit_of_the_process_counts() -> None:
    code = (
        "import resource; from comir_hpc.host.memory import available_bytes\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); print(available_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert 0 < int(done.stdout) < 1 << 30


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_cgroup_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """A job's own cgroup has no limit, the one above it has; page cache counts as free."""
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    root = tmp_path / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    for folder, limit in (("job", 5000), ("job/step", "max" if version == 2 else (1 << 63) - 4096)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / names[0]).write_text(f"{limit}\n", encoding="utf-8")
        (root / folder / names[1]).write_text("3000\n", encoding="utf-8")
    (root / "job" / "memory.stat").write_text("anon 1\ninactive_file 700\n", encoding="utf-8")
    (tmp_path / "proc/self").mkdir(parents=True)
    line = "0::/job/step" if version == 2 else "4:cpu:/x\n9:memory:/job/step"
    (tmp_path / "proc/self/cgroup").write_text(line + "\n", encoding="utf-8")
    monkeypatch.setattr(memory, "Path", lambda place: tmp_path / str(place).lstrip("/"))
    assert memory._cgroup_bytes() == 5000 - 3000 + 700


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="acts on glibc only")
@pytest.mark.parametrize(("keep", "fewer"), [(True, True), (False, False)])
def test_kept_memory_is_not_cleared_again(keep: bool, fewer: bool) -> None:
    """64 MiB, above every threshold of glibc, taken and given back twice: the second time without page faults."""
    code = f"""
        import ctypes, resource
        from comir_hpc.host.memory import keep_freed_memory
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        if {keep}:
            keep_freed_memory()
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = libc.malloc(64 << 20)
            ctypes.memset(block, 1, 64 << 20)
            libc.free(block)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        first, second = faults(), faults()
        print(second < first / 10)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(fewer)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="acts on glibc only")
@pytest.mark.parametrize("one", [True, False])
def test_a_thread_uses_what_another_one_has_freed(one: bool) -> None:
    """32 MiB in blocks of 64 KiB, taken and freed by the first thread, then taken by a second one."""
    code = f"""
        import ctypes, threading
        from comir_hpc.host.memory import resident_bytes, share_one_heap
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        if {one}:
            share_one_heap()
        def take():
            blocks = [libc.malloc(64 << 10) for _ in range(512)]
            for block in blocks:
                ctypes.memset(block, 1, 64 << 10)
            return blocks
        blocks = take()
        last = libc.malloc(64 << 10)  # what lies below it is not given back to the kernel
        for block in blocks:
            libc.free(block)
        before = resident_bytes()
        second = threading.Thread(target=take)
        second.start()
        second.join()
        print(resident_bytes() - before < 16 << 20)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(one)
