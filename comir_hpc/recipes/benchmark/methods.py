"""The methods that a benchmark compares: ours, identity, and other programs as they ship."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from comir_hpc.config.benchmark import ADAPT, DEFAULT, IDENTITY, OF_MODEL, own_methods
from comir_hpc.config.words import PEERS
from comir_hpc.space.grid import FloatArray


@dataclass(frozen=True)
class Task:
    """What every method is given.

    It goes to the process of the method as JSON, so it holds nothing but paths, numbers and words.

    Attributes
    ----------
    fixed, moving : Path
        The two files. They have no masks, and lie in the world as their headers say.
    folder : Path
        Folder to work in; it is emptied afterwards.
    threads : int
        Number of threads.
    seed : int
        Seed for a method that draws.
    model : Path or None
        Run folder of encoders; the general model where it is None.
    modalities : (str, str)
        Names of the two modalities in that run.
    """

    fixed: Path
    moving: Path
    folder: Path
    threads: int = 1
    seed: int = 0
    model: Path | None = None
    modalities: tuple[str, str] = ("any", "any")


@dataclass(frozen=True)
class Found:
    """What a method found.

    Attributes
    ----------
    matrix_mm : (4, 4) array or None
        From fixed to moving points, LPS (x, y, z) in mm; None if it found nothing.
    verdict : str
        PASS, WARN or FAIL; empty for methods that give none.
    numbers : dict
        What else goes into the table, by column.
    error : str
        Why nothing was found; empty otherwise.
    """

    matrix_mm: FloatArray | None
    verdict: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Method:
    """One way to register two files.

    Nothing of it is imported before its process runs: a peer that is not installed, or that crashes while it loads,
    costs its own rows only.

    Attributes
    ----------
    name : str
        Name in tables.
    call : callable
        Takes a `Task` and returns what it `Found`.
    settings : str
        The settings that it runs with, in words, for the table.
    needs : str
        Module that has to be installed; empty for ours.
    install : str
        Command that installs it.
    typical_s : float
        Seconds for a pair of 2 mm brains on one core, for predictions.
    loads : tuple of str
        Modules that are imported before the clock starts.
    """

    name: str
    call: Callable[[Task], Found]
    settings: str
    needs: str = ""
    install: str = ""
    typical_s: float = 60.0
    loads: tuple[str, ...] = ()


# Seconds for one case, from which a plan predicts what the table cannot tell yet.
_TYPICAL_S = {"comir": 100.0, "mind": 300.0, "gradient": 90.0, "intensity": 200.0}
_TYPICAL_WITHOUT_SEARCH_S = 40.0
_LOADS = ("comir_hpc.ingest", "comir_hpc.register", "comir_hpc.representations.learned")


def method(name: str) -> Method:
    """Return a method by its name; settings have refused any other name."""
    if name == IDENTITY:
        return Method(name, _identity, "the pair as it lies", typical_s=1.0)
    if name in PEERS:
        from comir_hpc.recipes.benchmark.peers import PEER_METHODS

        return PEER_METHODS[name]
    if name == DEFAULT:
        return Method(
            name,
            lambda task: _ours(task, "comir", "global", fallback="auto"),
            "comir-hpc register, its default settings",
            typical_s=150.0,
            loads=_LOADS,
        )
    if name == ADAPT:
        return Method(name, _adapt, "comir-hpc adapt, its default settings", typical_s=3600.0, loads=_LOADS)
    representation, initial = own_methods()[name.partition(OF_MODEL)[0]]
    typical = _TYPICAL_S.get(representation, 200.0) if initial == "global" else _TYPICAL_WITHOUT_SEARCH_S
    return Method(
        name,
        lambda task: _ours(task, representation, initial),
        f"comir-hpc register --representation {representation} --initial {initial}",
        typical_s=typical,
        loads=_LOADS,
    )


def given(task: Method, threads: int, model: Path | None) -> str:
    """Say in words what a method is given, for the table."""
    said = f"two files, no masks, positions of their headers, threads {threads}; {task.settings}"
    return said if model is None or not task.name.startswith("comir") else f"{said}; model {model.name}"


def _identity(task: Task) -> Found:
    del task
    return Found(np.eye(4))


def _ours(task: Task, representation: str, initial: str, fallback: str = "none") -> Found:
    """Make stores of the two files and register them, as the command line does.

    A row of a representation is of that representation alone: there is no fallback then.
    """
    from comir_hpc.config.base import validate
    from comir_hpc.config.register import RegisterSettings
    from comir_hpc.register import register

    stores = _stores(task)
    record: dict[str, Any] = {
        **stores,
        "out": task.folder / "result",
        "representation": representation,
        "initial": initial,
        "threads": task.threads,
        "overwrite": True,
        "fallback": fallback,
    }
    if representation == "comir" and task.model is not None:
        record |= {"model": task.model}
        record |= {f"{role}_modality": name for role, name in zip(stores, task.modalities, strict=True)}
    result = register(validate(RegisterSettings, record, source="benchmark"))
    numbers = {
        "agreement": result.agreement,
        "margin": result.margin,
        "overlap": result.record.get("overlap"),
        "consensus": result.record.get("consensus"),
        "compared": result.record.get("representation"),
        "search_seconds": result.record["timings_s"].get("search"),
    }
    matrix = None if result.transform is None else result.transform.matrix_mm
    return Found(matrix, result.verdict, numbers, "" if matrix is not None else "; ".join(result.reasons))


def _adapt(task: Task) -> Found:
    """Make encoders for the pair, without its answer, and register it with them."""
    from comir_hpc.config.adapt import AdaptSettings
    from comir_hpc.recipes.adapt import adapt
    from comir_hpc.runs.result import read_result

    done = adapt(
        AdaptSettings(**_stores(task), run=task.folder / "run", threads=task.threads, seed=task.seed)
    )
    matrix = None if done.registration is None else read_result(done.registration).matrix_lps_mm
    error = "" if matrix is not None else "; ".join(done.reasons)
    return Found(None if matrix is None else np.asarray(matrix), done.verdict, {}, error)


def _stores(task: Task) -> dict[str, Path]:
    """Make stores of the two files."""
    from comir_hpc.config.ingest import IngestSettings
    from comir_hpc.ingest import ingest

    stores = {role: task.folder / f"{role}.zarr" for role in ("fixed", "moving")}
    for role, source in (("fixed", task.fixed), ("moving", task.moving)):
        ingest(IngestSettings(source=source, out=stores[role], overwrite=True))
    return stores
