"""One method on one case, in a process of its own: ``python -m comir_hpc.recipes.benchmark.one JOB.json``.

A method that crashes takes nothing else with it, and its peak memory is its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comir_hpc.errors import ComirError
from comir_hpc.host.files import write_json
from comir_hpc.host.memory import peak_bytes
from comir_hpc.recipes.benchmark.methods import Task, method

ANSWER = "answer.json"
"""In the folder of the job: what was found."""


def write_job(folder: Path, name: str, task: Task) -> Path:
    """Write what the process is to do; return the file."""
    path = folder / "job.json"
    record = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(task).items()}
    write_json(path, {"method": name, "task": record})
    return path


def run(path: Path) -> dict[str, Any]:
    """Run the method that a job names.

    Returns
    -------
    dict
        ``status`` (done, failed or skipped), ``matrix_lps_mm`` or None, ``error``, and what goes into the table.
    """
    job = json.loads(path.read_text(encoding="utf-8"))
    record = job["task"]
    paths = {key: Path(record[key]) for key in ("fixed", "moving", "folder")}
    model = None if record["model"] is None else Path(record["model"])
    task = Task(**{**record, **paths, "model": model, "modalities": tuple(record["modalities"])})
    chosen = method(job["method"])
    if chosen.needs and importlib.util.find_spec(chosen.needs) is None:
        text = f"{chosen.name} is not installed: {chosen.install}"
        return {"status": "skipped", "matrix_lps_mm": None, "error": text}
    for module in (*chosen.loads, *([chosen.needs] if chosen.needs else [])):
        importlib.import_module(
            module
        )  # not counted: a program that is called a second time has no such cost
    start, busy = time.perf_counter(), time.process_time()
    try:
        found = chosen.call(task)
    except ComirError as error:
        seconds = time.perf_counter() - start
        return {"status": "failed", "matrix_lps_mm": None, "error": str(error), "seconds": seconds}
    return {
        "status": "done" if found.matrix_mm is not None else "failed",
        "matrix_lps_mm": None if found.matrix_mm is None else found.matrix_mm.tolist(),
        "verdict": found.verdict,
        "error": found.error,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "peak_memory_mib": peak_bytes() / 2**20,
        **found.numbers,
    }


if __name__ == "__main__":
    job = Path(sys.argv[1])
    write_json(job.with_name(ANSWER), run(job))
