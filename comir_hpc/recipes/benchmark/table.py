"""The table of a benchmark: a row for each case and method, written whole after every row.

Several jobs may write into one table. Each takes a lock, reads what is there, adds its row and writes the file anew. A
table of an older version keeps its columns.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comir_hpc.errors import ConfigError
from comir_hpc.host.files import write_text
from comir_hpc.host.locks import exclusive

COLUMNS = (
    "family", "level", "seed", "degradation", "method", "status", "verdict", "success", "tre_mm", "tre_median_mm",
    "tre_p95_mm", "tre_voxels", "tre_share", "displaced_mm", "rotation_deg", "agreement", "margin", "overlap",
    "consensus", "seconds", "cpu_seconds", "search_seconds", "peak_memory_mib", "threads", "compared", "truth", "given",
    "error",
)  # fmt: skip
_KEYS = ("family", "level", "seed", "method")
DONE, FAILED, SKIPPED = "done", "failed", "skipped"
"""What became of a case: an answer, none (crash, time limit, refusal), or a method that is not installed."""

Key = tuple[str, str, int, str, str]
"""Family, level, seed, degradation and method."""


@dataclass(frozen=True)
class Table:
    """A table on disk.

    It is text that people open while jobs add to it, so every row is written with the whole file, by a rename.

    Attributes
    ----------
    path : Path
        The CSV file.
    shared : bool
        Whether other jobs may write to it at the same time.
    """

    path: Path
    shared: bool = False

    def rows(self) -> list[dict[str, str]]:
        """Read all rows; none if there is no file.

        Raises
        ------
        ConfigError
            If the file is no table of a benchmark.
        """
        return self._read()[2]

    def done(self) -> set[Key]:
        """Return what need not be done again: all rows but those of methods that were not installed."""
        return {key_of(row) for row in self.rows() if row.get("status") != SKIPPED}

    def add(self, row: Mapping[str, Any], *, head: str = "") -> None:
        """Add a row; it replaces an earlier one of the same case and method.

        Parameters
        ----------
        row : mapping
            Values by column.
        head : str
            Comment for the first line of a new table: the command and the machine.

        Raises
        ------
        ConfigError
            If the file is no table of a benchmark, or cannot be written.
        """
        texts = {column: _text(row.get(column)) for column in COLUMNS}
        with self._locked():
            comments, columns, rows = self._read()
            kept = [one for one in rows if key_of(one) != key_of(texts)]
            comments = comments or ([f"# {' '.join(head.split())}"] if head else [])
            write_text(self.path, _written(comments, columns, [*kept, texts]))

    def require_writable(self) -> None:
        """Find out before hours of work whether rows can be added.

        Raises
        ------
        ConfigError
            If the file is no table of a benchmark, or cannot be written.
        """
        with self._locked():
            comments, columns, rows = self._read()
            if self.path.is_file():
                write_text(self.path, _written(comments, columns, rows))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other jobs out; make the folder of the table."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(self.path.with_name(f".{self.path.name}.lock"), needed=self.shared):
                yield
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written ({error}); give another --out") from error

    def _read(self) -> tuple[list[str], tuple[str, ...], list[dict[str, str]]]:
        """Return comments, columns and rows."""
        if not self.path.is_file():
            return [], COLUMNS, []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        comments = [line for line in lines if line.startswith("#")]
        reader = csv.DictReader(line for line in lines if not line.startswith("#"))
        columns = tuple(reader.fieldnames or COLUMNS)
        missing = [key for key in _KEYS if key not in columns]
        if missing:
            raise ConfigError(
                f"{self.path} has no column {missing[0]}: it is no table of a benchmark; give another --out"
            )
        return comments, columns, list(reader)


def key_of(row: Mapping[str, str]) -> Key:
    """Return what a row is about; a table without a column for it was made without degradations."""
    return (
        row["family"], row["level"], int(row["seed"]), row.get("degradation") or "none", row["method"],
    )  # fmt: skip


def _written(comments: list[str], columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.get(column, "") for column in columns] for row in rows)
    return "".join(f"{line}\n" for line in comments) + out.getvalue()


def _text(value: Any) -> str:
    if value is None:
        return ""
    # A message of several lines would still be valid CSV, but no line of it.
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
