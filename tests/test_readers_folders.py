"""Folders: one series or tiles as one volume; two channels, two modalities, gaps and strangers by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from comir_hpc.errors import VolumeError
from comir_hpc.space.grid import Box
from comir_hpc.volumes.readers import Source, open_source

PLANE = (6, 7)


def plane(number: int, dtype: str = "uint16") -> np.ndarray:
    return (1000 * number + np.arange(np.prod(PLANE)).reshape(PLANE)).astype(dtype)


def write_tiffs(folder: Path, names: Iterable[str], dtype: str = "uint16") -> None:
    """One slice a name, the first with values 0..., the next 1000..., in this order."""
    folder.mkdir(exist_ok=True)
    for k, name in enumerate(names):
        tifffile.imwrite(folder / name, plane(k, dtype))


def holds_planes(source: Source, count: int) -> None:
    np.testing.assert_array_equal(source.read()[0], np.stack([plane(k) for k in range(count)]))


# ---------------------------------------------------------------------- numbered slices


@pytest.mark.parametrize(
    ("names", "note"),
    [
        ([f"img_{k}.tif" for k in range(1, 12)], "11 slices from img_1.tif to img_11.tif"),
        ([f"img_{5 * k:03}.tif" for k in range(4)], "their numbers grow by 5"),
        ([f"t001_z{k}.tif" for k in range(9, 12)], "3 slices from t001_z9.tif"),
        ([f"scan2_c1_{k:03}_2024.tif" for k in range(3)], "3 slices"),
        ([f"{k}.TIFF" for k in range(8, 12)], "4 slices from 8.TIFF"),
        ([f"t{k:04}.tif" for k in range(3)], "3 slices"),
        ([f"img-{k}.tif" for k in range(3)], "3 slices"),
        ([f"z_{k}.tif" for k in range(-2, 3)], "5 slices from z_-2.tif to z_2.tif"),
        ([f"s{k:03}_pos{10 * k + k % 2:05}.tif" for k in range(4)], "4 slices"),
        (["rec0.tif", "Rec1.tif", "rec2.tiff"], "3 slices"),
    ],
)
def test_slices_in_the_order_of_their_numbers(tmp_path: Path, names: list[str], note: str) -> None:
    write_tiffs(tmp_path, names)
    source = open_source(tmp_path)
    holds_planes(source, len(names))
    assert note in source.notes[0]
    assert source.streamed
    assert list(source.files) == [tmp_path / name for name in names]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([f"img_z{z:03}_c{c}.tif" for z in range(3) for c in range(2)],
         r"2 numbers vary .*z 0 to 2 \(3\), c 0 to 1 \(2\).*channels or time points"),
        ([f"t{t}_{z}.tif" for t in range(2) for z in range(3)], r"2 numbers vary .*t 0 to 1 \(2\), 0 to 2 \(3\)"),
        ([f"img_z{z}_c{c}.tif" for z in range(3) for c in range(2)][:-1], r"2 numbers vary"),
        ([f"{z}_DAPI.tif" for z in range(3)] + [f"{z}_GFP.tif" for z in range(3)],
         r"2 series: 0_DAPI\.tif to 2_DAPI\.tif \(3 files\); 0_GFP\.tif"),
        ([f"img_c{c}.tif" for c in range(3)], r"numbered as channels \('c' before"),
        ([f"img_t{c}.tif" for c in range(3)], r"numbered as time points"),
        (["img_000.tif", "img_001.tif", "img_002.tif", "img_004.tif"], r"img_003\.tif missing between img_000"),
        (["s0.tif", "s2.tif", "s4.tif", "s10.tif"], r"s6\.tif, s8\.tif missing"),
        ([f"s{k}.tif" for k in (0, 1, 20)], r"s2\.tif, s3\.tif, s4\.tif, s5\.tif, s6\.tif and 13 more missing"),
        (["s1.tif", "s01.tif", "s2.tif"], r"s01\.tif and s1\.tif have one number"),
        (["s1.tif", "s1.tiff", "s2.tif"], r"s1\.tif and s1\.tiff have one number"),
        (["first.tif", "second.tif", "third.tif"], r"nothing in the names of first\.tif, second\.tif, third\.tif"),
        ([f"s{k}_p{9 - k}.tif" for k in range(3)], r"2 numbers vary"),
        (["a.tif", "b.tif", "c.tif", "s1.tif", "s2.tif"], r"nothing in the names"),
    ],
)  # fmt: skip
def test_names_that_are_no_single_series_are_refused(tmp_path: Path, names: list[str], words: str) -> None:
    write_tiffs(tmp_path, names)
    with pytest.raises(VolumeError, match=words):
        open_source(tmp_path)


@pytest.mark.parametrize("stranger", ["MAX_rec.tif", "rec_spr.tif", "rec_0002_mask.tif", "MAX_rec_0000.tif"])
def test_strangers_are_left_out_by_name(tmp_path: Path, stranger: str) -> None:
    write_tiffs(tmp_path, [f"rec_{k:04}.tif" for k in range(5)])
    before = open_source(tmp_path).fingerprint()
    tifffile.imwrite(tmp_path / stranger, np.zeros((3, 3), np.uint8))
    (tmp_path / "log.txt").write_text("scan", encoding="utf-8")
    source = open_source(tmp_path)
    holds_planes(source, 5)
    assert source.notes[1].endswith(f"left out: {', '.join(sorted(['log.txt', stranger]))}")
    assert source.fingerprint() == before


def test_hidden_files_and_stores_never_count(tmp_path: Path) -> None:
    write_tiffs(tmp_path, [f"s{k:02}.tif" for k in range(6)])
    plain = open_source(tmp_path)
    tifffile.imwrite(tmp_path / "._s06.tif", plane(6))
    (tmp_path / "stack.zarr").mkdir()
    (tmp_path / "stack.zarr" / "zarr.json").write_text("{}", encoding="utf-8")
    (tmp_path / "s06.tif").mkdir()
    source = open_source(tmp_path)
    holds_planes(source, 6)
    assert source.notes == plain.notes
    assert source.fingerprint() == plain.fingerprint()
    tifffile.imwrite(tmp_path / "s03.tif", plane(3), metadata=None)
    assert source.fingerprint() != open_source(tmp_path / "s03.tif").fingerprint() != plain.fingerprint()


def test_the_folder_one_stands_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiffs(tmp_path / "scan", ["s0.tif", "s1.tif"])
    monkeypatch.chdir(tmp_path / "scan")
    assert open_source(Path()).notes[0].startswith("scan: 2 slices")


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (lambda f: tifffile.imwrite(f, np.zeros((6, 8), np.uint16)), r"s2\.tif is \(6, 8\) uint16, the other slices"),
        (lambda f: tifffile.imwrite(f, plane(2, "float32")), r"s2\.tif is \(6, 7\) float32, the other slices"),
        (lambda f: tifffile.imwrite(f, np.zeros((3, *PLANE), np.uint16), photometric="minisblack"),
         r"s2\.tif holds 3 pages, s0\.tif 1"),
        (lambda f: f.write_bytes(b""), r"s2\.tif"),
    ],
)  # fmt: skip
def test_slices_that_differ_are_named_when_opened(
    tmp_path: Path, odd: Callable[[Path], object], words: str
) -> None:
    write_tiffs(tmp_path, [f"s{k}.tif" for k in range(4)])
    odd(tmp_path / "s2.tif")
    with pytest.raises(VolumeError, match=words):
        open_source(tmp_path)


def test_a_single_slice(tmp_path: Path) -> None:
    write_tiffs(tmp_path, ["only.tif"])
    holds_planes(open_source(tmp_path), 1)


# ---------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "PNG"), (".PNG", "PNG"), (".jpg", "JPEG")])
@pytest.mark.parametrize("colour", [False, True])
def test_pictures_are_a_stack(tmp_path: Path, suffix: str, kind: str, colour: bool) -> None:
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 255, (11, *PLANE, *([3] if colour else [])), dtype=np.uint8)
    for k, values in enumerate(planes):
        Image.fromarray(values).save(tmp_path / f"slice{k}{suffix}")
    expected = np.stack([np.asarray(Image.open(tmp_path / f"slice{k}{suffix}")) for k in range(11)])
    expected = np.moveaxis(expected, -1, 0) if colour else expected[None]
    source, box = open_source(tmp_path), Box((2, 1, 0), (5, 6, 4))
    assert (source.kind, source.shape) == (f"{kind} slices", (3 if colour else 1, 11, *PLANE))
    np.testing.assert_array_equal(source.read(), expected)
    np.testing.assert_array_equal(source.read(box), expected[(slice(None), *box.slices)])
    assert f"11 slices from slice0{suffix} to slice10{suffix}" in source.notes[0]
    assert any("JPEG has changed" in note for note in source.notes) == (kind == "JPEG")
    with pytest.raises(VolumeError, match=r"--spacing"):
        source.grid()
    (tmp_path / f"slice4{suffix}").unlink()
    with pytest.raises(VolumeError, match=rf"slice4\{suffix} missing"):
        open_source(tmp_path)


def test_pictures_of_another_size_are_named(tmp_path: Path) -> None:
    for k in range(3):
        Image.fromarray(np.zeros((6, 7 + (k == 1)), np.uint8)).save(tmp_path / f"s{k}.png")
    with pytest.raises(VolumeError, match=r"s1\.png is \(1, 1, 6, 8\) uint8"):
        open_source(tmp_path)


def test_a_picture_beside_a_stack_is_left_out(tmp_path: Path) -> None:
    write_tiffs(tmp_path, ["s0.tif", "s1.tif"])
    Image.fromarray(np.zeros(PLANE, np.uint8)).save(tmp_path / "preview.png")
    source = open_source(tmp_path)
    holds_planes(source, 2)
    assert "left out: preview.png" in source.notes[1]
    for k in range(2):
        Image.fromarray(np.zeros(PLANE, np.uint8)).save(tmp_path / f"p{k}.png")
    with pytest.raises(VolumeError, match=r"2 volumes \(PNG: .*; TIFF: s0\.tif, s1\.tif\)"):
        open_source(tmp_path)


# ---------------------------------------------------------------------- tiles that say where they lie

WHOLE = np.arange(12 * 10 * 8, dtype=np.int16).reshape(12, 10, 8)
SPACING_XYZ = (1.0, 1.5, 2.0)
OBLIQUE = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])


def write_part(
    path: Path, box: Box, direction: np.ndarray | None = None, values: np.ndarray | None = None
) -> None:
    """A box of WHOLE (or other values) where it lies in the world; the first voxel of WHOLE is at (5, 6, 7)."""
    matrix = np.eye(3) if direction is None else direction
    part = WHOLE[box.slices] if values is None else values
    image = sitk.GetImageFromArray(part)
    image.SetSpacing(SPACING_XYZ)
    image.SetDirection(matrix.ravel().tolist())
    away = np.array(box.start[::-1]) * SPACING_XYZ
    image.SetOrigin((np.array((5.0, 6.0, 7.0)) + matrix @ away).tolist())
    sitk.WriteImage(image, str(path))


def halves(axis: int, at: int = 5) -> tuple[Box, Box]:
    stop, start = list(WHOLE.shape), [0, 0, 0]
    stop[axis] = start[axis] = at
    return Box((0, 0, 0), tuple(stop)), Box(tuple(start), WHOLE.shape)  # type: ignore[arg-type]


def is_whole(source: Source, direction: np.ndarray) -> None:
    np.testing.assert_array_equal(source.read()[0], WHOLE)
    box = Box((3, 2, 1), (9, 8, 6))
    np.testing.assert_array_equal(source.read(box)[0], WHOLE[box.slices])
    grid = source.grid()
    np.testing.assert_allclose(grid.spacing_zyx, SPACING_XYZ[::-1], rtol=1e-6)
    for at in ((0, 0, 0), (11, 9, 7)):
        expected = np.array((5.0, 6.0, 7.0)) + direction @ (np.array(at[::-1]) * SPACING_XYZ)
        np.testing.assert_allclose(grid.world_mm(at), expected, atol=1e-4)


@pytest.mark.parametrize("suffix", [".mha", ".nii.gz", ".nrrd", ".mhd"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    "turned", [np.eye(3), OBLIQUE, np.diag([-1.0, -1.0, 1.0])], ids=["straight", "oblique", "turned"]
)
def test_tiles_lie_where_their_origins_say(
    tmp_path: Path, suffix: str, axis: int, turned: np.ndarray
) -> None:
    lower, upper = halves(axis)
    write_part(tmp_path / f"slab_2{suffix}", lower, turned)
    write_part(tmp_path / f"slab_1{suffix}", upper, turned)
    source = open_source(tmp_path)
    is_whole(source, turned)
    assert any(f"put along {'zyx'[axis]} where their origins say" in note for note in source.notes)
    assert not any("left out" in note for note in source.notes)


def test_tiles_along_several_axes(tmp_path: Path) -> None:
    cuts = [((0, 7), (7, 12)), ((0, 4), (4, 10)), ((0, 8),)]
    for k, ((a, b), (c, d), (e, f)) in enumerate(itertools.product(*cuts)):
        write_part(tmp_path / f"{'nwes'[k]}.mha", Box((a, c, e), (b, d, f)), OBLIQUE)
    source = open_source(tmp_path)
    is_whole(source, OBLIQUE)
    assert any("put along z and y" in note for note in source.notes)


def test_holes_between_tiles_are_zero_with_a_note(tmp_path: Path) -> None:
    write_part(tmp_path / "slab_1.mha", Box((8, 0, 0), WHOLE.shape))
    write_part(tmp_path / "slab_2.mha", Box((0, 0, 0), (5, 10, 8)))
    source = open_source(tmp_path)
    expected = WHOLE.copy()
    expected[5:8] = 0
    np.testing.assert_array_equal(source.read()[0], expected)
    assert any("240 of 960 voxels are in no file and are stored as 0 (between slab_2.mha and slab_1.mha, 3 voxels, "
               "6 millimeter, along z)" in note for note in source.notes)  # fmt: skip


def test_tiles_far_apart_are_refused(tmp_path: Path) -> None:
    write_part(tmp_path / "slab_1.mha", Box((0, 0, 0), (2, 10, 8)))
    write_part(tmp_path / "slab_2.mha", Box((10_000_000, 0, 0), (10_000_002, 10, 8)), values=WHOLE[:2])
    with pytest.raises(
        VolumeError, match=r"320 of the 800000160 voxels .*9999998 voxels, 2e\+07 millimeter, along z"
    ):
        open_source(tmp_path)


def test_no_tile_needs_to_lie_at_the_corner(tmp_path: Path) -> None:
    write_part(tmp_path / "a.mha", Box((0, 5, 0), (6, 10, 8)), OBLIQUE)
    write_part(tmp_path / "b.mha", Box((6, 0, 0), (12, 5, 8)), OBLIQUE)
    source = open_source(tmp_path)
    np.testing.assert_array_equal(source.read()[0, :6, 5:], WHOLE[:6, 5:])
    np.testing.assert_array_equal(source.read()[0, 6:, :5], WHOLE[6:, :5])
    np.testing.assert_allclose(source.grid().world_mm((0, 0, 0)), (5, 6, 7), atol=1e-6)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_two_modalities_of_one_grid_are_refused(tmp_path: Path, suffix: str) -> None:
    for name in ("sub-01_T1w", "sub-01_T2w"):
        write_part(tmp_path / f"{name}{suffix}", Box((0, 0, 0), WHOLE.shape))
    with pytest.raises(
        VolumeError, match=r"T1w.* and sub-01_T2w.* both hold 12 x 10 x 8 voxels .*of one place"
    ):
        open_source(tmp_path)


def test_tiles_at_the_zero_of_the_world_are_at_one_place(tmp_path: Path) -> None:
    for k in (1, 2):
        nibabel.save(nibabel.Nifti1Image(WHOLE.T, np.diag([1, 1, 2, 1])), tmp_path / f"vol_{k}.nii")
    with pytest.raises(VolumeError, match="of one place"):
        open_source(tmp_path)


def test_tiles_that_overlap_or_lie_off_the_grid(tmp_path: Path) -> None:
    write_part(tmp_path / "a.mha", Box((0, 0, 0), (6, 10, 8)))
    write_part(tmp_path / "b.mha", Box((5, 0, 0), WHOLE.shape))
    with pytest.raises(VolumeError, match=r"a\.mha and b\.mha both hold 1 x 10 x 8 voxels"):
        open_source(tmp_path)
    image = sitk.ReadImage(str(tmp_path / "b.mha"))
    image.SetOrigin((5, 6, 7 + 2 * 6.3))
    sitk.WriteImage(image, str(tmp_path / "b.mha"))
    with pytest.raises(VolumeError, match=r"b\.mha lies 6\.3, 0, 0 voxels \(z, y, x\) from a\.mha"):
        open_source(tmp_path)
    write_part(tmp_path / "b.mha", Box((6, 0, 0), WHOLE.shape), OBLIQUE)
    with pytest.raises(VolumeError, match=r"b\.mha: its direction is"):
        open_source(tmp_path)


# ---------------------------------------------------------------------- tiles that say nothing


@pytest.mark.parametrize("kind", [".npy", ".h5", ".tif"])
def test_tiles_without_a_place_need_numbers(tmp_path: Path, kind: str) -> None:
    def write(name: str, values: np.ndarray) -> None:
        file = tmp_path / f"{name}{kind}"
        if kind == ".npy":
            np.save(file, values)
        elif kind == ".h5":
            with h5py.File(file, "w") as store:
                store["data"] = values
        else:
            tifffile.imwrite(file, values, photometric="minisblack")

    for k in range(3):
        write(f"tile{k + 9}", WHOLE[4 * k : 4 * k + 4])
    source = open_source(tmp_path)
    np.testing.assert_array_equal(source.read()[0], WHOLE)
    assert any(f"3 tiles from tile9{kind} to tile11{kind}" in note for note in source.notes)
    (tmp_path / f"tile10{kind}").unlink()
    assert any("grow by 2" in note for note in open_source(tmp_path).notes)
    write("tile12", WHOLE[:4])
    with pytest.raises(VolumeError, match=rf"tile10\{kind} missing"):
        open_source(tmp_path)
    for name in ("tile9", "tile11", "tile12"):
        (tmp_path / f"{name}{kind}").unlink()
    for name in ("c1", "c2"):
        write(name, WHOLE)
    with pytest.raises(VolumeError, match="numbered as channels"):
        open_source(tmp_path)


def test_one_volume_in_a_folder_is_read(tmp_path: Path) -> None:
    write_part(tmp_path / "scan.mhd", Box((0, 0, 0), WHOLE.shape))
    (tmp_path / "scan.json").write_text("{}", encoding="utf-8")
    source = open_source(tmp_path)
    is_whole(source, np.eye(3))
    assert source.notes[-2:] == (
        f"{tmp_path.name}: scan.mhd is read, the only volume in it",
        f"{tmp_path.name}: left out: scan.json",
    )
    np.save(tmp_path / "other.npy", WHOLE)
    with pytest.raises(
        VolumeError, match=r"holds other\.npy, scan\.mhd: neither slices .* nor tiles of one format"
    ):
        open_source(tmp_path)
