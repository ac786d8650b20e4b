"""What a registration leaves when it fails, when it cannot write, and when it is run again."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registration_cases import store
from small_disk import make_read_only, small_disk
from test_register import CENTRE, PLAIN, only_volumes, pair, settings, turn, turned

from comir_hpc.config import RegisterSettings
from comir_hpc.errors import RegistrationError, UnsavedResult
from comir_hpc.register import outputs, register
from comir_hpc.report import report
from comir_hpc.runs.result import read_result
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform


def fails(folder: Path, **changes: Any) -> RegisterSettings:
    """A pair whose specimens overlap by so little where they are put that no start leads to an answer."""
    away = Grid(PLAIN.shape_zyx, PLAIN.spacing_zyx, (PLAIN.origin_mm[0] + 22.0, *PLAIN.origin_mm[1:]))
    truth = Transform.rigid(np.eye(3), away.centre_mm - CENTRE, CENTRE)
    return settings(folder, pair(folder, truth, away), initial="identity", **changes)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> RegisterSettings:
    chosen = fails(tmp_path_factory.mktemp("failed"))
    register(chosen)
    return chosen


def command(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    here = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "comir_hpc", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": here},
    )


# ---------------------------------------------------------------------- a registration that fails


def test_a_search_in_vain_leaves_a_result_with_its_reasons_and_no_transform(failed: RegisterSettings) -> None:
    names = {path.name for path in failed.out.iterdir()} - {"report.html"}
    assert names == {"result.json", "panels.npz"}
    result = read_result(failed.out)
    assert result.verdict == "FAIL"
    assert result.transform is None
    assert "none of 1 starts led to an answer (the best: only " in result.reasons[0]
    assert "of the smaller specimen overlaps" in result.reasons[0]
    assert (result.agreement, result.margin) == (None, None)
    assert result.fingerprint
    assert set(result.inputs) == {"fixed", "moving"}
    assert set(result.timings_s) >= {"open", "features", "search", "refine", "panels"}
    assert len(result.candidates) == 1
    with np.load(failed.out / "panels.npz") as panels:
        assert "axial_before_representation" in panels.files
        assert not [name for name in panels.files if "_after" in name]


def test_a_failed_registration_is_not_searched_again(failed: RegisterSettings) -> None:
    again = register(failed)
    assert again.skipped
    assert (again.verdict, again.transform) == ("FAIL", None)
    assert again.summary == f"FAIL: no transform was found; {failed.out / 'result.json'} (already done)"
    assert "none was found" in again._repr_html_()


def test_the_report_shows_a_failed_registration(failed: RegisterSettings) -> None:
    html = report(failed.out).read_text(encoding="utf-8")
    assert "No transform was found." in html
    assert "none of 1 starts led to an answer" in html
    assert html.count("overlay before alignment") == 3
    assert "after alignment" not in html
    assert "comir-hpc warp" not in html


def test_the_command_ends_with_1_and_leaves_a_report(tmp_path: Path) -> None:
    chosen = fails(tmp_path)
    stores = [f"--{role}{end}" for role in ("fixed", "moving") for end in ("", "-representation")]
    places = [chosen.fixed, chosen.fixed_representation, chosen.moving, chosen.moving_representation]
    options = [part for both in zip(stores, places, strict=True) for part in both]
    done = command("register", *options, "--initial", "identity", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("registration FAILED: none of 1 starts led to an answer")
    assert (tmp_path / "out" / "report.html").is_file()
    assert read_result(tmp_path / "out").verdict == "FAIL"


def test_a_result_of_before_is_withdrawn_with_its_transform(tmp_path: Path) -> None:
    good = settings(
        tmp_path, pair(tmp_path / "good", Transform.rigid(turn(4), (1.0, 0, 0), CENTRE)), initial="identity"
    )
    assert register(good).transform is not None
    assert (good.out / "transform.tfm").is_file()
    register(fails(tmp_path / "bad", out=good.out, overwrite=True))
    assert not (good.out / "transform.tfm").exists()
    assert not (good.out / "transform.json").exists()


# ---------------------------------------------------------------------- a folder that cannot be written to


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(tmp_path, pair(tmp_path, turned()), out=Path("/proc/comir-hpc/result"))
    monkeypatch.setattr("comir_hpc.register.starts.search", lambda *a, **k: pytest.fail("it searched"))
    with pytest.raises(RegistrationError, match="/proc/comir-hpc/result cannot be written to"):
        register(chosen)


def test_a_disk_without_room_is_refused_before_the_search(tmp_path: Path) -> None:
    chosen = settings(tmp_path, pair(tmp_path, turned()), out=tmp_path / "disk" / "result")
    with (
        small_disk(tmp_path / "disk", 2),
        pytest.raises(RegistrationError, match=r"has [12].* MiB of free disk space, 8.* MiB are needed"),
    ):
        register(chosen)


def test_a_disk_that_is_full_at_the_end_does_not_lose_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = Transform.rigid(turn(4), (1.0, 0, 0), CENTRE)
    chosen = settings(tmp_path, pair(tmp_path, truth), initial="identity")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs, "save_transform", full)
    with pytest.raises(UnsavedResult, match=r"cannot be written to \(No space left on device") as unsaved:
        register(chosen)
    assert "\n" not in str(unsaved.value)
    content = json.loads(unsaved.value.content)
    assert content["rotation_deg"] == pytest.approx(4, abs=0.3)
    assert content["verdict"] in ("PASS", "WARN", "FAIL")
    assert not (chosen.out / "result.json").exists()


def test_the_command_prints_the_result_that_it_cannot_write(tmp_path: Path) -> None:
    paths = only_volumes(pair(tmp_path, Transform.rigid(turn(4), (1.0, 0, 0), CENTRE)))
    out = tmp_path / "disk" / "out"
    with small_disk(tmp_path / "disk", 9.1) as disk:
        (disk / "filler").write_bytes(b"")
        full = (
            "import comir_hpc.register as r, pathlib\n"
            "panels = r.make_panels\n"
            "def fill(*a, **k):\n"  # somebody else fills the disk while it searches
            f"    file = pathlib.Path({str(disk / 'filler')!r}).open('wb', buffering=0)\n"
            "    try:\n"
            "        while file.write(bytes(65536)): pass\n"
            "    except OSError: pass\n"
            "    return panels(*a, **k)\n"
            "r.make_panels = fill\n"
            "from comir_hpc.commands import main\n"
            "main()\n"
        )
        arguments = [
            "register",
            "--fixed",
            str(paths["fixed"]),
            "--moving",
            str(paths["moving"]),
            "--out",
            str(out),
        ]
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                full,
                *arguments,
                "--representation",
                "intensity",
                "--initial",
                "identity",
                "--checks",
                "quick",
            ],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        left = sorted(path.name for path in out.iterdir())
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["rotation_deg"] == pytest.approx(4, abs=0.5)
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "result.json" not in left


def test_a_finished_registration_in_a_read_only_folder_returns_what_is_there(tmp_path: Path) -> None:
    paths = pair(tmp_path, Transform.rigid(turn(4), (1.0, 0, 0), CENTRE))
    with small_disk(tmp_path / "disk", 16) as disk:
        chosen = settings(tmp_path, paths, initial="identity", out=disk / "out")
        first = register(chosen)
        page = report(chosen.out)
        before = page.read_bytes()
        make_read_only(disk)
        again = register(chosen)
        assert again.skipped
        assert again.verdict == first.verdict
        assert report(chosen.out) == page
        assert page.read_bytes() == before
        other = chosen.model_copy(update={"seed": 1, "overwrite": True})
        with pytest.raises(RegistrationError, match="cannot be written to"):
            register(other)


def test_a_read_only_folder_without_a_page_is_one_line(tmp_path: Path) -> None:
    store(tmp_path / "unused.zarr", np.ones((8, 8, 8), np.uint8), Grid((8, 8, 8), (1, 1, 1)))
    with small_disk(tmp_path / "disk", 4) as disk:
        result = {"matrix_lps_mm": np.eye(4).tolist(), "verdict": "WARN"}
        (disk / "result.json").write_text(json.dumps(result), encoding="utf-8")
        make_read_only(disk)
        done = command("report", disk)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "report.html cannot be written (Read-only file system)" in done.stderr
