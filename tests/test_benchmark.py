"""A benchmark: what it refuses, one case after the other, crashes and hangs, resuming, and what its table says."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import wilcoxon
from typer.testing import CliRunner

from comir_hpc.commands.app import app
from comir_hpc.config.benchmark import BenchmarkRunSettings, BenchmarkSettings, all_methods
from comir_hpc.config.files import load
from comir_hpc.data.embedded import phantom_pair, write_nifti
from comir_hpc.errors import ConfigError
from comir_hpc.recipes.benchmark.figures import draw
from comir_hpc.recipes.benchmark.methods import given, method
from comir_hpc.recipes.benchmark.page import summarise, tables
from comir_hpc.recipes.benchmark.run import benchmark, plan_benchmark
from comir_hpc.recipes.benchmark.scores import comparisons, holm, scores, signed_rank, wilson
from comir_hpc.recipes.benchmark.table import COLUMNS, Table
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform, save_transform

# Other programs, as they fail: one hangs, one crashes, one raises.
BROKEN = {
    "ants": "import time\ndef image_read(path):\n    time.sleep(600)\n",
    "itk": "import os\nclass ParameterObject:\n    New = staticmethod(os.abort)\n",
    "picsl_greedy": "class Greedy3D:\n    def execute(self, *_, **__):\n        raise RuntimeError('no such metric')\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of phantoms, the truth, and programs that fail."""
    folder = tmp_path_factory.mktemp("benchmark")
    grid = Grid((24, 26, 22), (2.0, 2.0, 2.0))
    for name, values in zip(("fixed", "moving"), phantom_pair(grid.shape_zyx, seed=1), strict=True):
        write_nifti(folder / f"{name}.nii.gz", values, grid)
    save_transform(Transform.identity(), folder, {})
    (folder / "peers").mkdir()
    for name, text in BROKEN.items():
        (folder / "peers" / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def settings(folder: Path, **changes: Any) -> BenchmarkSettings:
    pair = {"name": "mine", "fixed": "fixed.nii.gz", "moving": "moving.nii.gz", "truth": "transform.tfm"}
    record = {"pairs": [pair], "levels": ["small"], "methods": ["identity"], "seeds": 1, **changes}
    return BenchmarkSettings.model_validate(record).placed_in(folder)


def run(out: Path, **changes: Any) -> BenchmarkRunSettings:
    return BenchmarkRunSettings(config=Path("none.yaml"), out=out, **changes)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pairs: [embeded]", "no family 'embeded'; did you mean embedded?"),
        ("pairs: [t1-epi]", "did you mean t1_epi?"),
        ("pairs: [embedded]\nlevels: [larg]", "no level 'larg'; did you mean large?"),
        ("pairs: [embedded]\nmethods: [elastics]", "no method 'elastics'; did you mean elastix?"),
        ("pairs: [embedded]\nmethods: [comir-moment]", "did you mean comir-moments?"),
        ("pairs: [embedded]\ndegradations: [noisy]", "no degradation 'noisy'; did you mean noise?"),
        ("pairs: [embedded]\nmethods: [mind, mind]", "method mind is given twice"),
        ("pairs: [{name: a, fixed: f, moving: m}]", "pair a: nothing is given of the answer"),
        (
            "pairs: [{name: a, fixed: f, moving: m, fixed_points: p}]",
            "fixed_points and moving_points is given of the answer; expected one of",
        ),
        ("pairs: [{name: embedded, fixed: f, moving: m, truth: t}]", "has the name of a family"),
        ("pairs: []", "pairs is empty; expected at least one"),
        ("pairs: [embedded]\nmethods: []", "methods is empty"),
        (
            "pairs: [embedded]\nmethods: [comir@brian]\nmodels: {brain: {run: r}}",
            "no model 'brian'; did you mean brain?",
        ),
        ("pairs: [embedded]\nmethods: [mind@brain]", "no method with a model 'mind'; did you mean"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load(BenchmarkSettings, tmp_path / "b.yaml")
    assert said in str(refused.value)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs").glob("benchmark*.yaml")))
def test_committed_settings_are_valid(path: Path) -> None:
    found = load(BenchmarkSettings, path)
    assert {name.partition("@")[0] for name in found.methods} <= set(all_methods())


def test_every_representation_has_every_start() -> None:
    assert {"gradient", "gradient-moments", "mind-identity", "intensity", "comir-moments"} <= set(
        all_methods()
    )


def test_paths_are_relative_to_the_file_and_those_of_the_command_to_the_current_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.yaml").write_text("pairs: [embedded]\nmethods: [elastix]\nseeds: 1\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    told = CliRunner().invoke(app, ["benchmark", str(tmp_path / "b.yaml"), "--data", "missing", "--dry-run"])
    assert told.exit_code == 0
    (tmp_path / "c.yaml").write_text("pairs: [concrete]\n", encoding="utf-8")
    refused = CliRunner().invoke(
        app, ["benchmark", str(tmp_path / "c.yaml"), "--data", "missing", "--dry-run"]
    )
    assert f"{folder / 'missing'}" in str(refused.exception)
    assert "comir-hpc datasets fetch concrete" in str(refused.exception)


def test_a_method_may_use_a_model_of_its_own(tmp_path: Path) -> None:
    text = (
        "pairs: [embedded]\nmethods: [comir, comir@brain]\nmodels: {brain: {run: r, modalities: [t1, epi]}}"
    )
    (tmp_path / "b.yaml").write_text(text, encoding="utf-8")
    found = load(BenchmarkSettings, tmp_path / "b.yaml")
    assert found.model_of("comir@brain") == (tmp_path / "r", ("t1", "epi"))
    assert found.model_of("comir") == (None, ("any", "any"))
    assert given(method("comir@brain"), 1, found.model_of("comir@brain")[0]).endswith(
        "--initial global; model r"
    )


# ---------------------------------------------------------------------- running


def rows_in(path: Path) -> dict[str, dict[str, str]]:
    return {row["method"]: row for row in Table(path).rows()}


def test_a_hang_a_crash_and_an_error_are_failed_cases_with_their_messages(
    folder: Path, tmp_path: Path
) -> None:
    methods = ["ants", "identity", "elastix", "greedy"]
    out = tmp_path / "table.csv"
    start = time.monotonic()
    hung = benchmark(settings(folder, methods=["ants"], peers="peers", time_limit_s=2.5), run(out))
    assert (hung.added, hung.failed) == (1, 1)
    assert time.monotonic() - start < 100
    asked = settings(folder, methods=methods, peers="peers")
    done = benchmark(asked, run(out))
    assert (done.added, done.failed, done.skipped, done.left) == (3, 2, 0, 0)
    rows = rows_in(out)
    assert rows["ants"]["error"] == "stopped after the time limit of 2.5 s"
    assert rows["elastix"]["error"].startswith("ended by SIGABRT")
    assert rows["greedy"]["error"] == "ended with code 1: RuntimeError: no such metric"
    assert [rows[name]["status"] for name in methods] == ["failed", "done", "failed", "failed"]
    assert [rows[name]["success"] for name in methods] == ["False"] * 4
    # The pair as it lies: its error is what it was displaced by.
    assert rows["identity"]["tre_mm"] == rows["identity"]["displaced_mm"]
    assert float(rows["identity"]["tre_voxels"]) == pytest.approx(
        float(rows["identity"]["tre_mm"]) / 2, rel=2e-3
    )
    assert "two files, no masks" in rows["greedy"]["given"]
    assert "-dof 6 -m NMI" in rows["greedy"]["given"]
    assert not (tmp_path / "table-work").exists()
    text = out.read_text(encoding="utf-8")
    assert text.startswith("# ")
    # What is there is not done again, what failed neither.
    assert benchmark(asked, run(out)).added == 0
    assert out.read_text(encoding="utf-8") == text
    page = "\n".join(summarise(out))
    assert "table.md" in page
    assert "no such metric" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_what_is_not_installed_is_skipped_with_the_command_and_done_later(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "peers").mkdir()  # empty
    hidden = (
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'picsl_greedy' else find(n, *a)\n"
    )
    (tmp_path / "peers" / "sitecustomize.py").write_text(hidden, encoding="utf-8")
    out = tmp_path / "table.csv"
    done = benchmark(settings(folder, methods=["greedy"], peers=str(tmp_path / "peers")), run(out))
    assert (done.added, done.failed, done.skipped) == (1, 0, 1)
    row = rows_in(out)["greedy"]
    assert (row["status"], row["success"]) == ("skipped", "")
    assert "pip install --target peers 'picsl-greedy" in row["error"]
    assert scores([row]) == []  # it is no failure of the method
    later = benchmark(settings(folder, methods=["greedy"], peers="peers"), run(out))
    assert (later.added, later.failed) == (1, 1)
    assert len(Table(out).rows()) == 1


def test_parts_and_workers_fill_one_table_and_a_stopped_one_goes_on(folder: Path, tmp_path: Path) -> None:
    asked = settings(folder, seeds=2, levels=["none", "small"])
    out = tmp_path / "table.csv"
    first = benchmark(asked, run(out, part=(1, 2), workers=2))
    assert (first.added, first.left) == (2, 1)  # three cases: nothing is drawn at the level none
    assert plan_benchmark(asked, run(out))["rows"] == "1 to add, 2 done"
    second = benchmark(asked, run(out, part=(2, 2)))
    assert (second.added, second.left) == (1, 0)
    rows = Table(out).rows()
    assert {(row["level"], row["seed"]) for row in rows} == {("none", "0"), ("small", "0"), ("small", "1")}
    # A row is taken out: only that is done again, and it is what it was.
    kept = [
        line for line in out.read_text(encoding="utf-8").splitlines() if not line.startswith("mine,small,1")
    ]
    out.write_text("\n".join(kept) + "\n", encoding="utf-8")
    assert benchmark(asked, run(out)).added == 1
    again = {(row["level"], row["seed"]): row["tre_mm"] for row in Table(out).rows()}
    assert again == {(row["level"], row["seed"]): row["tre_mm"] for row in rows}


def test_a_stop_ends_the_program_that_is_running_and_exits_with_85(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "started"
    (tmp_path / "ants.py").write_text(
        "import os, pathlib, time\ndef image_read(path):\n"
        f"    pathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\n    time.sleep(600)\n",
        encoding="utf-8",
    )
    config = tmp_path / "b.yaml"
    config.write_text(
        f"pairs: [{{name: mine, fixed: {folder}/fixed.nii.gz, moving: {folder}/moving.nii.gz, "
        f"truth: {folder}/transform.tfm}}]\nlevels: [none]\nmethods: [ants]\nseeds: 1\npeers: .\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "comir_hpc", "benchmark", str(config), "--out", str(tmp_path / "t.csv")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 100
        while not (mark.is_file() and mark.read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        child = int(mark.read_text())
        process.send_signal(signal.SIGUSR2)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 85, said
    assert "the same command goes on" in said
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (tmp_path / "t.csv").exists()


def test_an_answer_that_does_not_fit_is_found_before_the_first_case(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("x,y,z\n0,0,0\n1,0,0\n0,1,0\n0,0,1\n", encoding="utf-8")
    (tmp_path / "two.csv").write_text("x,y,z\n0,0,0\n", encoding="utf-8")
    pair = {"name": "mine", "fixed": "fixed.nii.gz", "moving": "moving.nii.gz"}
    pair |= {"fixed_points": str(tmp_path / "one.csv"), "moving_points": str(tmp_path / "two.csv")}
    asked = settings(folder, pairs=["embedded", pair])
    for each in (plan_benchmark, benchmark):
        with pytest.raises(ConfigError, match=r"one.csv has 4 landmarks and .*two.csv has 1"):
            each(asked, run(tmp_path / "t.csv"))
    assert not (tmp_path / "t.csv").exists()


# ---------------------------------------------------------------------- tables


def test_a_table_of_an_older_version_keeps_its_columns(tmp_path: Path) -> None:
    """benchmarks/general/cases.csv has no column for degradations."""
    path = tmp_path / "cases.csv"
    before = "# python run.py\nfamily,level,seed,method,verdict,success,tre_mm\nembedded,small,0,comir,PASS,True,0.58\n"
    path.write_text(before, encoding="utf-8")
    table = Table(path)
    assert table.done() == {("embedded", "small", 0, "none", "comir")}
    table.add(
        {"family": "embedded", "level": "any", "seed": 0, "method": "comir", "success": False, "threads": 1}
    )
    assert path.read_text(encoding="utf-8") == before + "embedded,any,0,comir,,False,\n"
    assert scores(table.rows())[0].right == 1


def test_a_table_that_cannot_be_written_is_refused_before_the_first_case(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot be written.*give another --out"):
        benchmark(settings(folder), run(tmp_path / "file" / "table.csv"))


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("x,y,z\n1,2,3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="has no column family: it is no table"):
        Table(tmp_path / "points.csv").rows()


def test_messages_and_numbers_stay_on_their_line(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv")
    row = {
        "family": "a",
        "level": "any",
        "seed": 3,
        "degradation": "none",
        "method": "ants",
        "status": "failed",
    }
    table.add({**row, "error": 'one, "two"\nthree', "tre_mm": 1.23456789}, head="command\nof two lines")
    lines = (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# command of two lines"
    assert len(lines) == 3
    (read,) = csv.DictReader(lines[1:])
    assert (read["error"], read["tre_mm"]) == ('one, "two" three', "1.235")
    assert tuple(read) == COLUMNS


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("found", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (4, 4, 0.5101, 1.0),
        (50, 100, 0.4038, 0.5962),
        (0, 0, 0.0, 1.0),
    ],
)
def test_intervals_are_wilsons(found: int, total: int, low: float, high: float) -> None:
    np.testing.assert_allclose(wilson(found, total), (low, high), atol=1e-4)


def test_adjusted_p_values_are_holms() -> None:
    np.testing.assert_allclose(holm([0.01, 0.02, 0.03, 0.04]), [0.04, 0.06, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.001, 0.4]), [0.8, 0.003, 0.8])
    assert holm([]) == []


def made_rows(errors: dict[str, list[float | None]]) -> list[dict[str, str]]:
    return [
        {
            "family": "mine", "level": ("small", "any")[seed % 2], "seed": str(seed), "degradation": "none",
            "method": method, "status": "done" if error is not None else "failed", "verdict": "WARN",
            "success": str(error is not None and error <= 2), "tre_mm": "" if error is None else str(error),
            "tre_median_mm": "" if error is None else str(error), "tre_p95_mm": "" if error is None else str(error),
            "tre_voxels": "" if error is None else str(error), "seconds": "10", "cpu_seconds": "9",
            "peak_memory_mib": "100", "rotation_deg": str(20 * seed), "error": "" if error is not None else "lost",
        }
        for method, values in errors.items()
        for seed, error in enumerate(values)
    ]  # fmt: skip


ROWS = made_rows(
    {
        "good": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2],
        "bad": [0.9, 1.1, 1.0, 30.0, None, None, 1.9, 9.0],
        "few": [0.4, 0.5],
    }
)


def test_scores_count_failures_as_wrong_and_leave_them_out_of_errors() -> None:
    good, bad, _ = scores(ROWS)
    assert (good.cases, good.right, good.failed, good.tre_mm) == (8, 8, 0, pytest.approx(0.85))
    assert (bad.cases, bad.right, bad.failed, bad.tre_mm) == (8, 4, 2, pytest.approx(1.5))
    assert bad.verdicts_wrong == (0, 4, 0)
    by_level = {(one.group, one.method): one.right for one in scores(ROWS, ("level",))}
    assert by_level["small", "bad"] == 3
    assert by_level["any", "bad"] == 1


def test_paired_tests_are_scipys_and_failures_are_the_worst_errors() -> None:
    one, two = (
        np.array([float(r["tre_mm"] or 1e6) for r in ROWS if r["method"] == m]) for m in ("good", "bad")
    )
    wanted = wilcoxon(one, two).pvalue
    lost = np.where(two == 1e6, np.inf, two)
    assert signed_rank(one, lost) == pytest.approx(wanted)
    found = {(each.method, each.other): each for each in comparisons(ROWS)}
    assert found["good", "bad"].p_value == pytest.approx(
        wanted
    )  # the only test of the pair that has enough cases
    assert found["good", "bad"].difference_mm == pytest.approx(-0.65)
    assert np.isnan(found["good", "few"].p_value)
    assert np.isnan(signed_rank(one, one))


def test_the_page_says_what_the_rows_say() -> None:
    text = tables(ROWS)
    assert (
        "| mine | good | 8 of 8 | 68% to 100% | 0.85 / 0.85 / 0.85 | 0.85 | 10.00 | 9.00 | 100 | 0 |" in text
    )
    assert "| mine | bad | 3 of 4 | 1 of 4 |" in text
    assert "| mine | good | bad | 8 | -0.65 | 0.0078 |" in text
    assert "| mine | bad | failed | 2 | lost |" in text
    assert "degradation" not in text


def test_figures_are_drawn_and_tell_methods_apart_without_colour(tmp_path: Path) -> None:
    from matplotlib.image import imread

    files = draw(ROWS, tmp_path, "t")
    assert [file.name for file in files] == ["t-success.png", "t-errors.png", "t-time.png"]
    for file in files:
        picture = imread(file)
        assert picture[..., :3].min() < 0.5
        assert picture.shape[0] > 200
    from comir_hpc.recipes.benchmark.figures import _styles

    styles = [(style["marker"], style["linestyle"]) for style in _styles(ROWS).values()]
    assert len(set(styles)) == len(styles)
    assert draw([], tmp_path, "none") == []
