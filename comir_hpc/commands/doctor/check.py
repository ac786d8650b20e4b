"""What an examination says: one line a check, as a table or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One line: what was tried, how it went, the numbers, and what to do if it did not go well."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Checks:
    """All lines of one examination."""

    rows: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        """Whether any line is a FAIL."""
        return any(row.status == "FAIL" for row in self.rows)

    def text(self) -> str:
        """Return a table for a person; a remedy stands under its line."""
        width = max(len(row.name) for row in self.rows)
        lines = []
        for row in self.rows:
            lines.append(f"{row.status}  {row.name:<{width}}  {row.detail}")
            if row.remedy:
                lines.append(" " * (width + 8) + f"-> {row.remedy}")
        counts = [(s, sum(row.status == s for row in self.rows)) for s in ("PASS", "WARN", "FAIL")]
        return "\n".join([*lines, ", ".join(f"{n} {s}" for s, n in counts if n)])

    def json(self) -> str:
        """Return the same for a program: a list of objects."""
        return json.dumps([asdict(row) for row in self.rows], indent=2)
