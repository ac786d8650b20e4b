"""Settings of `comir-hpc view`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from comir_hpc.config.base import Input, OnCommandLine, Output, Resource
from comir_hpc.config.shared import Replacing


class ViewSettings(Replacing):
    """`comir-hpc view`: a page that shows volumes in the browser."""

    shown: Annotated[Input[tuple[Path, ...]], Field(min_length=1), OnCommandLine(metavar="RESULT|VOLUME...")]
    """Folder that register wrote: its fixed volume, the moving one before and after, and what refine made of it. Or
    volumes, any files that ingest reads: the others lie on the first where their headers put them."""
    out: Output[Path | None] = None
    """Page to write; view.html in the folder of the result, or beside the first volume, when not given."""
    side: Annotated[Resource[int], Field(ge=16, le=1024)] = 256
    """Size of what is shown: the finest level of a volume that has at most the voxels of a cube of this side."""
    open_page: Annotated[Output[bool], OnCommandLine(names=("--open",))] = True
    """Open the page in a browser, where there is a display."""
