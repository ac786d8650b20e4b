"""Curves and maps as inline SVG that takes the page's text colour, so that one drawing serves light and dark.

Matplotlib is used through its objects only: no figure is registered anywhere, no global state changes for longer
than a drawing takes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree

FloatArray = NDArray[np.float64]

LINE, MARK = "#2f7fd6", "#d9730d"  # blue and orange, readable on white and on near-black
_SERIES = (LINE, MARK, "#3f9e4d", "#a566c8", "#c04a4a")  # one colour a modality
# A colour that nothing else uses; it becomes the page's text colour.
_INK = "#010203"
_STYLE: dict[Any, Any] = {
    # Text stays text, so that it takes the page's colour and can be searched.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
_MAP_DEG = 2.0  # pixel of the direction map
_NEIGHBOURS = 40  # rotations whose best score a pixel shows: the turns about its direction


def curve(
    name: str,
    steps: Sequence[float],
    values: Sequence[float],
    *,
    reference: tuple[float, str] | None = None,
    label: str = "step",
) -> str:
    """Draw one training curve as SVG.

    Parameters
    ----------
    name : str
        Name of the chart, which has to be unique in the page.
    reference : (float, str), optional
        A level and its name, drawn as a dashed line.
    label : str
        Words below the horizontal axis.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.135, 0.2, 0.85, 0.77))
        marker = None if len(steps) > 80 else "o"
        axes.plot(steps, values, color=LINE, linewidth=1.6, marker=marker, markersize=2.5)
        if reference is not None:
            level, words = reference
            axes.axhline(level, color=MARK, linestyle=(0, (4, 3)), linewidth=1.2)
            # The curve leaves the level early, to the right there is room above it.
            place, anchor = (1, level), ("axes fraction", "data")
            axes.annotate(words, place, (0, 3), anchor, "offset points", ha="right", va="bottom")
            axes.margins(y=0.12)
        axes.set_xlabel(label)
        _plain(axes)

    return _svg(name, draw, 4.4, 2.5)


def score_against_angle(
    angles_deg: ArrayLike, scores: ArrayLike, marked: Sequence[tuple[float, float, str]]
) -> str:
    """Draw every rotation's score against its angle to the answer; `marked` are (angle, score, label)."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.135, 0.16, 0.85, 0.81))
        # Thousands of dots become one picture. As elements of the SVG they would be most of the page.
        axes.scatter(angles_deg, scores, s=4, color=LINE, alpha=0.4, linewidths=0, rasterized=True)
        for angle, score, label in marked:
            axes.plot(
                angle, score, "o", markersize=12, markerfacecolor="none", color=MARK, markeredgewidth=1.6
            )
            axes.annotate(label, (angle, score), ha="center", va="center_baseline", fontsize=8)
        axes.set_xlim(-6, 186)
        axes.set_xticks(range(0, 181, 30))
        axes.set_xlabel("angle to the answer, degrees")
        axes.set_ylabel("coarse score")
        axes.margins(y=0.08)
        _plain(axes)

    return _svg("angles", draw, 4.6, 3.0)


def direction_map(rotations: FloatArray, scores: FloatArray, answer: FloatArray) -> str:
    """Draw the best score for each direction in which a rotation turns the fixed z axis, all directions at once.

    Parameters
    ----------
    rotations : (K, 3, 3)
        Rotations that were scored, from fixed to moving.
    scores : (K,)
        Score of each rotation, finite.
    answer : (3, 3)
        The rotation that was found; its direction is the middle of the map.
    """
    towards = rotations[:, :, 2] @ _to_the_middle(answer[:, 2]).T
    longitude, latitude, best = _best_by_direction(towards, scores)

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.01, 0.24, 0.98, 0.75), projection="mollweide")
        mesh = axes.pcolormesh(longitude, latitude, best, cmap="cividis", rasterized=True, shading="nearest")
        for colour, width in (("white", 3.4), (MARK, 2.0)):
            axes.plot(0, 0, "o", markersize=13, markerfacecolor="none", color=colour, markeredgewidth=width)
        axes.set_xticklabels([])
        axes.set_yticklabels([])
        axes.grid(visible=True, color="white", alpha=0.18, linewidth=0.6)
        bar = figure.colorbar(mesh, cax=figure.add_axes((0.2, 0.17, 0.6, 0.03)), orientation="horizontal")
        bar.set_label("best coarse score")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)

    return _svg("directions", draw, 4.6, 3.0)


def errors_by_class(
    name: str, classes: Sequence[str], series: Mapping[str, Sequence[tuple[int, float, bool]]], label: str
) -> str:
    """Draw values in columns as SVG: a dot for each value, a colour for each series.

    Parameters
    ----------
    name : str
        Name of the chart, which has to be unique in the page.
    classes : sequence of str
        Names of the columns, from left to right.
    series : mapping of str to sequence of (column, value, filled)
        Hollow dots are values of another kind; the page says which.
    label : str
        Words below the horizontal axis.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.135, 0.17, 0.85, 0.73))
        for number, (title, points) in enumerate(series.items()):
            colour = _SERIES[number % len(_SERIES)]
            beside = 0.2 * (number - (len(series) - 1) / 2)
            for filled in (True, False):
                chosen = [(column + beside, value) for column, value, full in points if full is filled]
                x, y = zip(*chosen, strict=True) if chosen else ((), ())
                face = colour if filled else "none"
                axes.plot(x, y, "o", color=colour, markersize=4.5, alpha=0.75, markerfacecolor=face)
            axes.plot([], [], "o", color=colour, markersize=4.5, label=title)
        axes.set_xticks(range(len(classes)), classes)
        axes.set_xlim(-0.6, len(classes) - 0.4)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        _legend(axes)
        _plain(axes)

    return _svg(name, draw, 4.6, 3.0)


def bands(
    name: str, x: Sequence[float], series: Mapping[str, tuple[FloatArray, FloatArray]], label: str
) -> str:
    """Draw curves with their range as SVG, each above what could be mere error of measurement.

    Parameters
    ----------
    name : str
        Name of the chart, which has to be unique in the page.
    x : sequence of A float
        Positions on the horizontal axis, in degrees.
    series : mapping of str to ((A, K), (A,))
        Values, of which the mean is drawn as a line and the range as a band, and the floor, dotted.
    label : str
        Words below the horizontal axis.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.135, 0.17, 0.85, 0.73))
        for number, (title, (values, floor)) in enumerate(series.items()):
            colour = _SERIES[number % len(_SERIES)]
            axes.plot(x, values.mean(axis=1), color=colour, linewidth=1.8, label=title)
            axes.fill_between(
                x, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.18, linewidth=0
            )
            axes.plot(x, floor, color=colour, linewidth=1.2, linestyle=(0, (1, 2)))
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 185)
        axes.set_xticks(range(0, 181, 30))
        axes.set_xlabel(label)
        _legend(axes)
        _plain(axes)

    return _svg(name, draw, 4.6, 3.0)


def _legend(axes: Axes) -> None:
    """Put the legend above the drawing, where no curve is."""
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, borderaxespad=0.2, handlelength=1.4
    )


def _to_the_middle(direction: FloatArray) -> FloatArray:
    """Return the rotation (3, 3) that turns a unit vector onto x, the middle of the map."""
    helper = np.eye(3)[int(np.abs(direction).argmin())]
    second = np.cross(direction, helper)
    second /= np.linalg.norm(second)
    return np.stack([direction, second, np.cross(direction, second)])


def _best_by_direction(
    directions: FloatArray, scores: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Find the best score for every point of the map, that of the nearest of `directions` (K, 3).

    Longitudes (n,) and latitudes (m,) in radians come first, then the scores (m, n).
    """
    step = np.radians(_MAP_DEG)
    longitude = np.arange(-np.pi + step / 2, np.pi, step)
    latitude = np.arange(-np.pi / 2 + step / 2, np.pi / 2, step)
    lon, lat = np.meshgrid(longitude, latitude)
    places = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)
    _, nearest = KDTree(directions).query(places, k=min(_NEIGHBOURS, len(scores)))
    best = scores[nearest.reshape(*lon.shape, -1)].max(axis=-1)
    return longitude, latitude, best


def _plain(axes: Axes) -> None:
    axes.grid(visible=True, color="#888888", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    if not 1e-3 <= max(map(abs, axes.get_ylim())) < 1e5:
        # Matplotlib writes a common power of ten above the axes, outside of the drawing.
        axes.yaxis.set_major_formatter("{x:g}")


def _svg(name: str, draw: Callable[[Figure], None], width: float, height: float) -> str:
    """Run a drawing (sizes in inches) and return ``<svg>...</svg>`` fit to stand in a page beside others."""
    buffer = io.StringIO()
    # Ids without a random part, and below no date: the same figures give the same page.
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "comir-hpc"}):
        figure = Figure(figsize=(width, height))
        draw(figure)
        figure.patch.set_visible(False)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        figure.savefig(buffer, format="svg", dpi=160, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Without sizes of its own, a drawing fills the place that the page gives it.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Several drawings in one page: their ids must not meet.
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
