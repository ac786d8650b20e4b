"""The numbers and pictures of a training run: metrics.jsonl always, and a mirror of it in MLflow.

metrics.jsonl is the record and the spool; MLflow gets its contents from a thread of its own, so that a dead or
slow server neither stops nor slows training. What it missed is sent by `sync`. MLflow knows which points it
has, so that nothing is sent twice, after a resume or a second `sync` either. Only rank 0 opens a tracker; the
other ranks use `NullTracker`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from comir_hpc.config import TrackingSettings
from comir_hpc.errors import CheckpointError, ComirError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

METRICS_FILE = "metrics.jsonl"
RUN_ID_FILE = "mlflow_run_id"
STATE_FILE = "tracking.json"

Status = Literal["running", "finished", "failed", "stopped"]
_MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

# MLflow's own bounds are 7 retries of 120 s: minutes of silence at the end of every run on a cluster whose
# server is down; the mirror itself tries again later. Whoever sets one of these in the environment is obeyed.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
# MLflow's pages open on language models unless the experiment says that it is something else.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_RETRY_S = 60.0  # between attempts to reach a server that failed
_CLOSING_S = 20.0  # longest wait for the mirror at the end; creating a sqlite database takes 5
_BATCH = 1000  # MLflow's own limit of metrics a request
_PARAMS = 100  # and of parameters
_PARAM_LENGTH = 6000  # and of characters in one
_METRIC_NAME = re.compile(r"[\w/.\- ]+")

_log = logging.getLogger(__name__)


class Tracker:
    """Writes metrics.jsonl, and hands everything to the mirror where there is one. Made by `open_tracker`."""

    def __init__(self, run_dir: Path, mirror: _Mirror | None) -> None:
        self.run_dir = run_dir
        self._mirror = mirror
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics and flush it.

        Parameters
        ----------
        step : int
            Optimiser steps done, from 1.
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
        values = {name: _finite(float(value)) for name, value in metrics.items()}
        row = {"step": int(step), "time": round(time.time(), 3), **values}
        try:
            self._file.write(json.dumps(row) + "\n")
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

    def finish(self, status: Status = "finished") -> None:
        """Close the file and end the MLflow run; waits for the mirror for 20 s at most."""
        self._file.close()
        if self._mirror:
            _write_state(self.run_dir, {**_read_state(self.run_dir), "status": status})
            self._mirror.close(status)


class NullTracker:
    """Takes everything and writes nothing: for every rank but the first."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def picture(self, step: int, path: Path) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
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
    """
    run_dir = Path(run_dir).absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    _drop_after(run_dir / METRICS_FILE, resume_step)
    if settings.mlflow is None:
        return Tracker(run_dir, None)
    state = {
        "mlflow": settings.mlflow,
        "experiment": settings.experiment,
        "params": flatten(params),
        "status": "running",
        "started": _read_state(run_dir).get("started", time.time()),
    }
    _write_state(run_dir, state)
    mirror = _Mirror(_Target.of(run_dir, settings.mlflow, state))
    mirror.start()
    for row in read_metrics(run_dir):
        mirror.add_row(row)
    return Tracker(run_dir, mirror)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl in order; a line torn by a crash ends the list. Empty where there is no file.

    Each holds ``step``, ``time`` (seconds since 1970) and the metrics (float, or None where not finite).
    """
    return list(_rows(Path(run_dir) / METRICS_FILE))


@dataclass(frozen=True)
class Synced:
    """What `sync` sent, and where."""

    uri: str
    run_id: str
    points: int
    files: int


def sync(run_dir: Path, uri: str | None = None) -> Synced:
    """Send to MLflow what it does not have of a run: parameters, metrics, settings, model.json, pictures.

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
    state = _read_state(run_dir)
    target = _Target.of(run_dir, uri or state.get("mlflow") or "auto", state)
    try:
        run = _MlflowRun(target)
        points = run.send_rows(rows)
        files = [(run_dir / name, "") for name in ("config.yaml", "model.json")]
        files += [(path, "pictures") for path in sorted((run_dir / "pictures").glob("*.png"))]
        sent = sum(run.send_file(path, folder) for path, folder in files)
        run.end(state.get("status", "running"), rows[-1].get("time", time.time()))
    except _failures() as error:
        raise ComirError(
            f"MLflow at {target.shown} cannot be reached ({target.brief(error)}); check the address and send again"
        ) from error
    return Synced(target.shown, run.run_id, points, sent)


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"a.b": "text"}``; items of a sequence of mappings are numbered from 0."""
    flat: dict[str, str] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            flat |= flatten(dict(enumerate(value)), f"{name}.")  # type: ignore[arg-type]
        else:
            flat[name] = str(value)
    return flat


# ---------------------------------------------------------------------- the file


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return
        if not isinstance(row, dict) or "step" not in row:
            return
        yield row


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`, atomically; none when `step` is 0."""
    if not path.exists():
        return
    kept = [row for row in _rows(path) if row["step"] <= step] if step else []
    spare = path.with_suffix(".tmp")
    spare.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    spare.replace(path)


def _read_state(run_dir: Path) -> dict[str, Any]:
    path = run_dir / STATE_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write_state(run_dir: Path, state: Mapping[str, Any]) -> None:
    spare = run_dir / f"{STATE_FILE}.tmp"
    spare.write_text(json.dumps(state, indent=1), encoding="utf-8")
    spare.replace(run_dir / STATE_FILE)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------- MLflow


@dataclass(frozen=True)
class _Target:
    """Where in MLflow a run goes."""

    run_dir: Path
    uri: str
    experiment: str
    params: Mapping[str, str]
    started: float

    @classmethod
    def of(cls, run_dir: Path, mlflow: str, state: Mapping[str, Any]) -> _Target:
        uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}" if mlflow == "auto" else mlflow
        experiment, params = state.get("experiment", "comir-hpc"), state.get("params", {})
        return cls(run_dir, uri, experiment, params, state.get("started", time.time()))

    @property
    def shown(self) -> str:
        """The URI without a password."""
        return self.brief(self.uri)

    def brief(self, error: Exception | str) -> str:
        """First line of a message, short and without the URI's password."""
        line = (str(error).splitlines() or [type(error).__name__])[0]
        password = urlsplit(self.uri).password
        return (line.replace(f":{password}@", ":***@") if password else line)[:160]

    @property
    def artifacts(self) -> str | None:
        """Where artifacts lie; a server decides for itself, a database would put them in the working folder."""
        if urlsplit(self.uri).scheme in ("http", "https"):
            return None
        return (self.run_dir.parent / "mlflow-artifacts").as_uri()


class _MlflowRun:
    """One run in MLflow, found or made; sends only what it does not hold yet."""

    def __init__(self, target: _Target) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        self._client: MlflowClient = MlflowClient(target.uri)
        run = self._find(target) or self._make(target)
        self.run_id: str = run.info.run_id
        self._steps = {
            name: {point.step for point in self._client.get_metric_history(self.run_id, name)}
            for name in run.data.metrics
        }
        self._send_params(target.params, run.data.params)
        self._client.update_run(self.run_id, status="RUNNING")

    def _find(self, target: _Target) -> Run | None:
        from mlflow.exceptions import MlflowException

        path = target.run_dir / RUN_ID_FILE
        if not path.is_file():
            return None
        try:
            run = self._client.get_run(path.read_text(encoding="utf-8").strip())
        except MlflowException as error:
            # An id of another server, or of a database that was deleted: this target gets a run of its own.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _make(self, target: _Target) -> Run:
        experiment = self._client.get_experiment_by_name(target.experiment)
        number = experiment.experiment_id if experiment else self._make_experiment(target)
        run = self._client.create_run(
            number, start_time=int(target.started * 1000), run_name=target.run_dir.name
        )
        self._client.set_tag(run.info.run_id, "run_folder", str(target.run_dir))
        (target.run_dir / RUN_ID_FILE).write_text(run.info.run_id + "\n", encoding="utf-8")
        return run

    def _make_experiment(self, target: _Target) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.create_experiment(
                target.experiment, artifact_location=target.artifacts, tags=_EXPERIMENT_TAGS
            )
        except MlflowException:
            experiment = self._client.get_experiment_by_name(target.experiment)
            if experiment is None:
                raise
            return experiment.experiment_id  # another run made it a moment ago

    def _send_params(self, params: Mapping[str, str], known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(k, v[:_PARAM_LENGTH]) for k, v in params.items() if k not in known]
        for start in range(0, len(new), _PARAMS):
            self._client.log_batch(self.run_id, params=new[start : start + _PARAMS])
        # MLflow's parameters cannot change; what a resume changed is kept as a tag.
        for name, value in params.items():
            if known.get(name, value[:_PARAM_LENGTH]) != value[:_PARAM_LENGTH]:
                self._client.set_tag(self.run_id, f"changed/{name}", value[:_PARAM_LENGTH])

    def send_rows(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Send the points that are not there yet; how many they were."""
        from mlflow.entities import Metric

        points = [
            Metric(name, float(value), int(row["time"] * 1000), row["step"])
            for row in rows
            for name, value in row.items()
            if name not in ("step", "time") and value is not None
            if row["step"] not in self._steps.get(name, ())
        ]
        for start in range(0, len(points), _BATCH):
            batch = points[start : start + _BATCH]
            self._client.log_batch(self.run_id, metrics=batch)
            for point in batch:
                self._steps.setdefault(point.key, set()).add(point.step)
        return len(points)

    def send_file(self, path: Path, folder: str) -> bool:
        """Send a file or folder that exists; whether it did."""
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), "/".join(filter(None, (folder, path.name))))
        elif path.is_file():
            self._client.log_artifact(self.run_id, str(path), folder or None)
        return path.exists()

    def end(self, status: str, when: float) -> None:
        """Set the run's status and its end (seconds since 1970), unless it is still running."""
        if status != "running":
            self._client.set_terminated(self.run_id, _MLFLOW_STATUS[status], int(when * 1000))


class _Mirror(threading.Thread):
    """Carries rows and files to MLflow; nobody ever waits for it, but `close` for a bounded time."""

    def __init__(self, target: _Target) -> None:
        super().__init__(name="mlflow-mirror", daemon=True)
        self._target = target
        self._run: _MlflowRun | None = None
        self._rows: deque[Mapping[str, Any]] = deque()
        self._files: deque[tuple[Path, str]] = deque()
        self._status: Status = "running"
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._warned = False

    def add_row(self, row: Mapping[str, Any]) -> None:
        self._rows.append(row)
        self._wake.set()

    def add_file(self, path: Path, folder: str) -> None:
        self._files.append((path, folder))
        self._wake.set()

    def close(self, status: Status) -> None:
        self._status = status
        self._closing.set()
        self._wake.set()
        self.join(_CLOSING_S)
        if self.is_alive():
            self._warn("it has not answered in time")

    def run(self) -> None:
        """Deliver whenever there is something; after a failure wait, then try again."""
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._deliver(closing)
            except _failures() as error:
                self._warn(self._target.brief(error))
                if not closing:
                    self._closing.wait(_RETRY_S)
                    self._wake.set()
            if closing:
                return

    def _deliver(self, closing: bool) -> None:
        if self._run is None:
            self._run = _MlflowRun(self._target)
        rows: Sequence[Mapping[str, Any]] = list(self._rows)
        self._run.send_rows(rows)
        for _ in rows:
            self._rows.popleft()
        while self._files:
            self._run.send_file(*self._files[0])
            self._files.popleft()
        if closing:
            self._run.end(self._status, time.time())

    def _warn(self, reason: str) -> None:
        if not self._warned:
            _log.warning(
                "MLflow at %s cannot be reached (%s); training goes on, `comir-hpc sync %s` sends what it missed",
                self._target.shown,
                reason,
                self._target.run_dir,
            )
        self._warned = True


def _failures() -> tuple[type[Exception], ...]:
    """What MLflow, its database and the network under it raise."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError
