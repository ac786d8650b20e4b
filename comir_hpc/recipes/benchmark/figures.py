"""Figures of a benchmark: success against displacement, errors, time against success.

Every method has a colour of Okabe and Ito's palette, which the colour-blind tell apart, and a marker and a dash of its
own, so that a print in grey can be read too. Rates are shades of grey with their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from comir_hpc.config.words import LEVELS
from comir_hpc.host.files import written_whole
from comir_hpc.recipes.benchmark.scores import Row, run_rows, scores

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C6D1F")
_MARKERS = "os^DvPX*<>hp"
_DASHES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (0, ()), (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)),
)  # fmt: skip
_LARGEST_DEG = {"none": "0", "small": "10", "medium": "30", "large": "90", "any": "180"}
_DARK = 0.5  # rate above which a cell's text is white
_APART = 0.16  # distance of the levels within a method's column, as a share of it
_SMALLEST_MM = 0.01  # errors below are drawn here: a logarithm has no place for 0

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
    rows: Sequence[Row],
    styles: dict[str, Style],
    one: Callable[[Axes, list[Row], dict[str, Style]], None],
    *,
    legend: bool = True,
) -> Figure:
    """Make a figure with a part for each pair, and one legend if it is needed."""
    pairs = list(dict.fromkeys(row["family"] for row in rows))
    columns = min(4, len(pairs))
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(3.4 * columns + 1.7, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for place, pair in zip(axes.flat, pairs, strict=False):
        one(place, [row for row in rows if row["family"] == pair], styles)
        place.set_title(pair, fontsize=10)
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=8)
        place.xaxis.label.set_size(9)
        place.yaxis.label.set_size(9)
        place.grid(visible=True, color="0.9", linewidth=0.6)
    for place in axes.flat[len(pairs) :]:
        place.set_axis_off()
    if not legend:
        return figure
    handles = [_handle(axes.flat[0], method, style) for method, style in styles.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _handle(axes: Axes, method: str, style: Style) -> object:
    return axes.plot([], [], label=method, linewidth=1.4, markersize=5, **style)[0]  # type: ignore[arg-type]


def _success(rows: Sequence[Row], styles: dict[str, Style]) -> Figure:
    """Draw the share of right answers by displacement: a row for each method, darker is more, with the numbers.

    Lines of a dozen methods with their intervals could not be told apart; the intervals stand in the tables.
    """
    levels = [level for level in LEVELS if any(row["level"] == level for row in rows)]

    def one(axes: Axes, some: list[Row], styles: dict[str, Style]) -> None:
        found = {(score.group, score.method): score for score in scores(some, ("level",))}
        rates = np.full((len(styles), len(levels)), np.nan)
        for line, method in enumerate(styles):
            for column, level in enumerate(levels):
                score = found.get((level, method))
                if score is None:
                    continue
                rates[line, column] = rate = score.right / score.cases
                colour = "white" if rate > _DARK else "black"
                text = f"{score.right}/{score.cases}"
                axes.text(column, line, text, ha="center", va="center", fontsize=7, color=colour)
        axes.imshow(rates, cmap="Greys", vmin=0, vmax=1.15, aspect="auto")
        axes.set_xticks(range(len(levels)), [_LARGEST_DEG[level] for level in levels])
        axes.set_yticks(range(len(styles)), list(styles))
        axes.set_xlabel("rotation of up to, degrees")

    figure = _per_pair(rows, styles, one, legend=False)
    for axes in figure.axes:
        axes.grid(visible=False)
    return figure


def _errors(rows: Sequence[Row], styles: dict[str, Style]) -> Figure:
    """Draw the mean error of every case in columns of methods, filled where it is right; levels from left to right."""

    def one(axes: Axes, some: list[Row], styles: dict[str, Style]) -> None:
        for column, (method, style) in enumerate(styles.items()):
            cases = [row for row in some if row["method"] == method and row["tre_mm"]]
            # By level from left to right within the column, so that nothing is drawn at random.
            levels = [LEVELS.index(row["level"]) if row["level"] in LEVELS else 0 for row in cases]
            places = [column + _APART * (level - 2) for level in levels]
            for place, row in zip(places, cases, strict=True):
                right = row["success"] == "True"
                axes.plot(
                    place, max(float(row["tre_mm"]), _SMALLEST_MM),
                    marker=str(style["marker"]), markersize=4.5, linestyle="none",
                    color=str(style["color"]), markerfacecolor=str(style["color"]) if right else "none",
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlim(-0.6, len(styles) - 0.4)
        axes.set_xticks(range(len(styles)), list(styles), rotation=90, fontsize=7)
        axes.set_ylabel("mean error, mm")

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
                # Identity takes no time, for which a logarithm has no place.
                max(score.seconds, 0.1), 100 * rate, [[100 * (rate - low)], [100 * (high - rate)]],
                markersize=6, elinewidth=0.6, linestyle="none", **style,  # type: ignore[arg-type]
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(-4, 104)
        axes.set_xlabel("median time, s")
        axes.set_ylabel("right, %")

    return _per_pair(rows, styles, one)
