"""`comir-hpc refine`: the field, and the report of the registration with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comir_hpc.config.refine import RefineSettings
from comir_hpc.errors import ComirError
from comir_hpc.host.progress import Progress

if TYPE_CHECKING:
    from comir_hpc.register.blockwise import RefineResult


@dataclass(frozen=True)
class Refined:
    """What came of a refinement.

    Attributes
    ----------
    result : RefineResult
        The field, and what became of its blocks.
    report : Path or None
        Page of the registration, which shows the field; None while blocks are missing, or where it cannot be written.
    """

    result: RefineResult
    report: Path | None = None


def refine(settings: RefineSettings, *, progress: Progress | None = None) -> Refined:
    """Refine a registration block by block, and write its report again when the field is complete.

    Raises
    ------
    ComirError
        For the same reasons as `comir_hpc.register.blockwise.refine`.
    """
    # Here, so that a recipe loads only the verbs that it comes to.
    from comir_hpc.register.blockwise import refine as run
    from comir_hpc.report import report

    result = run(settings, progress=progress)
    if not result.complete:
        return Refined(result)
    try:
        return Refined(result, report(settings.result))
    except ComirError:  # a folder that cannot be written to, which the notes of the result say
        return Refined(result)


def plan_refine(settings: RefineSettings) -> dict[str, Any]:
    """Say what `refine` would do and need.

    Raises
    ------
    ComirError
        If `refine` would raise it before it reads voxels.
    """
    from comir_hpc.register.blockwise import plan_refine as plan

    return plan(settings)
