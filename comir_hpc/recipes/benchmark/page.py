"""The tables of a benchmark as Markdown, made from its CSV, and what a user sees at the end of one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from comir_hpc.host.files import write_text
from comir_hpc.recipes.benchmark.scores import Comparison, Row, Score, comparisons, scores
from comir_hpc.recipes.benchmark.table import FAILED, SKIPPED, Table

SIGNIFICANT = 0.05


def summarise(path: Path) -> list[str]:
    """Write the tables and the figures beside a benchmark's CSV; return a line for each file.

    Raises
    ------
    ConfigError
        If the file is no table of a benchmark.
    """
    from comir_hpc.recipes.benchmark.figures import draw

    rows = Table(path).rows()
    page = path.with_suffix(".md")
    figures = draw(rows, path.parent, path.stem)
    pictures = [f"![{figure.stem}]({figure.name})" for figure in figures]
    write_text(page, "\n\n".join([tables(rows), *pictures]) + "\n")
    return [f"tables: {page}", *(f"figure: {figure}" for figure in figures)]


def tables(rows: Sequence[Row]) -> str:
    """Return all tables: by pair, by pair and level, degradations where there are any, tests, and what failed."""
    parts = ["**By pair**", score_table(scores(rows, ("family",)))]
    parts += ["**By pair and displacement**", rate_table(rows, "level")]
    if any((row.get("degradation") or "none") != "none" for row in rows):
        parts += ["**By pair and degradation**", rate_table(rows, "degradation")]
    tested = comparisons(rows)
    parts += ["**Paired tests**", comparison_table(tested)]
    failures = failure_table(rows)
    return "\n\n".join([*parts, *([failures] if failures else [])])


def score_table(found: Iterable[Score]) -> str:
    """Return a line for each group and method."""
    head = (
        "pair", "method", "right", "95 %", "TRE mean / median / p95, mm", "voxels", "s", "CPU s", "MiB", "failed",
        "PASS, WARN, FAIL of right", "of wrong",
    )  # fmt: skip
    lines = [
        (
            one.group,
            one.method,
            f"{one.right} of {one.cases}",
            "{:.0%} to {:.0%}".format(*one.interval),
            " / ".join(map(_number, (one.tre_mm, one.tre_median_mm, one.tre_p95_mm))),
            _number(one.tre_voxels),
            _number(one.seconds),
            _number(one.cpu_seconds),
            _number(one.peak_memory_mib, 0),
            str(one.failed),
            _counts(one.verdicts_right),
            _counts(one.verdicts_wrong),
        )
        for one in found
    ]
    return _markdown(head, lines)


def rate_table(rows: Sequence[Row], column: str) -> str:
    """Return the right answers of each pair and method, a column for each value of `column`."""
    found = {(one.group, one.method): one for one in scores(rows, ("family", column))}
    values = list(dict.fromkeys(row.get(column) or "none" for row in rows))
    lines = []
    for pair in dict.fromkeys(row["family"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows if row["family"] == pair):
            each = [found.get((f"{pair}, {value}", method)) for value in values]
            if any(each):
                lines.append((pair, method, *(f"{one.right} of {one.cases}" if one else "" for one in each)))
    return _markdown(("pair", "method", *values), lines)


def comparison_table(tested: Sequence[Comparison]) -> str:
    """Return the comparisons that can be told from chance; a sentence where there is none."""
    kept = [one for one in tested if one.p_value <= SIGNIFICANT]
    few = sum(math.isnan(one.p_value) for one in tested)
    note = (
        f"{len(tested)} comparisons, {few} of them with too few cases (fewer than six that differ); "
        f"{len(kept)} with p of at most {SIGNIFICANT} after Holm's correction by pair."
    )
    lines = [
        (one.pair, one.method, one.other, str(one.cases), _number(one.difference_mm), f"{one.p_value:.2g}")
        for one in kept
    ]
    head = ("pair", "method", "other", "cases", "median difference, mm", "p")
    return f"{note}\n\n{_markdown(head, lines)}" if lines else note


def failure_table(rows: Sequence[Row]) -> str:
    """Return what failed and what was skipped, with how often and the message of the first; empty if nothing was."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.get("status") in (FAILED, SKIPPED):
            groups.setdefault((row["family"], row["method"], row["status"]), []).append(row)
    lines = [
        (pair, method, status, str(len(some)), some[0].get("error", "").replace("|", "/"))
        for (pair, method, status), some in groups.items()
    ]
    return (
        "**Without an answer**\n\n" + _markdown(("pair", "method", "", "cases", "message"), lines)
        if lines
        else ""
    )


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _number(value: float, digits: int = 2) -> str:
    return (
        "" if math.isnan(value) else f"{value:.{digits}f}" if digits == 0 or value < 100 else f"{value:.0f}"
    )


def _counts(verdicts: Sequence[int]) -> str:
    return ", ".join(map(str, verdicts)) if any(verdicts) else ""
