"""A run in MLflow: found or made, and sent only what it does not hold yet."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from comir_hpc.host.files import write_text
from comir_hpc.runs.tracking.record import DIAGNOSTICS_FOLDER, RUN_ID_FILE

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

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
_BATCH = 1000  # MLflow's own limit of metrics a request
_PARAMS = 100  # and of parameters
_PARAM_LENGTH = 6000  # and of characters in one


@dataclass(frozen=True)
class Target:
    """Where in MLflow a run goes."""

    run_dir: Path
    uri: str
    experiment: str
    params: Mapping[str, str]
    started: float

    @classmethod
    def from_run(cls, run_dir: Path, mlflow: str, state: Mapping[str, Any]) -> Target:
        """Make the target of a run from its setting `tracking.mlflow`: auto is a database beside the run's folder."""
        uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}" if mlflow == "auto" else mlflow
        experiment, params = state.get("experiment", "comir-hpc"), state.get("params", {})
        return cls(run_dir, uri, experiment, params, state.get("started", time.time()))

    @property
    def shown(self) -> str:
        """The URI without its password, for messages."""
        return self.brief(self.uri)

    def brief(self, error: Exception | str) -> str:
        """Return the first line of a message, short and without the URI's password."""
        line = (str(error).splitlines() or [type(error).__name__])[0]
        password = urlsplit(self.uri).password
        return (line.replace(f":{password}@", ":***@") if password else line)[:160]

    @property
    def artifacts(self) -> str | None:
        """Place for artifacts; None for a server, which decides itself. A database would use the working folder."""
        if urlsplit(self.uri).scheme in ("http", "https"):
            return None
        return (self.run_dir.parent / "mlflow-artifacts").as_uri()


def _make_database(uri: str) -> None:
    """Make a sqlite database whole or not at all: a job that is preempted in its first seconds leaves no half of one.

    MLflow can neither use nor mend a database whose making was interrupted.
    """
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    spare = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        MlflowClient(f"sqlite:///{spare}").search_experiments(max_results=1)
        os.link(spare, path)
    except FileExistsError:
        pass  # another run was first
    finally:
        spare.unlink(missing_ok=True)


class MlflowRun:
    """One run in MLflow, found or made; sends only what it does not hold yet."""

    def __init__(self, target: Target) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # It logs every failure of its database with a traceback, and raises it too: the latter is enough.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        from mlflow import MlflowClient

        _make_database(target.uri)
        self._client: MlflowClient = MlflowClient(target.uri)
        run = self._find(target) or self._make(target)
        self.run_id: str = run.info.run_id
        self._points = {
            name: {
                _place(name, p.step, p.timestamp) for p in self._client.get_metric_history(self.run_id, name)
            }
            for name in run.data.metrics
        }
        self._send_params(target.params, run.data.params)
        self._client.update_run(self.run_id, status="RUNNING")

    def _find(self, target: Target) -> Run | None:
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

    def _make(self, target: Target) -> Run:
        experiment = self._client.get_experiment_by_name(target.experiment)
        number = experiment.experiment_id if experiment else self._make_experiment(target)
        run = self._client.create_run(
            number, start_time=int(target.started * 1000), run_name=target.run_dir.name
        )
        self._client.set_tag(run.info.run_id, "run_folder", str(target.run_dir))
        write_text(target.run_dir / RUN_ID_FILE, run.info.run_id + "\n")
        return run

    def _make_experiment(self, target: Target) -> str:
        from mlflow.exceptions import MlflowException

        try:
            made: str = self._client.create_experiment(
                target.experiment, artifact_location=target.artifacts, tags=_EXPERIMENT_TAGS
            )
            return made
        except MlflowException:
            experiment = self._client.get_experiment_by_name(target.experiment)
            if experiment is None:
                raise
            return str(experiment.experiment_id)  # another run made it a moment ago

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
            if _place(name, row["step"], int(row["time"] * 1000)) not in self._points.get(name, ())
        ]
        for start in range(0, len(points), _BATCH):
            batch = points[start : start + _BATCH]
            self._client.log_batch(self.run_id, metrics=batch)
            for point in batch:
                place = _place(point.key, point.step, point.timestamp)
                self._points.setdefault(point.key, set()).add(place)
        return len(points)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags, by which the runs of an experiment are filtered."""
        for name, text in tags.items():
            self._client.set_tag(self.run_id, name, text)

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


def _place(name: str, step: int, timestamp_ms: int) -> tuple[int, int]:
    """Return what tells two points of a metric apart.

    This is the step, and the time too where a step can be measured again.
    """
    return (step, timestamp_ms if name.startswith(f"{DIAGNOSTICS_FOLDER}/") else 0)


def failures() -> tuple[type[Exception], ...]:
    """Return the errors that MLflow, its database and the network under it raise."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError
