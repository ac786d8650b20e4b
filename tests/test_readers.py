"""Every format: the voxels of any box, the grid where ITK sees it, and a clear word on what is missing or torn."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import zarr
from scipy.spatial.transform import Rotation

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box, Grid
from comir_hpc.volumes.readers import Source, in_memory, open_source
from comir_hpc.volumes.volume import Volume

SHAPE = (5, 6, 7)
BOX = Box((1, 2, 0), (4, 6, 5))
OBLIQUE = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()


def counted(shape: tuple[int, ...] = SHAPE, dtype: str = "int16") -> np.ndarray:
    """Values that say where they are: no two alike, no symmetry."""
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def write_itk(path: Path, array: np.ndarray, *, compress: bool = False, vector: bool = False) -> None:
    image = sitk.GetImageFromArray(array, isVector=vector)
    image.SetSpacing((0.5, 1.25, 3.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection(OBLIQUE.ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=compress)


def holds(source: Source, array: np.ndarray) -> None:
    """The source's voxels, whole and by box, are those of (z, y, x) or (c, z, y, x) `array`."""
    expected = array[None] if array.ndim == 3 else array
    assert source.shape == expected.shape
    assert source.dtype == expected.dtype
    assert source.read().dtype == expected.dtype
    np.testing.assert_array_equal(source.read(), expected)
    np.testing.assert_array_equal(source.read(BOX), expected[(slice(None), *BOX.slices)])


def lies_as_itk_says(grid: Grid, path: Path | str) -> None:
    """The world position of every corner is the one that SimpleITK computes."""
    image = sitk.ReadImage(str(path))
    for z in (0, grid.shape_zyx[0] - 1):
        for y in (0, grid.shape_zyx[1] - 1):
            for x in (0, grid.shape_zyx[2] - 1):
                expected = image.TransformIndexToPhysicalPoint((x, y, z))
                np.testing.assert_allclose(grid.world_mm((z, y, x)), expected, atol=1e-4)


# ---------------------------------------------------------------------- formats that ITK knows


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_itk_formats(tmp_path: Path, suffix: str, compress: bool) -> None:
    path, array = tmp_path / f"scan{suffix}", counted()
    write_itk(path, array, compress=compress)
    source = open_source(path)
    holds(source, array)
    assert source.streamed == (suffix == ".nii" or (suffix != ".nii.gz" and not compress))
    assert source.load_bytes == 0 or source.load_bytes >= array.nbytes
    grid = source.grid()
    lies_as_itk_says(grid, path)
    assert grid.unit == "millimeter"
    np.testing.assert_allclose(grid.spacing_zyx, (3.0, 1.25, 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int32", "uint32", "float32", "float64", "int64"]
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_dtype_is_kept(tmp_path: Path, suffix: str, dtype: str) -> None:
    path, array = tmp_path / f"scan{suffix}", counted(dtype=dtype)
    write_itk(path, array)
    holds(open_source(path), array)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("compress", [False, True])
def test_colours_become_channels(tmp_path: Path, suffix: str, compress: bool) -> None:
    path, array = tmp_path / f"scan{suffix}", counted((*SHAPE, 3), "uint16")
    write_itk(path, array, vector=True, compress=compress)
    holds(open_source(path), np.moveaxis(array, -1, 0))


def test_nifti_rgb(tmp_path: Path) -> None:
    array = counted((*SHAPE, 3), "uint8")
    image = sitk.GetImageFromArray(array, isVector=True)
    sitk.WriteImage(image, str(tmp_path / "rgb.nii"))
    holds(open_source(tmp_path / "rgb.nii"), np.moveaxis(array, -1, 0))


@pytest.mark.parametrize("order", ["<", ">"])
def test_raw_files_in_both_byte_orders(tmp_path: Path, order: str) -> None:
    array = counted(dtype="int16")
    raw = array.astype(f"{order}i2").tobytes()
    big = order == ">"
    (tmp_path / "v.raw").write_bytes(b"12345" + raw)
    (tmp_path / "v.mhd").write_text(
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = {big}\nHeaderSize = 5\n"
        "DimSize = 7 6 5\nElementSpacing = 1 1 2\nElementType = MET_SHORT\nElementDataFile = v.raw\n"
    )
    (tmp_path / "v.nhdr").write_text(
        "NRRD0004\n# a comment\ntype: short\ndimension: 3\nsizes: 7 6 5\nspacings: 1 1 2\nencoding: raw\n"
        f"endian: {'big' if big else 'little'}\nbyte skip: -1\ndata file: v.raw\n"
    )
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), np.eye(4), header)
    nibabel.save(image, tmp_path / "v.nii")
    for name in ("v.mhd", "v.nhdr", "v.nii"):
        source = open_source(tmp_path / name)
        assert source.streamed, name
        holds(source, array)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))), array)
    assert {p.name for p in open_source(tmp_path / "v.mhd").files} == {"v.mhd", "v.raw"}


def affine(rotation: np.ndarray, flips: tuple[int, int, int] = (1, 1, 1)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = rotation @ np.diag(np.array([0.7, 1.1, 2.5]) * flips)
    matrix[:3, 3] = (11.0, -7.5, 42.0)
    return matrix


@pytest.mark.parametrize("rotation", [np.eye(3), OBLIQUE], ids=["straight", "oblique"])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (-1, -1, 1), (1, 1, -1), (-1, -1, -1)])
def test_nifti_orientation_is_what_itk_and_nibabel_say(
    tmp_path: Path, rotation: np.ndarray, flips: tuple[int, int, int]
) -> None:
    path, array, matrix = tmp_path / "scan.nii", counted(), affine(rotation, flips)
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), matrix), path)
    grid = open_source(path).grid()
    lies_as_itk_says(grid, path)
    # nibabel's world is RAS: x and y have the other sign.
    ras = matrix @ np.array([6, 5, 4, 1.0])
    np.testing.assert_allclose(grid.world_mm((4, 5, 6)), ras[:3] * (-1, -1, 1), atol=1e-4)
    assert np.linalg.det(np.asarray(grid.direction)) == pytest.approx(np.prod(flips), abs=1e-6)


@pytest.mark.parametrize(
    ("sform", "qform", "note"),
    [(1, 1, "sform is used"), (2, 1, "qform is used"), (1, 0, None), (0, 1, None), (0, 0, "neither")],
)
def test_nifti_forms_that_disagree_are_taken_as_itk_does(
    tmp_path: Path, sform: int, qform: int, note: str | None
) -> None:
    path = tmp_path / "scan.nii"
    image = nibabel.Nifti1Image(counted().transpose(2, 1, 0), affine(OBLIQUE))
    image.set_sform(affine(OBLIQUE), code=sform)
    image.set_qform(affine(np.eye(3)), code=qform)
    nibabel.save(image, path)
    raw = bytearray(path.read_bytes())
    raw[252:256] = np.array([qform, sform], dtype="<i2").tobytes()  # nibabel fills in codes that are 0
    path.write_bytes(bytes(raw))
    source = open_source(path)
    lies_as_itk_says(source.grid(), path)
    found = [n for n in source.notes if "form" in n]
    assert (note is None and not found) or (note is not None and note in found[0])


def test_nifti_forms_that_agree_need_no_note(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    image = nibabel.Nifti1Image(counted().transpose(2, 1, 0), affine(OBLIQUE))
    image.set_qform(affine(OBLIQUE), code=1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    assert open_source(path).notes == ()


def test_nifti_sheared_axes_are_refused(tmp_path: Path) -> None:
    matrix = affine(np.eye(3))
    matrix[0, 1] = 0.4
    nibabel.save(nibabel.Nifti1Image(counted().transpose(2, 1, 0), matrix), tmp_path / "scan.nii")
    with pytest.raises(VolumeError, match=r"scan\.nii: its axes are sheared.*resample"):
        open_source(tmp_path / "scan.nii")


@pytest.mark.parametrize(("unit", "name", "mm"), [("micron", "micrometer", 1e-3), ("meter", "meter", 1e3)])
def test_nifti_units(tmp_path: Path, unit: str, name: str, mm: float) -> None:
    path = tmp_path / "scan.nii"
    image = nibabel.Nifti1Image(counted().transpose(2, 1, 0), affine(OBLIQUE))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    grid = open_source(path).grid()
    assert grid.unit == name
    np.testing.assert_allclose(grid.spacing_zyx, (2.5, 1.1, 0.7), rtol=1e-5)
    np.testing.assert_allclose(grid.spacing_mm, np.array([2.5, 1.1, 0.7]) * mm, rtol=1e-5)
    image = sitk.ReadImage(str(path))
    np.testing.assert_allclose(grid.origin_mm, image.GetOrigin(), rtol=1e-5)


def test_nifti_slope_and_intercept(tmp_path: Path) -> None:
    path, array = tmp_path / "ct.nii", counted()
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), np.eye(4))
    nibabel.save(image, path)
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([0.5, -1000], dtype="<f4").tobytes()
    path.write_bytes(bytes(raw))
    holds(open_source(path), array.astype(np.float32) * np.float32(0.5) - 1000)
    np.testing.assert_allclose(open_source(path).read()[0], sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_fourth_axis_is_channels(tmp_path: Path, suffix: str) -> None:
    array = counted((3, *SHAPE))
    nibabel.save(nibabel.Nifti1Image(array.transpose(3, 2, 1, 0), np.eye(4)), tmp_path / f"s{suffix}")
    holds(open_source(tmp_path / f"s{suffix}"), array)


# ---------------------------------------------------------------------- TIFF


def test_tiff_without_spacing_names_the_option(tmp_path: Path) -> None:
    path, array = tmp_path / "stack.tif", counted()
    tifffile.imwrite(path, array, photometric="minisblack")
    source = open_source(path)
    holds(source, array)
    with pytest.raises(VolumeError, match=r"stack\.tif.*--spacing Z Y X --unit mm"):
        source.grid()
    grid = source.grid((2.0, 0.5, 0.5), "um")
    assert (grid.spacing_zyx, grid.unit) == ((2.0, 0.5, 0.5), "micrometer")


def test_tiff_resolution_without_z_is_not_enough(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "s.tif",
        counted(),
        resolution=(100, 100),
        resolutionunit="CENTIMETER",
        photometric="minisblack",
    )
    with pytest.raises(VolumeError, match=r"y 0\.1 mm, x 0\.1 mm and nothing about z; .*--spacing"):
        open_source(tmp_path / "s.tif").grid()


@pytest.mark.parametrize(
    ("unit", "name"), [("um", "micrometer"), ("micron", "micrometer"), ("mm", "millimeter")]
)
def test_imagej(tmp_path: Path, unit: str, name: str) -> None:
    path, array = tmp_path / "stack.tif", counted(dtype="uint16")
    tifffile.imwrite(path, array, imagej=True, resolution=(4.0, 2.0),
                     metadata={"axes": "ZYX", "spacing": 1.5, "unit": unit})  # fmt: skip
    source = open_source(path)
    holds(source, array)
    assert source.streamed
    assert (source.grid().spacing_zyx, source.grid().unit) == ((1.5, 0.5, 0.25), name)


def test_imagej_pixels_are_no_unit(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "s.tif", counted(dtype="uint16"), imagej=True, resolution=(4.0, 2.0),
                     metadata={"axes": "ZYX", "spacing": 1.5, "unit": "pixel"})  # fmt: skip
    with pytest.raises(VolumeError, match=r"'pixel', which is no length; .*--spacing"):
        open_source(tmp_path / "s.tif").grid()


@pytest.mark.parametrize("axes", ["ZCYX", "CZYX"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}])
def test_ome_tiff(tmp_path: Path, axes: str, options: dict[str, Any]) -> None:
    path, array = tmp_path / "stack.ome.tif", counted((5, 2, 33, 40), "uint16")
    if axes == "CZYX":
        array = array.swapaxes(0, 1)
    metadata = {"axes": axes, "PhysicalSizeX": 0.325, "PhysicalSizeY": 0.325, "PhysicalSizeYUnit": "µm",
                "PhysicalSizeZ": 2000.0, "PhysicalSizeZUnit": "nm"}  # fmt: skip
    tifffile.imwrite(path, array, metadata=metadata, photometric="minisblack", **options)
    source = open_source(path)
    holds(source, array if axes == "CZYX" else array.swapaxes(0, 1))
    np.testing.assert_allclose(source.grid().spacing_mm, (2e-3, 0.325e-3, 0.325e-3))


def test_ome_tiff_keeps_its_unit(tmp_path: Path) -> None:
    metadata = {"axes": "ZYX", "PhysicalSizeX": 80.0, "PhysicalSizeY": 80.0, "PhysicalSizeZ": 100.0}
    tifffile.imwrite(tmp_path / "s.ome.tif", counted(), metadata=metadata, photometric="minisblack")
    grid = open_source(tmp_path / "s.ome.tif").grid()
    assert (grid.spacing_zyx, grid.unit) == ((100.0, 80.0, 80.0), "micrometer")


def test_ome_tiff_without_z_names_what_is_missing(tmp_path: Path) -> None:
    metadata = {"axes": "ZYX", "PhysicalSizeX": 80.0, "PhysicalSizeY": 80.0}
    tifffile.imwrite(tmp_path / "s.ome.tif", counted(), metadata=metadata, photometric="minisblack")
    with pytest.raises(VolumeError, match=r"lacks PhysicalSizeZ; .*--spacing"):
        open_source(tmp_path / "s.ome.tif").grid()


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "jpeg"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("cut", [{"rowsperstrip": 5}, {"tile": (16, 32)}])
def test_tiff_layouts(tmp_path: Path, compression: str | None, planar: str, cut: dict[str, Any]) -> None:
    if compression == "jpeg" and "rowsperstrip" in cut:
        cut = {"rowsperstrip": 8}
    shape = (3, 41, 50, 3) if planar == "contig" else (3, 3, 41, 50)
    array = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    path = tmp_path / "rgb.tif"
    tifffile.imwrite(path, array, compression=compression, planarconfig=planar, photometric="rgb", **cut)
    whole = tifffile.imread(path)
    expected = np.moveaxis(whole, -1, 0) if planar == "contig" else np.moveaxis(whole, 1, 0)
    source, box = open_source(path), Box((1, 7, 13), (3, 38, 50))
    np.testing.assert_array_equal(source.read(), expected)
    np.testing.assert_array_equal(source.read(box), expected[(slice(None), *box.slices)])


def test_big_endian_tiff(tmp_path: Path) -> None:
    for compression in (None, "zlib"):
        tifffile.imwrite(
            tmp_path / "s.tif", counted(), byteorder=">", compression=compression, photometric="minisblack"
        )
        holds(open_source(tmp_path / "s.tif"), counted())


def test_tiff_several_images_are_named(tmp_path: Path) -> None:
    path = tmp_path / "two.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(counted(), photometric="minisblack")
        file.write(counted((4, 8, 9)), photometric="minisblack")
    with pytest.raises(VolumeError, match=r"2 images \(0: 5x6x7 .*1: 4x8x9.*--dataset NUMBER"):
        open_source(path)
    np.testing.assert_array_equal(open_source(path, "1").read()[0], counted((4, 8, 9)))
    with pytest.raises(VolumeError, match=r"--dataset 7 is none of them"):
        open_source(path, "7")


def test_tiff_time_series_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "t.tif", counted((2, *SHAPE), "uint16"), imagej=True, metadata={"axes": "TZYX"}
    )
    with pytest.raises(VolumeError, match=r"axes TZYX of .* extract one time point"):
        open_source(tmp_path / "t.tif")


def test_tiff_folder_is_ordered_by_number(tmp_path: Path) -> None:
    array = counted((12, 6, 7), "uint16")
    for z, plane in enumerate(array):
        tifffile.imwrite(tmp_path / f"slice{z}.tif", plane, compression="zlib" if z % 2 else None)
    source = open_source(tmp_path)
    holds(source, array)
    assert source.streamed
    assert "slice0.tif to slice11.tif" in source.notes[0]
    with pytest.raises(VolumeError, match=r"--spacing"):
        source.grid()
    tifffile.imwrite(tmp_path / "slice5.tif", np.zeros((6, 8), np.uint16))
    with pytest.raises(VolumeError, match=r"slice5\.tif is \(6, 8\) uint16, the other slices"):
        open_source(tmp_path).read()


def test_tiles_along_z(tmp_path: Path) -> None:
    array = counted((12, 6, 7), "uint16")
    for name, (a, b) in {"tile2.tif": (0, 5), "tile10.tif": (5, 12)}.items():
        tifffile.imwrite(tmp_path / name, array[a:b], photometric="minisblack")
    source = open_source(tmp_path)
    holds(source, array)
    assert source.streamed
    assert "2 tiles from tile2.tif to tile10.tif" in source.notes[-1]
    before = source.fingerprint()
    tifffile.imwrite(tmp_path / "tile10.tif", array[5:12] + 1, metadata=None)
    assert source.fingerprint() != before
    tifffile.imwrite(tmp_path / "tile10.tif", np.zeros((5, 6, 8), np.uint16), photometric="minisblack")
    with pytest.raises(
        VolumeError, match=r"tile10\.tif: its channels, y and x is \(1, 6, 8\), that of .*tile2\.tif"
    ):
        open_source(tmp_path)
    np.save(tmp_path / "other.npy", array)
    (tmp_path / "tile10.tif").unlink()
    with pytest.raises(VolumeError, match="nor tiles of one format"):
        open_source(tmp_path)


# ---------------------------------------------------------------------- DICOM


def write_dicom(
    folder: Path, array: np.ndarray, *, uid: str = "1.2.3", tilt: float = 0.0, skip: int | None = None
) -> None:
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z, plane in enumerate(array):
        if z == skip:
            continue
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing((0.5, 0.75))
        position = OBLIQUE @ np.array([0.0, tilt * z, 2.5 * z]) + (5.0, 6.0, 7.0)
        tags = {
            "0008|0060": "MR", "0008|103e": f"series {uid}", "0020|000e": uid, "0020|000d": "1.2",
            "0008|0018": f"{uid}.{z}",
            "0020|0032": "\\".join(f"{v:.6f}" for v in position), "0020|0013": str(z),
            "0020|0037": "\\".join(f"{v:.8f}" for v in OBLIQUE[:, :2].T.ravel()),
        }  # fmt: skip
        for key, value in tags.items():
            image.SetMetaData(key, value)
        # Names against the order of the slices: position must decide.
        writer.SetFileName(str(folder / f"{uid}_{99 - z}.dcm"))
        writer.Execute(image)


def test_dicom_series(tmp_path: Path) -> None:
    array = counted(dtype="uint16")
    write_dicom(tmp_path / "mr", array)
    source = open_source(tmp_path / "mr")
    holds(source, array)
    assert source.streamed
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "mr")))
    sitk.WriteImage(reader.Execute(), str(tmp_path / "same.mha"))
    lies_as_itk_says(source.grid(), tmp_path / "same.mha")
    np.testing.assert_allclose(source.grid().spacing_zyx, (2.5, 0.75, 0.5))


def test_one_dicom_slice_lies_in_its_own_plane(tmp_path: Path) -> None:
    array = counted(dtype="uint16")[:1]
    write_dicom(tmp_path / "mr", array)
    source = open_source(tmp_path / "mr")
    np.testing.assert_array_equal(source.read()[0], array)
    (file,) = (tmp_path / "mr").iterdir()
    lies_as_itk_says(source.grid(), file)


def test_dicom_several_series_are_named(tmp_path: Path) -> None:
    write_dicom(tmp_path / "mr", counted(dtype="uint16"), uid="1.2.3")
    write_dicom(tmp_path / "mr", counted((4, 6, 7), dtype="uint16"), uid="1.2.4")
    with pytest.raises(
        VolumeError, match=r"2 DICOM series.*--dataset UID: 1\.2\.3.*series 1\.2\.3, 5 files.*4 files"
    ):
        open_source(tmp_path / "mr")
    found = open_source(
        tmp_path / "mr", next(u for u in _series_ids(tmp_path / "mr") if u.startswith("1.2.4"))
    )
    assert found.shape == (1, 4, 6, 7)


def _series_ids(folder: Path) -> tuple[str, ...]:
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def test_dicom_missing_slice_and_tilt_are_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "gap", counted(dtype="uint16"), skip=2)
    with pytest.raises(VolumeError, match=r"5 mm apart, the other slices 2\.5 mm: a slice is missing"):
        open_source(tmp_path / "gap")
    write_dicom(tmp_path / "tilt", counted(dtype="uint16"), tilt=0.5)
    with pytest.raises(VolumeError, match=r"sideways by 0\.5 mm.*gantry tilt"):
        open_source(tmp_path / "tilt")


def test_folder_with_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    with pytest.raises(VolumeError, match=r"neither DICOM nor TIFF slices.*its folders are inside"):
        open_source(tmp_path)


# ---------------------------------------------------------------------- arrays


def test_npy(tmp_path: Path) -> None:
    for order in ("C", "F"):
        np.save(tmp_path / "v.npy", np.asarray(counted(), order=order))
        source = open_source(tmp_path / "v.npy")
        holds(source, counted())
        assert source.streamed
    np.save(tmp_path / "v.npy", counted((*SHAPE, 3)))
    holds(open_source(tmp_path / "v.npy"), np.moveaxis(counted((*SHAPE, 3)), -1, 0))
    with pytest.raises(VolumeError, match=r"--spacing"):
        open_source(tmp_path / "v.npy").grid()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (counted().astype(np.complex64), "complex"),
        (counted((2, *SHAPE, 2)), "four axes"),
        (np.array([["a"]]), "type <U1|shape"),
        (counted((6,)), "four axes"),
    ],
)
def test_npy_that_is_no_volume(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(VolumeError, match=words):
        open_source(tmp_path / "v.npy")


def test_bool_is_stored_as_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", counted() % 2 == 0)
    holds(open_source(tmp_path / "v.npy"), (counted() % 2 == 0).astype(np.uint8))


def test_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "v.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("set/raw", data=counted(), chunks=(2, 3, 7), compression="gzip")
        file["set/raw"].attrs["element_size_um"] = [2.0, 0.5, 0.25]
    source = open_source(path)
    holds(source, counted())
    assert (source.grid().spacing_zyx, source.grid().unit, source.atom_zyx) == (
        (2.0, 0.5, 0.25),
        "micrometer",
        (2, 3, 7),
    )
    with h5py.File(path, "a") as file:
        file.create_dataset("label", data=counted((3, *SHAPE), "uint8"))
    with pytest.raises(
        VolumeError, match=r"2 arrays.*--dataset NAME.*label 3x5x6x7 uint8, set/raw 5x6x7 int16"
    ):
        open_source(path)
    with pytest.raises(VolumeError, match=r"no dataset 'set'.*label 3x5x6x7"):
        open_source(path, "set")
    holds(open_source(path, "label"), counted((3, *SHAPE), "uint8"))
    with pytest.raises(VolumeError, match=r"no attribute element_size_um.*--spacing"):
        open_source(path, "label").grid()


def test_hdf5_labelled_axes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["a"] = counted((*SHAPE, 9))  # longer than z: only the labels tell that it is channels
        for dimension, label in zip(file["a"].dims, "zyxc", strict=True):
            dimension.label = label
    holds(open_source(tmp_path / "v.h5"), np.moveaxis(counted((*SHAPE, 9)), -1, 0))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(tmp_path: Path, version: str) -> None:
    path, array = tmp_path / "v.zarr", counted((2, *SHAPE), "uint16")
    group = zarr.create_group(store=str(path), zarr_format=2 if version == "0.4" else 3)
    group.create_array("s0", data=array[None], chunks=(1, 1, 2, 6, 7))
    group.create_array("s1", data=array[None, ..., ::2, ::2], chunks=(1, 1, 2, 3, 4))
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    axes += [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    scales = ([1, 1, 2.0, 0.5, 0.25], [1, 1, 2.0, 1.0, 0.5])
    multiscale = {
        "version": version, "axes": axes,
        "datasets": [
            {"path": f"s{n}", "coordinateTransformations": [
                {"type": "scale", "scale": list(s)}, {"type": "translation", "translation": [0, 0, 4.0, 5.0, 6.0]}]}
            for n, s in enumerate(scales)
        ],
    }  # fmt: skip
    group.attrs.update(
        {"multiscales": [multiscale]}
        if version == "0.4"
        else {"ome": {"version": "0.5", "multiscales": [multiscale]}}
    )
    source = open_source(path)
    holds(source, array)
    grid = source.grid()
    assert (grid.spacing_zyx, grid.origin_xyz, grid.unit) == ((2.0, 0.5, 0.25), (6.0, 5.0, 4.0), "micrometer")
    assert source.atom_zyx == (2, 6, 7)
    coarse = open_source(path, "s1")
    assert coarse.grid().spacing_zyx == (2.0, 1.0, 0.5)
    np.testing.assert_array_equal(coarse.read(), array[..., ::2, ::2])
    if version == "0.4":
        multiscale["axes"] = [{k: v for k, v in a.items() if k != "unit"} for a in axes]
        group.attrs.update({"multiscales": [multiscale]})
        with pytest.raises(VolumeError, match=r"no unit of length.*--unit"):
            open_source(path).grid()
        assert open_source(path).grid(unit="mm").spacing_zyx == (2.0, 0.5, 0.25)


def test_plain_zarr(tmp_path: Path) -> None:
    zarr.create_array(store=str(tmp_path / "v.zarr"), data=counted(), chunks=(2, 3, 4))
    holds(open_source(tmp_path / "v.zarr"), counted())
    group = zarr.create_group(store=str(tmp_path / "w.zarr"))
    group.create_array("a/b", data=counted(), chunks=(2, 3, 4))
    holds(open_source(tmp_path / "w.zarr"), counted())
    group.create_array("c", data=counted((3, *SHAPE)), chunks=(1, 2, 3, 4))
    with pytest.raises(VolumeError, match=r"2 arrays.*a/b 5x6x7 int16"):
        open_source(tmp_path / "w.zarr")
    holds(open_source(tmp_path / "w.zarr", "c"), counted((3, *SHAPE)))
    with pytest.raises(VolumeError, match=r"no array or image 'd'"):
        open_source(tmp_path / "w.zarr", "d")


def test_our_own_volume_keeps_its_direction(tmp_path: Path) -> None:
    grid = Grid(SHAPE, (2.0, 0.5, 0.25), (1.0, 2.0, 3.0), tuple(map(tuple, OBLIQUE.tolist())), "micrometer")
    volume = Volume.create(tmp_path / "v.zarr", grid, "int16", chunk=4, shard=8)
    volume.write(grid.box, counted()[None])
    with pytest.raises(VolumeError, match=r"v\.zarr is incomplete"):
        open_source(tmp_path / "v.zarr")
    volume.finish()
    source = open_source(tmp_path / "v.zarr")
    holds(source, counted())
    assert source.grid() == grid


def test_in_memory() -> None:
    grid = Grid(SHAPE, (2.0, 1.0, 1.0))
    source = in_memory(counted(), grid)
    holds(source, counted())
    assert source.grid() == grid
    assert source.fingerprint() == in_memory(counted().copy(), grid).fingerprint()
    assert source.fingerprint() != in_memory(counted()[::-1], grid).fingerprint()
    with pytest.raises(VolumeError, match=r"does not fit a grid"):
        in_memory(counted((5, 6, 8)), grid)


# ---------------------------------------------------------------------- spacing and units given by the user


def test_given_spacing_replaces_and_keeps_the_place(tmp_path: Path) -> None:
    write_itk(tmp_path / "s.mha", counted())
    source = open_source(tmp_path / "s.mha")
    grid = source.grid((3000.0, 500.0, 500.0), "um")
    assert (grid.spacing_zyx, grid.unit) == ((3000.0, 500.0, 500.0), "micrometer")
    np.testing.assert_allclose(grid.origin_mm, (10.0, -20.0, 30.0))
    assert source.grid((3.0, 1.0, 1.0)).unit == "millimeter"
    header = nibabel.Nifti1Header()
    header.set_xyzt_units("mm")
    nibabel.save(nibabel.Nifti1Image(counted(), np.eye(4), header), tmp_path / "s.nii")
    with pytest.raises(VolumeError, match=r"spacing is in millimeter, --unit says micrometer"):
        open_source(tmp_path / "s.nii").grid(unit="um")


@pytest.mark.parametrize(("name", "text"), [("v.nhdr", "NRRD"), ("v.mhd", "MetaImage")])
def test_headers_without_spacing(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "v.raw").write_bytes(counted().tobytes())
    (tmp_path / "v.nhdr").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nencoding: raw\nendian: little\ndata file: v.raw\n"
    )
    (tmp_path / "v.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 7 6 5\nElementType = MET_SHORT\n"
        "ElementDataFile = v.raw\n"
    )
    source = open_source(tmp_path / name)
    holds(source, counted())
    with pytest.raises(VolumeError, match=f"no voxel spacing in this {text} file.*--spacing"):
        source.grid()


# ---------------------------------------------------------------------- bad files


WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "a.nii": lambda p, a: write_itk(p, a),
    "a.nii.gz": lambda p, a: write_itk(p, a),
    "a.nrrd": lambda p, a: write_itk(p, a),
    "b.nrrd": lambda p, a: write_itk(p, a, compress=True),
    "a.mha": lambda p, a: write_itk(p, a),
    "b.mha": lambda p, a: write_itk(p, a, compress=True),
    "a.npy": lambda p, a: np.save(p, a),
    "a.tif": lambda p, a: tifffile.imwrite(p, a, photometric="minisblack"),
    "b.tif": lambda p, a: tifffile.imwrite(p, a, compression="zlib", photometric="minisblack"),
    "a.h5": lambda p, a: h5py.File(p, "w").create_dataset("a", data=a).file.close(),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_truncated_files_are_named(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    array = np.random.default_rng(0).integers(0, 1000, (20, 30, 40)).astype(np.int16)
    WRITERS[name](path, array)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(VolumeError, match=name.replace(".", r"\.")):
        open_source(path).read()


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_another_format_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is a letter, not an image\n" * 40)
    with pytest.raises(VolumeError, match=name.replace(".", r"\.")):
        open_source(tmp_path / name).read()


def test_damaged_gzip(tmp_path: Path) -> None:
    write_itk(tmp_path / "a.nii", counted((20, 30, 40)))
    packed = bytearray(gzip.compress((tmp_path / "a.nii").read_bytes()))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "a.nii.gz").write_bytes(bytes(packed))
    with pytest.raises(VolumeError, match=r"a\.nii\.gz cannot be read"):
        open_source(tmp_path / "a.nii.gz").read()


def test_missing_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"nothing\.nii does not exist"):
        open_source(tmp_path / "nothing.nii")
    (tmp_path / "a.gif").write_bytes(b"x")
    with pytest.raises(VolumeError, match=r"a\.gif: unknown format; expected NIfTI"):
        open_source(tmp_path / "a.gif")
    write_itk(tmp_path / "a.mhd", counted())
    (tmp_path / "a.raw").unlink()
    with pytest.raises(VolumeError, match=r"a\.raw, which does not exist"):
        open_source(tmp_path / "a.mhd")
    write_itk(tmp_path / "a.mha", counted())
    with pytest.raises(VolumeError, match=r"holds one volume: leave --dataset a out"):
        open_source(tmp_path / "a.mha", "a")


def test_box_outside(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", counted())
    with pytest.raises(VolumeError, match=r"is not inside the volume"):
        open_source(tmp_path / "v.npy").read(Box((0, 0, 0), (5, 6, 8)))


def test_fingerprint_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    np.save(path, counted())
    source = open_source(path)
    before = source.fingerprint()
    assert open_source(path).fingerprint() == before
    np.save(path, counted((5, 6, 8)))
    assert source.fingerprint() != before
    path.unlink()
    with pytest.raises(VolumeError, match=r"disappeared"):
        source.fingerprint()
    zarr.create_array(store=str(tmp_path / "v.zarr"), data=counted(), chunks=(2, 3, 4))
    source = open_source(tmp_path / "v.zarr")
    before = source.fingerprint()
    shutil.copy(tmp_path / "v.zarr" / "c" / "0" / "0" / "0", tmp_path / "v.zarr" / "c" / "0" / "0" / "1")
    assert source.fingerprint() != before
