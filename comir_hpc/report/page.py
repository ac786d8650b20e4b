"""From what a folder holds to the page: the numbers, sentences and drawings that the template lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from comir_hpc import __version__
from comir_hpc.config.words import REPRESENTATIONS
from comir_hpc.host.memory import in_words
from comir_hpc.report import charts
from comir_hpc.report.contents import Contents, file_sums
from comir_hpc.report.deformation import deformation_numbers, deformation_pictures
from comir_hpc.report.evidence import evidence_rows
from comir_hpc.report.filled import filled
from comir_hpc.report.panels import plane_pictures
from comir_hpc.report.refinement import describe_refinement
from comir_hpc.report.snippets import make_snippets
from comir_hpc.report.training import describe_run
from comir_hpc.report.wording import Chart, Number, duration, figure, is_number
from comir_hpc.runs.result import Errors, Result
from comir_hpc.runs.result_parts import Metric, in_percent
from comir_hpc.runs.tracking import flatten
from comir_hpc.space.grid import Grid
from comir_hpc.space.rotations import angle_deg
from comir_hpc.transforms import Transform

_MEANINGS = {
    "PASS": "The volumes are aligned.",
    "WARN": "An alignment was found. Check it before you use it.",
    "FAIL": "No alignment that can be trusted was found. Do not use this transform.",
}
_NOTHING = "No transform was found."
_SYMBOLS = {"PASS": "✓", "WARN": "!", "FAIL": "✕"}


def render(contents: Contents) -> str:
    """Render the page as HTML that is complete in itself."""
    made = {"version": __version__, "when": datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")}
    shared = {
        "contents": contents,
        "made": made,
        "missing": contents.missing,
        "training": describe_run(contents),
    }
    registration = None if contents.result is None else _registration(contents, contents.result)
    return filled("report.html.j2", r=registration, **shared)


# ---------------------------------------------------------------------- a registration


def _registration(contents: Contents, result: Result) -> dict[str, Any]:
    verdict = result.verdict or "unknown"
    found = result.transform
    fixed_grid = _grid(result, "fixed")
    centre = np.zeros(3) if fixed_grid is None else fixed_grid.centre_mm
    direction = None if fixed_grid is None else np.asarray(fixed_grid.direction)
    candidates = _candidates(result, found, centre)
    return {
        "title": f"{_name(contents, result, 'moving')} on {_name(contents, result, 'fixed')}",
        "verdict": verdict,
        "symbol": _SYMBOLS.get(verdict, "?"),
        "meaning": _MEANINGS.get(verdict, "The result carries no verdict.")
        if found is not None
        else _NOTHING,
        "reasons": result.reasons,
        "advice": _advice(result),
        "notes": result.notes,
        "numbers": _numbers(result, centre),
        "errors": _errors(result),
        "evidence": evidence_rows(result),
        "probability": "" if result.probability is None else in_percent(result.probability),
        "planes": [] if contents.panels is None else plane_pictures(contents.panels, direction),
        "deformation": _deformation(contents, result, direction),
        "refinement": describe_refinement(contents, direction),
        "landscape": _landscape(contents, found, candidates, fixed_grid),
        "candidates": candidates,
        "matrix": [] if found is None else [[f"{v:.6f}" for v in row] for row in found.matrix_mm],
        "direction": result.direction,
        "snippets": [] if found is None else make_snippets(contents.folder, result),
        "timings": _timings(result.timings_s),
        "files": file_sums(contents.folder),
        "inputs": [_input(result, role) for role in ("fixed", "moving") if role in result.inputs],
        "versions": result.versions,
        "settings": flatten(result.settings),
        "model": flatten(result.model or {}),
    }


def _advice(result: Result) -> list[Markup]:
    offered = REPRESENTATIONS.get(result.representation or str(result.settings.get("representation")))
    if result.verdict == "PASS":
        return [
            Markup("Look at the checkerboard once: edges must run on across the squares."),
            Markup("Apply the transform with the commands under <a href='#transform'>Transform</a>."),
        ]
    wider = "raise <code>--rotations</code> and <code>--candidates</code>, and register again."
    if result.settings.get("initial", "global") != "global":
        wider = "use <code>--initial global</code>, and register again."
    if result.verdict == "WARN":
        steps = [
            Markup("Go through the pictures plane by plane, above all those of the representations."),
            Markup("If they are off, search more widely: " + wider),
        ]
    else:
        steps = [
            Markup(
                "Check under <a href='#provenance'>Provenance</a> that both volumes show one specimen and that "
                "their spacings are right."
            ),
            Markup("Search more widely: " + wider),
        ]
    if offered is not None and offered.trained:
        steps.append(
            Markup(
                "If the two representations do not look alike, the encoders do not know such images: make some that "
                "do, with <code>comir-hpc adapt</code> from this pair, or with <code>train</code> from an aligned one."
            )
        )
    return steps


def _numbers(result: Result, centre_mm: Any) -> list[Number]:
    metric, truth, baseline = result.metric or Metric(), result.truth, result.baseline
    numbers = []
    if truth is not None:
        other = ""
        if baseline is not None and is_number(baseline.tre_mm):
            other = f"; {baseline.name}: {figure(baseline.tre_mm)} mm"
        voxels = "" if truth.tre_voxels is None else f"{figure(truth.tre_voxels)} voxels"
        numbers.append(Number("Error against the truth", f"{figure(truth.tre_mm)} mm", voxels + other))
    if result.transform is not None:
        numbers += _found_numbers(result, result.transform, centre_mm)
    # Where the metric is the agreement itself, it is said once.
    if metric.value is not None and is_number(metric.value) and metric.value != result.agreement:
        numbers.append(Number("Metric", figure(metric.value), metric.name))
    if result.timings_s:
        seconds = sum(result.timings_s.values())
        numbers.append(Number("Time", duration(seconds), "all stages of the registration"))
    if result.peak_memory_mib is not None and is_number(result.peak_memory_mib):
        numbers.append(Number("Peak memory", in_words(result.peak_memory_mib * 1024**2), "of the process"))
    return numbers


def _found_numbers(result: Result, found: Transform, centre_mm: Any) -> list[Number]:
    shift = found.apply(centre_mm) - centre_mm
    lead = (
        "no second answer was left to compare"
        if result.margin is None
        else "lead over the next distinct answer"
    )
    return [
        Number("Agreement", figure(result.agreement), "correlation after alignment; 1 is perfect"),
        Number("Margin", figure(result.margin), lead),
        Number("Rotation", f"{found.rotation_deg:.2f}°", "fixed to moving"),
        Number(
            "Translation",
            f"{figure(float(np.linalg.norm(shift)))} mm",
            "of the fixed centre, x y z: " + " ".join(f"{v:.2f}" for v in shift),
        ),
    ]


def _errors(result: Result) -> list[dict[str, str]]:
    """Make the rows of the table of errors against a known truth; none where no truth is known."""
    if result.truth is None:
        return []
    beside = (() if result.baseline is None else (result.baseline,)) + result.others
    own = {"method": "this registration"} | _error_row(result.truth)
    return [own, *({"method": other.name} | _error_row(other) for other in beside)]


def _error_row(errors: Errors) -> dict[str, str]:
    keys = ("tre_mm", "tre_voxels", "tre_median_mm", "tre_p95_mm", "rotation_error_deg")
    return {key: figure(getattr(errors, key)) for key in keys}


def _candidates(result: Result, found: Transform | None, centre_mm: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, candidate in enumerate(result.candidates, start=1):
        other = candidate.transform
        away = angle = None
        if found is not None:
            angle = float(angle_deg(found.rotation_xyz.T @ other.rotation_xyz))
            away = float(found.distance_mm(other, centre_mm))
        turned = other.rotation_deg if candidate.rotation_deg is None else candidate.rotation_deg
        rows.append(
            {
                "rank": number if candidate.rank is None else candidate.rank,
                "rotation": f"{turned:.1f}",
                "coarse": candidate.coarse_score,
                "coarse_text": figure(candidate.coarse_score),
                "refined_text": figure(candidate.refined_score),
                "angle": angle,
                "angle_text": "–" if angle is None else f"{angle:.1f}",
                "away_text": "–" if away is None else f"{away:.2f}",
                "chosen": angle is not None and away is not None and angle < 1e-3 and away < 1e-3,
            }
        )
    return rows


def _deformation(contents: Contents, result: Result, direction: NDArray[Any] | None) -> dict[str, Any] | None:
    """Describe what bends space; None where nothing that bends was asked for."""
    record = result.deformation
    if record is None:
        return None
    drawn = contents.panels is not None and contents.deformation is not None
    return {
        "kept": record.kept,
        "reason": record.reason,
        "numbers": deformation_numbers(record),
        "planes": deformation_pictures(contents.panels or {}, contents.deformation or {}, direction)
        if drawn
        else [],
    }


def _landscape(
    contents: Contents,
    found: Transform | None,
    candidates: Sequence[Mapping[str, Any]],
    fixed: Grid | None,
) -> list[Chart]:
    search = contents.search
    if search is None or found is None or not {"rotations", "scores"} <= set(search):
        return []
    finite = np.isfinite(search["scores"])
    if not finite.any():
        return []
    rotations = np.asarray(search["rotations"], dtype=np.float64)[finite]
    scores = np.asarray(search["scores"], dtype=np.float64)[finite]
    angles = angle_deg(np.swapaxes(rotations, -1, -2) @ found.rotation_xyz)
    # Candidates of another start than the search have no coarse score, and no place in its landscape.
    marked = [(c["angle"], c["coarse"], str(c["rank"])) for c in candidates if is_number(c["coarse"])]
    drawn = [
        Chart(
            "Score of every rotation",
            Markup(charts.score_against_angle(angles, scores, marked)),
            f"{len(scores)} rotations, each at its best shift. Circles are the candidates that were refined. A "
            "clear answer is a single peak at the left; a second peak elsewhere is a second answer.",
        ),
    ]
    if fixed is not None and fixed.planar:  # whose axis has one direction only
        return drawn
    return [
        *drawn,
        Chart(
            "Best score by direction",
            Markup(charts.direction_map(rotations, scores, found.rotation_xyz)),
            "All directions into which the fixed volume’s z axis can be turned, the best of the turns about each; "
            "the ring in the middle is the answer. A second bright spot is a second answer.",
        ),
    ]


def _timings(timings: Mapping[str, float]) -> list[dict[str, Any]]:
    longest = max(timings.values(), default=0.0) or 1.0
    return [
        {"name": name.replace("_", " "), "text": duration(value), "share": round(100 * value / longest, 1)}
        for name, value in timings.items()
    ]


def _input(result: Result, role: str) -> dict[str, str]:
    grid = _grid(result, role)
    record = result.inputs[role]
    return {
        "role": role,
        "path": record.path,
        "source": record.source or "–",
        "fingerprint": record.fingerprint or "–",
        "grid": "–" if grid is None else str(grid),
        "origin": "–" if grid is None else " ".join(f"{v:g}" for v in grid.origin_mm) + " mm (x, y, z; LPS)",
        "direction": "–"
        if grid is None
        else "  ".join(" ".join(f"{v:.3g}" for v in row) for row in grid.direction),
    }


def _grid(result: Result, role: str) -> Grid | None:
    record = result.inputs.get(role)
    return None if record is None else record.space


def _name(contents: Contents, result: Result, role: str) -> str:
    record = result.inputs.get(role)
    if record is None:
        return f"the {role} volume"
    # A store in the folder of the result was made by `register`: the user knows the file that was given.
    made_here = Path(record.path).parent.resolve() == contents.folder.resolve()
    return Path(record.source if made_here and record.source else record.path).name
