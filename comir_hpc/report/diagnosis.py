"""What a page says of the figures that `evaluate --model` wrote into a run: numbers and drawings of the newest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from comir_hpc.report import charts
from comir_hpc.report.wording import Chart, Number, figure, is_number
from comir_hpc.runs.diagnosis import Diagnosis, as_diagnosis


def describe_diagnoses(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Collect everything that the page shows of diagnoses; None where nothing was measured, or all is damaged."""
    read = [as_diagnosis(record) for record in records]
    readable = sorted((one for one in read if one is not None), key=lambda one: one.step)
    if not readable:
        return None
    newest = readable[-1]
    drawings = [_over_group(newest), _over_angles(newest)]
    if len(readable) > 1:
        drawings.append(_over_steps(readable))
    return {
        "step": newest.step,
        "group": newest.group,
        "numbers": _numbers(newest),
        "charts": [drawing for drawing in drawings if drawing is not None],
        "how": _how(newest),
    }


def _numbers(record: Diagnosis) -> list[Number]:
    numbers = []
    if record.bias is not None:
        note = (
            f"and {figure(record.bias.degrees)}°: where the aligned pair ends, registered from the identity"
        )
        numbers.append(Number("Registration bias", f"{figure(record.bias.voxels)} voxel", note))
    numbers += [
        Number("Agreement", figure(record.agreement), "correlation over the specimen, aligned"),
        Number(
            "Retrieval",
            figure(record.patches.retrieval),
            "share of patches whose partner is the most similar",
        ),
    ]
    for name, one in record.modalities.items():
        note = f"worst of {record.group or 'the group'}; mean {figure(one.equivariance.mean)}"
        numbers.append(Number(f"Equivariance error, {name}", figure(one.equivariance.worst), note))
    for name, one in record.modalities.items():
        rank = one.effective_rank
        # A representation of one channel has the rank 1, which tells nothing.
        if rank is not None and is_number(rank) and abs(rank - 1) > 1e-6:
            numbers.append(Number(f"Effective rank, {name}", figure(rank), "latent channels that vary"))
    return numbers


def _over_group(record: Diagnosis) -> Chart | None:
    elements = record.elements
    angles = [int(element.angle_deg) for element in elements]
    columns = sorted(set(angles))
    series = {
        name: [
            (columns.index(angle), error, element.trained)
            for angle, error, element in zip(angles, one.equivariance.errors, elements, strict=True)
            if error is not None and is_number(error)
        ]
        for name, one in record.modalities.items()
        if len(one.equivariance.errors) == len(elements)
    }
    if not any(series.values()):
        return None
    svg = charts.errors_by_class("group", [f"{c}°" for c in columns], series, "angle of the rotation")
    untrained = any(not element.trained for element in elements)
    hollow = " Hollow: not among those that the training undid." if untrained else ""
    group = record.group or "the group"
    note = f"a dot a rotation of {group}, share of the variance; 0 is perfect.{hollow}"
    return Chart("Equivariance error of every rotation", Markup(svg), note)


def _over_angles(record: Diagnosis) -> Chart | None:
    series: dict[str, tuple[charts.FloatArray, charts.FloatArray]] = {}
    angles: tuple[float, ...] = ()
    for name, one in record.modalities.items():
        lengths = {len(one.so3.angles_deg), len(one.so3.errors), len(one.so3.floor)}
        if lengths == {0} or len(lengths) > 1 or len({len(row) for row in one.so3.errors}) > 1:
            continue
        # A value that is not known becomes NaN.
        errors, floor = (np.array(values, dtype=np.float64) for values in (one.so3.errors, one.so3.floor))
        # All encoders of a run were measured at the same angles, so one list serves all curves.
        if errors.size and np.isfinite(errors).all():
            angles = one.so3.angles_deg
            series[name] = (errors, floor)
    if not series:
        return None
    return Chart(
        "Equivariance error at any angle",
        Markup(charts.bands("angles-any", angles, series, "rotation, degrees")),
        "mean and range over several axes. Dotted: what resampling alone can add at most; below it nothing is known.",
    )


def _over_steps(ordered: Sequence[Diagnosis]) -> Chart | None:
    steps = [float(record.step) for record in ordered]
    worst = [
        max(
            np.nan if one.equivariance.worst is None else one.equivariance.worst
            for one in record.modalities.values()
        )
        for record in ordered
    ]
    if not np.isfinite(worst).all():
        return None
    svg = charts.curve("diagnoses", steps, worst)
    return Chart("Worst equivariance error by checkpoint", Markup(svg), "of all modalities, over the group")


def _how(record: Diagnosis) -> str:
    """Say in a sentence how the figures were obtained."""
    cubes = record.cubes
    borders = [one.border for one in record.modalities.values()]
    known = [value for value in borders if value is not None and is_number(value)]
    seen = f"; padding changes values there by {figure(max(known))} of their variance" if known else ""
    side = " × ".join(map(str, cubes.side_zyx))
    return (
        f"Measured on {len(cubes.starts)} cubes of {side} voxels, over the specimen in them, "
        f"{max(cubes.trim_zyx, default=0)} voxels away from every face{seen}."
    )
