"""Measure the processor seconds of each test file, with those of the programs that it starts: a plugin of pytest.

    SUITE=seconds.csv PYTHONPATH=benchmarks/house .venv/bin/python -m pytest -p suite -n auto --dist loadfile

Processor seconds, because they hardly depend on what else the machine does. Daemons (SLURM, Apptainer's) and their jobs
are not counted. The column `after` of suite.csv has these numbers; the tests start with the files that need most.
"""

from __future__ import annotations

import csv
import os
import resource
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_seconds: Counter[str] = Counter()


def _used() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Add up what a test takes, with its fixtures."""
    before = _used()
    try:
        return (yield)
    finally:
        _seconds[item.path.name] += _used() - before


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a process of pytest-xdist has measured."""
    _seconds.update(getattr(node, "workeroutput", {}).get("seconds", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the seconds over, or write them if this is the process that the others hand them to."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["seconds"] = dict(_seconds)
        return
    with Path(os.environ["SUITE"]).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("part", "after"), *((n, f"{s:.1f}") for n, s in _seconds.most_common())])
