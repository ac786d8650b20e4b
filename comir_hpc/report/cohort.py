"""Put many registrations on one page: a table with a thumbnail each, the worst first, sorted by a click."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from comir_hpc import __version__
from comir_hpc.errors import ComirError, RegistrationError
from comir_hpc.host.files import write_text
from comir_hpc.report.contents import read_contents
from comir_hpc.report.filled import filled
from comir_hpc.report.wording import figure
from comir_hpc.runs.pictures import (
    Arrays,
    complete_planes,
    isotropic,
    oriented,
    overlay,
    png_uri,
    shaded,
    spacing_mm,
)
from comir_hpc.runs.record import brief
from comir_hpc.runs.result import Result

COHORT_FILE = "cohort.html"
_LONGEST = 96  # pixels of a thumbnail
_WORST = {"FAIL": 0, "WARN": 1, "PASS": 2}


def cohort(folders: Sequence[Path]) -> Path:
    """Write ``cohort.html`` beside the folders of several registrations, and return its path.

    It stands in the folder that all of them have in common. A folder that cannot be read is a line of the table.

    Raises
    ------
    ComirError
        If none of them holds a registration, or the page cannot be written.
    """
    rows = [_row(Path(folder)) for folder in folders]
    if all(row["result"] is None for row in rows):
        raise ComirError(f"none of {len(rows)} folders holds a registration; the first: {rows[0]['why']}")
    path = Path(os.path.commonpath([row["folder"].parent for row in rows])) / COHORT_FILE
    for row in rows:
        page = row["folder"] / "report.html"
        # Relative, so that the page and the folders can be moved together.
        row["link"] = quote(os.path.relpath(page, path.parent)) if page.is_file() else ""
    # What could not be read stands before the failures: it must not be overlooked.
    rows.sort(key=lambda row: (_WORST.get(row["verdict"], -1), row["odds"], row["name"]))
    try:
        write_text(path, _page(rows))
    except OSError as error:
        raise ComirError(
            f"{path} cannot be written ({brief(error.strerror or str(error))}); make room there, or copy the folders "
            "to a place that can be written to"
        ) from error
    return path


def _page(rows: Sequence[dict[str, Any]]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    return filled("cohort.html.j2", rows=rows, counts=counts, version=__version__)


def _row(folder: Path) -> dict[str, Any]:
    """Describe one registration; of a folder without one it says why."""
    folder = folder.absolute()
    row: dict[str, Any] = {"folder": folder, "name": folder.name, "verdict": "unread", "odds": -1.0}
    row |= {"result": None, "thumbnail": "", "numbers": [], "link": ""}
    try:
        contents = read_contents(folder)
        if contents.result is None:
            raise RegistrationError(f"{folder} holds a training run, and no registration")
    except ComirError as error:
        return row | {"why": str(error)}
    result = contents.result
    return row | {
        "result": result,
        "verdict": result.verdict or "unknown",
        "odds": -1.0 if result.probability is None else result.probability,
        "why": "; ".join(result.reasons[:2]),
        "numbers": _numbers(result),
        "thumbnail": "" if contents.panels is None else _thumbnail(contents.panels, result),
    }


def _numbers(result: Result) -> list[tuple[str, float | str]]:
    """Give the figures of one line, each as text and as what it is sorted by."""
    seconds = sum(result.timings_s.values()) if result.timings_s else None
    percent = None if result.probability is None else 100 * result.probability
    figures = (percent, result.bound_mm, result.agreement, result.margin, result.overlap, seconds)
    return [(figure(value), "" if value is None else value) for value in figures]


def _thumbnail(panels: Arrays, result: Result) -> str:
    """Draw the middle plane after the registration, or before it where there is no answer."""
    names = complete_planes(panels)
    if not names:
        return ""
    fixed = result.inputs.get("fixed")
    space = None if fixed is None else fixed.space
    direction = np.eye(3) if space is None else np.asarray(space.direction, dtype=np.float64)
    shades = shaded({names[0]: oriented(panels, names[0], direction)})
    when = "after" if (names[0], "after") in shades else "before"
    sides = [
        isotropic(shades[names[0], kind], spacing_mm(panels, names[0]), _LONGEST) for kind in ("fixed", when)
    ]
    return png_uri(overlay(*sides))
