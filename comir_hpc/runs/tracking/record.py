"""What a run leaves on disk of its progress: the record, and the spool of what MLflow gets."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from comir_hpc.host.files import write_text

METRICS_FILE = "metrics.jsonl"
SYSTEM_FILE = "system.jsonl"
RUN_ID_FILE = "mlflow_run_id"
STATE_FILE = "tracking.json"
Status = Literal["running", "finished", "failed", "stopped"]
DIAGNOSTICS_FOLDER, DIAGNOSTICS_FILE = "diagnostics", "diagnostics.json"

_log = logging.getLogger("comir_hpc.runs.tracking")


class FirstFailure:
    """Says in one line what failed first in the record of a run, and nothing of what fails after it.

    A full disk or a dead server makes every part of the record fail, in several threads: the user needs to know once.
    """

    def __init__(self) -> None:
        self._said = False

    def warn(self, text: str) -> None:
        """Log a line, unless there was one."""
        if not self._said:
            self._said = True
            _log.warning("%s", text)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl in order; a line torn by a crash ends the list. Empty where there is no file.

    Each holds ``step``, ``time`` (seconds since 1970) and the metrics (float, or None where not finite).
    """
    return list(_rows(Path(run_dir) / METRICS_FILE))


def read_system(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of system.jsonl in order, like `read_metrics`.

    ``step`` counts seconds since the run was started.
    """
    return list(_rows(Path(run_dir) / SYSTEM_FILE))


def read_diagnostics(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read folder and record of every checkpoint of a run that `evaluate` measured, oldest step first.

    A record that is damaged is left out.
    """
    found = []
    for path in sorted((Path(run_dir) / DIAGNOSTICS_FOLDER).glob(f"step-*/{DIAGNOSTICS_FILE}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            continue
        if isinstance(record, dict) and _is_step(record.get("step")):
            found.append((path.parent, record))
    return found


def flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to ``{"a.b": "text"}``; items of a sequence of mappings are numbered from 0."""
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


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    # What follows a torn line was never there: it was the last one when the writer died.
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return
        if not isinstance(row, dict) or not _is_step(row.get("step")):
            return
        yield row


def _is_step(value: object) -> bool:
    # A bool is an int for Python.
    return isinstance(value, int) and not isinstance(value, bool)


def drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`, atomically; none when `step` is 0."""
    if not path.exists():
        return
    # Steps after the checkpoint are done again, and would stand in the record twice.
    kept = [row for row in _rows(path) if row["step"] <= step] if step else []
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a file of lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_state(run_dir: Path) -> dict[str, Any]:
    """Read the state of a run's mirror: URI, experiment, parameters, status, start; nothing if it is damaged."""
    path = run_dir / STATE_FILE
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def write_state(run_dir: Path, state: Mapping[str, Any]) -> None:
    """Replace it as a whole."""
    write_text(run_dir / STATE_FILE, json.dumps(state, indent=1))


def finite(value: float) -> float | None:
    """Return the value if it is finite; otherwise None, which JSON can say."""
    return value if math.isfinite(value) else None
