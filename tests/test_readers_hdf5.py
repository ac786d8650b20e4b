"""HDF5: the order, size and place that ilastik, vigra, Fiji, Imaris and BigDataViewer write beside the voxels."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box
from comir_hpc.volumes.readers import open_source

SHAPE = (6, 20, 24)
ARRAY = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)
CHANNELS = np.stack([ARRAY, ARRAY + 1])


def axistags(keys: str, resolution: dict[str, float] | None = None) -> str:
    sizes = resolution or {}
    return json.dumps(
        {"axes": [{"key": k, "typeFlags": 2, "resolution": sizes.get(k, 0), "description": ""} for k in keys]}
    )


def write(path: Path, array: np.ndarray, **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        file["exported_data"] = array
        file["exported_data"].attrs.update(attributes)
    return path


def ordered(array: np.ndarray, order: str) -> np.ndarray:
    """A (c, z, y, x) array with its axes in `order`; an axis t of length 1 is put where it is named."""
    return array[None].transpose(["tczyx".index(a) for a in order])


# ---------------------------------------------------------------------- order of axes


def test_ilastik_export_in_xyz(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "x.h5", ARRAY.T, axistags=axistags("xyz")))
    np.testing.assert_array_equal(source.read()[0], ARRAY)
    box = Box((1, 2, 3), (4, 15, 16))
    np.testing.assert_array_equal(source.read(box)[0], ARRAY[box.slices])
    grid = source.grid((2, 1, 1), "um")
    assert (grid.shape_zyx, grid.spacing_zyx) == (SHAPE, (2.0, 1.0, 1.0))


@pytest.mark.parametrize("order", ["tzyxc", "txyzc", "cxyzt", "zctyx", "yxczt"])
def test_axistags_of_five_axes(tmp_path: Path, order: str) -> None:
    source = open_source(write(tmp_path / "a.h5", ordered(CHANNELS, order), axistags=axistags(order)))
    np.testing.assert_array_equal(source.read(), CHANNELS)


def test_channels_longer_than_z_are_told_by_the_tags(tmp_path: Path) -> None:
    """Without tags the shorter end is taken as the channels, which is z here."""
    many = np.stack([ARRAY + n for n in range(9)])
    source = open_source(write(tmp_path / "a.h5", many.transpose(1, 2, 3, 0), axistags=axistags("zyxc")))
    np.testing.assert_array_equal(source.read(), many)


@pytest.mark.parametrize("names", [("x", "y", "z"), ("width", "height", "depth"), ("X", "Y", "Z")])
def test_dimension_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = ARRAY.T
        for dimension, name in zip(file["a"].dims, names, strict=True):
            dimension.label = name
    np.testing.assert_array_equal(open_source(tmp_path / "a.h5").read()[0], ARRAY)


@pytest.mark.parametrize("names", [("z", "", ""), ("lon", "lat", "level"), ("z", "z", "x"), ("t", "y", "x")])
def test_labels_that_give_no_order_refuse_the_file(tmp_path: Path, names: tuple[str, ...]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = ARRAY
        for dimension, name in zip(file["a"].dims, names, strict=True):
            dimension.label = name
    with pytest.raises(VolumeError, match=r"a\.h5: its dimension labels name the axes") as error:
        open_source(tmp_path / "a.h5")
    assert "--spacing" not in str(error.value)


@pytest.mark.parametrize("text", ["{", '{"axes": 3}', axistags("zy"), axistags("zyq"), '{"axes": [{}]}'])
def test_axistags_that_give_no_order_refuse_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(VolumeError, match=r"a\.h5: .*axistags") as error:
        open_source(write(tmp_path / "a.h5", ARRAY, axistags=text))
    assert "--spacing" not in str(error.value)


def test_several_time_points_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", CHANNELS, axistags=axistags("tzyx"))
    with pytest.raises(VolumeError, match=r"\(t, z, y, x\) of \(2, 6, 20, 24\): 2 time points"):
        open_source(path)


# ---------------------------------------------------------------------- size of a voxel


def test_resolution_of_axistags_needs_a_unit(tmp_path: Path) -> None:
    tags = axistags("xyzc", {"x": 0.25, "y": 0.5, "z": 2.0})
    source = open_source(write(tmp_path / "a.h5", CHANNELS.transpose(3, 2, 1, 0), axistags=tags))
    assert source.grid(unit="um").spacing_zyx == (2.0, 0.5, 0.25)
    with pytest.raises(VolumeError, match=r"no unit.*axistags has no unit.*--unit"):
        source.grid()
    source = open_source(write(tmp_path / "b.h5", ARRAY, axistags=axistags("zyx", {"x": 0.25, "z": 2.0})))
    with pytest.raises(VolumeError, match="no voxel spacing"):
        source.grid(unit="um")


@pytest.mark.parametrize(
    ("name", "value", "unit"),
    [
        ("element_size_um", [2.0, 0.5, 0.25], "micrometer"),
        ("element_size_um", np.array([[2.0, 0.5, 0.25]], np.float32), "micrometer"),
        ("element_size_um", "[2.0, 0.5, 0.25]", "micrometer"),
        ("element_size_um", b"2.0 0.5 2.5e-1", "micrometer"),
        ("element_size_nm", [2.0, 0.5, 0.25], "nanometer"),
        ("element_size_mm", [2.0, 0.5, 0.25], "millimeter"),
    ],
)
@pytest.mark.parametrize("holder", ["set/a", "set", "/"])
def test_element_size(tmp_path: Path, name: str, value: Any, unit: str, holder: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["set/a"] = ARRAY
        file[holder].attrs[name] = value
    grid = open_source(tmp_path / "a.h5").grid()
    assert (grid.spacing_zyx, grid.unit) == ((2.0, 0.5, 0.25), unit)


def test_element_size_of_the_dataset_comes_before_that_of_the_file(tmp_path: Path) -> None:
    with h5py.File(write(tmp_path / "a.h5", ARRAY, element_size_um=[2.0, 0.5, 0.25]), "a") as file:
        file.attrs["element_size_um"] = [9.0, 9.0, 9.0]
    assert open_source(tmp_path / "a.h5").grid().spacing_zyx == (2.0, 0.5, 0.25)


def test_element_size_of_axes_in_another_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", ARRAY.T, axistags=axistags("xyz"), element_size_um=[2.0, 0.5, 0.25])
    source = open_source(path)
    assert source.grid().spacing_zyx == (2.0, 0.5, 0.25)
    assert any("element size is read as (z, y, x)" in note for note in source.notes)
    assert open_source(write(tmp_path / "b.h5", ARRAY, element_size_um=[2.0, 0.5, 0.25])).notes == ()


def test_element_size_of_a_slice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", ARRAY[0], element_size_um=[0.5, 0.25])
    assert open_source(path).grid().spacing_zyx == (1.0, 0.5, 0.25)


@pytest.mark.parametrize("value", [[2.0, 0.5], [2.0, 0.0, 0.25], "wide", [2.0, float("nan"), 1.0]])
def test_element_size_that_is_none(tmp_path: Path, value: Any) -> None:
    source = open_source(write(tmp_path / "a.h5", ARRAY, element_size_um=value))
    with pytest.raises(VolumeError, match=r"element_size_um is .*expected three positive.*--spacing"):
        source.grid()


# ---------------------------------------------------------------------- Imaris


def characters(text: object) -> np.ndarray:
    """An attribute as Imaris writes it: an array of single characters."""
    return np.array([c.encode() for c in str(text)], dtype="S1")


def imaris(path: Path, channels: np.ndarray, *, times: int = 1, unit: str = "um", **extents: float) -> Path:
    """Two levels, padded to whole chunks; edges as given (x 10 to 22, y 20 to 30, z -3 to 9 if not)."""
    ends = dict(ExtMin0=10, ExtMax0=22, ExtMin1=20, ExtMax1=30, ExtMin2=-3, ExtMax2=9) | extents
    with h5py.File(path, "w") as file:
        image = file.create_group("DataSetInfo/Image")
        image.attrs["Unit"] = characters(unit)
        for name, value in ends.items():
            image.attrs[name] = characters(value)
        for level, step in enumerate((1, 2)):
            coarse = channels[:, ::step, ::step, ::step]
            for time_point in range(times):
                for number, values in enumerate(coarse):
                    place = f"DataSet/ResolutionLevel {level}/TimePoint {time_point}/Channel {number}"
                    padded = np.zeros([-(-n // 8) * 8 for n in values.shape], values.dtype)
                    padded[tuple(slice(n) for n in values.shape)] = values
                    file.create_dataset(f"{place}/Data", data=padded, chunks=(8, 8, 8), compression="gzip")
                    for axis, n in zip("ZYX", values.shape, strict=True):
                        file[place].attrs[f"ImageSize{axis}"] = characters(n)
    return path


def test_imaris(tmp_path: Path) -> None:
    path = imaris(tmp_path / "a.ims", CHANNELS)
    source = open_source(path)
    np.testing.assert_array_equal(source.read(), CHANNELS)  # without the padding
    grid = source.grid()
    assert (grid.spacing_zyx, grid.unit) == ((2.0, 0.5, 0.5), "micrometer")
    # Edges are at 10, 20, -3: centres half a voxel further in.
    assert grid.origin_xyz == (10.25, 20.25, -2.0)
    coarse = open_source(path, "1")
    np.testing.assert_array_equal(coarse.read(), CHANNELS[:, ::2, ::2, ::2])
    assert coarse.grid().spacing_zyx == (4.0, 1.0, 1.0)
    assert coarse.grid().origin_xyz == (10.5, 20.5, -1.0)
    with pytest.raises(VolumeError, match=r"no resolution level 2; it holds 0 to 1"):
        open_source(path, "2")
    path.rename(tmp_path / "same.h5")
    assert open_source(tmp_path / "same.h5").kind == "Imaris"


def test_imaris_channels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    many = np.stack([ARRAY + n for n in range(11)])
    np.testing.assert_array_equal(open_source(imaris(tmp_path / "a.ims", many)).read(), many)


@pytest.mark.parametrize(
    ("unit", "name"),
    [(b"nm", "nanometer"), (b"mm", "millimeter"), ("µm".encode(), "micrometer"), (b"\xb5m", "micrometer")],
)
def test_imaris_units(tmp_path: Path, unit: bytes, name: str) -> None:
    path = imaris(tmp_path / "a.ims", CHANNELS)
    with h5py.File(path, "a") as file:
        file["DataSetInfo/Image"].attrs["Unit"] = np.frombuffer(unit, "S1")
    assert open_source(path).grid().unit == name


def test_imaris_with_an_axis_from_high_to_low(tmp_path: Path) -> None:
    grid = open_source(imaris(tmp_path / "a.ims", CHANNELS, ExtMin2=9, ExtMax2=-3)).grid()
    assert grid.spacing_zyx == (2.0, 0.5, 0.5)
    np.testing.assert_allclose(grid.world_mm((5, 0, 0)), (0.01025, 0.02025, -0.002))


def test_imaris_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="2 time points"):
        open_source(imaris(tmp_path / "t.ims", CHANNELS, times=2))
    with pytest.raises(VolumeError, match=r"its extent along z is 9\.0 to 9\.0"):
        open_source(imaris(tmp_path / "e.ims", CHANNELS, ExtMin2=9)).grid()
    with h5py.File(imaris(tmp_path / "s.ims", CHANNELS), "a") as file:
        file["DataSet/ResolutionLevel 0/TimePoint 0/Channel 0"].attrs["ImageSizeZ"] = characters(900)
    with pytest.raises(VolumeError, match=r"its size is \(900\.0, 20\.0, 24\.0\).*stores \(8, 24, 24\)"):
        open_source(tmp_path / "s.ims")


# ---------------------------------------------------------------------- BigDataViewer


def bigdataviewer(
    path: Path, values: np.ndarray, affine: str, *, setups: int = 1, size: str = "0.25 0.5 2.0"
) -> Path:
    with h5py.File(path, "w") as file:
        for setup in range(setups):
            file[f"s{setup:02}/resolutions"] = np.array([[1.0, 1, 1], [2, 2, 1]])
            file[f"s{setup:02}/subdivisions"] = np.array([[8, 8, 4], [8, 8, 4]])
            for level, step in enumerate((1, 2)):
                # BigDataViewer has unsigned values written as signed ones.
                coarse = values[:, ::step, ::step].view(np.int16)
                file.create_dataset(f"t00000/s{setup:02}/{level}/cells", data=coarse, chunks=(4, 8, 8))
    views = "".join(
        f"<ViewSetup><id>{n}</id><voxelSize><unit>um</unit><size>{size}</size></voxelSize></ViewSetup>"
        for n in range(setups)
    )
    places = "".join(
        f'<ViewRegistration timepoint="0" setup="{n}"><ViewTransform type="affine"><affine>{affine}</affine>'
        "</ViewTransform></ViewRegistration>"
        for n in range(setups)
    )
    path.with_suffix(".xml").write_text(f"<SpimData>{views}{places}</SpimData>", encoding="utf-8")
    return path


def test_bigdataviewer(tmp_path: Path) -> None:
    values = ARRAY + 60000  # beyond what a sign would leave
    path = bigdataviewer(tmp_path / "a.h5", values, "0.25 0 0 10 0 0.5 0 20 0 0 2 30")
    source = open_source(path)
    assert source.dtype == np.uint16
    np.testing.assert_array_equal(source.read()[0], values)
    grid = source.grid()
    assert (grid.spacing_zyx, grid.unit, grid.origin_xyz) == (
        (2.0, 0.5, 0.25),
        "micrometer",
        (10.0, 20.0, 30.0),
    )
    coarse = open_source(path, "t00000/s00/1")
    np.testing.assert_array_equal(coarse.read()[0], values[:, ::2, ::2])
    assert coarse.grid().spacing_zyx == (2.0, 1.0, 0.5)
    assert coarse.grid().origin_xyz == (10.125, 20.25, 30.0)


def test_bigdataviewer_choice_and_refusals(tmp_path: Path) -> None:
    path = bigdataviewer(tmp_path / "a.h5", ARRAY, "1 0 0 0 0 1 0 0 0 0 1 0", setups=2)
    with pytest.raises(VolumeError, match=r"views t00000/s00, t00000/s01; name one with --dataset"):
        open_source(path)
    np.testing.assert_array_equal(open_source(path, "t00000/s01").read()[0], ARRAY)
    with pytest.raises(VolumeError, match="registers this view by more than a scale and a shift"):
        open_source(bigdataviewer(tmp_path / "b.h5", ARRAY, "0 1 0 0 -1 0 0 0 0 0 1 0"))
    path = bigdataviewer(tmp_path / "c.h5", ARRAY, "1 0 0 0 0 1 0 0 0 0 1 0")
    path.with_suffix(".xml").unlink()
    with pytest.raises(VolumeError, match=r"c\.xml, which holds it, does not lie beside it; .*--spacing"):
        open_source(path).grid()


# ---------------------------------------------------------------------- claims


@pytest.mark.parametrize("side", [10**5, 10**6])
@pytest.mark.parametrize("stored", [False, True])
def test_claims_are_held_against_what_is_stored(tmp_path: Path, side: int, stored: bool) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("a", (side,) * 3, np.uint8, chunks=(64, 64, 64))
        if stored:
            data[:2, :2, :2] = 1
    begin = time.process_time()
    with pytest.raises(VolumeError, match=rf"{side} x {side} x {side} voxels.*stores {int(stored)} of its"):
        open_source(tmp_path / "a.h5")
    assert time.process_time() - begin < 5


def test_claims_of_a_dataset_in_one_piece(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", (10**5,) * 3, np.uint8)
    with pytest.raises(VolumeError, match="stores 0 of its"):
        open_source(tmp_path / "a.h5")


def test_a_large_dataset_in_one_piece_is_believed(tmp_path: Path) -> None:
    """2 GiB that are allocated, as a hole in the file."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", (2048, 1024, 1024), np.uint8)[-1, -1, -1] = 7
    assert open_source(tmp_path / "a.h5").shape == (1, 2048, 1024, 1024)


def test_a_part_in_another_file_that_is_missing(tmp_path: Path) -> None:
    """HDF5 itself reads zeros in its place."""
    write(tmp_path / "part.h5", ARRAY)
    layout = h5py.VirtualLayout(SHAPE, np.uint16)
    layout[:] = h5py.VirtualSource("part.h5", "exported_data", SHAPE)
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("a", layout)
    np.testing.assert_array_equal(open_source(tmp_path / "all.h5").read()[0], ARRAY)
    (tmp_path / "part.h5").unlink()
    with pytest.raises(VolumeError, match=r"part\.h5, which does not exist"):
        open_source(tmp_path / "all.h5")
