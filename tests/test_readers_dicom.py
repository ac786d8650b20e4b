"""DICOM: every frame where its header says, with the values it means, or a word on why it is no volume."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import tifffile
from dicom_files import enhanced, phantom, rescaled, save, slices
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)
from scipy.spatial.transform import Rotation

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box
from comir_hpc.volumes.readers import Source, open_source

OBLIQUE = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()


def placed(source: Source, values: dict[float, np.ndarray]) -> None:
    """The slice at each height z holds these values, first voxel at (5, 6, z), whatever the order of the slices."""
    grid, voxels = source.grid(), source.read()[0]
    found = {round(float(grid.world_mm((k, 0, 0))[2]), 4): k for k in range(len(voxels))}
    assert set(found) == set(values)
    for z, expected in values.items():
        np.testing.assert_allclose(grid.world_mm((found[z], 0, 0)), (5, 6, z), atol=1e-6)
        np.testing.assert_array_equal(voxels[found[z]], expected)


def as_itk(source: Source, folder: Path) -> None:
    """Voxels and corners are those of ITK's series reader."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    np.testing.assert_array_equal(np.moveaxis(source.read(), 0, -1).squeeze(), sitk.GetArrayFromImage(image))
    z, y, x = source.shape_zyx
    for corner in np.ndindex(2, 2, 2):
        at = (corner[0] * (z - 1), corner[1] * (y - 1), corner[2] * (x - 1))
        np.testing.assert_allclose(
            source.grid().world_mm(at), image.TransformIndexToPhysicalPoint(at[::-1]), atol=1e-4
        )


# ---------------------------------------------------------------------- enhanced files


@pytest.mark.parametrize(
    "order",
    [range(8), range(7, -1, -1), (0, 2, 4, 6, 1, 3, 5, 7), (3, 0, 7, 5, 1, 6, 2, 4)],
    ids=["rising", "falling", "interleaved", "mixed"],
)
@pytest.mark.parametrize("by_file", [True, False])
def test_enhanced_frames_lie_where_their_positions_say(tmp_path: Path, order: Any, by_file: bool) -> None:
    array, heights = phantom(), [7.0 + 3 * k for k in order]
    path = enhanced(tmp_path / "scan" / "a.dcm", array, heights=heights)
    source = open_source(path if by_file else path.parent)
    assert source.grid().spacing_zyx == (3.0, 1.5, 1.0)
    assert source.grid().unit == "millimeter"
    assert source.dtype == np.uint16
    assert source.streamed
    placed(source, dict(zip(heights, array, strict=True)))
    box = Box((1, 2, 0), (6, 5, 3))
    np.testing.assert_array_equal(source.read(box), source.read()[(slice(None), *box.slices)])


def test_given_spacing_does_not_change_the_order_of_frames(tmp_path: Path) -> None:
    array = phantom()
    path = enhanced(tmp_path / "a.dcm", array, heights=[28.0 - 3 * k for k in range(8)])
    grid, voxels = open_source(path).grid((6.0, 1.0, 1.0), "mm"), open_source(path).read()[0]
    lower, upper = (grid.world_mm((k, 0, 0))[2] for k in (0, 7))
    np.testing.assert_array_equal(voxels[0 if lower < upper else 7], array[7])
    assert abs(upper - lower) == pytest.approx(42)


def test_enhanced_isotropic_millimetres_are_a_spacing(tmp_path: Path) -> None:
    path = enhanced(tmp_path / "a.dcm", phantom(), heights=[7.0 + k for k in range(8)], spacing=(1.0, 1.0))
    assert open_source(path).grid().spacing_zyx == (1.0, 1.0, 1.0)


def pack(ds: Dataset, array: np.ndarray, coder: str) -> None:
    """Compress the frames of an image, (frame, y, x)."""
    if coder == "rle":
        ds.compress(RLELossless)
    elif coder:
        encode, ds.file_meta.TransferSyntaxUID = {
            "jpeg2k": (
                partial(imagecodecs.jpeg2k_encode, level=0, codecformat="j2k", bitspersample=ds.BitsStored),
                JPEG2000Lossless,
            ),
            "jpegls": (imagecodecs.jpegls_encode, JPEGLSLossless),
        }[coder]
        ds.PixelData = encapsulate([encode(plane) for plane in array])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True


@pytest.mark.parametrize("coder", ["", "rle", "jpeg2k", "jpegls"])
@pytest.mark.parametrize("first", [1, 0.5])
def test_enhanced_slopes_of_every_frame(tmp_path: Path, coder: str, first: float) -> None:
    array, slopes = phantom((8, 16, 15)), [first, 0.4, 0.25, 0.125, 1.5, 0.01, 2.75, 0.3]

    def whole(ds: Dataset) -> None:
        pack(ds, array, coder)

    path = enhanced(tmp_path / "a.dcm", array, change=lambda g, k: rescaled(g, slopes[k], k - 3), whole=whole)
    source = open_source(path)
    assert source.dtype == np.float32
    assert source.streamed == (coder in ("", "rle"))
    expected = array * np.reshape(slopes, (8, 1, 1)) + np.arange(-3, 5).reshape(8, 1, 1)
    np.testing.assert_array_equal(source.read()[0], expected.astype(np.float32))


def test_enhanced_slope_of_all_frames(tmp_path: Path) -> None:
    path = enhanced(
        tmp_path / "a.dcm",
        phantom(),
        whole=lambda ds: rescaled(ds.SharedFunctionalGroupsSequence[0], 2, -100),
    )
    source = open_source(path)
    assert source.dtype.kind == "i"
    np.testing.assert_array_equal(source.read()[0], phantom().astype(int) * 2 - 100)


def _echo(group: Dataset, k: int) -> None:
    group.MREchoSequence = [Dataset()]
    group.MREchoSequence[0].EffectiveEchoTime = (10.0, 20.0)[k % 2]


def _time(group: Dataset, k: int) -> None:
    group.FrameContentSequence[0].TemporalPositionIndex = 1 + k // 4


def _diffusion(group: Dataset, k: int) -> None:
    group.MRDiffusionSequence = [Dataset()]
    group.MRDiffusionSequence[0].DiffusionBValue = (0.0, 1000.0)[k % 2]


@pytest.mark.parametrize(
    ("change", "heights", "words"),
    [
        (_time, [0, 3, 6, 9] * 2, r"2 time points \(TemporalPositionIndex 1, 2\)"),
        (_echo, [0, 0, 3, 3, 6, 6, 9, 9], r"2 echoes \(EffectiveEchoTime 10\.0, 20\.0\)"),
        (_diffusion, [0, 0, 3, 3, 6, 6, 9, 9], r"2 b-values \(DiffusionBValue 0\.0, 1000\.0\)"),
        (lambda g, k: None, [0, 3, 6, 9] * 2, r"2 slices at each place"),
    ],
)
def test_enhanced_several_volumes_are_named(
    tmp_path: Path, change: Any, heights: list[float], words: str
) -> None:
    path = enhanced(tmp_path / "a.dcm", phantom(), heights=heights, change=change)
    with pytest.raises(VolumeError, match=words):
        open_source(path)


@pytest.mark.parametrize(
    ("heights", "words"),
    [
        ([0, 3, 6, 12, 15, 18, 21, 24], "frame 3 and a.dcm frame 4 are 6 mm apart, the other slices 3 mm"),
        ([0, 3, 6, 6, 9, 12, 15, 18], "frame 3 and a.dcm frame 4 lie at one place.*a slice is double"),
    ],
)
def test_enhanced_gaps_and_doubles(tmp_path: Path, heights: list[float], words: str) -> None:
    path = enhanced(tmp_path / "a.dcm", phantom(), heights=heights)
    with pytest.raises(VolumeError, match=words):
        open_source(path)


def test_enhanced_frames_without_a_place(tmp_path: Path) -> None:
    def strip(group: Dataset, k: int) -> None:
        del group.PlanePositionSequence

    source = open_source(enhanced(tmp_path / "a.dcm", phantom(), change=strip))
    with pytest.raises(VolumeError, match=r"no ImagePositionPatient.*--spacing Z Y X"):
        source.grid()
    assert source.grid((3, 1.5, 1)).spacing_zyx == (3, 1.5, 1)
    assert any("in the order of the file along z" in note for note in source.notes)

    def strip_in_time(group: Dataset, k: int) -> None:
        strip(group, k)
        _time(group, k)

    with pytest.raises(VolumeError, match="2 time points"):
        open_source(enhanced(tmp_path / "a.dcm", phantom(), change=strip_in_time))


# ---------------------------------------------------------------------- classic slices


@pytest.mark.parametrize("name", ["{:03}.dcm", "IM{:04}", "{:03}.IMA"])
def test_one_slice_by_its_path(tmp_path: Path, name: str) -> None:
    slices(tmp_path, phantom(), name=name)
    source = open_source(tmp_path / name.format(3))
    np.testing.assert_array_equal(source.read()[0, 0], phantom()[3])
    assert source.grid().spacing_zyx == (3.0, 1.5, 1.0)
    np.testing.assert_allclose(source.grid().world_mm((0, 0, 0)), (5, 6, 16))
    assert "name its folder" in source.notes[0]
    assert open_source(tmp_path).shape == (1, 8, 6, 5)


@pytest.mark.parametrize("step", [(0.0, 0.0, 3.0), (0.0, 0.0, -3.0)])
def test_series_is_ordered_by_position(tmp_path: Path, step: tuple[float, float, float]) -> None:
    source = open_source(slices(tmp_path, phantom(), step=step))
    placed(source, {7 + k * step[2]: phantom()[k] for k in range(8)})
    as_itk(source, tmp_path)


@pytest.mark.parametrize("sign", [1, -1])
def test_oblique_series_lies_as_itk_says(tmp_path: Path, sign: int) -> None:
    rows = [float(f"{v:.10f}") for v in OBLIQUE[:, :2].T.ravel()]
    step = [float(f"{v:.10f}") for v in sign * 2.5 * OBLIQUE[:, 2]]
    source = open_source(slices(tmp_path, phantom(), orientation=rows, step=step))
    as_itk(source, tmp_path)
    assert source.grid().spacing_zyx == pytest.approx((2.5, 1.5, 1.0))


@pytest.mark.parametrize("first", [1, 0.5])
@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_every_slice_has_its_own_slope(tmp_path: Path, first: float, dtype: str) -> None:
    array, slopes = phantom(dtype=dtype), [first, 0.4, 0.25, 0.125, 1.5, 0.01, 2.75, 0.3]

    def change(ds: Dataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = slopes[k], k

    source = open_source(slices(tmp_path, array, change=change, modality="PT"))
    assert source.dtype == np.float32
    expected = [plane * np.float64(s) + k for k, (plane, s) in enumerate(zip(array, slopes, strict=True))]
    np.testing.assert_array_equal(source.read()[0], np.float32(expected))


def test_small_slopes_behind_an_empty_slice(tmp_path: Path) -> None:
    array = phantom()
    array[0] = 0

    def change(ds: Dataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = (1 if k == 0 else 1e-4), 0

    source = open_source(slices(tmp_path, array, change=change))
    np.testing.assert_allclose(source.read()[0], array * 1e-4, rtol=1e-6)


def test_whole_intercepts_stay_integers(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept, ds.BitsStored, ds.HighBit = 1, -1024, 12, 11

    source = open_source(slices(tmp_path, phantom(), change=change, modality="CT"))
    assert source.dtype == np.int16
    as_itk(source, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"BitsStored": 12, "HighBit": 11},
        {"RescaleSlope": 2, "RescaleIntercept": -100},
        {"RescaleSlope": 0.5, "RescaleIntercept": 0},
    ],
)
@pytest.mark.parametrize("coder", ["", "rle", "jpeg2k", "jpegls"])
def test_monochrome1_is_as_itk_has_it(tmp_path: Path, change: dict[str, Any], coder: str) -> None:
    array = phantom((4, 32, 24))

    def inverted(ds: Dataset, k: int) -> None:
        ds.PhotometricInterpretation = "MONOCHROME1"
        for key, value in change.items():
            setattr(ds, key, value)
        pack(ds, array[k : k + 1], coder)

    source = open_source(slices(tmp_path, array, change=inverted))
    as_itk(source, tmp_path)
    assert any("MONOCHROME1" in note and "as ITK" in note for note in source.notes)
    plain = np.int64(2 ** change.get("BitsStored", 16) - 1) - array
    slope, intercept = change.get("RescaleSlope", 1), change.get("RescaleIntercept", 0)
    np.testing.assert_array_equal(source.read()[0], plain * slope + intercept)


@pytest.mark.parametrize(
    ("dtype", "syntax"),
    [
        (dtype, syntax)
        for syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
        for dtype in ("uint8", "int8", "uint16", "int16", "uint32", "int32")
        if not (syntax == ExplicitVRBigEndian and dtype.endswith("8"))  # writers disagree on these
    ],
)
def test_types_and_transfer_syntaxes(tmp_path: Path, dtype: str, syntax: str) -> None:
    array = phantom(dtype=dtype)
    if array.dtype.kind == "i":
        array = array - array.dtype.type(7)

    def change(ds: Dataset, k: int) -> None:
        if syntax == ExplicitVRBigEndian:
            ds.PixelData = array[k].astype(array.dtype.newbyteorder(">")).tobytes()

    source = open_source(slices(tmp_path, array, syntax=syntax, change=change))
    assert source.dtype == array.dtype
    np.testing.assert_array_equal(source.read()[0], array)
    placed(source, {7.0 + 3 * k: array[k] for k in range(8)})


@pytest.mark.parametrize("by_plane", [False, True])
def test_colour(tmp_path: Path, by_plane: bool) -> None:
    array = phantom((4, 6, 5, 3), "uint8")

    def change(ds: Dataset, k: int) -> None:
        if by_plane:
            ds.PlanarConfiguration, ds.PixelData = 1, np.moveaxis(array[k], -1, 0).tobytes()

    source = open_source(slices(tmp_path, array, change=change))
    np.testing.assert_array_equal(source.read(), np.moveaxis(array, -1, 0))
    box = Box((1, 2, 1), (3, 5, 4))
    np.testing.assert_array_equal(source.read(box), np.moveaxis(array, -1, 0)[(slice(None), *box.slices)])


def test_unused_bits_do_not_count(tmp_path: Path) -> None:
    array = phantom(dtype="int16") - 100

    def change(ds: Dataset, k: int) -> None:
        ds.BitsStored, ds.HighBit = 12, 11
        ds.PixelData = ((array[k].view(np.uint16) & 0x0FFF) | 0x5000).tobytes()

    np.testing.assert_array_equal(open_source(slices(tmp_path, array, change=change)).read()[0], array)


# ---------------------------------------------------------------------- what is no single volume


def _temporal(ds: Dataset, k: int) -> None:
    ds.TemporalPositionIdentifier = 1 + k // 4


def _echo_time(ds: Dataset, k: int) -> None:
    ds.EchoTime = (12.5, 80.0)[k // 4]


def _times(ds: Dataset, k: int) -> None:
    ds.AcquisitionTime = ("101500", "101507")[k // 4]


@pytest.mark.parametrize(
    ("facet", "words"),
    [
        (_temporal, r"2 time points \(TemporalPositionIdentifier 1, 2\)"),
        (_echo_time, r"2 echoes \(EchoTime 12\.5, 80\.0\)"),
        (_times, r"2 time points \(AcquisitionTime 101500, 101507\)"),
        (lambda ds, k: None, "2 slices at each place"),
    ],
)
def test_several_volumes_in_a_series_are_named(tmp_path: Path, facet: Any, words: str) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = [5, 6, 7 + 3 * (k % 4)]
        facet(ds, k)

    slices(tmp_path, phantom(), change=change)
    with pytest.raises(VolumeError, match=words):
        open_source(tmp_path)


def _gap(ds: Dataset, k: int) -> bool:
    return k != 3


def _double(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient = [5, 6, 7 + 3 * min(k, 6)]


def _tilted(ds: Dataset, k: int) -> None:
    ds.ImagePositionPatient = [5, 6 + 0.5 * k, 7 + 3 * k]


def _turned(ds: Dataset, k: int) -> None:
    if k == 4:
        ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def _smaller(ds: Dataset, k: int) -> None:
    if k == 4:
        ds.Rows = 3


def _finer(ds: Dataset, k: int) -> None:
    if k == 4:
        ds.PixelSpacing = [0.75, 1.0]


def _lost(ds: Dataset, k: int) -> None:
    if k == 4:
        del ds.ImagePositionPatient


def _sheared(ds: Dataset, k: int) -> None:
    ds.ImageOrientationPatient = [1, 0, 0, 0.3, 0.954, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_gap, r"002\.dcm and 004\.dcm are 6 mm apart, the other slices 3 mm: a slice is missing"),
        (_double, r"006\.dcm and 007\.dcm lie at one place.*a slice is double"),
        (_tilted, r"sideways by 0\.5 mm.*gantry tilt"),
        (_turned, r"004\.dcm is oriented otherwise than 000\.dcm"),
        (_smaller, r"the size .* of 004\.dcm is \(3, 5, 1\), that of 000\.dcm \(6, 5, 1\)"),
        (_finer, r"PixelSpacing of 004\.dcm is \(0\.75, 1\.0\) mm, that of 000\.dcm \(1\.5, 1\.0\) mm"),
        (_lost, r"004\.dcm has no ImagePositionPatient, 000\.dcm has"),
        (_sheared, r"no two perpendicular directions"),
    ],
)
def test_what_is_no_even_stack_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    slices(tmp_path, phantom(), change=change)
    with pytest.raises(VolumeError, match=words):
        open_source(tmp_path)


def test_two_series_are_named(tmp_path: Path) -> None:
    slices(tmp_path, phantom(), uid="1.2.3")
    slices(tmp_path, phantom() + 1, uid="1.2.34", name="b{:03}.dcm")
    with pytest.raises(VolumeError, match=r"2 DICOM series; .*1\.2\.3 \(MR, 8 files\); 1\.2\.34 \(MR"):
        open_source(tmp_path)
    with pytest.raises(VolumeError, match=r"--dataset 7 is none of them"):
        open_source(tmp_path, "7")
    np.testing.assert_array_equal(open_source(tmp_path, "1.2.34").read()[0], phantom() + 1)
    assert open_source(tmp_path, "1.2.34").notes == (
        f"{tmp_path.name}: the DICOM series 1.2.34 is read (MR, 8 slices)",
        f"{tmp_path.name}: left out: 1 other DICOM series",
    )


# ---------------------------------------------------------------------- without positions


def _no_position(ds: Dataset, k: int) -> None:
    del ds.ImagePositionPatient
    del ds.ImageOrientationPatient
    ds.SliceLocation = 3 * k


def test_no_position_is_read_by_number(tmp_path: Path) -> None:
    slices(tmp_path, phantom(), change=_no_position)
    for k in range(8):  # names against the numbers
        (tmp_path / f"{k:03}.dcm").rename(tmp_path / f"x{99 - k}.dcm")
    source = open_source(tmp_path)
    with pytest.raises(VolumeError, match=r"no ImagePositionPatient.*PixelSpacing is 1\.5 x 1 mm.*--spacing"):
        source.grid()
    grid = source.grid((3, 1.5, 1), "mm")
    assert (grid.spacing_zyx, grid.unit) == ((3, 1.5, 1), "millimeter")
    np.testing.assert_array_equal(source.read()[0], phantom())
    assert any("in the order of InstanceNumber" in note for note in source.notes)


def _number_lost(ds: Dataset, k: int) -> None:
    _no_position(ds, k)
    del ds.InstanceNumber


def _number_double(ds: Dataset, k: int) -> None:
    _no_position(ds, k)
    ds.InstanceNumber = 1 + min(k, 6)


def _number_gap(ds: Dataset, k: int) -> bool:
    _no_position(ds, k)
    return k != 3


def _interleaved(ds: Dataset, k: int) -> None:
    _no_position(ds, k)
    ds.SliceLocation = 3 * (0, 2, 4, 6, 1, 3, 5, 7)[k]


def _in_time(ds: Dataset, k: int) -> None:
    _no_position(ds, k)
    _temporal(ds, k)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_number_lost, "neither ImagePositionPatient nor an InstanceNumber"),
        (_number_double, r"006\.dcm and 007\.dcm have one InstanceNumber, 7"),
        (_number_gap, r"missing between 002\.dcm \(InstanceNumber 3\) and 004\.dcm \(5\)"),
        (_interleaved, r"SliceLocation goes from 18 \(003\.dcm\) to 3 \(004\.dcm\)"),
        (_in_time, "2 time points"),
    ],
)
def test_no_position_and_no_sure_order_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    slices(tmp_path, phantom(), change=change)
    with pytest.raises(VolumeError, match=words):
        open_source(tmp_path)


def test_wrong_pixel_spacing_can_be_replaced(tmp_path: Path) -> None:
    for spacing in ([0, 0], None):

        def change(ds: Dataset, k: int, spacing: Any = spacing) -> None:
            ds.PixelSpacing = spacing

        source = open_source(slices(tmp_path, phantom(), change=change))
        with pytest.raises(VolumeError, match=r"PixelSpacing.*its slices are 3 mm apart.*--spacing"):
            source.grid()
        assert source.grid((3, 2, 2)).spacing_zyx == (3, 2, 2)
        assert source.grid((3, 2, 2)).origin_xyz == (5, 6, 7)


def _frames(path: Path, change: Callable[[Dataset], Any]) -> Path:
    """A classic file of several frames, without functional groups."""
    enhanced(path, phantom())
    ds = pydicom.dcmread(path)
    del ds.PerFrameFunctionalGroupsSequence, ds.SharedFunctionalGroupsSequence
    ds.PixelSpacing, ds.ImageOrientationPatient, ds.ImagePositionPatient = (
        [1.5, 1],
        [1, 0, 0, 0, 1, 0],
        [5, 6, 7],
    )
    change(ds)
    return save(ds, path)


def test_frames_that_follow_in_time_are_refused(tmp_path: Path) -> None:
    def cine(ds: Dataset) -> None:
        ds.FrameTime = 33.3

    with pytest.raises(VolumeError, match=r"8 frames follow each other in time \(FrameTime\)"):
        open_source(_frames(tmp_path / "us.dcm", cine))


def test_dose_grid(tmp_path: Path) -> None:
    def dose(ds: Dataset) -> None:
        ds.GridFrameOffsetVector, ds.DoseGridScaling = [-3.0 * k for k in range(8)], 0.001

    source = open_source(_frames(tmp_path / "dose.dcm", dose))
    placed(source, {7 - 3.0 * k: np.float32(phantom()[k] * np.float64(0.001)) for k in range(8)})


def test_nuclear_medicine_names_the_first_frame(tmp_path: Path) -> None:
    def spect(ds: Dataset) -> None:
        ds.SpacingBetweenSlices = 4.0

    source = open_source(_frames(tmp_path / "nm.dcm", spect))
    assert source.grid().spacing_zyx == (4.0, 1.5, 1.0)
    placed(source, {7 + 4.0 * k: phantom()[k] for k in range(8)})


# ---------------------------------------------------------------------- what else is in the folder


def test_strangers_beside_a_series_are_named(tmp_path: Path) -> None:
    slices(tmp_path, phantom())
    before = open_source(tmp_path).fingerprint()
    tifffile.imwrite(tmp_path / "preview.tif", np.zeros((64, 64), np.uint8))
    (tmp_path / "readme.txt").write_text("hi", encoding="utf-8")
    (tmp_path / ".hidden.dcm").write_bytes(b"no DICOM")
    (tmp_path / "old.zarr").mkdir()
    report = Dataset()
    report.file_meta = pydicom.dataset.FileMetaDataset()
    report.file_meta.TransferSyntaxUID, report.SOPClassUID = (
        ImplicitVRLittleEndian,
        "1.2.840.10008.5.1.4.1.1.88.11",
    )
    report.SOPInstanceUID = "1.2.99"
    save(report, tmp_path / "report.dcm")
    source = open_source(tmp_path)
    placed(source, {7.0 + 3 * k: phantom()[k] for k in range(8)})
    assert source.notes == (
        f"{tmp_path.name}: the DICOM series 1.2.3 is read (MR, 8 slices)",
        f"{tmp_path.name}: left out: preview.tif, readme.txt, report.dcm",
    )
    assert source.fingerprint() == before


def test_a_series_and_a_stack_are_two_volumes(tmp_path: Path) -> None:
    slices(tmp_path, phantom())
    for k in range(3):
        tifffile.imwrite(tmp_path / f"s{k}.tif", phantom()[k])
    with pytest.raises(
        VolumeError, match=r"2 volumes \(DICOM: 000\.dcm.*; TIFF: s0\.tif, s1\.tif, s2\.tif\)"
    ):
        open_source(tmp_path)


def test_damaged_slices_are_named(tmp_path: Path) -> None:
    slices(tmp_path, phantom())
    file = tmp_path / "003.dcm"
    whole = file.read_bytes()
    for content in (b"", whole[:-20], b"x" * 400):
        file.write_bytes(content)
        with pytest.raises(VolumeError, match=r"003\.dcm"):
            open_source(tmp_path)


# ---------------------------------------------------------------------- headers that claim too much


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("frames", [1, 100_000, 2_000_000_000])
def test_claims_are_refused_before_anything_is_allocated(tmp_path: Path, frames: int, packed: bool) -> None:
    def whole(ds: Dataset) -> None:
        ds.NumberOfFrames, ds.Rows, ds.Columns = frames, 65535, 65535

    path = _frames(tmp_path / "a.dcm", lambda ds: ds.compress(RLELossless) if packed else None)
    ds = pydicom.dcmread(path)
    whole(ds)
    save(ds, path)
    with pytest.raises(VolumeError, match=r"a\.dcm is truncated or its header is wrong: \d+ frames of 65535"):
        open_source(path)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "is a mosaic"),
        ({"TotalPixelMatrixColumns": 20}, "8 frames are tiles of one plane"),
    ],
)
def test_tiles_in_a_plane_are_no_slices(tmp_path: Path, tags: dict[str, Any], words: str) -> None:
    path = _frames(tmp_path / "a.dcm", lambda ds: [setattr(ds, k, v) for k, v in tags.items()])
    with pytest.raises(VolumeError, match=words):
        open_source(path)


def test_palette_and_jpeg_colours_are_as_itk_has_them(tmp_path: Path) -> None:
    def palette(ds: Dataset, k: int) -> None:
        ds.PhotometricInterpretation = "PALETTE COLOR"
        for n, name in enumerate(("Red", "Green", "Blue")):
            setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 8])
            table = (np.arange(256) * (n + 1) % 256).astype(np.uint8)
            setattr(ds, f"{name}PaletteColorLookupTableData", table.tobytes())

    def jpeg(ds: Dataset, k: int) -> None:
        ds.PhotometricInterpretation, ds.file_meta.TransferSyntaxUID = "YBR_FULL_422", JPEGBaseline8Bit
        ds.PixelData = encapsulate([imagecodecs.jpeg8_encode(colours[k])])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True

    colours = np.random.default_rng(0).integers(0, 255, (3, 16, 24, 3), dtype=np.uint8)
    as_itk(
        open_source(slices(tmp_path / "palette", phantom((4, 16, 24), "uint8"), change=palette)),
        tmp_path / "palette",
    )
    source = open_source(slices(tmp_path / "jpeg", colours, change=jpeg))
    assert source.shape == (3, 3, 16, 24)
    as_itk(source, tmp_path / "jpeg")


def test_wrong_numbers_of_bits(tmp_path: Path) -> None:
    slices(tmp_path, phantom()[:1])
    file = tmp_path / "000.dcm"
    raw = file.read_bytes()
    at = raw.index(struct.pack("<HH2sH", 0x28, 0x101, b"US", 2)) + 8
    file.write_bytes(raw[:at] + struct.pack("<H", 99) + raw[at + 2 :])
    with pytest.raises(VolumeError, match=r"000\.dcm cannot be read as DICOM \(99 bits stored of 16\)"):
        open_source(file)


def test_mutated_headers_never_end_in_a_traceback(tmp_path: Path) -> None:
    paths = [
        slices(tmp_path / "a", phantom()[:1]) / "000.dcm",
        enhanced(tmp_path / "b.dcm", phantom(), change=lambda g, k: rescaled(g, 0.5, k)),
    ]
    rng = np.random.default_rng(0)
    for path in paths:
        whole = path.read_bytes()
        body = len(whole) - phantom().nbytes if path.name == "b.dcm" else len(whole) - phantom()[0].nbytes
        for _ in range(60):
            raw = bytearray(whole)
            for at in rng.integers(132, body, 3):
                raw[at] = rng.integers(256)
            target = tmp_path / "fuzz.dcm"
            target.write_bytes(bytes(raw))
            try:
                source = open_source(target)
                if np.prod(source.shape, dtype=float) < 1e7:
                    source.read()
                source.grid((1, 1, 1), "mm")
            except VolumeError:
                continue
    shutil.rmtree(tmp_path / "a")
