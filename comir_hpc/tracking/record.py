"""What a run leaves on disk of its progress: the record, and the spool of what MLflow gets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

METRICS_FILE = "metrics.jsonl"
SYSTEM_FILE = "system.jsonl"
RUN_ID_FILE = "mlflow_run_id"
STATE_FILE = "tracking.json"
Status = Literal["running", "finished", "failed", "stopped"]
DIAGNOSTICS_FOLDER, DIAGNOSTICS_FILE = "diagnostics", "diagnostics.json"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl in order; a line torn by a crash ends the list. Empty where there is no file.

    Each holds ``step``, ``time`` (seconds since 1970) and the metrics (float, or None where not finite).
    """
    return list(_rows(Path(run_dir) / METRICS_FILE))


def read_system(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of system.jsonl in order, like `read_metrics`; ``step`` counts seconds since the run was started."""
    return list(_rows(Path(run_dir) / SYSTEM_FILE))


def read_diagnostics(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and record of every checkpoint of a run that `evaluate` measured, oldest step first.

    A record that is damaged is left out.
    """
    found = []
    for path in sorted((Path(run_dir) / DIAGNOSTICS_FOLDER).glob(f"step-*/{DIAGNOSTICS_FILE}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            continue
        if isinstance(record, dict) and "step" in record:
            found.append((path.parent, record))
    return found


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


def drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`, atomically; none when `step` is 0."""
    if not path.exists():
        return
    kept = [row for row in _rows(path) if row["step"] <= step] if step else []
    spare = path.with_suffix(".tmp")
    spare.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    spare.replace(path)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a file of lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_state(run_dir: Path) -> dict[str, Any]:
    """What is known of the mirror of a run: URI, experiment, parameters, status, start."""
    path = run_dir / STATE_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_state(run_dir: Path, state: Mapping[str, Any]) -> None:
    """Replace it as a whole."""
    spare = run_dir / f"{STATE_FILE}.tmp"
    spare.write_text(json.dumps(state, indent=1), encoding="utf-8")
    spare.replace(run_dir / STATE_FILE)


def finite(value: float) -> float | None:
    """The value, or None, which JSON can say."""
    return value if math.isfinite(value) else None
