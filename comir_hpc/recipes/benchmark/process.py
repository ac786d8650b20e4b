"""Run one method in a process of its own, with a time limit: a crash or a hang is an answer, too."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from comir_hpc.errors import StopRequested
from comir_hpc.recipes.benchmark.methods import Task
from comir_hpc.recipes.benchmark.one import ANSWER, write_job
from comir_hpc.recipes.benchmark.table import FAILED

_LOOK_S = 0.1  # between two looks at the process
_LONGEST = 300  # characters of a message that are kept
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)


def run_apart(
    name: str,
    task: Task,
    *,
    limit_s: float,
    peers: Path | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Run a method, and return its answer or what kept it from one.

    Parameters
    ----------
    name : str
        Name of the method.
    task : Task
        What it is given.
    limit_s : float
        Seconds after which it is stopped, with everything that it started.
    peers : Path, optional
        Folder to import other programs from.
    stop : Event, optional
        Flag that ends the process at once.

    Returns
    -------
    dict
        As from `comir_hpc.recipes.benchmark.one.run`; a crash or a hang has the status "failed" and its message.

    Raises
    ------
    StopRequested
        If the flag was set.
    """
    job = write_job(task.folder, name, task)
    # What an earlier process left, whose end nobody saw, must not count as this one's answer.
    (task.folder / ANSWER).unlink(missing_ok=True)
    errors = task.folder / "errors.txt"
    start = time.perf_counter()
    with errors.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "comir_hpc.recipes.benchmark.one", str(job)],
            env=_environment(task.threads, peers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # so that what it starts can be stopped with it
        )
        try:
            ended = _wait(child, limit_s, stop)
        finally:
            _end(child)
    seconds = time.perf_counter() - start
    if stop is not None and stop.is_set() and not ended:
        raise StopRequested("stopped on request; what is done is in the table, and the same command goes on")
    if not ended:
        return _failed(f"stopped after the time limit of {limit_s:g} s", seconds)
    answer = task.folder / ANSWER
    if child.returncode == 0 and answer.is_file():
        return dict(json.loads(answer.read_text(encoding="utf-8")))
    return _failed(_why(child.returncode, errors), seconds)


def _environment(threads: int, peers: Path | None) -> dict[str, str]:
    """Set the number of threads that the libraries take, and where peers are imported from."""
    found = dict(os.environ) | dict.fromkeys(_THREADS, str(threads))
    if peers is not None:
        # First, since peers may need other versions of what both need.
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(peers.absolute()), found.get("PYTHONPATH"))))
    return found


def _wait(child: subprocess.Popen[bytes], limit_s: float, stop: threading.Event | None) -> bool:
    """Wait until the process has ended by itself; return whether it did."""
    end = time.monotonic() + limit_s
    while child.poll() is None:
        left = end - time.monotonic()
        if left <= 0 or (stop is not None and stop.is_set()):
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(min(_LOOK_S, left))
    return True


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _why(code: int, errors: Path) -> str:
    """Say how a process ended, with the last line that it said."""
    lines = [line.strip() for line in errors.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = next((line for line in reversed(lines) if line), "it said nothing")
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"{how}: {said[:_LONGEST]}"


def _failed(error: str, seconds: float) -> dict[str, Any]:
    return {"status": FAILED, "matrix_lps_mm": None, "error": error, "seconds": seconds}
