"""Warp into one file: that format, the voxels of the .zarr, the fixed grid as other readers see it, or a refusal."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from test_warp import FIXED, MOVING, RIGID, SMOOTH, made, volume

from comir_hpc.errors import ConfigError, VolumeError
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import array_and_grid, save_transform
from comir_hpc.volumes.readers import open_source
from comir_hpc.volumes.volume import Volume
from comir_hpc.warp import plan_warp, warp
from comir_hpc.warp.files import nifti_matrix, predicted_bytes, write_file

ITK_NAMES = ["w.nii", "w.nii.gz", "w.nrrd", "w.mha", "W.MHA", "w.NII.GZ"]
DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"]
MICRO = Grid(FIXED.shape_zyx, (2.0, 1.5, 0.5), (30.0, -20.0, 1000.0), FIXED.direction, "micrometer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_transform(RIGID, tmp_path)
    volume(tmp_path / "fixed.zarr", np.zeros(FIXED.shape_zyx, np.uint8), FIXED)
    return tmp_path


def ramp(dtype: str, grid: Grid = FIXED, channels: int = 1) -> np.ndarray:
    """Values that differ along every axis, up to the largest of the dtype."""
    values = np.random.default_rng(0).integers(0, 100, (channels, *grid.shape_zyx)).astype(dtype)
    kind = np.dtype(dtype)
    values[0, -1, 2, 3] = np.iinfo(kind).max if kind.kind in "iu" else 1e30
    return values


@pytest.mark.parametrize("name", ITK_NAMES)
def test_a_file_holds_what_the_zarr_holds(folder: Path, name: str) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(np.int16))
    expected = Volume.open(warp(made(folder)).path).read()[0]
    result = warp(made(folder, out=folder / "new" / name))
    assert (result.path.name, result.blocks, result.complete, result.notes) == (name, 1, True, ())
    assert [p.name for p in (folder / "new").iterdir()] == [name]
    small = folder / name.lower()  # ITK knows its suffixes in small letters only
    shutil.copy(result.path, small)
    values, grid = array_and_grid(sitk.ReadImage(str(small)))
    np.testing.assert_array_equal(values, expected)
    assert values.dtype == np.int16
    assert grid.agrees_with(FIXED)
    assert open_source(small).grid().agrees_with(FIXED)
    np.testing.assert_array_equal(open_source(small).read()[0], expected)


@pytest.mark.parametrize("grid", [FIXED, MICRO], ids=["oblique and mirrored", "micrometres"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["w.nii.gz", "w.nrrd", "w.mha"])
def test_every_type_and_grid_is_kept(tmp_path: Path, name: str, dtype: str, grid: Grid) -> None:
    path, values = tmp_path / name, ramp(dtype, grid)
    assert write_file(path, values, grid) == ()
    read, found = array_and_grid(sitk.ReadImage(str(path)))
    assert read.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(read, values[0])
    assert found.agrees_with(grid)
    np.testing.assert_allclose(found.spacing_mm, grid.spacing_mm, rtol=1e-6)


def test_nifti_as_nibabel_sees_it(tmp_path: Path) -> None:
    values = ramp("uint16", channels=3)
    notes = write_file(tmp_path / "w.nii.gz", values, FIXED)
    assert notes == ("w.nii.gz: its 3 channels lie along the fourth axis",)
    image = nibabel.load(tmp_path / "w.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), values.transpose(3, 2, 1, 0))
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    lps = np.array([[1.0, 2, 3], [25, 20, 10]])
    world = FIXED.world_mm(lps[:, ::-1]) * (-1, -1, 1)
    for matrix in (image.get_sform(), image.get_qform(), nifti_matrix(FIXED)):
        np.testing.assert_allclose(lps @ matrix[:3, :3].T + matrix[:3, 3], world, atol=1e-3)
    source = open_source(tmp_path / "w.nii.gz")
    np.testing.assert_array_equal(source.read(), values)
    with gzip.open(tmp_path / "w.nii.gz") as file:
        assert len(file.read()) == 352 + values.nbytes


@pytest.mark.parametrize("name", ["w.nrrd", "w.mha"])
def test_channels_of_itk_files(tmp_path: Path, name: str) -> None:
    values = ramp("float32", channels=2)
    write_file(tmp_path / name, values, FIXED)
    read, grid = array_and_grid(sitk.ReadImage(str(tmp_path / name)))
    np.testing.assert_array_equal(read, values)
    np.testing.assert_array_equal(open_source(tmp_path / name).read(), values)
    assert grid.agrees_with(FIXED)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"]
)
@pytest.mark.parametrize(("name", "channels"), [("w.ome.tif", 1), ("w.OME.tiff", 2)])
def test_ome_tiff_keeps_values_spacing_and_unit(tmp_path: Path, name: str, channels: int, dtype: str) -> None:
    values = ramp(dtype, MICRO, channels)
    notes = write_file(tmp_path / name, values, MICRO)
    assert "neither origin nor direction" in notes[0]
    with tifffile.TiffFile(tmp_path / name) as file:
        assert file.is_ome
        assert not file.is_imagej
        assert file.series[0].axes == ("CZYX" if channels > 1 else "ZYX")
        found = file.series[0].asarray()
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found.reshape(values.shape), values)
        assert 'PhysicalSizeZ="2.0"' in file.ome_metadata
        assert 'PhysicalSizeXUnit="\u00b5m"' in file.ome_metadata
    source = open_source(tmp_path / name)
    np.testing.assert_array_equal(source.read(), values)
    assert (source.grid().spacing_zyx, source.grid().unit) == (MICRO.spacing_zyx, "micrometer")


def test_what_ome_tiff_lacks_is_refused_and_where_tiff_of_imagej_ends_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"OME-TIFF holds .* is int64; write \.nii\.gz"):
        write_file(tmp_path / "w.ome.tif", ramp("int64"), FIXED)
    with pytest.raises(VolumeError, match=r"is int16; write \.ome\.tif, \.nii\.gz"):
        write_file(tmp_path / "w.tif", ramp("int16"), FIXED)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", ["w.tif", "w.tiff"])
def test_tiff_as_imagej_sees_it(tmp_path: Path, name: str, channels: int, dtype: str) -> None:
    values = ramp(dtype, MICRO, channels)
    notes = write_file(tmp_path / name, values, MICRO)
    assert notes == (
        f"{name}: TIFF keeps voxel size and unit, but neither origin nor direction: where it lies is lost",
    )
    with tifffile.TiffFile(tmp_path / name) as file:
        assert file.is_imagej
        assert file.imagej_metadata["unit"] == "um"
        assert file.imagej_metadata["spacing"] == 2.0
        assert file.pages[0].dtype == np.dtype(dtype)
        resolution = [file.pages[0].tags[tag].value for tag in ("YResolution", "XResolution")]
        np.testing.assert_allclose([a / b for a, b in resolution], (1 / 1.5, 1 / 0.5), rtol=1e-6)
        assert file.series[0].axes == ("ZCYX" if channels > 1 else "ZYX")
        stack = file.asarray().reshape(MICRO.shape_zyx[0], channels, *MICRO.shape_zyx[1:])
    np.testing.assert_array_equal(stack.transpose(1, 0, 2, 3), values)
    source = open_source(tmp_path / name)
    np.testing.assert_array_equal(source.read(), values)
    np.testing.assert_allclose(source.grid().spacing_mm, MICRO.spacing_mm, rtol=1e-6)


def test_a_single_slice(tmp_path: Path) -> None:
    grid = Grid((1, 12, 10), (5.0, 2.0, 1.0), (1.0, 2.0, 3.0))
    values = ramp("uint16", grid)
    for name in ("s.nii.gz", "s.nrrd", "s.mha", "s.tif"):
        write_file(tmp_path / name, values, grid)
        source = open_source(tmp_path / name)
        np.testing.assert_array_equal(source.read(), values)
        assert source.grid().shape_zyx == grid.shape_zyx
        np.testing.assert_allclose(source.grid().spacing_mm[1:], grid.spacing_mm[1:], rtol=1e-6)


@pytest.mark.parametrize("name", ["w.nii", "w.nrrd", "w.mha", "w.tif"])
def test_float16_becomes_float32_exactly_and_is_said(tmp_path: Path, name: str) -> None:
    values = np.random.default_rng(0).normal(size=(1, *FIXED.shape_zyx)).astype(np.float16)
    notes = write_file(tmp_path / name, values, FIXED)
    assert "has no float16; the values are kept as float32, exactly" in notes[0]
    read = open_source(tmp_path / name).read()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.astype(np.float32))


def test_ids_beyond_2_53_reach_the_file(folder: Path) -> None:
    ids = np.array([2**63 + 1, 2**63 + 3, 2**53 + 1], dtype=np.uint64)
    values = np.random.default_rng(0).choice(ids, MOVING.shape_zyx)
    volume(folder / "moving.zarr", values, kind="labels")
    for name in ("w.nii.gz", "w.nrrd", "w.mha"):
        warp(made(folder, out=folder / name))
        read = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name)))
        assert set(np.unique(read).tolist()) == {0, *ids.tolist()}


def test_a_grid_too_fine_for_single_precision_is_said(tmp_path: Path) -> None:
    grid = Grid((4, 5, 6), (1e-4, 1e-4, 1e-4), (150.000003, 0.0, 0.0))
    (note,) = write_file(tmp_path / "w.nii", ramp("uint8", grid), grid)
    assert "single precision, which moves voxels by up to" in note
    assert write_file(tmp_path / "w.nrrd", ramp("uint8", grid), grid) == ()


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "name", ["w.img", "w.mhd", "w.nhdr", "w.h5", "w.npy", "w.png", "w", "w.nii.bz2", "w.csv"]
)
def test_other_names_are_refused_with_the_list(folder: Path, name: str) -> None:
    volume(folder / "moving.zarr", SMOOTH)
    for verb in (warp, plan_warp):
        with pytest.raises(
            ConfigError, match=r"expected \.zarr \(any size\) or one of \.nii, \.nii\.gz, \.nrrd"
        ):
            verb(made(folder, out=folder / name))
    assert not (folder / name).exists()


@pytest.mark.parametrize("dtype", ["int16", "int8", "uint32", "int64", "float64"])
def test_tiff_refuses_types_that_imagej_lacks(folder: Path, dtype: str) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(dtype))
    with pytest.raises(
        VolumeError, match=rf"holds uint8, uint16, float32, and the moving volume is {dtype}; write"
    ):
        warp(made(folder, out=folder / "w.tif"))
    assert not (folder / "w.tif").exists()


def test_what_does_not_fit_is_refused_with_the_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(np.float32))
    monkeypatch.setattr("comir_hpc.warp.files.available_bytes", lambda: 10 << 20)
    with pytest.raises(
        VolumeError, match=r"needs 2\d\.\d MiB of memory.*10\.0 MiB are free\. Write NAME\.zarr"
    ):
        warp(made(folder, out=folder / "w.nii.gz"))
    assert not list(folder.glob("*w.nii*"))
    big = (1, 40_000, 500, 500)
    assert predicted_bytes(Path("w.nii"), big, np.dtype(np.uint8)) == 10_000_000_000
    assert predicted_bytes(Path("w.mha"), big, np.dtype(np.uint8)) == 20_000_000_000
    assert predicted_bytes(Path("w.mha"), (2, *big[1:]), np.dtype(np.uint8)) == 60_000_000_000


def test_limits_of_the_formats(folder: Path) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(np.float32))
    long = Grid((40_000, 4, 4), (1.0, 10.0, 10.0), (-15.0, -15.0, -20_000.0))
    Volume.create(folder / "long.zarr", long, np.uint8).finish()
    with pytest.raises(
        VolumeError, match="NIfTI ends at 32767 voxels along an axis, and the result has 40000"
    ):
        warp(made(folder, like=folder / "long.zarr", out=folder / "w.nii"))
    wide = Grid((1100, 1000, 1000), (0.04, 0.04, 0.04), (-20.0, -20.0, -20.0))
    Volume.create(folder / "wide.zarr", wide, np.uint8).finish()
    with pytest.raises(VolumeError, match=r"ends at 4 GiB, and the result has 4\.1 GiB"):
        warp(made(folder, like=folder / "wide.zarr", out=folder / "w.tif"))


def test_nothing_is_replaced_unasked_and_no_original_ever(folder: Path) -> None:
    original = folder / "original.nii.gz"
    original.write_bytes(b"mine")
    volume(folder / "moving.zarr", SMOOTH.astype(np.float32), source={"path": str(original)})
    with pytest.raises(ConfigError, match=r"the output .*original\.nii\.gz is the input"):
        warp(made(folder, out=original, overwrite=True))
    assert original.read_bytes() == b"mine"
    out = folder / "w.nii.gz"
    out.write_bytes(b"other")
    with pytest.raises(VolumeError, match=r"w\.nii\.gz exists; choose another name, or pass --overwrite"):
        warp(made(folder, out=out))
    assert out.read_bytes() == b"other"
    assert warp(made(folder, out=out, overwrite=True)).complete
    (folder / "d.nii.gz").mkdir()
    with pytest.raises(VolumeError, match=r"d\.nii\.gz is a folder"):
        warp(made(folder, out=folder / "d.nii.gz", overwrite=True))


@pytest.mark.parametrize(
    ("option", "changes"),
    [("--part", {"part": (1, 2)}), ("--workers", {"workers": 2}), ("--verify", {"verify": True})],
)
def test_options_for_blocks_are_refused(folder: Path, option: str, changes: dict[str, Any]) -> None:
    volume(folder / "moving.zarr", SMOOTH)
    with pytest.raises(ConfigError, match=rf"{option}: one process makes w\.nii at once"):
        warp(made(folder, out=folder / "w.nii", **changes))


@pytest.mark.parametrize("name", ["w.nii", "w.nii.gz", "w.nrrd", "w.mha", "w.tif"])
def test_a_full_or_read_only_disk_leaves_nothing(folder: Path, small_disk: Path, name: str) -> None:
    noise = np.random.default_rng(0).normal(size=(1, 60, 60, 60)).astype(np.float32)
    grid = Grid(noise.shape[1:], (1.0, 1.0, 1.0))
    with pytest.raises(VolumeError, match=r"cannot be written \(No space left on device\)"):
        write_file(small_disk / name, noise, grid)
    assert not list(small_disk.iterdir())
    volume(folder / "moving.zarr", SMOOTH.astype(np.float32))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(VolumeError, match=r"cannot be written \(Read-only file system\)"):
        warp(made(folder, out=small_disk / name))


def test_the_plan_names_memory_and_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume(folder / "moving.zarr", SMOOTH.astype(np.float32))
    monkeypatch.setattr("comir_hpc.warp.one_file.expected_peak", lambda more: (100 << 20) + more)
    plan = plan_warp(made(folder, out=folder / "w.nii.gz"))
    assert (plan["files"], plan["interpolation"]) == (1, "linear")
    assert 120 < float(plan["peak_memory"].removesuffix(" MiB")) < 125
    assert not (folder / "w.nii.gz").exists()
