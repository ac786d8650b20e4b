"""Files of any format where a verb takes a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

from comir_hpc.commands.app import app
from comir_hpc.config import EvaluateSettings, RegisterSettings, TrainSettings, WarpSettings, validate
from comir_hpc.data.embedded import write_nifti
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.recipes.stores import as_store, is_store, plan_stores, store_of, with_stores
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform, save_transform
from comir_hpc.volumes.volume import Volume

GRID = Grid((12, 14, 16), (1, 1, 1))


def scan(path: Path, value: int = 100) -> Path:
    """A cube of some values in a NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(GRID.shape_zyx, np.uint8)
    values[3:9, 4:10, 5:11] = value + np.arange(216).reshape(6, 6, 6) % 50
    write_nifti(path, values, GRID)
    return path


def test_two_files_of_one_name_get_two_stores(tmp_path: Path) -> None:
    first, second = scan(tmp_path / "ses-1" / "T1w.nii.gz"), scan(tmp_path / "ses-2" / "T1w.nii.gz", 20)
    stores = [as_store(path, tmp_path / "out") for path in (first, second)]
    assert stores[0] != stores[1]
    assert all(store.name.startswith("T1w-") and store.suffix == ".zarr" for store in stores)
    assert [int(Volume.open(store).read().max()) for store in stores] == [149, 69]


def test_a_store_is_made_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    path = scan(tmp_path / "a.nii.gz")
    told: list[str] = []
    store = as_store(path, tmp_path, tell=told.append)
    made = (store / "zarr.json").stat().st_mtime_ns
    assert str(store) in told[0]
    assert "millimetres" in told[1]
    assert as_store(path, tmp_path, tell=told.append) == store
    assert (store / "zarr.json").stat().st_mtime_ns == made
    assert told[2:] == told[1:2]  # what is assumed of the file is said every time
    assert as_store(store, tmp_path / "elsewhere") == store
    scan(path, 20)
    os.utime(path, ns=(1, 1))
    again = as_store(path, tmp_path)
    assert again != store
    assert int(Volume.open(again).read().max()) == 69


def test_an_unfinished_store_is_gone_on_with(tmp_path: Path) -> None:
    path = scan(tmp_path / "a.nii.gz")
    store = as_store(path, tmp_path)
    Volume.open(store, writable=True).update_metadata(complete=False)
    assert is_store(store)
    assert as_store(path, tmp_path) == store
    assert Volume.open(store).complete
    # One that another version began is made anew: its name is ours.
    Volume.open(store, writable=True).update_metadata(complete=False, fingerprint="of another version")
    assert int(Volume.open(as_store(path, tmp_path)).read().max()) == 149


def test_what_is_no_volume_of_ours_is_ingested_too(tmp_path: Path) -> None:
    import zarr

    group = zarr.create_group(store=str(tmp_path / "foreign.zarr"), zarr_format=2)
    array = group.create_array("0", shape=GRID.shape_zyx, chunks=(8, 8, 8), dtype=np.uint8)
    array[:] = np.arange(np.prod(GRID.shape_zyx), dtype=np.uint8).reshape(GRID.shape_zyx)
    axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
    scale = [{"type": "scale", "scale": [2.0, 1.0, 1.0]}]
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    ]
    assert not is_store(tmp_path / "foreign.zarr")
    store = as_store(tmp_path / "foreign.zarr", tmp_path)
    assert Volume.open(store).grid.spacing_zyx == (2.0, 1.0, 1.0)
    assert is_store(tmp_path / "none.zarr")  # the verb that opens it says that it is not there
    with pytest.raises(VolumeError, match=r"none\.nii does not exist"):
        as_store(tmp_path / "none.nii", tmp_path)


def test_options_of_ingest_are_named_with_the_command_that_has_them(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a b.tif", np.zeros((4, 5, 6), np.uint8), photometric="minisblack")
    with pytest.raises(VolumeError, match=r"--spacing.*comir-hpc ingest '.*a b\.tif' OUT\.zarr") as caught:
        as_store(tmp_path / "a b.tif", tmp_path)
    assert "give OUT.zarr here" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "record", "names"),
    [
        (RegisterSettings, {"fixed": "f", "moving": "m", "out": "o", "representation": "intensity"}, ["f", "m"]),
        (WarpSettings, {"transform": "t", "zarr": "z", "like": "l", "out": "o"}, ["z", "l"]),
        (WarpSettings, {"transform": "t", "points": "p", "out": "o"}, []),
        (EvaluateSettings, {"model": "m", "volumes": {"a": "x", "b": "y"}, "out": "o"}, ["x", "y"]),
        (TrainSettings, {"modalities": ["a", "b"], "pairs": [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]},
         ["1", "2", "3", "4"]),
    ],
)  # fmt: skip
def test_settings_know_their_volumes(kind: Any, record: dict[str, Any], names: list[str]) -> None:
    seen: list[str] = []

    def change(path: Path) -> Path:
        seen.append(str(path))
        return Path("new") / path

    settings = validate(kind, record)
    changed = settings.with_volumes(change)
    assert seen == names
    again: list[str] = []
    changed.with_volumes(lambda path: again.append(str(path)) or path)  # type: ignore[func-returns-value]
    assert again == [f"new/{name}" for name in names]


def test_several_processes_do_not_make_one_store(tmp_path: Path) -> None:
    path = scan(tmp_path / "a.nii.gz")
    settings = WarpSettings(transform=Path("t"), zarr=path, like=path, out=tmp_path / "o.zarr")
    with pytest.raises(ConfigError, match=r"comir-hpc ingest .*a\.nii\.gz OUT\.zarr"):
        with_stores(settings, tmp_path, processes=4)
    store = as_store(path, tmp_path)
    assert with_stores(settings, tmp_path, processes=4).zarr == store


def test_a_plan_writes_nothing_and_says_what_it_cannot_plan(tmp_path: Path) -> None:
    path = scan(tmp_path / "in" / "a.nii.gz")
    settings = WarpSettings(transform=Path("t"), zarr=path, like=path, out=tmp_path / "o.zarr")
    found = plan_stores(settings, tmp_path)
    assert found.settings is None
    assert [plan["ingest"] for plan in found.plans] == [str(path)]
    assert found.plans[0]["store"] == str(store_of(path, tmp_path))
    assert "peak_memory" in found.plans[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
    as_store(path, tmp_path)
    found = plan_stores(settings, tmp_path)
    assert found.plans == ()
    assert found.settings is not None
    assert found.settings.zarr == store_of(path, tmp_path)


def test_warp_takes_files_of_one_name(tmp_path: Path) -> None:
    """Two sessions' scans of one name: the second on the first one's grid."""
    moving, fixed = scan(tmp_path / "ses-1" / "T1w.nii.gz"), scan(tmp_path / "ses-2" / "T1w.nii.gz", 20)
    save_transform(Transform.identity(), tmp_path, {})
    command = ["warp", "--zarr", moving, "--like", fixed, "--transform", tmp_path / "transform.tfm"]
    command += ["--out", tmp_path / "out" / "w.zarr"]
    planned = CliRunner().invoke(app, [*map(str, command), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert planned.output.count("peak memory") == 2
    assert "warp itself can be planned when these files are stores" in planned.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, list(map(str, command)))
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(Volume.open(tmp_path / "out" / "w.zarr").read().max(), 149)
    assert len(list((tmp_path / "out").glob("T1w-*.zarr"))) == 2
    planned = CliRunner().invoke(app, [*map(str, command), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "inside the moving volume" in planned.output


def test_warp_without_a_grid_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    path = scan(tmp_path / "a.nii.gz")
    out = tmp_path / "out" / "w.zarr"
    done = CliRunner().invoke(app, ["warp", "--zarr", str(path), "--transform", "t.tfm", "--out", str(out)])
    assert isinstance(done.exception, ConfigError)
    assert "--like" in str(done.exception)
    assert not out.parent.exists()


def test_train_takes_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scan(tmp_path / f"{name}.nii.gz")
    (tmp_path / "c.yaml").write_text(
        "modalities: [a, b]\npairs: [{a: a.nii.gz, b: b.nii.gz}]\nsampling: {patch: [8, 8, 8]}\n",
        encoding="utf-8",
    )
    command = ["train", tmp_path / "c.yaml", "--run", tmp_path / "run", "--dry-run"]
    planned = CliRunner().invoke(app, list(map(str, command)))
    assert planned.exit_code == 0, planned.output
    assert planned.output.count("peak memory") == 2
    assert str(tmp_path / "run" / "volumes" / "a-") in planned.output
    assert not (tmp_path / "run").exists()
