import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phantoms import store, store_pair
from PIL import Image
from trained_run import write_run
from typer.testing import CliRunner

from comir_hpc.commands import app as cli
from comir_hpc.config import (
    CompareSettings,
    EvaluateSettings,
    SamplingSettings,
    TrackingSettings,
    TrainSettings,
    dump,
)
from comir_hpc.config.base import validate
from comir_hpc.data.embedded import phantom_pair
from comir_hpc.errors import CheckpointError, ComirError, ConfigError, RegistrationError, VolumeError
from comir_hpc.evaluate import (
    diagnose,
    evaluate,
    open_subject,
    plan_diagnosis,
    registration_bias,
    specimen_points,
    target_registration_error,
)
from comir_hpc.evaluate.cubes import choose_sides, place_cubes, read_cubes
from comir_hpc.evaluate.labels import label_overlaps
from comir_hpc.learning.specimens import prepare_specimens
from comir_hpc.runs.checkpoints import checkpoint_path, write_checkpoint
from comir_hpc.runs.result import read_result
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform, save_transform
from comir_hpc.volumes.points import read_point_table
from comir_hpc.volumes.volume import Volume

GRID = Grid((10, 20, 30), (2.0, 1.0, 1.0), (1.0, 2.0, 3.0))


def make_volume(path: Path) -> Volume:
    volume = Volume.create(path, GRID, np.uint8)
    values = np.zeros(volume.shape, np.uint8)
    values[:, 2:8, 5:15, 10:20] = 100
    volume.write(GRID.box, values)
    volume.finish(intensity=[{"low": 0, "high": 100, "mean": 50, "std": 10, "foreground_above": 50}])
    return volume


def write_registration(folder: Path, volume: Volume, found: Transform) -> Path:
    folder.mkdir()
    record = {
        "verdict": "PASS",
        "matrix_lps_mm": found.matrix_mm.tolist(),
        "inputs": {"fixed": {"path": str(volume.path), "grid": GRID.as_dict()}},
        "settings": {"representation": "comir", "initial": "global"},
        "timings_s": {"search": 1.0, "refine": 2.0},
    }
    (folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def shift(x: float, y: float, z: float) -> Transform:
    return Transform.rigid(np.eye(3), (x, y, z), (0, 0, 0))


def test_a_pure_shift_is_its_length() -> None:
    points = np.random.default_rng(0).normal(size=(50, 3))
    np.testing.assert_allclose(target_registration_error(shift(3, 4, 0), shift(0, 0, 0), points), 5.0)


def test_half_a_turn_about_z_moves_points_by_twice_their_distance_to_the_axis() -> None:
    half = Transform.rigid(np.diag([-1.0, -1.0, 1.0]), (0, 0, 0), (0, 0, 0))
    error = target_registration_error(half, Transform.identity(), np.array([[3.0, 4.0, 7.0]]))
    np.testing.assert_allclose(error, 10.0)


def test_specimen_points_are_foreground_in_the_world(tmp_path: Path) -> None:
    points = specimen_points(make_volume(tmp_path / "v.zarr"))
    assert len(points) == 6 * 10 * 10
    index = GRID.index_zyx(points)
    assert index.min(axis=0).round(6).tolist() == [2, 5, 10]
    assert index.max(axis=0).round(6).tolist() == [7, 14, 19]


def test_methods_side_by_side(tmp_path: Path) -> None:
    volume = make_volume(tmp_path / "v.zarr")
    save_transform(shift(0, 0, 0), tmp_path / "truth", {})
    folders = [
        write_registration(tmp_path / "near", volume, shift(0.3, 0, 0)),
        write_registration(tmp_path / "far", volume, shift(0, 30, 40)),
    ]
    table = evaluate(folders, tmp_path / "truth" / "transform.tfm", out=tmp_path / "table.csv")
    near, far = table.rows
    assert near.tre_mm == pytest.approx(0.3)
    assert near.tre_voxels == pytest.approx(0.3)  # the finest spacing is 1 mm
    assert far.tre_mm == far.tre_p95_mm == pytest.approx(50)
    assert near.rotation_error_deg == far.rotation_error_deg == 0
    assert (near.success, far.success) == (True, False)  # 2 % of the mean side of 23.3 mm is 0.47 mm
    assert near.seconds == 3.0
    assert (tmp_path / "table.csv").read_text(encoding="utf-8").count("\n") == 3
    assert json.loads((folders[0] / "result.json").read_text(encoding="utf-8"))["truth"][
        "tre_mm"
    ] == pytest.approx(0.3)


def test_the_rotation_s_error_is_the_angle_between_the_two_whatever_the_shift(tmp_path: Path) -> None:
    def about_z(degrees: float) -> Transform:
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        return Transform.rigid([[c, -s, 0], [s, c, 0], [0, 0, 1]], (7 * degrees, 0, 0), (0, 0, 0))

    save_transform(about_z(170), tmp_path / "truth", {})
    folder = write_registration(tmp_path / "r", make_volume(tmp_path / "v.zarr"), about_z(-175))
    (row,) = evaluate([folder], tmp_path / "truth" / "transform.tfm").rows
    assert row.rotation_error_deg == pytest.approx(15)
    truth = read_result(folder).truth
    assert truth is not None
    assert truth.rotation_error_deg == pytest.approx(15)


def test_a_registration_that_found_nothing_stands_in_the_table_without_errors(tmp_path: Path) -> None:
    volume = make_volume(tmp_path / "v.zarr")
    save_transform(shift(0, 0, 0), tmp_path / "truth", {})
    folder = write_registration(tmp_path / "failed", volume, shift(0, 0, 0))
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    record |= {"verdict": "FAIL", "matrix_lps_mm": None, "reasons": ["none of 8 starts led to an answer"]}
    (folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
    table = evaluate([folder], tmp_path / "truth" / "transform.tfm", out=tmp_path / "table.csv")
    (row,) = table.rows
    assert (row.verdict, row.success, row.num_points) == ("FAIL", False, 600)
    assert np.isnan(row.tre_mm)
    assert np.isnan(row.rotation_error_deg)
    truth = read_result(folder).truth
    assert truth is not None
    assert (truth.tre_mm, truth.success) == (None, False)
    with pytest.raises(RegistrationError, match=r"aligned pair failed \(none of 8 starts"):
        registration_bias(folder)


def test_points_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("# LPS\nname,x,y,z\na,1,2,3\nb,4,5,6\n", encoding="utf-8")
    np.testing.assert_array_equal(read_point_table(path).points_mm, [[1, 2, 3], [4, 5, 6]])


def test_points_in_ras_are_measured_in_lps(tmp_path: Path) -> None:
    half = Transform.rigid(np.diag([-1.0, -1.0, 1.0]), (0, 0, 0), (50, 0, 0))
    save_transform(half, tmp_path / "truth", {})
    folder = write_registration(tmp_path / "r", make_volume(tmp_path / "v.zarr"), Transform.identity())
    points = tmp_path / "F.fcsv"
    points.write_text(
        "# CoordinateSystem = RAS\n# columns = id,x,y,z,label\n1,10,0,3,F-1\n", encoding="utf-8"
    )
    table = evaluate([folder], tmp_path / "truth" / "transform.tfm", points=points)
    assert table.rows[0].tre_mm == pytest.approx(
        120
    )  # twice from x = -10 to the axis; taken for LPS it would be 80
    assert "F.fcsv: its points are RAS" in table.notes[0]


@pytest.mark.parametrize("text", ["x,y\n1,2\n", "x,y,z\n1,2,three\n", "x,y,z\n", "x,y,z\n1,2\n"])
def test_points_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(VolumeError, match=r"p\.csv"):
        read_point_table(path)


def test_a_folder_without_result(tmp_path: Path) -> None:
    save_transform(shift(0, 0, 0), tmp_path, {})
    with pytest.raises(RegistrationError, match="comir-hpc register"):
        evaluate([tmp_path / "none"], tmp_path / "transform.tfm")


# ---------------------------------------------------------------------- what a model can do


SMALL: dict[str, Any] = {"cubes": 2, "side": 16, "angle_step": 90.0, "axes": 1, "device": "cpu"}


def make_run(folder: Path, pair: dict[str, Path]) -> Path:
    """A finished run with a checkpoint of other weights before its end."""
    run = write_run(folder, spacing=(2.0, 2.0, 2.0))
    settings = TrainSettings(
        modalities=tuple(pair),
        pairs=(pair,),
        sampling=SamplingSettings(patch=(16, 16, 16), foreground=0.3),
        tracking=TrackingSettings(mlflow=None),
    )
    (run / "config.yaml").write_text(dump(settings), encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"step": 7, "time": 1.0, "loss": 1.0}\n', encoding="utf-8")
    record = json.loads((run / "model.json").read_text(encoding="utf-8"))
    description = {key: record[key] for key in record if key not in ("version", "step", "reference")}
    average = {
        f"{name}.{key}": value * 1.5 if value.is_floating_point() else value
        for name in pair
        for key, value in torch.load(run / "model" / f"{name}.pt", weights_only=True).items()
    }
    loop = {"step": 3, "loss": 2.0, "average": average, "model": description}
    write_checkpoint(checkpoint_path(run / "checkpoints", 3), {"loop": loop})
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return store_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, pair: dict[str, Path]) -> Path:
    """A run that was measured at its end by the command line."""
    run = make_run(tmp_path_factory.mktemp("measured") / "run", pair)
    options = ["--cubes", "2", "--side", "16", "--angle-step", "90", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, ["evaluate", "--model", str(run), *options])
    assert done.exit_code == 0, done.output
    assert "worst equivariance error over O" in done.output
    assert "aligned pair" in done.output
    return run


def read_record(run: Path, step: int) -> dict[str, Any]:
    path = run / "diagnostics" / f"step-{step:08d}" / "diagnostics.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def test_a_model_is_measured_and_shown(measured: Path) -> None:
    record = read_record(measured, 7)
    assert (record["step"], record["group"], record["own_volumes"]) == (7, "O", True)
    assert len(record["elements"]) == 24
    assert all(element["trained"] for element in record["elements"])
    for one in record["modalities"].values():
        errors = one["equivariance"]["errors"]
        assert errors[0] == 0
        assert one["equivariance"]["worst"] == max(errors) == errors[one["equivariance"]["worst_element"]]
        assert one["so3"]["worst"] > 1e-4  # resampled about axes off the grid
        assert one["so3"]["angles_deg"] == [90, 180]
        assert np.array(one["so3"]["errors"]).shape == (2, 3)
    assert record["bias"]["voxels"] >= 0
    assert record["bias"]["verdict"] in ("PASS", "WARN", "FAIL")
    assert record["metrics"]["diagnostics/bias_voxels"] == record["bias"]["voxels"]
    assert set(record["patches"]["equivariance"]) == {"one", "two"}
    with Image.open(measured / "diagnostics" / "step-00000007" / "diagnostics.png") as picture:
        assert picture.width > 600
    html = (measured / "report.html").read_text(encoding="utf-8")
    assert "Measured at step 7" in html
    assert "Equivariance error of every rotation" in html
    assert "Equivariance error at any angle" in html


def test_an_earlier_checkpoint_is_measured_with_its_own_weights(measured: Path) -> None:
    before = read_record(measured, 7)
    settings = EvaluateSettings(model=measured, checkpoint=3, **SMALL)
    subject = open_subject(settings)
    assert (subject.step, subject.model.name) == (3, "step-00000003")
    found = diagnose(settings, subject)
    assert found.record["bias"] is None
    assert "no registration of the aligned pair (not asked for)" in found.summary
    assert read_record(measured, 3)["step"] == 3
    other = found.record["modalities"]["one"]["so3"]["mean"]
    assert other != pytest.approx(before["modalities"]["one"]["so3"]["mean"], rel=1e-3)
    assert read_record(measured, 7) == before


def test_volumes_of_another_specimen_are_measured_elsewhere(measured: Path, tmp_path: Path) -> None:
    others = store_pair(tmp_path / "others", seed=5)
    settings = EvaluateSettings(model=measured, volumes=others, out=tmp_path / "figures", **SMALL)
    subject = open_subject(settings)
    assert not subject.own
    assert diagnose(settings, subject).folder == tmp_path / "figures"
    assert (tmp_path / "figures" / "diagnostics.json").is_file()


def test_the_plan_writes_nothing(pair: dict[str, Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pair)
    before = sorted(run.rglob("*"))
    plan = plan_diagnosis(EvaluateSettings(model=run, checkpoint=3, **SMALL))
    assert "step 3" in plan["model"]
    assert plan["passes"].startswith(str(2 * 2 * (1 + 24 + 2 * (1 + 1))))
    assert sorted(run.rglob("*")) == before


def test_the_bias_of_a_known_registration(tmp_path: Path) -> None:
    volume = make_volume(tmp_path / "v.zarr")
    bias = registration_bias(write_registration(tmp_path / "shifted", volume, shift(0.3, 0.4, 0)))
    assert bias.voxels == pytest.approx(0.5)  # the finest spacing is 1 mm
    assert bias.shift_voxels == pytest.approx(0.5)
    assert bias.degrees == pytest.approx(0)
    centre = specimen_points(volume).mean(axis=0)
    cosine, sine = np.cos(np.radians(2)), np.sin(np.radians(2))
    about_z = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    turned = Transform.rigid(about_z, (0, 0, 0), centre)
    bias = registration_bias(write_registration(tmp_path / "turned", volume, turned))
    assert bias.degrees == pytest.approx(2)
    assert bias.shift_voxels == pytest.approx(0, abs=1e-9)
    assert bias.voxels > 0.05


def test_cubes_lie_on_the_stride_in_the_specimen_and_apart(tmp_path: Path) -> None:
    values = np.zeros((48, 48, 96), np.uint8)
    noise = np.random.default_rng(0).integers(60, 200, (24, 24, 32))
    values[12:36, 12:36, 8:40] = values[12:36, 12:36, 56:88] = noise
    volume = Volume.open(store(tmp_path / "v.zarr", values, above=50))
    settings = SamplingSettings(patch=(16, 16, 16))
    specimen = prepare_specimens([[volume]], settings)[0]
    places = place_cubes(specimen, 2, (24, 24, 24), (4, 4, 4), (4, 4, 4))
    assert all(coordinate % 4 == 0 for start in places.starts for coordinate in start)
    assert abs(places.starts[0][2] - places.starts[1][2]) >= 32
    images, mask = read_cubes(specimen, 0, places, (24, 24, 24))
    assert images.shape == (2, 1, 24, 24, 24)
    assert mask[:, 4:20, 4:20, 4:20].mean() > 0.75
    assert min(places.around_zyx) >= 24 * 3**0.5
    assert all((n - 24) % 2 == 0 for n in places.around_zyx)


def test_beyond_the_volume_is_air(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(60, 200, (16, 16, 16)).astype(np.uint8)
    volume = Volume.open(store(tmp_path / "v.zarr", values, above=50))
    specimen = prepare_specimens([[volume]], SamplingSettings(patch=(16, 16, 16)))[0]
    places = place_cubes(specimen, 5, (16, 16, 16), (0, 0, 0), (8, 8, 8))
    assert places.starts == ((0, 0, 0),)  # there is room for one
    images, mask = read_cubes(specimen, 0, places, (32, 32, 32))
    inside = (slice(8, 24),) * 3
    scale = volume.intensity()
    np.testing.assert_allclose(images[0, 0][inside], scale.normalise(values), rtol=1e-6)
    outside = np.ones((32, 32, 32), bool)
    outside[inside] = False
    assert set(np.unique(images[0, 0][outside])) == {scale.normalise(np.array(scale.low)).item()}
    assert not mask[0][:5].any()


@pytest.mark.parametrize(
    ("side", "stride", "halo", "planar", "expected"),
    [
        (64, (8, 8, 8), (56, 56, 56), False, ((64, 64, 64), (16, 16, 16))),
        (60, (8, 8, 8), (3, 3, 3), False, ((64, 64, 64), (3, 3, 3))),
        (30, (2, 4, 4), (20, 20, 20), False, ((32, 32, 32), (8, 8, 8))),
        (32, (1, 8, 8), (0, 20, 20), True, ((1, 32, 32), (0, 8, 8))),
    ],
)
def test_sides_fit_the_stride(
    side: int, stride: Sequence[int], halo: Sequence[int], planar: bool, expected: object
) -> None:
    assert choose_sides(side, tuple(stride), tuple(halo), planar=planar) == expected  # type: ignore[arg-type]


def refusal(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])
    assert isinstance(done.exception, ComirError), done.output
    return str(done.exception)


def test_what_cannot_be_measured_says_why(measured: Path, pair: dict[str, Path], tmp_path: Path) -> None:
    assert "--result and --truth, or --model" in refusal("--truth", "t.json")
    assert "--checkpoint, --side mean nothing without --model" in refusal(
        "--result", "r", "--truth", "t", "--checkpoint", 3, "--side", 32
    )
    assert "--truth mean nothing with --model" in refusal("--model", measured, "--truth", "t.json")
    assert "kept are steps 3" in refusal("--model", measured, "--checkpoint", 5)
    assert "MODALITY=PATH" in refusal("--model", measured, "--volume", "one")
    assert "--out DIR with --volume" in refusal("--model", measured, "--volume", f"one={pair['one']}")
    with pytest.raises(ConfigError, match=r"trained on \['one', 'two'\]"):
        open_subject(EvaluateSettings(model=measured, volumes={"one": pair["one"]}, out=tmp_path))
    with pytest.raises(CheckpointError, match=r"config\.yaml does not exist"):
        open_subject(EvaluateSettings(model=tmp_path))
    first, _ = phantom_pair((40, 44, 40), seed=1)
    odd = {"one": pair["one"], "two": store(tmp_path / "odd.zarr", first, above=20.0)}
    with pytest.raises(VolumeError, match="different grids"):
        open_subject(EvaluateSettings(model=measured, volumes=odd, out=tmp_path))


def test_a_run_that_has_not_ended_names_its_checkpoint(pair: dict[str, Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pair)
    (run / "model.json").unlink()
    with pytest.raises(CheckpointError, match="give --checkpoint 3"):
        open_subject(EvaluateSettings(model=run))
    assert open_subject(EvaluateSettings(model=run, checkpoint=3)).step == 3


def test_the_way_back_is_measured_by_the_registration_that_leads_back(tmp_path: Path) -> None:
    volume = make_volume(tmp_path / "v.zarr")
    save_transform(shift(3, 0, 0), tmp_path / "truth", {})
    there = write_registration(tmp_path / "there", volume, shift(3, 0, 0))
    back = write_registration(tmp_path / "back", volume, shift(-3, 0.9, 1.2))
    (row,) = evaluate([there], tmp_path / "truth" / "transform.tfm", back=back).rows
    assert row.tre_mm == pytest.approx(0)
    assert row.inverse_mm == pytest.approx(1.5)  # what is left of 3 mm there and 3 mm back
    # Without it, the transform's own inverse leads back; with it, no truth is needed.
    (row,) = evaluate([there], tmp_path / "truth" / "transform.tfm").rows
    assert row.inverse_mm == pytest.approx(0, abs=1e-9)
    (row,) = evaluate([there], back=back).rows
    assert row.inverse_mm == pytest.approx(1.5)
    assert np.isnan(row.tre_mm)
    with pytest.raises(ConfigError, match="--back"):
        validate(CompareSettings, {"result": [there]})


def test_corresponding_points_are_a_truth(tmp_path: Path) -> None:
    folder = write_registration(tmp_path / "r", make_volume(tmp_path / "v.zarr"), shift(1, 0, 0))
    (tmp_path / "f.csv").write_text("x,y,z\n0,0,0\n5,5,5\n", encoding="utf-8")
    (tmp_path / "m.csv").write_text("x,y,z\n1,0,0\n6,9,8\n", encoding="utf-8")
    (row,) = evaluate([folder], points=tmp_path / "f.csv", moving_points=tmp_path / "m.csv").rows
    assert row.tre_mm == pytest.approx(2.5)  # 0 mm, and 3-4-5 mm
    assert np.isnan(row.rotation_error_deg)
    assert (row.determinant_least, row.folded_share) == (pytest.approx(1), 0)
    assert row.inverse_mm == pytest.approx(0, abs=1e-9)
    (tmp_path / "few.csv").write_text("x,y,z\n1,0,0\n", encoding="utf-8")
    with pytest.raises(RegistrationError, match="2 points"):
        evaluate([folder], points=tmp_path / "f.csv", moving_points=tmp_path / "few.csv")


def test_dice_and_surface_distance_of_shifted_cubes(tmp_path: Path) -> None:
    grid = Grid((20, 20, 20), (2.0, 1.0, 1.0))
    one = np.zeros(grid.shape_zyx, np.uint8)
    one[4:12, 5:15, 5:15] = 3
    one[14:16, 2:4, 2:4] = 7
    other = np.zeros_like(one)
    other[4:12, 5:15, 9:19] = 3
    for name, values in (("fixed", one), ("moving", other)):
        volume = Volume.create(
            tmp_path / f"{name}.zarr", grid, np.uint8, channels=1, kind="labels", chunk=16, shard=64
        )
        volume.write(grid.box, values[None])
        volume.finish()
    paths = tmp_path / "fixed.zarr", tmp_path / "moving.zarr"
    cube, missing = label_overlaps(*paths, Transform.identity())
    assert (cube.label, cube.dice, cube.hd95_mm) == (3, pytest.approx(0.6), pytest.approx(4.0))
    assert (missing.label, missing.dice, np.isnan(missing.hd95_mm)) == (7, 0.0, True)
    onto = label_overlaps(*paths, shift(4, 0, 0))[0]
    assert (onto.dice, onto.hd95_mm) == (1.0, 0.0)


def test_values_that_are_no_labels_are_refused(tmp_path: Path) -> None:
    grid = Grid((8, 8, 8), (1.0, 1.0, 1.0))
    volume = Volume.create(tmp_path / "v.zarr", grid, np.float32, channels=1, chunk=16, shard=64)
    volume.write(grid.box, np.full((1, *grid.shape_zyx), 0.5, np.float32))
    volume.finish()
    with pytest.raises(VolumeError, match="no labels"):
        label_overlaps(tmp_path / "v.zarr", tmp_path / "v.zarr", Transform.identity())
    with pytest.raises(ConfigError, match="nothing to compare"):
        validate(CompareSettings, {"result": ["r"]})
    with pytest.raises(ConfigError, match="--moving-labels"):
        validate(CompareSettings, {"result": ["r"], "fixed_labels": "a"})
