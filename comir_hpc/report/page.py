"""From what a folder holds to the page: the numbers, sentences and drawings that the template lays out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from comir_hpc import __version__
from comir_hpc.geometry import Grid
from comir_hpc.memory import in_words
from comir_hpc.report import charts
from comir_hpc.report.contents import Contents, file_sums
from comir_hpc.report.panels import plane_pictures
from comir_hpc.report.training import describe_run
from comir_hpc.report.wording import Chart, Number, Snippet, duration, figure, is_number
from comir_hpc.rotations import angle_deg
from comir_hpc.tracking import flatten
from comir_hpc.transforms import Transform

_MEANINGS = {
    "PASS": "The volumes are aligned.",
    "WARN": "An alignment was found. Check it before you use it.",
    "FAIL": "No alignment that can be trusted was found. Do not use this transform.",
}
_SYMBOLS = {"PASS": "✓", "WARN": "!", "FAIL": "✕"}


def render(contents: Contents) -> str:
    """HTML of the page, complete in itself."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("comir_hpc.report", "template"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = {"version": __version__, "when": datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")}
    shared = {
        "contents": contents,
        "made": made,
        "missing": contents.missing,
        "training": describe_run(contents),
    }
    registration = None if contents.result is None else _registration(contents, contents.result)
    return environment.get_template("report.html.j2").render(r=registration, **shared)


# ---------------------------------------------------------------------- a registration


def _registration(contents: Contents, result: dict[str, Any]) -> dict[str, Any]:
    inputs = result.get("inputs") or {}
    verdict = str(result.get("verdict", "unknown"))
    found = Transform(np.asarray(result["matrix_lps_mm"], dtype=np.float64))
    fixed_grid = _grid(inputs, "fixed")
    centre = np.zeros(3) if fixed_grid is None else fixed_grid.centre_mm
    direction = None if fixed_grid is None else np.asarray(fixed_grid.direction)
    candidates = _candidates(result, found, centre)
    return {
        "title": f"{_name(inputs, 'moving')} on {_name(inputs, 'fixed')}",
        "verdict": verdict,
        "symbol": _SYMBOLS.get(verdict, "?"),
        "meaning": _MEANINGS.get(verdict, "The result carries no verdict."),
        "reasons": result.get("reasons") or [],
        "advice": _advice(verdict, result),
        "notes": result.get("notes") or [],
        "numbers": _numbers(result, found, centre),
        "errors": _errors(result),
        "planes": [] if contents.panels is None else plane_pictures(contents.panels, direction),
        "landscape": _landscape(contents, found, candidates, fixed_grid),
        "candidates": candidates,
        "matrix": [[f"{v:.6f}" for v in row] for row in found.matrix_mm],
        "direction": result.get("direction", ""),
        "snippets": _snippets(contents.folder, inputs),
        "timings": _timings(result.get("timings_s") or {}),
        "files": file_sums(contents.folder),
        "inputs": [_input(inputs, role) for role in ("fixed", "moving") if role in inputs],
        "versions": result.get("versions") or {},
        "settings": flatten(result.get("settings") or {}),
        "model": flatten(result.get("model") or {}),
    }


def _advice(verdict: str, result: Mapping[str, Any]) -> list[Markup]:
    learned = (result.get("settings") or {}).get("representation") == "comir"
    if verdict == "PASS":
        return [
            Markup("Look at the checkerboard once: edges must run on across the squares."),
            Markup("Apply the transform with the commands under <a href='#transform'>Transform</a>."),
        ]
    wider = "raise <code>--rotations</code> and <code>--candidates</code>, and register again."
    if verdict == "WARN":
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
    if learned:
        steps.append(
            Markup(
                "If the two representations do not look alike, the encoders do not know such images: train on an "
                "aligned pair from the same instruments."
            )
        )
    return steps


def _numbers(result: Mapping[str, Any], found: Transform, centre_mm: Any) -> list[Number]:
    shift = found.apply(centre_mm) - centre_mm
    metric, truth = result.get("metric") or {}, result.get("truth") or {}
    baseline, timings = result.get("baseline") or {}, result.get("timings_s") or {}
    numbers = []
    if truth:
        other = ""
        if is_number(baseline.get("tre_mm")):
            other = f"; {baseline.get('name', 'baseline')}: {figure(baseline['tre_mm'])} mm"
        voxels = f"{figure(truth.get('tre_voxels'))} voxels" if "tre_voxels" in truth else ""
        numbers.append(Number("Error against the truth", f"{figure(truth.get('tre_mm'))} mm", voxels + other))
    numbers += [
        Number("Agreement", figure(result.get("agreement")), "correlation after alignment; 1 is perfect"),
        Number("Margin", figure(result.get("margin")), "lead over the next distinct answer"),
        Number("Rotation", f"{found.rotation_deg:.2f}°", "fixed to moving"),
        Number(
            "Translation",
            f"{figure(float(np.linalg.norm(shift)))} mm",
            "of the fixed centre, x y z: " + " ".join(f"{v:.2f}" for v in shift),
        ),
    ]
    if is_number(metric.get("value")) and metric["value"] != result.get("agreement"):
        numbers.append(Number("Metric", figure(metric["value"]), str(metric.get("name", ""))))
    if timings:
        numbers.append(Number("Time", duration(sum(timings.values())), "all stages of the registration"))
    if is_number(result.get("peak_memory_mib")):
        numbers.append(Number("Peak memory", in_words(result["peak_memory_mib"] * 1024**2), "of the process"))
    return numbers


def _errors(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of errors against a known truth; none where no truth is known."""
    truth, baseline = result.get("truth"), result.get("baseline")
    if not truth:
        return []
    rows = [{"method": "this registration"} | _error_row(truth)]
    if baseline:
        rows.append({"method": str(baseline.get("name", "baseline"))} | _error_row(baseline))
    return rows


def _error_row(record: Mapping[str, Any]) -> dict[str, str]:
    keys = ("tre_mm", "tre_voxels", "tre_median_mm", "tre_p95_mm", "rotation_error_deg")
    return {key: figure(record.get(key)) for key in keys}


def _candidates(result: Mapping[str, Any], found: Transform, centre_mm: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for candidate in result.get("candidates") or []:
        other = Transform(np.asarray(candidate["matrix_lps_mm"], dtype=np.float64))
        angle = float(angle_deg(found.rotation_xyz.T @ other.rotation_xyz))
        away = float(found.distance_mm(other, centre_mm))
        rows.append(
            {
                "rank": candidate.get("rank", len(rows) + 1),
                "rotation": f"{candidate.get('rotation_deg', other.rotation_deg):.1f}",
                "coarse": candidate.get("coarse_score"),
                "coarse_text": figure(candidate.get("coarse_score")),
                "refined_text": figure(candidate.get("refined_score")),
                "angle": angle,
                "angle_text": f"{angle:.1f}",
                "away_text": f"{away:.2f}",
                "chosen": angle < 1e-3 and away < 1e-3,
            }
        )
    return rows


def _landscape(
    contents: Contents, found: Transform, candidates: Sequence[Mapping[str, Any]], fixed: Grid | None
) -> list[Chart]:
    search = contents.search
    if search is None or not {"rotations", "scores"} <= set(search):
        return []
    finite = np.isfinite(search["scores"])
    if not finite.any():
        return []
    rotations = np.asarray(search["rotations"], dtype=np.float64)[finite]
    scores = np.asarray(search["scores"], dtype=np.float64)[finite]
    angles = angle_deg(np.swapaxes(rotations, -1, -2) @ found.rotation_xyz)
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


def _snippets(folder: Path, inputs: Mapping[str, Any]) -> list[Snippet]:
    fixed, moving = (str((inputs.get(role) or {}).get("path", role)) for role in ("fixed", "moving"))
    tfm, record = str(folder / "transform.tfm"), str(folder / "transform.json")
    command = ["comir-hpc", "warp", "--zarr", moving, "--transform", tfm, "--like", fixed]
    points = ["comir-hpc", "warp", "--points", "points.csv", "--transform", tfm, "--out", "moved.csv"]
    return [
        Snippet("The moving volume on the fixed grid", shlex.join([*command, "--out", "warped.zarr"])),
        Snippet("Points of the fixed volume, in the moving one (LPS, mm)", shlex.join(points)),
        Snippet(
            "SimpleITK",
            "import SimpleITK as sitk\n\n"
            'fixed, moving = sitk.ReadImage("fixed.nii.gz"), sitk.ReadImage("moving.nii.gz")\n'
            f"transform = sitk.ReadTransform({tfm!r})\n"
            "aligned = sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0)",
        ),
        Snippet(
            "NumPy",
            "import json\nimport numpy as np\n\n"
            f"matrix = np.array(json.load(open({record!r}))['matrix_lps_mm'])\n"
            "moving_points = fixed_points @ matrix[:3, :3].T + matrix[:3, 3]  # (N, 3), LPS, mm",
        ),
    ]


def _timings(timings: Mapping[str, float]) -> list[dict[str, Any]]:
    longest = max(timings.values(), default=0.0) or 1.0
    return [
        {"name": name.replace("_", " "), "text": duration(value), "share": round(100 * value / longest, 1)}
        for name, value in timings.items()
    ]


def _input(inputs: Mapping[str, Any], role: str) -> dict[str, str]:
    grid = _grid(inputs, role)
    record = inputs[role]
    return {
        "role": role,
        "path": str(record.get("path", "–")),
        "fingerprint": str(record.get("fingerprint", "–")),
        "grid": "–" if grid is None else str(grid),
        "origin": "–" if grid is None else " ".join(f"{v:g}" for v in grid.origin_mm) + " mm (x, y, z; LPS)",
        "direction": "–"
        if grid is None
        else "  ".join(" ".join(f"{v:.3g}" for v in row) for row in grid.direction),
    }


def _grid(inputs: Mapping[str, Any], role: str) -> Grid | None:
    record = (inputs.get(role) or {}).get("grid")
    return Grid.from_dict(record) if record else None


def _name(inputs: Mapping[str, Any], role: str) -> str:
    path = (inputs.get(role) or {}).get("path")
    return Path(path).name if path else f"the {role} volume"
