"""Draw what was measured of a model as one picture, for MLflow and for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = ("#2f7fd6", "#d9730d", "#4c9a2a", "#9a4cc0", "#a03030")


def draw_diagnosis(path: Path, record: Mapping[str, Any]) -> None:
    """Write a PNG: equivariance over the group and over all angles, and agreement against a shift.

    Parameters
    ----------
    path : Path
        File to write.
    record : mapping
        Content of diagnostics.json; ``metrics`` need not be there.
    """
    figure = Figure(figsize=(12, 3.9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    group, angles, shifts = figure.subplots(1, 3, width_ratios=(1, 1.25, 0.8))
    _over_group(group, record)
    _over_angles(angles, record)
    _over_shifts(shifts, record["patches"])
    for axes in (group, angles, shifts):
        axes.grid(visible=True, color="#888888", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    bias = record["bias"]
    ended = f", aligned pair {bias['voxels']:.3f} voxel / {bias['degrees']:.3f}° off" if bias else ""
    figure.suptitle(f"{Path(record['run']).name}, step {record['step']}{ended}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    spare = path.with_name(f".{path.name}.part")
    figure.savefig(spare, format="png")
    spare.replace(path)


def _over_group(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw a dot for each element, in columns by angle; it is hollow where the training did not undo the element."""
    angle = np.array([element["angle_deg"] for element in record["elements"]])
    trained = np.array([element["trained"] for element in record["elements"]])
    columns = np.unique(angle)
    place = np.searchsorted(columns, angle).astype(float)
    for number, (name, one) in enumerate(record["modalities"].items()):
        errors = np.array([np.nan if e is None else e for e in one["equivariance"]["errors"]])
        x = place + 0.16 * (number - (len(record["modalities"]) - 1) / 2)
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(x[trained], errors[trained], "o", markersize=4, color=colour, alpha=0.7, label=name)
        axes.plot(x[~trained], errors[~trained], "o", markersize=4, color=colour, markerfacecolor="none")
    axes.set_xticks(range(len(columns)), [f"{a}°" for a in columns])
    axes.set_ylim(bottom=0)
    axes.set_title(f"Equivariance error, {record['group']}", fontsize=10)
    axes.set_xlabel("angle of the element")
    axes.legend(frameon=False, fontsize=8)


def _over_angles(axes: Axes, record: Mapping[str, Any]) -> None:
    for number, (name, one) in enumerate(record["modalities"].items()):
        curve = one["so3"]
        errors = np.array(curve["errors"], dtype=float)
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(curve["angles_deg"], errors.mean(axis=1), color=colour, label=name)
        axes.fill_between(
            curve["angles_deg"], errors.min(axis=1), errors.max(axis=1), color=colour, alpha=0.2, linewidth=0
        )
        floor = np.array(curve["floor"], dtype=float)
        axes.plot(
            curve["angles_deg"], floor, ":", color=colour, linewidth=1.2, label=f"{name}, resampling at most"
        )
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlim(0, 185)
    axes.set_xticks(range(0, 181, 30))
    axes.set_title("Equivariance error, any angle", fontsize=10)
    axes.set_xlabel("rotation, degrees (mean and range over axes)")
    axes.legend(frameon=False, fontsize=8)


def _over_shifts(axes: Axes, patches: Mapping[str, Any]) -> None:
    shifted = {0.0: patches["agreement"], **{float(s): v for s, v in patches["shifted"].items()}}
    shifts = sorted(shifted)
    axes.plot(shifts, [shifted[s] for s in shifts], "o-", color=_COLOURS[0], markersize=4)
    axes.set_title("Agreement when shifted", fontsize=10)
    axes.set_xlabel("shift, voxels")
