"""The families of pairs with a known answer, and their displacements: `comir_hpc.data.families`, by short names.

The scripts of this folder use these.
"""

from __future__ import annotations

from pathlib import Path

from comir_hpc.config.words import FAMILIES as FILES
from comir_hpc.data.families import DISPLACEMENTS as LEVELS
from comir_hpc.data.families import SUCCESS, Case, Pair, drawn, family, specimen

__all__ = ["FILES", "LEVELS", "SUCCESS", "Case", "Family", "drawn", "specimen"]


def Family(name: str, data: Path) -> Pair:  # noqa: N802
    """Return a family whose files lie below a folder; `comir-hpc datasets fetch` writes them there."""
    return family(name, data)
