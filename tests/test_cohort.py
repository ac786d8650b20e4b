"""Several registrations on one page: the worst first, and nothing from outside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from result_folder import write_result_folder
from typer.testing import CliRunner

from comir_hpc.commands.app import app
from comir_hpc.errors import ComirError
from comir_hpc.report import cohort, report

PIECE = {
    "name": "margin", "value": 0.4, "unit": "share", "sentence": "it leads by 40 %", "title": "lead",
    "right": [0.2, 0.3, 0.4, 0.5, 0.6], "wrong": [-0.1, 0.0, 0.05, 0.1, 0.2],
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    found = []
    for name, verdict, probability in (
        ("a", "PASS", 0.97),
        ("b", "FAIL", 0.02),
        ("c", "WARN", 0.4),
        ("d", "PASS", 0.9),
    ):
        made = write_result_folder(tmp_path / f"made-{name}", verdict)
        folder = tmp_path / name
        made.rename(folder)
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        record |= {"probability": probability, "bound_mm": 0.8, "evidence": [PIECE]}
        (folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
        found.append(folder)
    return found


def test_the_worst_comes_first_with_its_thumbnail_and_its_page(results: list[Path]) -> None:
    report(results[1])
    page = cohort(results)
    assert page == results[0].parent / "cohort.html"
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'<th scope="row" data-sort="(\w)"', text) == ["b", "c", "d", "a"]
    assert text.count("data:image/png;base64,") == 4
    assert 'href="b/report.html"' in text
    assert "//" not in re.sub(r'"data:[^"]*"', "", text)


def test_a_folder_that_cannot_be_read_is_a_line_and_none_at_all_is_refused(results: list[Path]) -> None:
    empty = results[0].parent / "<empty>"
    empty.mkdir()
    text = cohort([empty, results[0]]).read_text(encoding="utf-8")
    assert "&lt;empty&gt;" in text
    assert "<empty>" not in text
    assert "holds neither result.json" in text
    with pytest.raises(ComirError, match="none of 1 folders holds a registration"):
        cohort([empty])


def test_the_command_takes_several_folders(results: list[Path]) -> None:
    done = CliRunner().invoke(app, ["report", *map(str, results)])
    assert done.exit_code == 0, done.output
    assert "cohort.html" in done.output
    done = CliRunner().invoke(app, ["report", str(results[0])])
    assert "report.html" in done.output


def test_the_page_draws_each_piece_of_evidence_on_its_scale(results: list[Path]) -> None:
    text = report(results[0]).read_text(encoding="utf-8")
    assert 'aria-label="lead: 40 %"' in text
    assert text.count('<rect class="right"') == text.count('<rect class="wrong"') == 2
    at = float(re.search(r'<line class="here" x1="([\d.]+)"', text)[1])  # type: ignore[index]
    assert at == pytest.approx(6 + (0.4 + 0.1) / 0.7 * 208, abs=0.1)
    assert "right with a probability of 97 %" in text
