"""Fill the table of a benchmark: cases side by side, over several jobs, and again after a stop."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comir_hpc import __version__
from comir_hpc.config.benchmark import BenchmarkRunSettings, BenchmarkSettings
from comir_hpc.data.families import Pair
from comir_hpc.errors import StopRequested
from comir_hpc.host.progress import Progress
from comir_hpc.host.signals import stop_signals
from comir_hpc.recipes.benchmark.cases import Place, Tell, open_pairs, places, rows_of
from comir_hpc.recipes.benchmark.methods import method
from comir_hpc.recipes.benchmark.table import DONE, FAILED, SKIPPED, Table, key_of

_LOOK_S = 0.5  # between two looks at the flag to stop


@dataclass(frozen=True)
class BenchmarkResult:
    """What a call of the benchmark did.

    `added`, `failed` and `skipped` count the rows of this call only.

    Attributes
    ----------
    table : Path
        The table.
    added : int
        Number of rows that this call added.
    failed, skipped : int
        Numbers of them without an answer, and of methods that are not installed.
    left : int
        Number of rows that other parts have to add.
    """

    table: Path
    added: int
    failed: int
    skipped: int
    left: int

    @property
    def summary(self) -> str:
        """Summary for the user in one line."""
        said = [f"{self.table}: {self.added} rows added"]
        said += [f"{self.failed} of them failed"] if self.failed else []
        said += [f"{self.skipped} skipped, since the method is not installed"] if self.skipped else []
        said += [f"{self.left} left to other parts"] if self.left else []
        return "; ".join(said)


def benchmark(
    settings: BenchmarkSettings,
    run: BenchmarkRunSettings,
    *,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> BenchmarkResult:
    """Fill the rows that the table lacks.

    Parameters
    ----------
    settings : BenchmarkSettings
        Pairs, displacements, degradations and methods.
    run : BenchmarkRunSettings
        Where the table goes, and which part of it is done here.
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.
    tell : callable, optional
        Function that is called with every row that is added.

    Raises
    ------
    ConfigError
        If files of a pair are missing, an answer does not fit its pair, or the table cannot be written.
    StopRequested
        If the scheduler asked for a stop; the same command goes on.
    """
    table = Table(run.out, shared=run.workers > 1 or run.part[1] > 1)
    pairs = open_pairs(settings)
    todo = list(_todo(settings, run, table))
    if todo:
        table.require_writable()
    work = run.work or run.out.with_name(f"{run.out.stem}-work")
    counts = dict.fromkeys((DONE, FAILED, SKIPPED), 0)
    total = sum(len(methods) for _, methods in todo)
    keep = threading.Lock()

    def added(row: dict[str, Any]) -> None:
        # Cases end in threads side by side, and the counts belong to all of them.
        with keep:
            table.add(row, head=_head())
            counts[row["status"]] += 1
            if tell is not None:
                tell(row)
            if progress is not None:
                progress("cases", sum(counts.values()), total)

    with stop_signals() as stop:
        _work_through(todo, pairs, settings, work, run.workers, stop, added)
    with suppress(OSError):
        work.rmdir()  # kept as long as another part works in it
    rows = sum(counts.values())
    left = len(places(settings)) * len(settings.methods) - len(_wanted(settings, table))
    return BenchmarkResult(run.out, rows, counts[FAILED], counts[SKIPPED], left)


def _work_through(
    todo: list[tuple[Place, list[str]]],
    pairs: dict[str, Pair],
    settings: BenchmarkSettings,
    work: Path,
    workers: int,
    stop: threading.Event,
    added: Tell,
) -> None:
    """Work on some cases side by side, until all are done or the flag is set."""

    def one(place: Place, methods: list[str]) -> None:
        for row in rows_of(place, pairs[place.pair], methods, settings, work, stop):
            added(row)

    with ThreadPoolExecutor(workers) as pool:
        waiting: set[Future[None]] = {pool.submit(one, *each) for each in todo}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
                for each in done:
                    each.result()
                if stop.is_set():
                    raise StopRequested(
                        "stopped on request; what is done is in the table, and the same command goes on"
                    )
        finally:
            # Whatever ends this, no process of a method lives on.
            if waiting:
                stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def plan_benchmark(settings: BenchmarkSettings, run: BenchmarkRunSettings) -> dict[str, Any]:
    """Say what `benchmark` would do, and how long it would take.

    Raises
    ------
    ConfigError
        If files of a pair are missing, or the table is none.
    """
    table = Table(run.out)
    open_pairs(settings)
    todo = list(_todo(settings, run, table))
    seconds = _typical_seconds(table)
    names = [name for _, methods in todo for name in methods]
    predicted = sum(seconds.get(name, method(name).typical_s) for name in names) / run.workers
    measured = [name for name in settings.methods if name in seconds]
    basis = f"of {', '.join(measured)} as measured in the table, of others" if measured else "of all methods"
    return {
        "pairs": ", ".join(pair if isinstance(pair, str) else pair.name for pair in settings.pairs),
        "levels": ", ".join(settings.levels),
        "degradations": ", ".join(settings.degradations),
        "methods": ", ".join(settings.methods),
        "cases": f"{len(places(settings))} of {len(settings.methods)} methods each",
        "rows": f"{len(names)} to add, {len(_wanted(settings, table))} done",
        "time": f"{_duration(predicted)} with {run.workers} at a time; {basis} as on 2 mm brains on one core",
        "table": str(run.out),
    }


def _todo(
    settings: BenchmarkSettings, run: BenchmarkRunSettings, table: Table
) -> Iterator[tuple[Place, list[str]]]:
    """Yield the cases of this part, with the methods that the table lacks."""
    done = table.done()
    number, parts = run.part
    for place in places(settings)[number - 1 :: parts]:
        methods = [name for name in settings.methods if (*place.key, name) not in done]
        if methods:
            yield place, methods


def _wanted(settings: BenchmarkSettings, table: Table) -> list[tuple[Any, ...]]:
    """Return the rows that the settings ask for and the table has, skipped ones too."""
    asked = {(*place.key, name) for place in places(settings) for name in settings.methods}
    return [key for row in table.rows() if (key := key_of(row)) in asked]


def _typical_seconds(table: Table) -> dict[str, float]:
    """Return the median seconds of each method in a table."""
    found: dict[str, list[float]] = {}
    for row in table.rows():
        if row.get("status", DONE) == DONE and row.get("seconds"):
            found.setdefault(row["method"], []).append(float(row["seconds"]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _head() -> str:
    """Describe the command and the machine, for the head of the table."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    words = ["comir-hpc", *words[1:]] if words[0] == "__main__.py" else words
    return f"{shlex.join(words)} (comir-hpc {__version__}, {platform.machine()}, {os.cpu_count()} cores)"
