"""`comir-hpc report`: one self-contained page that shows whether a registration, or a training run, is right.

`contents` reads what the folder holds, `panels` makes pictures of volumes, `charts` draws curves, `page` puts
them into ``report.html.j2``. What a folder lacks is said on the page; a folder without anything is refused.
"""

from __future__ import annotations

from pathlib import Path

from comir_hpc.report.contents import read_contents
from comir_hpc.report.page import render

__all__ = ["report"]


def report(folder: Path) -> Path:
    """Write ``report.html`` into a folder that `register` or `train` wrote, and return its path.

    The page needs no network and no other file: styles, scripts and pictures are inside.

    Raises
    ------
    ComirError
        If the folder holds neither the result of a registration nor the metrics of a training run, or its
        result.json is damaged.
    """
    contents = read_contents(Path(folder))
    path = contents.folder / "report.html"
    partial = path.with_suffix(".html.partial")
    partial.write_text(render(contents), encoding="utf-8")
    partial.replace(path)
    return path
