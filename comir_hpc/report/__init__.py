"""`comir-hpc report`: one self-contained page that shows whether a registration, or a training run, is right.

`contents` reads what the folder holds, `panels` makes pictures of volumes, `charts` draws curves, `snippets` writes
what can be copied, `page` puts them into ``report.html.j2``. What a folder lacks is said on the page; a folder without
anything is refused. `evidence` draws what a verdict rests on, `cohort` puts several registrations into one table.
"""

from __future__ import annotations

from pathlib import Path

from comir_hpc.errors import ComirError
from comir_hpc.host.files import write_text
from comir_hpc.report.cohort import cohort
from comir_hpc.report.contents import Contents, read_contents
from comir_hpc.report.page import render
from comir_hpc.runs.record import brief
from comir_hpc.runs.result import RESULT_FILE

__all__ = ["cohort", "report"]

PAGE_FILE = "report.html"


def report(folder: Path) -> Path:
    """Write ``report.html`` into a folder that `register` or `train` wrote, and return its path.

    The page needs no network and no other file: styles, scripts and pictures are inside. In a folder that cannot be
    written to, a page that was made after the result is returned as it is.

    Raises
    ------
    ComirError
        If the folder holds neither the result of a registration nor the metrics of a training run, its result.json is
        damaged or of a newer format, or the page cannot be written.
    """
    contents = read_contents(Path(folder))
    path = contents.folder / PAGE_FILE
    try:
        write_text(path, render(contents))
    except OSError as error:
        if _up_to_date(contents, path):
            return path
        raise ComirError(
            f"{path} cannot be written ({brief(error.strerror or str(error))}); make room there, or copy the folder to "
            "a place that can be written to and report on the copy"
        ) from error
    return path


def _up_to_date(contents: Contents, page: Path) -> bool:
    """Say whether a page shows the registration in its folder; the report of a run cannot be known to."""
    if contents.result is None or not page.is_file():
        return False
    return page.stat().st_mtime_ns >= (contents.folder / RESULT_FILE).stat().st_mtime_ns
