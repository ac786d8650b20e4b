"""Rows of benchmarks: tables on disk that a stopped benchmark goes on with, and measurements in their own processes.

Lines of a table that begin with "#" stand before its header. They say which command made it, and on what machine.
Scripts import this file from the folder above their own. It needs only the standard library, since some scripts also
run in an environment of another tool.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def options_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a script's docstring, with its line breaks."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def verbs_of(doc: str | None) -> tuple[argparse.ArgumentParser, Any]:
    """Return such a parser for a script with verbs, in `verb`: one that measures here, and others that call it."""
    parser = options_of(doc)
    return parser, parser.add_subparsers(dest="verb", required=True)


# ---------------------------------------------------------------------- tables


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a table; one that does not exist yet has none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def done_in(path: Path, keys: Sequence[str]) -> set[tuple[str, ...]]:
    """List what a table holds already: the values of these columns, as text."""
    return {tuple(row[key] for key in keys) for row in read_rows(path)}


def add_rows(path: Path, rows: Iterable[Row], columns: Sequence[str], digits: int = 4) -> None:
    """Append rows to a table, and begin it with a header if it is new.

    A column that a row lacks stays empty. ``digits`` are the significant digits of numbers with a fraction.
    """
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(columns)
        for row in rows:
            values = [row.get(column) for column in columns]
            writer.writerow([f"{v:.{digits}g}" if isinstance(v, float) else v for v in values])


def write_rows(path: Path, rows: Sequence[Row], *heads: str) -> None:
    """Write a whole table, with the columns of its first row.

    Parameters
    ----------
    *heads : str
        Lines before the header, without their "#".
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {head}\n" for head in heads)
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------------- measurements


class Kept:
    """Measurements in a JSON file of lines, as they were made: what a stopped comparison goes on with.

    Attributes
    ----------
    path : Path
        The file.
    rows : list of dict
        What it holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, row: dict[str, Any]) -> None:
        """Keep one more."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def measured_apart(command: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a command that prints its measurement as JSON in its last line.

    A process of its own has a peak of memory of its own, and its libraries and kernels are as new as the others'.

    Raises
    ------
    SystemExit
        If the command fails; its last words are shown.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    print(done.stdout, end="", flush=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
