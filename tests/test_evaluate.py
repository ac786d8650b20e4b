import json
from pathlib import Path

import numpy as np
import pytest

from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.evaluate import evaluate, specimen_points, target_registration_error
from comir_hpc.geometry import Grid
from comir_hpc.points import read_point_table
from comir_hpc.transforms import Transform, save_transform
from comir_hpc.volume import Volume

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
    assert (near.success, far.success) == (True, False)  # 2 % of the mean side of 23.3 mm is 0.47 mm
    assert near.seconds == 3.0
    assert (tmp_path / "table.csv").read_text(encoding="utf-8").count("\n") == 3
    assert json.loads((folders[0] / "result.json").read_text(encoding="utf-8"))["truth"][
        "tre_mm"
    ] == pytest.approx(0.3)


def test_points_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("# LPS\nname,x,y,z\na,1,2,3\nb,4,5,6\n", encoding="utf-8")
    np.testing.assert_array_equal(read_point_table(path).points_mm, [[1, 2, 3], [4, 5, 6]])


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
