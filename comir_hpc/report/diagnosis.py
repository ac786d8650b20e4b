"""What a page says of the figures that `evaluate --model` wrote into a run: numbers and drawings of the newest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from comir_hpc.report import charts
from comir_hpc.report.wording import Chart, Number, figure, is_number

Record = Mapping[str, Any]


def describe_diagnoses(records: Sequence[Record]) -> dict[str, Any] | None:
    """Everything that the page shows of them; None where nothing was measured, or all is damaged."""
    readable = [record for record in records if isinstance(record.get("modalities"), dict)]
    if not readable:
        return None
    newest = max(readable, key=lambda record: int(record["step"]))
    drawings = [_over_group(newest), _over_angles(newest)]
    if len(readable) > 1:
        drawings.append(_over_steps(readable))
    return {
        "step": newest["step"],
        "group": newest.get("group", ""),
        "numbers": _numbers(newest),
        "charts": [drawing for drawing in drawings if drawing is not None],
        "how": _how(newest),
    }


def _numbers(record: Record) -> list[Number]:
    numbers = []
    bias = record.get("bias")
    if bias:
        note = (
            f"and {figure(bias.get('degrees'))}°: where the aligned pair ends, registered from the identity"
        )
        numbers.append(Number("Registration bias", f"{figure(bias.get('voxels'))} voxel", note))
    numbers += [
        Number("Agreement", figure(record.get("agreement")), "correlation over the specimen, aligned"),
        Number(
            "Retrieval",
            figure((record.get("patches") or {}).get("retrieval")),
            "share of patches whose partner is the most similar",
        ),
    ]
    for name, one in record["modalities"].items():
        error = one.get("equivariance") or {}
        note = f"worst of {record.get('group', 'the group')}; mean {figure(error.get('mean'))}"
        numbers.append(Number(f"Equivariance error, {name}", figure(error.get("worst")), note))
    for name, one in record["modalities"].items():
        rank = one.get("effective_rank")
        if is_number(rank) and abs(rank - 1) > 1e-6:
            numbers.append(Number(f"Effective rank, {name}", figure(rank), "latent channels that vary"))
    return numbers


def _over_group(record: Record) -> Chart | None:
    elements = record.get("elements") or []
    angles = [int(element["angle_deg"]) for element in elements]
    columns = sorted(set(angles))
    series = {
        name: [
            (columns.index(angle), float(error), bool(element["trained"]))
            for angle, error, element in zip(angles, one["equivariance"]["errors"], elements, strict=True)
            if is_number(error)
        ]
        for name, one in record["modalities"].items()
    }
    if not any(series.values()):
        return None
    svg = charts.errors_by_class("group", [f"{c}°" for c in columns], series, "angle of the rotation")
    hollow = " Hollow: not among those that the training undid." if _untrained(elements) else ""
    note = f"a dot a rotation of {record.get('group', 'the group')}, share of the variance; 0 is perfect.{hollow}"
    return Chart("Equivariance error of every rotation", Markup(svg), note)


def _untrained(elements: Sequence[Record]) -> bool:
    return any(not element["trained"] for element in elements)


def _over_angles(record: Record) -> Chart | None:
    series, angles = {}, []
    for name, one in record["modalities"].items():
        curve = one.get("so3") or {}
        errors, floor = (np.array(curve.get(key) or [[]], dtype=np.float64) for key in ("errors", "floor"))
        if errors.size and np.isfinite(errors).all():
            angles = curve["angles_deg"]
            series[name] = (errors, floor)
    if not series:
        return None
    return Chart(
        "Equivariance error at any angle",
        Markup(charts.bands("angles-any", angles, series, "rotation, degrees")),
        "mean and range over several axes. Dotted: what resampling alone can add at most; below it nothing is known.",
    )


def _over_steps(records: Sequence[Record]) -> Chart | None:
    ordered = sorted(records, key=lambda record: int(record["step"]))
    steps = [float(record["step"]) for record in ordered]
    worst = [
        max((one["equivariance"]["worst"] or np.nan) for one in record["modalities"].values())
        for record in ordered
    ]
    if not np.isfinite(worst).all():
        return None
    svg = charts.curve("diagnoses", steps, worst)
    return Chart("Worst equivariance error by checkpoint", Markup(svg), "of all modalities, over the group")


def _how(record: Record) -> str:
    """How the figures were obtained, in a sentence."""
    cubes = record.get("cubes") or {}
    border = [one.get("border") for one in record["modalities"].values()]
    known = [value for value in border if is_number(value)]
    seen = f"; padding changes values there by {figure(max(known))} of their variance" if known else ""
    side = " × ".join(map(str, cubes.get("side_zyx", [])))
    return (
        f"Measured on {len(cubes.get('starts', []))} cubes of {side} voxels, over the specimen in them, "
        f"{max(cubes.get('trim_zyx', [0]))} voxels away from every face{seen}."
    )
