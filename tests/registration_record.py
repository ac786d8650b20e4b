"""A small result of a registration, for tests of what reads one."""

from __future__ import annotations

import json
from pathlib import Path

from comir_hpc.runs.result import RESULT_FILE

RECORD = {
    "verdict": "WARN",
    "reasons": ["the mirrored moving volume agrees as well", "right with a probability of 71 %"],
    "probability": 0.71,
    "bound_mm": 2.5,
    "evidence": [
        {"name": "chance", "value": 31.0, "unit": "standard deviations"},
        {"name": "halves", "value": None, "unit": "mm"},
    ],
    "causes": ["symmetric"],
    "margin": None,
    "overlap": 0.97,
    "timings_s": {"search": 4.0, "check": 2.0},
    "settings": {"fixed": "a.zarr", "moving": "b.zarr", "out": "r", "representation": "mind", "model": None},
    "fingerprint": "12ab",
    "truth": {"tre_mm": 1.25},
    "matrix_lps_mm": None,
}


def write(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).write_text(json.dumps(RECORD | changes), encoding="utf-8")
    (folder / "report.html").write_text("<h1>WARN</h1>", encoding="utf-8")
    return folder
