"""A registration in MLflow: settings, evidence, verdict, and the page that shows it.

The folder of the result is the record, and this is a copy of it. So a server that is away costs one line and never the
result. The same call sends again what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comir_hpc.runs.result import RESULT_FILE, Result, read_result
from comir_hpc.runs.tracking.record import RUN_ID_FILE, FirstFailure, finite, flatten

_FIGURES = (
    "probability", "bound_mm", "agreement", "reference_agreement", "margin", "overlap", "halves_distance_mm",
    "drift_mm", "deviation", "rotation_deg", "peak_memory_mib",
)  # fmt: skip
_TRUTH = ("tre_mm", "tre_median_mm", "tre_p95_mm", "rotation_error_deg")
_FILES = (RESULT_FILE, "report.html")
_NOT_THE_METHOD = ("out", "overwrite")  # settings that say nothing of the answer
_LONGEST_TAG = 5000  # characters that MLflow keeps of a tag


def log_registration(folder: Path, mlflow: str, experiment: str, *, again: bool = False) -> bool:
    """Send a finished registration to MLflow.

    Parameters
    ----------
    folder : Path
        Folder of the result.
    mlflow : str
        Tracking URI; auto is a database beside the folder.
    experiment : str
        Name of the experiment that the run belongs to.
    again : bool
        Whether this is the result that was there before. Then its run is continued, if it has one. A new result gets a
        run of its own, since parameters and metrics of another one would be mixed with its own.

    Returns
    -------
    bool
        Whether MLflow has it now. If not, one line in the log says why; nothing is raised for MLflow's sake.
    """
    folder = Path(folder).absolute()
    result = read_result(folder)
    try:
        from comir_hpc.runs.tracking.remote import MlflowRun, Target, failures
    except ImportError as error:
        FirstFailure().warn(
            f"the registration is not in MLflow: {error}; install comir-hpc again, its libraries come with it"
        )
        return False
    now = time.time()
    state = {
        "experiment": experiment,
        "params": parameters_of(result),
        "started": now - sum(result.timings_s.values()),
    }
    target = Target.from_run(folder, mlflow, state)
    try:
        if not again:
            (folder / RUN_ID_FILE).unlink(missing_ok=True)
        run = MlflowRun(target)
        run.send_rows([{"step": 0, "time": now, **metrics_of(result)}])
        run.tag(tags_of(result))
        for name in (*_FILES, result.transform_file):
            run.send_file(folder / name, "")
        run.end("finished", now)
    except failures() as error:
        FirstFailure().warn(
            f"MLflow at {target.shown} cannot be reached ({target.brief(error)}); the result in {folder} is complete, "
            "and the same command sends it later"
        )
        return False
    return True


def parameters_of(result: Result) -> dict[str, str]:
    """List the settings of a registration that its answer may depend on, and its volumes, as text."""
    settings = {k: v for k, v in result.settings.items() if k not in _NOT_THE_METHOD and v is not None}
    model: Mapping[str, Any] = result.model or {}
    origin = {"fingerprint": result.fingerprint, "model_run": model.get("run")}
    return flatten(settings | {k: v for k, v in origin.items() if v is not None})


def metrics_of(result: Result) -> dict[str, float]:
    """List the numbers of a registration: those of the verdict, each piece of evidence, seconds, errors if known."""
    found: dict[str, float | None] = {name: getattr(result, name) for name in _FIGURES}
    found |= {f"evidence/{piece.name}": piece.value for piece in result.evidence}
    found |= {f"seconds/{name}": value for name, value in result.timings_s.items()}
    if result.truth is not None:
        found |= {name: getattr(result.truth, name) for name in _TRUTH}
    return {
        name: float(value) for name, value in found.items() if value is not None and finite(value) is not None
    }


def tags_of(result: Result) -> dict[str, str]:
    """List what an experiment's table is filtered by: verdict, reasons, causes."""
    reasons = "; ".join(result.reasons)
    tags = {"verdict": str(result.verdict), "reasons": reasons, "causes": ", ".join(result.causes)}
    tags["mlflow.note.content"] = f"{result.verdict}: {reasons}"  # what a run's page shows as its description
    return {name: text[:_LONGEST_TAG] for name, text in tags.items() if text}
