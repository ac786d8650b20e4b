"""What a page says of a training run: curves, what the encoders can do, pictures, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from comir_hpc.report import charts
from comir_hpc.report.contents import Contents
from comir_hpc.report.diagnosis import describe_diagnoses
from comir_hpc.report.panels import picture_file
from comir_hpc.report.wording import Chart, Number, duration, figure, is_number
from comir_hpc.runs.model import Model, Reference
from comir_hpc.runs.pictures import Picture
from comir_hpc.runs.tracking import flatten

Rows = Sequence[Mapping[str, Any]]
Points = Sequence[tuple[float, float]]

_CURVES = {
    "loss": ("Loss", "lower is better"),
    "bound": ("Information shared", "nats that the loss proves the two representations to share"),
    "retrieval": ("Retrieval", "share of patches whose partner is more similar than all other patches"),
    "agreement": ("Agreement", "correlation of the two representations of aligned patches"),
    "model_equivariance_error": (
        "Equivariance error",
        "share of the variance, the worst of a few rotations of patches that stay the same; averaged weights",
    ),
    "learning_rate": ("Learning rate", "of the optimiser"),
    "patches_per_s": ("Speed", "patches a second"),
}
# `ceiling` is drawn as a line in other curves.
_NOT_CURVES = ("step", "time", "ceiling")


def describe_run(contents: Contents) -> dict[str, Any] | None:
    """Collect everything that the page's section on training shows; None where there is no run."""
    if contents.run is None:
        return None
    rows = contents.metrics
    series = _series(rows)
    config = _config(contents.config)
    levels = _levels(rows, config)
    main = [name for name in _CURVES if name in series]
    model = contents.model
    reference = Reference() if model is None else model.reference
    return {
        "run": str(contents.run),
        "numbers": _numbers(rows, series, config),
        "charts": [_curve(name, series[name], levels.get(name)) for name in main],
        "further": [_curve(name, series[name], None) for name in sorted(set(series) - set(main))],
        "abilities": _abilities(reference),
        "shifted": _shifted(reference),
        "diagnosis": describe_diagnoses(contents.diagnoses),
        "pictures": _pictures(contents.pictures),
        "config": contents.config,
        "model": {} if model is None else flatten(_without_reference(model)),
    }


def _series(rows: Rows) -> dict[str, Points]:
    """Return the points (step, value) of every metric that has two finite points or more."""
    # A dictionary keeps the order in which the names first appear, and with it the order of the page.
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_CURVES)
    found = {n: [(float(r["step"]), float(r[n])) for r in rows if is_number(r.get(n))] for n in names}
    return {name: points for name, points in found.items() if len(points) > 1}


def _levels(rows: Rows, config: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """Return the dashed lines: the level that the bound cannot exceed.

    For InfoNCE this is also the loss of encoders that know nothing.
    """
    if not rows or not is_number(rows[-1].get("ceiling")):
        return {}
    ceiling = float(rows[-1]["ceiling"])
    levels = {"bound": (ceiling, f"ceiling, {ceiling:.2f}")}
    if (config.get("loss") or {}).get("bound") == "infonce":
        levels["loss"] = (ceiling, f"chance, {ceiling:.2f}")
    return levels


def _curve(name: str, points: Points, level: tuple[float, str] | None) -> Chart:
    title, note = _CURVES.get(name, (name.replace("_", " "), ""))
    steps, values = zip(*points, strict=True)
    safe = "".join(c if c.isalnum() else "-" for c in name)
    return Chart(title, Markup(charts.curve(f"curve-{safe}", steps, values, reference=level)), note)


def _numbers(rows: Rows, series: Mapping[str, Points], config: Mapping[str, Any]) -> list[Number]:
    if not rows:
        return []
    steps = (config.get("optimiser") or {}).get("steps")
    numbers = [Number("Steps", str(rows[-1]["step"]), f"of {steps}" if steps else "")]
    numbers += [
        Number(_CURVES[name][0], figure(series[name][-1][1]), "at the last line")
        for name in ("loss", "agreement", "retrieval")
        if name in series
    ]
    times = [row["time"] for row in rows if is_number(row.get("time"))]
    if len(times) > 1:
        numbers.append(Number("Time", duration(times[-1] - times[0]), "first to last line, pauses included"))
    return numbers


def _without_reference(model: Model) -> dict[str, Any]:
    return {key: value for key, value in model.as_dict().items() if key != "reference"}


def _abilities(reference: Reference) -> list[Number]:
    """Return the figures that `train` measured on clean training patches when it was done."""
    numbers = []
    if is_number(reference.agreement):
        low = f"5 % of the patches below {figure(reference.agreement_p5)}"
        numbers.append(Number("Agreement, aligned", figure(reference.agreement), low))
    if is_number(reference.mismatched):
        high = f"5 % of the pairs above {figure(reference.mismatched_p95)}"
        numbers.append(Number("Agreement, different places", figure(reference.mismatched), high))
    for modality, error in reference.equivariance.items():
        note = f"share of the variance; worst rotation {figure(error.max)}"
        numbers.append(Number(f"Equivariance error, {modality}", figure(error.mean), note))
    if any(rank != 1 for rank in reference.effective_rank.values()):
        numbers += [
            Number(f"Effective rank, {modality}", figure(rank), "latent channels that vary")
            for modality, rank in reference.effective_rank.items()
        ]
    return numbers


def _shifted(reference: Reference) -> Chart | None:
    """Draw how fast agreement falls as the second modality is shifted: what registration lives on."""
    shifted = {
        float(s): v for s, v in reference.shifted.items() if v is not None and is_number(v) and s.isdigit()
    }
    if not shifted or reference.agreement is None:
        return None
    points = sorted({0.0: reference.agreement, **shifted}.items())
    shifts, values = zip(*points, strict=True)
    svg = charts.curve("shifted", shifts, values, label="shift, voxels")
    return Chart("Agreement when shifted", Markup(svg), "a steep fall is what a registration can hold on to")


def _pictures(paths: Sequence[Path]) -> list[tuple[str, Picture | None]]:
    """Choose first, middle and last picture of a run, with their names; None for one that a crash tore."""
    chosen = dict.fromkeys((0, len(paths) // 2, len(paths) - 1)) if paths else {}
    return [
        (paths[i].stem, picture_file(paths[i], f"patches and representations, {paths[i].stem}"))
        for i in chosen
    ]


def _config(text: str | None) -> dict[str, Any]:
    try:
        record = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return {}  # the page shows the text as it is; only what is derived from it is left out
    return record if isinstance(record, dict) else {}
