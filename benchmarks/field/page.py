"""Make docs/benchmarks.md and its figures from the committed tables: `make bench-page`.

    python benchmarks/field/page.py

The text stands in page.md, the numbers in peers.csv and full.csv beside it and in benchmarks/general/default.csv.
"""

from __future__ import annotations

from pathlib import Path

from comir_hpc.config.words import DATA_SETS, PEERS
from comir_hpc.data.registry import data_set
from comir_hpc.recipes.benchmark.figures import draw
from comir_hpc.recipes.benchmark.methods import method
from comir_hpc.recipes.benchmark.page import tables
from comir_hpc.recipes.benchmark.scores import Row
from comir_hpc.recipes.benchmark.table import Table, key_of

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
OURS = ROOT / "benchmarks" / "general" / "default.csv"
TABLES = {
    HERE / "full.csv": "All methods, all families",
    HERE / "peers.csv": "Peers, and ours on the same cases",
    HERE / "degraded.csv": "Degradations",
    OURS: "Ours",
}
"""Tables that the page shows, as far as they are there, and their headings."""


def page() -> str:
    """Return the text of the page."""
    text = (HERE / "page.md").read_text(encoding="utf-8")
    there = {path: title for path, title in TABLES.items() if path.is_file()}
    parts = {
        "state": "\n".join(_state(path, title) for path, title in TABLES.items()),
        "data": _data(),
        "methods": _methods(),
        "results": "\n\n".join(_results(path, title) for path, title in there.items()),
    }
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


def _state(path: Path, title: str) -> str:
    place = path.relative_to(ROOT)
    if not path.is_file():
        return f"* {title}: **not run yet** (`{place}`)"
    rows = Table(path).rows()
    families = ", ".join(dict.fromkeys(row["family"] for row in rows))
    methods = ", ".join(dict.fromkeys(row["method"] for row in rows))
    seeds = len({row["seed"] for row in rows})
    return (
        f"* {title}: {len(rows)} rows (`{place}`), at most {seeds} displacement{'s' if seeds > 1 else ''} of each "
        f"level; {families}; {methods}"
    )


def _data() -> str:
    lines = [
        "| name | volumes | voxels | licence | from | how the answer is known |",
        "|---|---|---|---|---|---|",
    ]
    for one in map(data_set, DATA_SETS):
        cells = (one.name, one.modalities, one.spacing, one.licence, f"{one.source} ({one.size})", one.truth)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _methods() -> str:
    names = ("identity", "default", "comir", "mind", "gradient", "intensity", *PEERS)
    lines = ["| method | settings |", "|---|---|"]
    lines += [f"| {name} | `{method(name).settings}` |" for name in names]
    lines.append("| NAME-identity, NAME-moments | one of ours from another start, e.g. `comir-moments` |")
    return "\n".join(lines)


def _results(path: Path, title: str) -> str:
    rows = shown(path)
    head = next(
        (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")),
        "",
    )
    figures = [
        f"![{title}: {name}](pictures/field-{path.stem}-{name}.png)" for name in ("success", "errors", "time")
    ]
    # A table with one method compares nothing: its figures would be no news.
    pictures = figures if len({row["method"] for row in rows}) > 1 else []
    return "\n\n".join([f"### {title}", f"Made by: `{head}`", *pictures, tables(rows)])


def shown(path: Path) -> list[Row]:
    """Return the rows of a table; beside peers those of ours that were run on the same cases earlier."""
    rows: list[Row] = list(Table(path).rows())
    if path.stem != "peers" or not OURS.is_file():
        return rows
    cases = {key_of(row)[:4] for row in rows}
    return [*(row for row in Table(OURS).rows() if key_of(row)[:4] in cases), *rows]


def main() -> None:
    """Write the page and its figures."""
    for path in TABLES:
        if path.is_file() and len({row["method"] for row in shown(path)}) > 1:
            draw(shown(path), ROOT / "docs" / "pictures", f"field-{path.stem}")
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
