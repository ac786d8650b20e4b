"""The numbers and pictures of a training run: metrics.jsonl always, and a mirror of it in MLflow.

metrics.jsonl is the record and the spool. system.jsonl is the same for the machine's load (`system`). MLflow gets their
contents from a thread of its own (`mirror`), so that a dead or slow server neither stops nor slows training. What it
missed is sent by `sync`. MLflow knows which points it has (`remote`), so that nothing is sent twice, after a resume or
a second `sync` either. Only rank 0 opens a tracker; the other ranks use `NullTracker`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from comir_hpc.config.train import TrackingSettings
from comir_hpc.errors import CheckpointError, ComirError
from comir_hpc.runs.checkpoints import unwritable
from comir_hpc.runs.model import MODEL_FILE, WEIGHTS_FOLDER
from comir_hpc.runs.tracking.mirror import Mirror
from comir_hpc.runs.tracking.record import (
    DIAGNOSTICS_FOLDER,
    METRICS_FILE,
    RUN_ID_FILE,
    SYSTEM_FILE,
    FirstFailure,
    Status,
    drop_after,
    finite,
    flatten,
    read_diagnostics,
    read_metrics,
    read_state,
    read_system,
    write_state,
)
from comir_hpc.runs.tracking.remote import MlflowRun, Target, failures
from comir_hpc.runs.tracking.system import SystemMonitor

__all__ = [
    "METRICS_FILE",
    "RUN_ID_FILE",
    "NullTracker",
    "Synced",
    "Tracker",
    "flatten",
    "open_tracker",
    "read_diagnostics",
    "read_metrics",
    "read_system",
    "send_diagnostics",
    "sync",
]

_METRIC_NAME = re.compile(r"[\w/.\- ]+")


class Tracker:
    """Writes metrics.jsonl, and hands everything to the mirror where there is one. Made by `open_tracker`."""

    def __init__(
        self,
        run_dir: Path,
        mirror: Mirror | None,
        monitor: SystemMonitor | None = None,
        checkpoint_mib: int = 0,
        failure: FirstFailure | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._failure = failure or FirstFailure()
        self._mirror, self._monitor, self._checkpoint_mib = mirror, monitor, checkpoint_mib
        # Appended to: what a resumed run did before stays. `drop_after` has taken off what will come again.
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics and flush it.

        Parameters
        ----------
        step : int
            Number of optimiser steps that are done, from 1.
        metrics : mapping of str to float
            Names of letters, digits and ``_ / . -``; a value that is not finite is written as null.

        Raises
        ------
        ValueError
            If a name holds another character (MLflow would refuse it).
        CheckpointError
            If the line cannot be written (a full disk).
        """
        for name in metrics:
            if not _METRIC_NAME.fullmatch(name):
                raise ValueError(f"metric {name!r}: expected letters, digits and _ / . - only")
        values = {name: finite(float(value)) for name, value in metrics.items()}
        row = {"step": int(step), "time": round(time.time(), 3), **values}
        try:
            self._file.write(json.dumps(row) + "\n")
            # A job may be killed at any moment; whoever looks at the run meanwhile sees each line at once.
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self.run_dir / METRICS_FILE} cannot be written ({error}); make room and run the same command "
                "again: it resumes from the last checkpoint"
            ) from error
        if self._mirror:
            self._mirror.add_row(row)

    def picture(self, step: int, path: Path) -> None:
        """Send a picture that was written below the run folder; `step` is in its name already."""
        self.artifact(path, folder="pictures")

    def artifact(self, path: Path, folder: str = "") -> None:
        """Send a file or a folder to the run's artifacts, below `folder`."""
        if self._mirror:
            self._mirror.add_file(path, folder)

    def checkpoint(self, path: Path) -> None:
        """Send a checkpoint, unless it is larger than `tracking.checkpoint_mib`."""
        if _mib(path) <= self._checkpoint_mib:
            self.artifact(path, folder="checkpoints")

    def finish(self, status: Status = "finished") -> None:
        """Close the file and end the MLflow run; waits for the mirror for 20 s at most.

        It raises nothing: what ended the training is what the user has to see. What fails here is a warning.
        """
        if self._monitor:
            self._monitor.stop()
        try:
            self._file.close()
            if self._mirror:
                write_state(self.run_dir, {**read_state(self.run_dir), "status": status})
        except OSError as error:
            self._failure.warn(f"the record of {self.run_dir} is not complete ({error})")
        if self._mirror:
            self._mirror.close(status)


class NullTracker:
    """Takes everything and writes nothing: for every rank but the first."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def picture(self, step: int, path: Path) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def checkpoint(self, path: Path) -> None:
        """Do nothing."""

    def finish(self, status: Status = "finished") -> None:
        """Do nothing."""


def open_tracker(
    settings: TrackingSettings, run_dir: Path, params: Mapping[str, Any], *, resume_step: int = 0
) -> Tracker:
    """Start or continue the record of the run in `run_dir`.

    Parameters
    ----------
    params : mapping
        The resolved settings, nested; MLflow gets them flattened (``optimiser.steps``).
    resume_step : int
        Steps that the checkpoint in use had done; later lines of metrics.jsonl are dropped, because the loop
        will write them again. 0 starts the record afresh.

    Raises
    ------
    CheckpointError
        If the folder cannot be written to (a full disk).
    """
    run_dir = Path(run_dir).absolute()
    try:
        return _open_tracker(settings, run_dir, params, resume_step)
    except OSError as error:
        raise unwritable(run_dir, error) from error


def _open_tracker(
    settings: TrackingSettings, run_dir: Path, params: Mapping[str, Any], resume_step: int
) -> Tracker:
    run_dir.mkdir(parents=True, exist_ok=True)
    drop_after(run_dir / METRICS_FILE, resume_step)
    failure = FirstFailure()
    state = {
        "mlflow": settings.mlflow,
        "experiment": settings.experiment,
        "checkpoint_mib": settings.checkpoint_mib,
        "params": flatten(params),
        "status": "running",
        "started": read_state(run_dir).get("started", time.time()),
    }
    mirror = None
    if settings.mlflow is not None:
        # Before anything is sent: a run that dies at once can still be sent by `sync`.
        write_state(run_dir, state)
        mirror = Mirror(Target.from_run(run_dir, settings.mlflow, state), failure)
        mirror.start()
        # MLflow may have missed some before the stop. It knows which points it has, so that all are offered again.
        for row in (*read_metrics(run_dir), *read_system(run_dir)):
            mirror.add_row(row)
    monitor = _watch_system(settings, run_dir, state["started"], mirror, failure)
    return Tracker(run_dir, mirror, monitor, settings.checkpoint_mib, failure)


def _watch_system(
    settings: TrackingSettings, run_dir: Path, started: float, mirror: Mirror | None, failure: FirstFailure
) -> SystemMonitor | None:
    if settings.system_every is None:
        return None
    before = read_system(run_dir)
    if before:  # its first line says when the run began: also without MLflow, a resumed run goes on counting
        started = before[0]["time"] - before[0]["step"]

    def deliver(row: Mapping[str, Any]) -> None:
        if mirror:
            mirror.add_row(row)

    monitor = SystemMonitor(run_dir / SYSTEM_FILE, started, settings.system_every, deliver, failure)
    monitor.start()
    return monitor


Measured = list[tuple[Path, dict[str, Any]]]


@dataclass(frozen=True)
class Synced:
    """What `sync` sent, and where."""

    uri: str
    run_id: str
    points: int
    files: int


def sync(run_dir: Path, uri: str | None = None) -> Synced:
    """Send to MLflow what it does not have of a run, and its files.

    These are settings, model, last checkpoint, pictures, and what `evaluate` measured.

    Parameters
    ----------
    uri : str, optional
        Tracking URI; the run's own setting when not given.

    Raises
    ------
    ComirError
        If the folder holds no record of a run, or MLflow cannot be reached.
    """
    run_dir = Path(run_dir).absolute()
    rows = read_metrics(run_dir)
    if not rows:
        raise ComirError(f"{run_dir / METRICS_FILE} is missing or empty; expected a folder that train wrote")
    state = read_state(run_dir) or _state_without_mlflow(run_dir, rows)
    target = Target.from_run(run_dir, uri or state.get("mlflow") or "auto", state)
    measured = read_diagnostics(run_dir)
    try:
        run = MlflowRun(target)
        points = run.send_rows([*rows, *read_system(run_dir), *_diagnostic_rows(measured)])
        sent = sum(run.send_file(path, folder) for path, folder in _files(run_dir, state, measured))
        run.end(state.get("status", "running"), rows[-1].get("time", time.time()))
    except failures() as error:
        raise ComirError(
            f"MLflow at {target.shown} cannot be reached ({target.brief(error)}); check the address and send again"
        ) from error
    return Synced(target.shown, run.run_id, points, sent)


def _state_without_mlflow(run_dir: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a run that was told to leave MLflow alone would have noted for it."""
    path = run_dir / "config.yaml"
    record = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    settings = record if isinstance(record, dict) else {}
    tracking = settings.get("tracking") or {}
    return {
        **{key: tracking[key] for key in ("experiment", "checkpoint_mib") if key in tracking},
        "params": flatten(settings),
        "status": "finished" if (run_dir / MODEL_FILE).is_file() else "running",
        "started": rows[0].get("time", time.time()),
    }


def send_diagnostics(run_dir: Path) -> str | None:
    """Add what `evaluate` measured to the run in MLflow, if it has one.

    Returns
    -------
    str or None
        Why it could not be sent, and how to send it later. A run that is not tracked is no reason.
    """
    run_dir = Path(run_dir).absolute()
    state = read_state(run_dir)
    if not state.get("mlflow"):
        return None
    if not (run_dir / RUN_ID_FILE).is_file():
        return f"MLflow does not know this run yet; `comir-hpc sync {run_dir}` sends all of it"
    target = Target.from_run(run_dir, state["mlflow"], state)
    measured = read_diagnostics(run_dir)
    try:
        run = MlflowRun(target)
        run.send_rows(_diagnostic_rows(measured))
        for path, folder in _diagnostic_files(measured):
            run.send_file(path, folder)
        rows = read_metrics(run_dir)
        run.end(state.get("status", "running"), rows[-1]["time"] if rows else time.time())
    except failures() as error:
        why = f"MLflow at {target.shown} cannot be reached ({target.brief(error)})"
        return f"{why}; `comir-hpc sync {run_dir}` sends what it missed"
    return None


def _diagnostic_rows(measured: Measured) -> list[dict[str, Any]]:
    return [
        {"step": record["step"], "time": record["time"], **record.get("metrics", {})}
        for _, record in measured
    ]


def _diagnostic_files(measured: Measured) -> list[tuple[Path, str]]:
    return [
        (path, f"{DIAGNOSTICS_FOLDER}/{folder.name}")
        for folder, _ in measured
        for path in sorted(folder.glob("diagnostics.*"))
    ]


def _files(run_dir: Path, state: Mapping[str, Any], measured: Measured) -> list[tuple[Path, str]]:
    """List all files of a run that MLflow keeps: what the training sends, and what was measured since."""
    files = [(run_dir / name, "") for name in ("config.yaml", MODEL_FILE, WEIGHTS_FOLDER)]
    files += [(path, "pictures") for path in sorted((run_dir / "pictures").glob("*.png"))]
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1:]
    # Only the newest: a run goes on from it, and the others are pruned anyway.
    files += [(p, "checkpoints") for p in newest if _mib(p) <= state.get("checkpoint_mib", 0)]
    return files + _diagnostic_files(measured)


def _mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
