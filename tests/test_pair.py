"""Two files in, everything out: `comir-hpc register` as its user meets it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from registration_cases import seen, specimen, turn
from trained_run import write_run
from typer.testing import CliRunner

from comir_hpc.api import Image, ingest
from comir_hpc.commands.app import app
from comir_hpc.config.register import volume_name
from comir_hpc.data.embedded import write_nifti
from comir_hpc.errors import ComirError, ConfigError
from comir_hpc.register.checks.verdict import Judgement
from comir_hpc.runs.result import read_result
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Affine
from comir_hpc.volumes.volume import Volume

JUDGE = "comir_hpc.register.checks.account.judge"
VALUES = (20 * specimen(brightness=5)[0]).clip(0).astype(np.float32)
GRID = Grid(VALUES.shape, (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))
ONTO = Grid((30, 44, 36), (1.5, 1.0, 1.0), (5.0, -8.0, 18.0))
TRUTH = Affine.rigid(turn(12), (2.5, -1.5, 3.0), GRID.centre_mm)
POINTS = GRID.world_mm(np.argwhere(VALUES > 60)[::50])
QUICK = ("--representation", "intensity", "--initial", "moments", "--checks", "quick", "--threads", "1")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two NIfTI files of one specimen, which is the current one."""
    write_nifti(tmp_path / "fixed.nii.gz", VALUES, GRID)
    write_nifti(tmp_path / "moving.nii.gz", seen(VALUES, GRID, ONTO, TRUTH), ONTO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: object) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def run(*words: object) -> str:
    """Run a command that ends well; what it printed."""
    done = command(*words)
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    return str(done.output)


def refused(*words: object) -> str:
    """Run a command that is refused; its one line."""
    done = command(*words)
    assert isinstance(done.exception, ComirError), f"{done.output}\n{done.exception!r}"
    assert "\n" not in str(done.exception)
    assert len(str(done.exception)) < 500
    return str(done.exception)


def lines(output: str) -> dict[str, str]:
    """What stands behind the first word of each line."""
    return dict(line.split(": ", 1) for line in output.splitlines() if ": " in line and line[0] != " ")


def correlation(found: np.ndarray[Any, Any]) -> float:
    inside = VALUES > 20
    return float(np.corrcoef(found[inside], VALUES[inside])[0, 1])


def test_two_files_of_different_spacing_give_a_transform_a_page_and_the_next_command(here: Path) -> None:
    said = lines(run("register", "fixed.nii.gz", "moving.nii.gz", *QUICK))
    out = here / "fixed-moving"  # named after the two
    assert "fixed-moving" in said["note"] or (out / "result.json").is_file()
    assert "fixed-moving/transform.tfm" in said["WARN"]
    assert "the refinement started at one place (--initial moments)" in said["why"]
    assert Path(said["report"]) == out / "report.html"
    assert (out / "report.html").stat().st_size > 10_000
    assert "moving.nii.gz on fixed.nii.gz" in (out / "report.html").read_text(encoding="utf-8")
    found = read_result(out).transform
    assert found is not None
    assert found.distance_mm(TRUTH, POINTS).mean() < 0.3
    stores = sorted(out.glob("*.zarr"))
    assert len(stores) == 2

    words = shlex.split(said["next"])
    assert words[:2] == ["comir-hpc", "warp"]
    run(*words[1:])
    assert sorted(out.glob("*.zarr")) == stores  # used again, not made again
    warped = nibabel.load(out / "moving_on_fixed.nii.gz")
    np.testing.assert_allclose(warped.affine, nibabel.load("fixed.nii.gz").affine)
    assert correlation(np.asanyarray(warped.dataobj).T) > 0.95


def test_a_second_run_does_nothing_again_and_notices_a_changed_file(here: Path) -> None:
    register = ("register", "fixed.nii.gz", "moving.nii.gz", *QUICK, "--warped", "w.nrrd")
    run(*register)
    watched = [
        *here.glob("fixed-moving/*.zarr/zarr.json"),
        here / "fixed-moving/result.json",
        here / "w.nrrd",
    ]
    before = [path.stat().st_mtime_ns for path in watched]
    again = run(*register)
    assert "already done" in again
    assert "ingest" not in again
    assert lines(again)["warped"] == "w.nrrd"
    assert [path.stat().st_mtime_ns for path in watched] == before

    write_nifti(here / "moving.nii.gz", VALUES, GRID)
    os.utime(here / "moving.nii.gz", ns=(1, 1))
    assert "holds the result of other inputs" in refused(*register)
    assert len(list(here.glob("fixed-moving/*.zarr"))) == 3
    run(*register, "--overwrite")
    found = read_result(here / "fixed-moving").transform
    assert found is not None
    assert found.distance_mm(Affine.identity(), POINTS).mean() < 0.1
    warped = sitk.GetArrayFromImage(sitk.ReadImage("w.nrrd"))  # of the new file, since the old one is ours
    assert correlation(warped) > 0.99


@pytest.mark.parametrize("name", ["w.nii.gz", "w.nii", "w.nrrd", "w.mha", "w.tif", "w.zarr", "in/w.zarr"])
def test_warped_is_what_warp_writes(name: str, here: Path) -> None:
    said = lines(run("register", "fixed.nii.gz", "moving.nii.gz", *QUICK, "--out", "r", "--warped", name))
    assert said["warped"] == name
    assert "next" not in said
    run(
        "warp",
        "--zarr",
        "moving.nii.gz",
        "--like",
        "fixed.nii.gz",
        "--transform",
        "r/transform.tfm",
        "--out",
        "r/w.zarr",
    )
    expected = Volume.open(here / "r" / "w.zarr").read()[0]
    assert correlation(expected) > 0.95
    path = here / name
    if path.suffix == ".zarr":
        assert Volume.open(path).grid == GRID
        found = Volume.open(path).read()[0]
    elif path.suffix == ".tif":
        found = tifffile.imread(path)
    else:
        image = sitk.ReadImage(path)
        np.testing.assert_allclose(image.GetOrigin(), GRID.origin_xyz, atol=1e-5)
        found = sitk.GetArrayFromImage(image)
    np.testing.assert_array_equal(found, expected)


def test_what_is_required_decides_the_exit_code_and_whether_it_is_warped(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verdict, require, code in (("WARN", "warn", 0), ("WARN", "pass", 1), ("PASS", "pass", 0)):
        found = Judgement(verdict, ("so it is",))  # type: ignore[arg-type]
        monkeypatch.setattr(JUDGE, lambda evidence, found=found: found)
        words = (*QUICK, "--warped", f"{verdict}-{require}.nii.gz", "--out", f"{verdict}-{require}")
        done = command("register", "fixed.nii.gz", "moving.nii.gz", *words, "--require", require)
        assert done.exit_code == code, done.output
        assert (here / f"{verdict}-{require}.nii.gz").is_file() == (code == 0)
        assert (here / f"{verdict}-{require}" / "transform.tfm").is_file()  # found it was, and it is kept
        if code:
            assert str(done.exception) == (
                "the verdict is WARN and --require pass asks for PASS, so WARN-pass.nii.gz was not written: so it is"
            )
        elif verdict == "WARN":
            assert "why: so it is" in done.output


def test_a_failed_registration_warps_nothing_and_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JUDGE, lambda evidence: Judgement("FAIL", ("they share nothing",)))
    done = command("register", "fixed.nii.gz", "moving.nii.gz", *QUICK, "--warped", "w.nii.gz")
    assert done.exit_code == 1
    assert str(done.exception) == "registration FAILED, so w.nii.gz was not written: they share nothing"
    assert "next:" not in done.output
    assert not (here / "w.nii.gz").exists()
    assert "report: " in done.output


def test_where_the_general_model_fails_the_next_command_is_adapt(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JUDGE, lambda evidence: Judgement("FAIL", ("they share nothing",)))
    done = command("register", "fixed.nii.gz", "moving.nii.gz", *QUICK[2:])
    assert str(done.exception) == "registration FAILED: they share nothing"
    assert lines(done.output)["next"] == "comir-hpc adapt fixed.nii.gz moving.nii.gz --run fixed-moving-run"
    assert command("adapt", *shlex.split(lines(done.output)["next"])[2:], "--dry-run").exit_code == 0


def test_the_report_is_left_out_if_that_is_asked_for(here: Path) -> None:
    register = ("register", "fixed.nii.gz", "moving.nii.gz", *QUICK, "--out", "r")
    run(*register)
    assert "report:" not in run(*register, "--no-report")
    assert (here / "r" / "report.html").is_file()  # of this result: it stays
    run(*register, "--no-report", "--seed", "1", "--overwrite")
    assert not (here / "r" / "report.html").exists()


def test_any_format_goes_in(here: Path) -> None:
    image = sitk.ReadImage("moving.nii.gz")
    sitk.WriteImage(image, "moving.nrrd")
    sitk.WriteImage(image, "moving.mha")
    values = sitk.GetArrayFromImage(image)
    tifffile.imwrite(
        "moving.tif", values, imagej=True, resolution=(1.0, 1.0),
        metadata={"spacing": 1.5, "unit": "mm", "axes": "ZYX"},
    )  # fmt: skip
    found = {}
    for name in ("moving.nii.gz", "moving.nrrd", "moving.mha", "moving.tif"):
        said = lines(run("register", "fixed.nii.gz", name, *QUICK, "--out", f"r-{name}"))
        result = read_result(here / f"r-{name}").transform
        assert result is not None
        found[name] = result
        proposed = shlex.split(said["next"])[-1]
        assert proposed == f"r-{name}/moving_on_fixed{name.removeprefix('moving')}"
    for name in ("moving.nrrd", "moving.mha"):
        np.testing.assert_allclose(found[name].matrix_mm, found["moving.nii.gz"].matrix_mm, atol=1e-4)
    # A TIFF has no origin: its points are shifted by the one of the NIfTI file.
    shifted = found["moving.tif"].apply(POINTS) + np.asarray(ONTO.origin_xyz)
    np.testing.assert_allclose(shifted, found["moving.nii.gz"].apply(POINTS), atol=0.05)


def test_a_plan_names_what_will_be_written(here: Path) -> None:
    planned = run("register", "fixed.nii.gz", "moving.nii.gz", *QUICK, "--dry-run")
    assert planned.count("peak memory") == 2
    assert sorted(path.name for path in here.iterdir()) == ["fixed.nii.gz", "moving.nii.gz"]
    run("register", "fixed.nii.gz", "moving.nii.gz", *QUICK, "--out", "r")
    planned = run(
        "register", "fixed.nii.gz", "moving.nii.gz", *QUICK, "--out", "r", "--warped", "w.mha", "--dry-run"
    )
    assert "w.mha, unless the verdict is FAIL" in planned
    assert "r/report.html" in planned


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fixed.nii.gz none.nii", "none.nii does not exist"),
        ("none.zarr moving.nii.gz", "none.zarr"),
        ("fixed.nii.gz notes.txt", "notes.txt: unknown format; expected NIfTI"),
        ("fixed.nii.gz torn.nii.gz", "torn.nii.gz"),
        ("fixed.nii.gz moving.nii.gz --warped w.jpg", "w.jpg: unknown format; expected .zarr (any size) or one of"),
        ("fixed.nii.gz moving.nii.gz --warped moving.nii.gz", "the output moving.nii.gz is the input"),
        ("fixed.nii.gz moving.nii.gz --warped notes.nii", "notes.nii exists; choose another name, or pass --overwrite"),
        ("fixed.nii.gz moving.nii.gz --model none --representation comir", "none does not exist"),
        ("fixed.nii.gz moving.nii.gz --model run --representation comir --fixed-modality one",
         "run has encoders of one, two; --moving-modality is missing"),
        ("fixed.nii.gz moving.nii.gz --model run --representation comir --fixed-modality t1 --moving-modality two",
         "run has encoders of one, two; --fixed-modality is t1"),
        ("fixed.nii.gz moving.nii.gz --representation comir --fixed-representation f.zarr",
         "give --moving-representation, or --model"),
        ("fixed.nii.gz moving.nii.gz --representation magic", "Input should be 'comir'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_ingested(words: str, said: str, here: Path) -> None:
    (here / "notes.txt").write_text("no volume", encoding="utf-8")
    (here / "notes.nii").write_text("no volume", encoding="utf-8")
    (here / "torn.nii.gz").write_bytes((here / "fixed.nii.gz").read_bytes()[:200])
    write_run(here / "run")
    before = sorted(here.rglob("*"))
    assert said in refused(
        "register", *words.split(), *(QUICK[2:] if "--repr" in words else QUICK), "--out", "r"
    )
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (
            (1, 44, 36),
            "is a single slice, and the general model sees volumes only; add --representation intensity",
        ),
        ((2, 40, 44, 36), "has 2 channels, and the general model sees one"),
    ],
)
def test_what_the_general_model_cannot_see_is_refused_with_what_can(
    shape: tuple[int, ...], said: str, here: Path
) -> None:
    values = np.broadcast_to(VALUES[20:21] if shape[0] == 1 else VALUES, shape)
    ingest(Image(values, (1.0, 1.0, 1.0)), here / "odd.zarr")
    assert said in refused("register", "odd.zarr", "odd.zarr")
    assert said in refused("register", "odd.zarr", "odd.zarr", "--dry-run")


def test_errors_of_python_name_keywords(here: Path) -> None:
    from comir_hpc import api

    write_run(here / "run")
    with pytest.raises(ComirError, match="moving_modality is missing"):
        api.register("fixed.nii.gz", "moving.nii.gz", model="run", fixed_modality="one")
    with pytest.raises(ConfigError, match=r"w\.gif: unknown format"):
        api.register("fixed.nii.gz", "moving.nii.gz", warped="w.gif")


def test_python_writes_the_warped_volume_and_not_a_wrong_one(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from comir_hpc import api

    quick: dict[str, Any] = {
        "representation": "intensity",
        "initial": "moments",
        "checks": "quick",
        "threads": 1,
    }
    api.register("fixed.nii.gz", "moving.nii.gz", warped="w.mha", out="r", **quick)
    assert correlation(sitk.GetArrayFromImage(sitk.ReadImage("w.mha"))) > 0.95
    monkeypatch.setattr(JUDGE, lambda evidence: Judgement("FAIL", ("they share nothing",)))
    failed = api.register("fixed.nii.gz", "moving.nii.gz", warped="f.mha", out="failed", **quick)
    assert failed.verdict == "FAIL"
    assert "f.mha was not written" in caplog.text
    assert not (here / "f.mha").exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/sub-01_T1w.nii.gz", "sub-01_T1w"), ("EPI.ome.zarr", "EPI"), ("b.OME.TIF", "b"), ("scan.v2.nrrd", "scan.v2"),
        ("dicom/1.2.840.113", "1.2.840.113"), (".hidden", ".hidden"), ("x.zarr/1", "1"), ("t1.mgz", "t1"),
    ],
)  # fmt: skip
def test_a_volume_is_called_by_its_file(path: str, name: str) -> None:
    assert volume_name(Path(path)) == name
