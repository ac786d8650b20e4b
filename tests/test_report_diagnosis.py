"""What a run's page says of the figures that `evaluate` measured."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import page_source, picture
from result_folder import write_result_folder, write_run

from comir_hpc.evaluate.plots import draw_diagnosis
from comir_hpc.report import report
from comir_hpc.report.diagnosis import describe_diagnoses
from comir_hpc.space.groups import rotation_group
from comir_hpc.space.rotations import angle_deg


def make_record(step: int = 400, worst: float = 0.12) -> dict[str, Any]:
    """Figures like those of the demo's encoders, of which D4 was trained and O measured."""
    rng = np.random.default_rng(0)
    group, trained = rotation_group("O"), {m.tobytes() for m in rotation_group("D4").matrices}
    elements = [
        {
            "angle_deg": round(float(angle_deg(m))),
            "matrix_zyx": m.tolist(),
            "trained": m.tobytes() in trained,
        }
        for m in group.matrices
    ]
    angles = list(range(15, 181, 15))
    modalities = {}
    for name, scale in (("t1w", 0.8), ("t2w", 1.0)):
        errors = [0.0, *(worst * scale * rng.uniform(0.6, 1, 23)).tolist()]
        errors[7] = worst * scale
        curve = worst * np.sin(np.radians(np.array(angles))) ** 2 + 0.02
        modalities[name] = {
            "equivariance": {
                "errors": errors,
                "mean": float(np.mean(errors)),
                "worst": max(errors),
                "worst_element": 7,
            },
            "so3": {
                "angles_deg": angles,
                "axes_zyx": np.eye(3).tolist(),
                "errors": (scale * curve[:, None] * rng.uniform(0.9, 1.1, (len(angles), 3))).tolist(),
                "floor": [0.015] * len(angles),
                "voxels": 20000,
                "mean": 0.1,
                "worst": 0.2,
            },
            "effective_rank": 1.0,
            "border": 0.0023,
        }
    return {
        "run": "run",
        "step": step,
        "time": 1.0,
        "group": "O",
        "trained_group": "D4",
        "elements": elements,
        "cubes": {"starts": [[0, 8, 16], [8, 40, 16]], "side_zyx": [64, 64, 64], "trim_zyx": [16, 16, 16]},
        "modalities": modalities,
        "agreement": 0.76,
        "patches": {"retrieval": 0.98, "agreement": 0.8, "shifted": {"1": 0.6, "2": 0.35}},
        "bias": {"voxels": 0.118, "degrees": 0.05, "shift_voxels": 0.11, "verdict": "PASS"},
        "bias_missing": None,
    }


def write_record(run: Path, record: dict[str, Any]) -> Path:
    folder = run / "diagnostics" / f"step-{record['step']:08d}"
    folder.mkdir(parents=True)
    (folder / "diagnostics.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def test_the_newest_checkpoint_is_shown_and_all_are_compared() -> None:
    shown = describe_diagnoses([make_record(400), make_record(100, worst=0.5)])
    assert shown is not None
    assert shown["step"] == 400
    values = {number.label: number.value for number in shown["numbers"]}
    assert values["Registration bias"] == "0.118 voxel"
    assert "and 0.05°" in shown["numbers"][0].note
    assert values["Equivariance error, t2w"] == "0.12"
    assert not [label for label in values if "rank" in label]
    assert [chart.title for chart in shown["charts"]] == [
        "Equivariance error of every rotation",
        "Equivariance error at any angle",
        "Worst equivariance error by checkpoint",
    ]
    assert "Hollow" in shown["charts"][0].note
    for angle in (0, 90, 120, 180):
        assert f">{angle}°</text>" in shown["charts"][0].svg.replace("\n", "")
    assert "2 cubes of 64 × 64 × 64 voxels" in shown["how"]
    assert "16 voxels away from every face; padding changes values there by 0.0023" in shown["how"]


def test_what_was_not_measured_is_not_drawn() -> None:
    assert describe_diagnoses([]) is None
    assert describe_diagnoses([{"step": 3}]) is None
    record = make_record()
    record["bias"] = None
    for one in record["modalities"].values():
        one["equivariance"] = {"errors": [None] * 24, "mean": None, "worst": None, "worst_element": 0}
        one["so3"]["errors"] = [[None] * 3] * 12
    shown = describe_diagnoses([record, make_record(100)])
    assert shown is not None
    assert shown["charts"] == []
    assert {number.value for number in shown["numbers"] if "Equivariance" in number.label} == {"–"}


@pytest.mark.parametrize(
    "changes",
    [
        {"modalities": [1]},
        {"modalities": {"t1w": {"equivariance": {"errors": "none"}}}},
        {"elements": [{"angle_deg": "ninety", "trained": True}]},
        {"step": 4.5},
        {"cubes": {"starts": 3}},
    ],
)
def test_figures_of_wrong_types_are_left_out(changes: dict[str, Any]) -> None:
    assert describe_diagnoses([{**make_record(), **changes}]) is None
    shown = describe_diagnoses([make_record(100), {**make_record(400), **changes}])
    assert shown is not None
    assert shown["step"] == 100


def test_figures_of_other_lengths_are_not_drawn() -> None:
    record = make_record()
    for one in record["modalities"].values():
        one["equivariance"]["errors"].pop()
        one["so3"]["floor"].pop()
    shown = describe_diagnoses([record])
    assert shown is not None
    assert shown["charts"] == []


def test_ranks_of_several_channels_are_said() -> None:
    record = make_record()
    record["modalities"]["t1w"]["effective_rank"] = 2.4
    shown = describe_diagnoses([record])
    assert shown is not None
    assert ("Effective rank, t1w", "2.4") in [(n.label, n.value) for n in shown["numbers"]]


def test_the_pages_of_the_run_and_of_its_registration_show_it(tmp_path: Path) -> None:
    folder = write_result_folder(tmp_path)
    run = tmp_path / "run"
    assert "comir-hpc evaluate --model" in report(run).read_text(encoding="utf-8")
    write_record(run, make_record())
    for page in (report(run), report(folder)):
        html = page.read_text(encoding="utf-8")
        assert "Measured at step 400" in html
        assert "comir-hpc evaluate --model" not in html
        ids = re.findall(r'\bid="([^"]+)"', html)
        assert len(ids) == len(set(ids))


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw_diagnosis(tmp_path / "d.png", make_record())
    assert (tmp_path / "d.png").stat().st_size > 10_000


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_the_section_without_overflow(tmp_path: Path, width: int) -> None:
    run = write_run(tmp_path / "run")
    write_record(run, make_record())
    page = report(run)
    probe = (
        "<script>document.body.dataset.wide=document.documentElement.scrollWidth-innerWidth</script></body>"
    )
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    source, console = page_source(page.as_uri(), f"--window-size={width},900")
    assert console == []
    overflow = re.search(r'data-wide="(-?\d+)"', source)
    assert overflow is not None
    assert int(overflow.group(1)) <= 0
    assert picture(page.as_uri(), tmp_path / "p.png", width, 900).is_file()
