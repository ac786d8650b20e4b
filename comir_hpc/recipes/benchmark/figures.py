"""Figures of a benchmark: success against displacement, errors, time against success.

Every method has a colour of Okabe and Ito's palette, which the colour-blind tell apart, and a marker and a dash of its
own, so that a print in grey can be read too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from comir_hpc.config.words import LEVELS
from comir_hpc.host.files import written_whole
from comir_hpc.recipes.benchmark.scores import Row, run_rows, scores, wilson

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C6D1F")
_MARKERS = "os^DvPX*<>hp"
_DASHES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (0, ()), (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)),
)  # fmt: skip
_LARGEST = 180.0  # degrees
_BINS = (0.0, 10.0, 30.0, 60.0, 90.0, 135.0, 180.0001)  # of the rotation, in degrees
_HOLLOW = 0.08  # how far markers of methods stand apart, as a share of a column

Style = dict[str, object]


def draw(rows: Sequence[Row], folder: Path, name: str) -> list[Path]:
    """Draw all figures that the rows have something for; return their files (PNG).

    Parameters
    ----------
    rows : sequence of rows
        Rows of a table.
    folder : Path
        Folder to write to.
    name : str
        Begin of the files' names.
    """
    some = run_rows(rows)
    if not some:
        return []
    styles = _styles(some)
    found = []
    for kind, each in (("success", _success), ("errors", _errors), ("time", _time)):
        path = folder / f"{name}-{kind}.png"
        figure = each(some, styles)
        with written_whole(path) as spare:
            figure.savefig(spare, dpi=130)
        found.append(path)
    return found


def _styles(rows: Sequence[Row]) -> dict[str, Style]:
    methods = dict.fromkeys(row["method"] for row in rows)
    return {
        method: {
            "color": _COLOURS[n % len(_COLOURS)],
            "marker": _MARKERS[n % len(_MARKERS)],
            "linestyle": _DASHES[n % len(_DASHES)],
        }
        for n, method in enumerate(methods)
    }


def _per_pair(
    rows: Sequence[Row], styles: dict[str, Style], one: Callable[[Axes, list[Row], dict[str, Style]], None]
) -> Figure:
    """Make a figure with a part for each pair, and one legend."""
    pairs = list(dict.fromkeys(row["family"] for row in rows))
    columns = min(4, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(3.4 * columns + 1.7, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for place, pair in zip(axes.flat, pairs, strict=False):
        one(place, [row for row in rows if row["family"] == pair], styles)
        place.set_title(pair, fontsize=10)
        place.spines[["top", "right"]].set_visible(False)
        place.grid(visible=True, color="0.9", linewidth=0.6)
    for place in axes.flat[len(pairs) :]:
        place.set_axis_off()
    handles = [_handle(axes.flat[0], method, style) for method, style in styles.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _handle(axes: Axes, method: str, style: Style) -> object:
    return axes.plot([], [], label=method, linewidth=1.4, markersize=5, **style)[0]  # type: ignore[arg-type]


def _success(rows: Sequence[Row], styles: dict[str, Style]) -> Figure:
    """Draw the rate of right answers against the rotation of the pair before, with 95 % intervals."""

    def one(axes: Axes, some: list[Row], styles: dict[str, Style]) -> None:
        for number, (method, style) in enumerate(styles.items()):
            values = [
                (float(row["rotation_deg"]), row["success"] == "True")
                for row in some
                if row["method"] == method and row.get("rotation_deg")
            ]
            points = [_rate(values, low, high) for low, high in pairwise(_BINS)]
            kept = np.array([point for point in points if point is not None])
            if not len(kept):
                continue
            shifted = kept[:, 0] + 1.5 * (number - len(styles) / 2)
            bars = np.abs(kept[:, 2:].T - kept[:, 1])
            axes.errorbar(
                shifted, 100 * kept[:, 1], 100 * bars, markersize=5, linewidth=1.2, elinewidth=0.6,
                **style,  # type: ignore[arg-type]
            )  # fmt: skip
        axes.set_xlim(-8, _LARGEST + 8)
        axes.set_xticks(range(0, 181, 45))
        axes.set_ylim(-4, 104)
        axes.set_xlabel("rotation before, degrees")
        axes.set_ylabel("right, %")

    return _per_pair(rows, styles, one)


def _rate(
    values: list[tuple[float, bool]], low: float, high: float
) -> tuple[float, float, float, float] | None:
    """Mean rotation of a bin, rate of right answers, and its interval; None for an empty bin."""
    inside = [(angle, right) for angle, right in values if low <= angle < high]
    if not inside:
        return None
    right = sum(each for _, each in inside)
    return float(np.mean([angle for angle, _ in inside])), right / len(inside), *wilson(right, len(inside))


def _errors(rows: Sequence[Row], styles: dict[str, Style]) -> Figure:
    """Draw the mean error of every case, in columns of methods, filled where it is right."""

    def one(axes: Axes, some: list[Row], styles: dict[str, Style]) -> None:
        for column, (method, style) in enumerate(styles.items()):
            cases = [row for row in some if row["method"] == method and row["tre_mm"]]
            # By level from left to right within the column, so that nothing is drawn at random.
            levels = [LEVELS.index(row["level"]) if row["level"] in LEVELS else 0 for row in cases]
            places = [column + _HOLLOW * 2 * (level - 2) for level in levels]
            for place, row in zip(places, cases, strict=True):
                right = row["success"] == "True"
                axes.plot(
                    place, float(row["tre_mm"]), marker=str(style["marker"]), markersize=4.5, linestyle="none",
                    color=str(style["color"]), markerfacecolor=str(style["color"]) if right else "none",
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xticks(range(len(styles)), list(styles), rotation=90, fontsize=7)
        axes.set_ylabel("mean error, mm (filled: right)")

    return _per_pair(rows, styles, one)


def _time(rows: Sequence[Row], styles: dict[str, Style]) -> Figure:
    """Draw the rate of right answers against the median time."""

    def one(axes: Axes, some: list[Row], styles: dict[str, Style]) -> None:
        for score in scores(some):
            if not np.isfinite(score.seconds):
                continue
            low, high = score.interval
            rate = score.right / score.cases
            style = {key: value for key, value in styles[score.method].items() if key != "linestyle"}
            axes.errorbar(
                max(score.seconds, 0.1), 100 * rate, [[100 * (rate - low)], [100 * (high - rate)]],
                markersize=6, elinewidth=0.6, linestyle="none", **style,  # type: ignore[arg-type]
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_ylim(-4, 104)
        axes.set_xlabel("median time, s")
        axes.set_ylabel("right, %")

    return _per_pair(rows, styles, one)
