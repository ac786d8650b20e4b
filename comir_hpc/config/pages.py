"""Settings of the small verbs: `report`, `sync` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from comir_hpc.config.base import Input, OnCommandLine, Output, Settings


class ReportSettings(Settings):
    """`comir-hpc report`: a folder in, a page out; of several registrations one table."""

    folder: Annotated[Input[tuple[Path, ...]], OnCommandLine(metavar="DIR...")]
    """Folder that register or train wrote. Of several that register wrote, a table is made, the worst first."""


class SyncSettings(Settings):
    """`comir-hpc sync`: a run in, what MLflow lacks of it out."""

    folder: Annotated[Input[Path], OnCommandLine(metavar="RUN")]
    """Run folder that train wrote."""
    mlflow: Output[str | None] = None
    """Tracking URI to send to; the run's own setting when not given."""


class DoctorSettings(Settings):
    """`comir-hpc doctor`: what works on this node."""

    folder: Input[Path] = Path()
    """Folder whose file system is tried."""
    as_json: Annotated[Output[bool], OnCommandLine(names=("--json",))] = False
    """Print a list of objects for a program instead of a table."""
