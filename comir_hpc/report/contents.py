"""What a result folder holds, read once; a piece that is not there is named with the reason."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import ComirError
from comir_hpc.tracking import METRICS_FILE, read_diagnostics, read_metrics

Arrays = Mapping[str, NDArray[Any]]
TRANSFORM_FILES = ("transform.tfm", "transform.h5", "transform.json")


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything that the page is made from.

    Attributes
    ----------
    folder : Path
        Absolute.
    result : dict or None
        result.json of `register`; None for a training run's own report.
    panels, search : mapping of str to array, or None
        panels.npz and search.npz of `register`.
    run : Path or None
        Folder of the training run, where one is found.
    metrics : list of dict
        Lines of its metrics.jsonl.
    config, model : str, dict or None
        Its config.yaml as text and its model.json.
    pictures : tuple of Path
        Its pictures, oldest first.
    diagnoses : tuple of dict
        What `evaluate` measured of its checkpoints, by step.
    missing : dict
        Why a piece (``panels``, ``search``, ``training``) is not there, as a sentence.
    """

    folder: Path
    result: dict[str, Any] | None
    panels: Arrays | None = None
    search: Arrays | None = None
    run: Path | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    config: str | None = None
    model: dict[str, Any] | None = None
    pictures: tuple[Path, ...] = ()
    diagnoses: tuple[dict[str, Any], ...] = ()
    missing: dict[str, str] = field(default_factory=dict)


def read_contents(folder: Path) -> Contents:
    """Read a folder of `register` or `train`.

    Raises
    ------
    ComirError
        If there is nothing to report on, or result.json is damaged.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise ComirError(f"{folder} does not exist; expected a folder that register or train wrote")
    result = _read_result(folder)
    if result is None and not (folder / METRICS_FILE).is_file():
        raise ComirError(
            f"{folder} holds neither result.json nor {METRICS_FILE}; expected a folder that register or train wrote"
        )
    missing: dict[str, str] = {}
    panels = search = None
    if result is not None:
        panels = _read_arrays(folder / "panels.npz", "panels", missing)
        search = _read_arrays(folder / "search.npz", "search", missing)
    run = folder if result is None else _find_run(folder, result, missing)
    if run is None:
        return Contents(folder, result, panels, search, missing=missing)
    return Contents(
        folder,
        result,
        panels,
        search,
        run=run,
        metrics=read_metrics(run),
        config=_read_text(run / "config.yaml"),
        model=_read_json(run / "model.json"),
        pictures=tuple(sorted((run / "pictures").glob("*.png"))),
        diagnoses=tuple(record for _, record in read_diagnostics(run)),
        missing=missing,
    )


def file_sums(folder: Path) -> list[dict[str, Any]]:
    """Name, bytes and SHA-256 of each transform file in a folder."""
    paths = [folder / name for name in TRANSFORM_FILES if (folder / name).is_file()]
    return [
        {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in paths
    ]


def _read_result(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    if not path.is_file():
        return None
    result = _read_json(path)
    if result is None:
        raise ComirError(f"{path} is damaged (not a JSON object); run the registration again")
    if "matrix_lps_mm" not in result:
        inner = sorted(str(p.parent) for p in folder.glob("*/result.json"))
        remedy = f"did you mean {' or '.join(inner)}?" if inner else "expected what register wrote"
        raise ComirError(f"{path} holds no matrix_lps_mm, so it is no result of a registration; {remedy}")
    return result


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) else None


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _read_arrays(path: Path, name: str, missing: dict[str, str]) -> Arrays | None:
    if not path.is_file():
        missing[name] = f"{path.name} is not in this folder."
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        missing[name] = f"{path.name} cannot be read ({error})."
        return None


def _find_run(folder: Path, result: Mapping[str, Any], missing: dict[str, str]) -> Path | None:
    named = result.get("run") or (result.get("model") or {}).get("run")
    if not named:
        missing["training"] = (
            "No encoder was trained for this result: it compares the intensities themselves."
        )
        return None
    # As it was named, then beside the result: folders are moved and copied together.
    for run in (Path(named), folder / named, folder.parent / Path(named).name):
        if (run / METRICS_FILE).is_file():
            return run.absolute()
    missing["training"] = f"The training run {named} is not there any more (no {METRICS_FILE} in it)."
    return None
