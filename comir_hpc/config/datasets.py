"""Settings of `comir-hpc datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import model_validator

from comir_hpc.config.base import Input, OnCommandLine, Output, Settings


class DatasetsSettings(Settings):
    """`comir-hpc datasets`: what there is to measure with, and the volumes of one set on request."""

    action: Annotated[Input[Literal["list", "fetch"]], OnCommandLine(metavar="list|fetch")] = "list"
    """List all sets, or fetch one of them; nothing is fetched unasked."""
    name: Annotated[Input[str | None], OnCommandLine(metavar="NAME")] = None
    """Name of the set to fetch."""
    folder: Annotated[Output[Path], OnCommandLine(metavar="DIR")] = Path("data")
    """Folder for the files of all sets; a set goes into a folder of its own in it."""
    archive: Input[Path | None] = None
    """File of the package that was fetched before, for a machine without a network (fetch)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.action == "fetch" and self.name is None:
            raise ValueError("fetch needs a name: comir-hpc datasets fetch NAME DIR")
        if self.action == "list" and (self.name is not None or self.archive is not None):
            raise ValueError("list takes nothing else; comir-hpc datasets fetch NAME DIR fetches a set")
        return self
