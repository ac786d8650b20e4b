"""A file in, a trusted volume out: known voxels and statistics, resumed equals uninterrupted, every refusal named."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from comir_hpc.blocks.ledger import Ledger
from comir_hpc.config import IngestSettings
from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.ingest import ingest, ingest_array, job, memory, plan_ingest
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.readers import open_source
from comir_hpc.volumes.volume import Volume

GRID = Grid((40, 50, 36), (2.0, 1.0, 1.0), (1.0, -2.0, 3.0))


def image(dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    """A bright ball of varied values in dark noise."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in GRID.shape_zyx), indexing="ij")
    inside = z**2 + y**2 + x**2 < 0.6
    values = np.where(inside, rng.normal(150, 25, GRID.shape_zyx), rng.normal(10, 2, GRID.shape_zyx))
    return values.clip(0, 250).astype(dtype)


def write(path: Path, values: np.ndarray) -> Path:
    picture = sitk.GetImageFromArray(values)
    picture.SetSpacing(GRID.spacing_zyx[::-1])
    picture.SetOrigin(GRID.origin_xyz)
    sitk.WriteImage(picture, str(path))
    return path


def settings(source: Path, out: Path, **more: Any) -> IngestSettings:
    return IngestSettings(source=source, out=out, **{"chunk": 8, "shard": 32, **more})


def files_of(store: Path) -> dict[str, bytes]:
    """Every file, without what the metadata say about the run that wrote it."""
    found = {str(f.relative_to(store)): f.read_bytes() for f in sorted(store.rglob("*")) if f.is_file()}
    record = json.loads(found["zarr.json"])
    for key in ("predicted", "needed"):
        record["attributes"]["comir"].pop(key, None)
    return {**found, "zarr.json": json.dumps(record).encode()}


# ---------------------------------------------------------------------- what it writes


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (".nii", "uint8"),
        (".nii", "float64"),
        (".nii.gz", "int16"),
        (".mha", "int32"),
        (".mha", "uint16"),
        (".nrrd", "float32"),
    ],
)
def test_voxels_grid_and_dtype(tmp_path: Path, suffix: str, dtype: str) -> None:
    source = write(tmp_path / f"scan{suffix}", image(dtype))
    result = ingest(settings(source, tmp_path / "scan.zarr"))
    volume = Volume.open(tmp_path / "scan.zarr")
    np.testing.assert_array_equal(volume.read()[0], image(dtype))
    assert volume.dtype == np.dtype(dtype)
    assert volume.grid == result.grid
    assert volume.grid.agrees_with(GRID)
    assert (result.blocks, result.skipped) == (2 * 2 * 2, 0)
    assert result.num_bytes == sum(f.stat().st_size for f in result.path.rglob("*") if f.is_file())
    assert [volume.level_factors(n) for n in range(volume.num_levels)] == [(1, 1, 1), (1, 2, 2), (2, 4, 4)]


def test_channels(tmp_path: Path) -> None:
    values = np.stack([image(), image(seed=1) // 2, np.full(GRID.shape_zyx, 255)]).astype(np.uint8)
    np.save(tmp_path / "rgb.npy", np.moveaxis(values, 0, -1))
    ingest(settings(tmp_path / "rgb.npy", tmp_path / "v.zarr", spacing=(2, 1, 1), unit="um"))
    volume = Volume.open(tmp_path / "v.zarr")
    np.testing.assert_array_equal(volume.read(), values)
    assert volume.intensity(1).mean == pytest.approx(volume.intensity(0).mean / 2, rel=0.02)
    # A constant channel beside others becomes zero, not a division by zero.
    assert np.all(volume.intensity(2).normalise(volume.read()[2]) == 0)


def test_array_and_file_give_the_same_volume(tmp_path: Path) -> None:
    ingest(settings(write(tmp_path / "scan.mha", image()), tmp_path / "a" / "v.zarr"))
    ingest_array(image(), GRID, tmp_path / "b" / "v.zarr", chunk=8, shard=32)
    stores = [files_of(tmp_path / n / "v.zarr") for n in "ab"]
    assert stores[0].keys() == stores[1].keys()
    assert all(stores[0][k] == stores[1][k] for k in stores[0] if k != "zarr.json")
    first, second = (Volume.open(tmp_path / n / "v.zarr") for n in "ab")
    assert first.intensity() == second.intensity()
    again = ingest_array(image(), GRID, tmp_path / "b" / "v.zarr", chunk=8, shard=32)
    assert again.skipped == again.blocks


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"compression": "zlib", "tile": (16, 16)}])
def test_tiff_needs_spacing_and_keeps_it(tmp_path: Path, options: dict[str, Any]) -> None:
    tifffile.imwrite(tmp_path / "s.tif", image(), photometric="minisblack", **options)
    with pytest.raises(VolumeError, match=r"s\.tif.*--spacing Z Y X --unit mm"):
        ingest(settings(tmp_path / "s.tif", tmp_path / "v.zarr"))
    assert not (tmp_path / "v.zarr").exists()
    result = ingest(settings(tmp_path / "s.tif", tmp_path / "v.zarr", spacing=(2, 1, 1), unit="um"))
    assert result.grid.spacing_mm == pytest.approx((2e-3, 1e-3, 1e-3))
    np.testing.assert_array_equal(Volume.open(tmp_path / "v.zarr").read()[0], image())


def test_blocks_hold_what_is_decoded_at_once(tmp_path: Path) -> None:
    """Strips as wide as the page: a block that is narrower would decode them again for each of its neighbours."""
    tifffile.imwrite(
        tmp_path / "s.tif", image(), photometric="minisblack", compression="zlib", rowsperstrip=50
    )
    plan = plan_ingest(
        settings(tmp_path / "s.tif", tmp_path / "v.zarr", spacing=(2, 1, 1), unit="um", shard=16)
    )
    assert (plan["block"], plan["blocks"]) == ("16 x 64 x 48", 3)
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_dataset("a", data=image(), chunks=(4, 20, 16))
    plan = plan_ingest(
        settings(tmp_path / "v.h5", tmp_path / "v.zarr", spacing=(2, 1, 1), unit="um", shard=16)
    )
    assert plan["block"] == "16 x 32 x 16"


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    source = write(tmp_path / "scan.mha", image("float32"))
    for workers in (1, 2):
        ingest(settings(source, tmp_path / str(workers) / "v.zarr", workers=workers))
    assert files_of(tmp_path / "1" / "v.zarr") == files_of(tmp_path / "2" / "v.zarr")


def test_parts_of_an_array_job_write_what_one_run_does(tmp_path: Path) -> None:
    source = write(tmp_path / "scan.mha", image("float32"))
    ingest(settings(source, tmp_path / "whole" / "v.zarr"))
    task = settings(source, tmp_path / "parts" / "v.zarr")
    missing = [ingest(task.model_copy(update={"part": (i, 3)})).missing for i in (2, 3, 1)]
    assert missing == [5, 2, 0]
    assert files_of(tmp_path / "parts" / "v.zarr") == files_of(tmp_path / "whole" / "v.zarr")


def test_labels(tmp_path: Path) -> None:
    values = (image() > 80).astype(np.uint8) * 7
    ingest(settings(write(tmp_path / "l.mha", values), tmp_path / "l.zarr", kind="labels"))
    volume = Volume.open(tmp_path / "l.zarr")
    assert set(np.unique(volume.read(level=1))) == {0, 7}
    with pytest.raises(VolumeError, match="no intensity statistics"):
        volume.intensity()
    ingest_array(np.ones(GRID.shape_zyx, np.uint8), GRID, tmp_path / "one.zarr", kind="labels")


# ---------------------------------------------------------------------- statistics


def test_statistics_of_integers_are_exact(tmp_path: Path) -> None:
    values = image("uint16")
    ingest_array(values, GRID, tmp_path / "v.zarr", chunk=8, shard=16)
    found = Volume.open(tmp_path / "v.zarr").intensity()
    inside = values[values > found.foreground_above]
    low = np.percentile(values, 0.1, method="inverted_cdf")
    high = np.percentile(inside, 99.9, method="inverted_cdf")
    clipped = np.clip(inside, low, high).astype(np.float64)
    assert (found.low, found.high) == (low, high)
    assert found.mean == pytest.approx(clipped.mean(), rel=1e-12)
    assert found.std == pytest.approx(clipped.std(), rel=1e-12)
    assert 20 < found.foreground_above < 80
    assert Volume.open(tmp_path / "v.zarr").metadata["value_range"] == [[values.min(), values.max()]]


def test_threshold_of_the_user(tmp_path: Path) -> None:
    ingest_array(image(), GRID, tmp_path / "v.zarr", foreground_above=5.0)
    assert Volume.open(tmp_path / "v.zarr").intensity().foreground_above == 5.0
    with pytest.raises(VolumeError, match=r"no voxel is above 500, the largest is.*--foreground-above"):
        ingest_array(image(), GRID, tmp_path / "w.zarr", foreground_above=500.0)


# ---------------------------------------------------------------------- resumed, changed, replaced


DYING = """
import json, os, signal, sys
from comir_hpc.config import IngestSettings
from comir_hpc.ingest import ingest
from comir_hpc.volumes.volume import Volume
settings = IngestSettings(**json.loads(sys.argv[1]))
moment = sys.argv[2]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "pyramid":
    Volume.fill_shard = die
elif moment == "finish":
    Volume.finish = die
elif moment == "write":
    write = Volume.write
    def half(volume, box, values, **more):
        write(volume, box, values, **more)
        if box.start[0] == 16:
            die()
    Volume.write = half
ingest(settings, progress=lambda what, done, total: done == int(moment) and die() if moment.isdigit() else None)
"""


def killed(record: IngestSettings, moment: str) -> None:
    command = [sys.executable, "-c", DYING, record.model_dump_json(), moment]
    assert subprocess.run(command, check=False, timeout=120).returncode == -9


@pytest.mark.parametrize("moment", ["0", "7", "write", "pyramid", "finish"])
def test_killed_and_rerun_equals_uninterrupted(tmp_path: Path, moment: str) -> None:
    source = write(tmp_path / "scan.mha", image("float32"))
    whole, torn = (settings(source, tmp_path / n / "v.zarr", shard=16) for n in ("whole", "torn"))
    ingest(whole)
    killed(torn, moment)
    with pytest.raises(VolumeError, match=r"incomplete: .* run that command again"):
        Volume.open(torn.out)
    result = ingest(torn)
    expected_done = {"0": 0, "7": 7, "write": 12, "pyramid": 36, "finish": 36}[moment]
    assert result.skipped == expected_done
    assert files_of(torn.out) == files_of(whole.out)
    assert ingest(torn).computed == 0
    leftover = {f.name for f in Ledger(torn.out, "").folder.iterdir() if not f.name.endswith(".jsonl")}
    assert leftover == {"lock", "writer.lock", "pieces.lock"}


def test_a_damaged_or_deleted_shard_is_found_and_redone(tmp_path: Path) -> None:
    task = settings(write(tmp_path / "scan.mha", image()), tmp_path / "v.zarr")
    ingest(task)
    before = files_of(task.out)
    shard = task.out / "0" / "c" / "0" / "1" / "1" / "1"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    assert ingest(task).computed == 0
    assert ingest(task.model_copy(update={"verify": True})).computed == 1
    assert files_of(task.out) == before
    shard.unlink()
    assert ingest(task).computed == 1
    assert files_of(task.out) == before


def test_unfinished_store_of_a_changed_source_is_begun_anew(tmp_path: Path) -> None:
    task = settings(write(tmp_path / "scan.mha", image()), tmp_path / "v.zarr", shard=16)
    killed(task, "7")
    write(tmp_path / "scan.mha", image(seed=5))
    assert ingest(task).skipped == 0
    np.testing.assert_array_equal(Volume.open(task.out).read()[0], image(seed=5))


def test_finished_store_of_a_changed_source_is_refused(tmp_path: Path) -> None:
    task = settings(write(tmp_path / "scan.mha", image()), tmp_path / "v.zarr")
    ingest(task)
    write(tmp_path / "scan.mha", image(seed=5))
    with pytest.raises(VolumeError, match=r"v\.zarr .*source_size_and_time: .*--overwrite"):
        ingest(task)
    np.testing.assert_array_equal(Volume.open(task.out).read()[0], image())
    ingest(task.model_copy(update={"overwrite": True}))
    np.testing.assert_array_equal(Volume.open(task.out).read()[0], image(seed=5))


def test_finished_store_of_other_settings_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "scan.mha", image())
    ingest(settings(source, tmp_path / "v.zarr"))
    with pytest.raises(VolumeError, match=r"something else \(kind: image, now labels\); .*--overwrite"):
        ingest(settings(source, tmp_path / "v.zarr", kind="labels"))
    other = write(tmp_path / "other.mha", image(seed=5))
    with pytest.raises(VolumeError, match=r"\(source: .*scan\.mha, now .*other\.mha; source_size"):
        ingest(settings(other, tmp_path / "v.zarr"))


def test_what_is_no_volume_is_never_replaced(tmp_path: Path) -> None:
    source = write(tmp_path / "scan.mha", image())
    (tmp_path / "v.zarr").mkdir()
    (tmp_path / "v.zarr" / "thesis.tex").write_text("irreplaceable", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(VolumeError, match=r"v\.zarr exists and is no volume of ours"):
            ingest(settings(source, tmp_path / "v.zarr", overwrite=overwrite))
    assert (tmp_path / "v.zarr" / "thesis.tex").read_text(encoding="utf-8") == "irreplaceable"


def test_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "scan.mha", image())
    task = settings(source, tmp_path / "v.zarr", shard=16)

    def disturb(what: str, done: int, total: int) -> None:
        if done == 5:
            os.utime(source, (1, 1))

    with pytest.raises(VolumeError, match=r"scan\.mha changed while it was read"):
        ingest(task, progress=disturb)
    with pytest.raises(VolumeError, match="incomplete"):
        Volume.open(task.out)
    assert ingest(task).skipped == 0
    np.testing.assert_array_equal(Volume.open(task.out).read()[0], image())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_voxels_are_named_and_replaced(tmp_path: Path, bad: float) -> None:
    values = image("float32")
    values[20, 30, 10] = bad
    np.save(tmp_path / "v.npy", values)
    task = settings(tmp_path / "v.npy", tmp_path / "v.zarr", shard=16, spacing=(2, 1, 1), unit="mm")
    words = r"1 of 36 blocks .*v\.npy: 1 voxels of box z\[16:32\] y\[16:32\] x\[0:16\] are NaN or infinite, "
    with pytest.raises(VolumeError, match=words + r".*20, 30, 10; .*--non-finite"):
        ingest(task)
    with pytest.raises(VolumeError, match="incomplete"):
        Volume.open(task.out)
    ingest(task.model_copy(update={"non_finite": -1.0}))
    expected = values.copy()
    expected[20, 30, 10] = -1
    np.testing.assert_array_equal(Volume.open(task.out).read()[0], expected)


def test_non_finite_value_must_fit(tmp_path: Path) -> None:
    for value, dtype in ((np.nan, "float32"), (1e6, "float16")):
        with pytest.raises(ConfigError, match="--non-finite"):
            ingest_array(image(dtype), GRID, tmp_path / "v.zarr", non_finite=value)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_constant_image(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "v.npy", np.full(GRID.shape_zyx, 3, dtype))
    task = settings(tmp_path / "v.npy", tmp_path / "v.zarr", spacing=(2, 1, 1), unit="mm")
    for _ in range(2):
        with pytest.raises(
            VolumeError, match=r"v\.npy: all voxels have the value 3; expected an image with contrast"
        ):
            ingest(task)
        with pytest.raises(VolumeError, match="incomplete"):
            Volume.open(task.out)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((0, 5, 6), "has no voxels"), ((1, 1, 60), "is a line"), ((50, 1, 1), "is a line")],
)
def test_neither_volume_nor_slice(tmp_path: Path, shape: tuple[int, ...], words: str) -> None:
    np.save(tmp_path / "v.npy", np.zeros(shape))
    with pytest.raises(VolumeError, match=rf"v\.npy: .*{words}"):
        ingest(settings(tmp_path / "v.npy", tmp_path / "v.zarr", spacing=(2, 1, 1), unit="mm"))
    assert not (tmp_path / "v.zarr").exists()


def test_missing_truncated_and_complex(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"no\.nii does not exist"):
        ingest(settings(tmp_path / "no.nii", tmp_path / "v.zarr"))
    source = write(tmp_path / "scan.nii.gz", image())
    source.write_bytes(source.read_bytes()[:20_000])
    with pytest.raises(VolumeError, match=r"scan\.nii\.gz cannot be read"):
        ingest(settings(source, tmp_path / "v.zarr"))
    if (tmp_path / "v.zarr").exists():
        with pytest.raises(VolumeError, match="incomplete"):
            Volume.open(tmp_path / "v.zarr")
    np.save(tmp_path / "c.npy", image().astype(np.complex64))
    with pytest.raises(VolumeError, match=r"c\.npy holds complex values"):
        ingest(settings(tmp_path / "c.npy", tmp_path / "c.zarr", spacing=(1, 1, 1), unit="mm"))


def test_memory_is_predicted_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, raw = (
        write(tmp_path / "scan.nii.gz", image("float64")),
        write(tmp_path / "scan.nii", image("float64")),
    )
    monkeypatch.setattr(memory, "_LIBRARY_BYTES", 0)
    monkeypatch.setattr(memory, "expected_peak", int)
    monkeypatch.setattr(memory, "counting_bytes", lambda dtype, values: 0)
    size = image("float64").nbytes
    task = settings(packed, tmp_path / "v.zarr", shard=16, max_memory=size / 2**30)
    with pytest.raises(
        VolumeError, match=r"scan\.nii\.gz needs .* KiB of memory, .* \(--max-memory-gib\); .*gunzip"
    ):
        ingest(task)
    assert not (tmp_path / "v.zarr").exists()
    ingest(task.model_copy(update={"source": raw}))
    plan = plan_ingest(task)
    assert plan["read"] == "whole, into memory"
    assert plan_ingest(task.model_copy(update={"source": raw}))["read"] == "block by block"


def test_plan_is_json_and_writes_nothing(tmp_path: Path) -> None:
    task = settings(write(tmp_path / "scan.nii", image()), tmp_path / "v.zarr", shard=16)
    plan = json.loads(json.dumps(plan_ingest(task)))
    assert (plan["blocks"], plan["dtype"], plan["channels"]) == (36, "uint16", 1)
    assert not (tmp_path / "v.zarr").exists()
    ingest(task)
    store = files_of(task.out)
    assert plan["files_at_most"] >= len(store)
    assert job.Job.from_source(open_source(task.source), task).output_files_and_bytes()[1] >= sum(
        map(len, store.values())
    )


def test_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = settings(write(tmp_path / "scan.mha", image()), tmp_path / "v.zarr", shard=16)
    write_block = Volume.write

    def fill(volume: Volume, box: Any, values: Any, **more: Any) -> None:
        if box.start[0] == 16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_block(volume, box, values, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Volume, "write", fill)
        with pytest.raises(VolumeError, match=r"v\.zarr.*No space left.*takes up to .* KiB, .* are free"):
            ingest(task)
    assert ingest(task).skipped == 12
    np.testing.assert_array_equal(Volume.open(task.out).read()[0], image())


def test_really_full_disk(tmp_path: Path, small_disk: Path) -> None:
    values = np.random.default_rng(0).integers(0, 60000, GRID.shape_zyx).astype(np.uint16)
    task = settings(write(tmp_path / "scan.mha", values), small_disk / "v.zarr", shard=16)
    with pytest.raises(VolumeError, match=r"v\.zarr.*No space left on device"):
        ingest(task)
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    assert ingest(task).skipped > 0
    np.testing.assert_array_equal(Volume.open(task.out).read()[0], values)


def test_read_only_target(tmp_path: Path, small_disk: Path) -> None:
    task = settings(write(tmp_path / "scan.mha", image()), small_disk / "v.zarr", shard=16)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(VolumeError, match=r"v\.zarr.* cannot be made \(Read-only file system\)"):
        ingest(task)


def test_what_was_expected_stands_beside_what_was_needed(tmp_path: Path) -> None:
    result = ingest(settings(write(tmp_path / "scan.mha", image()), tmp_path / "v.zarr", shard=16))
    kept = Volume.open(result.path).metadata
    assert kept["predicted"]["blocks"] == kept["needed"]["blocks"] == result.blocks
    assert kept["needed"]["num_bytes"] <= kept["predicted"]["num_bytes"]
    assert kept["needed"]["files"] <= kept["predicted"]["files"]
    assert "expected" in result.summary


def test_tiles_along_z_are_one_volume(tmp_path: Path) -> None:
    values, folder = image(), tmp_path / "tiles"
    folder.mkdir()
    for number, (a, b) in enumerate(((0, 9), (9, 10), (10, len(values)))):
        np.save(folder / f"tile{9 + number}.npy", values[a:b])
    result = ingest(settings(folder, tmp_path / "v.zarr", shard=16, spacing=(2, 1, 1), unit="mm"))
    np.testing.assert_array_equal(Volume.open(result.path).read()[0], values)
    assert "3 tiles from tile9.npy to tile11.npy" in result.notes[-1]


def test_every_row_or_every_so_manieth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are left out by their place in the volume: the same ones for any blocks, the range is that of all."""
    values = image("uint16")
    values[1, 2, 3] = 60000
    source = write(tmp_path / "scan.mha", values)
    monkeypatch.setattr("comir_hpc.ingest.job._COUNTED", values.size // 4)
    found = [
        Volume.open(ingest(settings(source, tmp_path / f"{shard}.zarr", shard=shard, chunk=8)).path).metadata
        for shard in (16, 64)
    ]
    assert found[0]["intensity"] == found[1]["intensity"]
    assert found[0]["value_range"][0][1] == 60000
    monkeypatch.undo()
    all_of_them = Volume.open(ingest(settings(source, tmp_path / "all.zarr")).path).metadata["intensity"][0]
    assert found[0]["intensity"][0]["mean"] == pytest.approx(all_of_them["mean"], rel=0.05)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(VolumeError, match="cannot be made"):
        ingest(settings(write(tmp_path / "scan.mha", image()), tmp_path / "file" / "v.zarr"))
