"""NIfTI headers that real tools write: which form counts, what sizes mean, pairs, and files that are torn."""

from __future__ import annotations

import gzip
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from comir_hpc.errors import VolumeError
from comir_hpc.volumes.readers import Source, open_source

SHAPE = (28, 24, 20)
ARRAY = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
LPS_FLIP = ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0))
CLASSES = {1: nibabel.Nifti1Image, 2: nibabel.Nifti2Image}


def diagonal(
    x: float, y: float, z: float, origin: tuple[float, float, float] = (-10, -11, -12)
) -> np.ndarray:
    affine = np.diag([x, y, z, 1.0])
    affine[:3, 3] = origin
    return affine


def nifti_image(
    affine: np.ndarray, *, version: int = 1, order: str = "<", array: np.ndarray = ARRAY, **fields: Any
) -> nibabel.Nifti1Image:
    """An image with the affine as sform (code 1), no qform, mm, and then header fields as they are given."""
    kind = CLASSES[version]
    header = kind.header_class(endianness=order)
    header.set_data_dtype(array.dtype)
    image = kind(array.transpose(*range(array.ndim)[::-1]), affine, header)
    image.set_sform(affine, code=1)
    image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    for name, value in fields.items():
        image.header[name] = value
    return image


def written(path: Path, affine: np.ndarray, **options: Any) -> Path:
    """The file of `nifti_image`, its header as it stands: nibabel would mend it while saving."""
    version, order = options.get("version", 1), options.get("order", "<")
    plain = {k: v for k, v in options.items() if k in ("version", "order", "array")}
    content = bytearray(nifti_image(affine, **plain).to_bytes())
    record = np.frombuffer(
        content, CLASSES[version].header_class.template_dtype.newbyteorder(order), count=1
    ).copy()
    for name, value in options.items():
        if name not in plain:
            record[name] = value
    content[: record.nbytes] = record.tobytes()
    path.write_bytes(gzip.compress(bytes(content)) if path.name.lower().endswith(".gz") else bytes(content))
    return path


def holds(source: Source, array: np.ndarray = ARRAY) -> None:
    np.testing.assert_array_equal(source.read(), array[None] if array.ndim == 3 else array)
    assert source.read().dtype == array.dtype


def lies(
    source: Source, spacing: tuple[float, ...], origin: tuple[float, ...], direction: Any = LPS_FLIP
) -> None:
    grid = source.grid()
    np.testing.assert_allclose(grid.spacing_zyx, spacing, rtol=1e-6)
    np.testing.assert_allclose(grid.origin_xyz, origin, atol=1e-5)
    np.testing.assert_allclose(grid.direction, direction, atol=1e-6)


# ---------------------------------------------------------------------- which numbers count


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("code", [1, 2, 4])
def test_sizes_come_from_the_sform(tmp_path: Path, version: int, code: int) -> None:
    pixdim = [1, 1, 1, 1, 1, 1, 1, 1]
    path = written(
        tmp_path / "pix1.nii", diagonal(0.5, 0.5, 2), version=version, pixdim=pixdim, sform_code=code
    )
    source = open_source(path)
    lies(source, (2, 0.5, 0.5), (10, 11, -12))
    assert "2 x 0.5 x 0.5 by the sform and 1 x 1 x 1 by pixdim" in source.notes[0]
    affine = nibabel.load(path).affine
    np.testing.assert_allclose(source.grid().world_mm((3, 2, 1)), (affine @ (1, 2, 3, 1))[:3] * (-1, -1, 1))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_negative_pixdim_with_a_good_sform(tmp_path: Path, axis: int) -> None:
    sizes = [1.0, 2, 2, 2, 1, 1, 1, 1]
    sizes[axis] = -2
    affine = diagonal(2, -2, 2, (-10, 20, -12))
    source = open_source(written(tmp_path / "neg.nii", affine, pixdim=sizes))
    lies(source, (2, 2, 2), (10, -20, -12), np.diag([-1, 1, 1]))
    assert "the sign is ignored, as nibabel does" in source.notes[0]


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_negative_pixdim_with_a_qform_is_read_as_nibabel_does(tmp_path: Path, axis: int) -> None:
    sizes = [1.0, 2, 3, 4, 1, 1, 1, 1]
    sizes[axis] *= -1
    path = written(tmp_path / "neg.nii", diagonal(2, 3, 4), pixdim=sizes, sform_code=0, qform_code=1, quatern_d=0.6,
                   qoffset_x=5)  # fmt: skip
    source = open_source(path)
    affine = nibabel.load(path).affine
    np.testing.assert_allclose(
        source.grid().world_mm((7, 6, 5)), (affine @ (5, 6, 7, 1))[:3] * (-1, -1, 1), atol=1e-4
    )
    assert "negative" in source.notes[0]


@pytest.mark.parametrize(("said", "taken"), [(-1.0000005, -1), (-7.0, -1), (0.5, 1)])
def test_a_handedness_that_is_neither_1_nor_minus_1_is_taken_by_its_sign_and_said(
    tmp_path: Path, said: float, taken: int
) -> None:
    """nibabel takes 1 for all of these; ITK and NIfTI's own library look at the sign."""
    sizes = [said, 2, 3, 4, 1, 1, 1, 1]
    path = written(
        tmp_path / "q.nii", diagonal(2, 3, 4), pixdim=sizes, sform_code=0, qform_code=1, quatern_d=0.6
    )
    source, itk = open_source(path), sitk.ReadImage(str(path))
    np.testing.assert_allclose(
        source.grid().world_mm((7, 6, 5)), itk.TransformIndexToPhysicalPoint((5, 6, 7)), atol=1e-4
    )
    assert "has to be 1 or -1" in source.notes[0]
    assert f"as {taken}, as ITK does" in source.notes[0]


def test_missing_pixdim_is_asked_for_and_the_direction_kept(tmp_path: Path) -> None:
    sizes = [-1.0, 2, 0, 4, 1, 1, 1, 1]
    path = written(tmp_path / "p.nii", diagonal(2, 3, 4), pixdim=sizes, sform_code=0, qform_code=1)
    with pytest.raises(
        VolumeError, match=r"p\.nii: no voxel spacing.*its pixdim is \[2\.0, 0\.0, 4\.0\].*--spacing"
    ):
        open_source(path).grid()
    grid = open_source(path).grid((4, 3, 2))
    np.testing.assert_allclose(grid.direction, np.diag([-1, -1, -1]))
    # A sform needs no pixdim.
    lies(open_source(written(tmp_path / "s.nii", diagonal(2, 3, 4), pixdim=[1.0, 2, 0, 4, 1, 1, 1, 1], qform_code=1)),
         (4, 3, 2), (10, 11, -12))  # fmt: skip


def test_sheared_sform_gives_way_to_a_good_qform(tmp_path: Path) -> None:
    affine = diagonal(2, 2, 2)
    affine[0, 1] = 0.3
    path = written(
        tmp_path / "shear_q.nii",
        affine,
        qform_code=1,
        pixdim=[1, 2, 2, 2, 1, 1, 1, 1],
        quatern_b=0,
        quatern_c=0,
        quatern_d=0,
        qoffset_x=7,
        qoffset_y=0,
        qoffset_z=0,
    )
    source = open_source(path)
    lies(source, (2, 2, 2), (-7, 0, 0))
    np.testing.assert_allclose(source.grid().origin_mm, sitk.ReadImage(str(path)).GetOrigin())
    (note,) = source.notes
    assert "sform (code 1), whose axes are sheared, and qform disagree" in note
    assert "the qform is used" in note


@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("shear", [0.001, 0.02])
def test_slightly_sheared_sform_is_read_with_a_note(
    tmp_path: Path, axes: tuple[int, int], shear: float
) -> None:
    affine = diagonal(2, 2, 2)
    affine[axes] = shear
    source = open_source(written(tmp_path / "sh.nii", affine))
    grid = source.grid()
    assert "sheared by up to" in source.notes[0]
    said = float(source.notes[0].split("by up to ")[-1].split()[0])
    # The corners lie where the sform says, to what the note says.
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in SHAPE], indexing="ij"), -1).reshape(-1, 3)
    truth = (corners[:, ::-1] @ affine[:3, :3].T + affine[:3, 3]) * (-1, -1, 1)
    moved = np.linalg.norm(grid.world_mm(corners) - truth, axis=1) / 2
    assert moved.max() == pytest.approx(said, rel=0.05)
    np.testing.assert_allclose(
        moved.max(), shear / 4 * np.hypot(*[SHAPE[2 - a] - 1 for a in axes]) / 2, rtol=0.02
    )


@pytest.mark.parametrize("flip", [1, -1])
def test_the_thickness_of_a_slice_may_be_oblique(tmp_path: Path, flip: int) -> None:
    """A slice out of a tilted stack: its voxels lie where the sform says, its normal is square to it."""
    affine = diagonal(2, 3, 4 * flip)
    affine[1, 2] = 1.5
    source = open_source(written(tmp_path / "slice.nii", affine, array=ARRAY[:1]))
    grid = source.grid()
    np.testing.assert_allclose(grid.direction, np.diag([-1, -1, flip]), atol=1e-6)
    np.testing.assert_allclose(grid.world_mm((0, 23, 19)), (10 - 38, 11 - 69, -12), atol=1e-4)


def test_strongly_sheared_sform_is_refused_with_its_numbers(tmp_path: Path) -> None:
    affine = diagonal(2, 2, 2)
    affine[0, 1] = 0.3
    with pytest.raises(
        VolumeError, match=r"sheared by up to 8\.53 degrees.*move voxels by up to 1\.1"
    ) as error:
        open_source(written(tmp_path / "sh.nii", affine))
    assert "--spacing" not in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_axes_that_span_nothing_are_refused(tmp_path: Path, bad: float) -> None:
    path = written(tmp_path / "a.nii", diagonal(2, 2, 2), srow_y=[0, bad, 0, -11])
    with pytest.raises(VolumeError, match=r"a\.nii: its (axes|orientation)") as error:
        open_source(path)
    assert "--spacing" not in str(error.value)


@pytest.mark.parametrize("code", [4, 5, 6, 7])
def test_junk_units_are_millimetres_with_a_note(tmp_path: Path, code: int) -> None:
    path = written(tmp_path / "unitjunk.nii", diagonal(2, 2, 2), xyzt_units=code)
    source = open_source(path)
    lies(source, (2, 2, 2), (10, 11, -12))
    assert source.grid().unit == "millimeter"
    assert f"no unit of length {code} (xyzt_units): its numbers are taken as millimetres" in source.notes[0]


@pytest.mark.parametrize("time_unit", [8, 16, 24, 32, 48])
def test_units_of_time_do_not_matter(tmp_path: Path, time_unit: int) -> None:
    source = open_source(written(tmp_path / "t.nii", diagonal(2, 2, 2), xyzt_units=3 + time_unit))
    assert source.grid().unit == "micrometer"


def test_a_unit_that_is_not_named_can_be_given(tmp_path: Path) -> None:
    grid = open_source(written(tmp_path / "u.nii", diagonal(2, 3, 4), xyzt_units=0)).grid(unit="um")
    assert (grid.spacing_zyx, grid.origin_xyz, grid.unit) == ((4, 3, 2), (10, 11, -12), "micrometer")
    with pytest.raises(VolumeError, match="its spacing is in millimeter, --unit says micrometer"):
        open_source(written(tmp_path / "u.nii", diagonal(2, 3, 4))).grid(unit="um")


@pytest.mark.parametrize("code", [-1, 6, 256])
def test_codes_that_nifti_does_not_have_are_said(tmp_path: Path, code: int) -> None:
    path = written(tmp_path / "c.nii", diagonal(2, 2, 2), sform_code=code)
    source = open_source(path)
    assert f"sform_code {code} is none of NIfTI's" in source.notes[0]
    np.testing.assert_allclose(source.grid().origin_mm, sitk.ReadImage(str(path)).GetOrigin())


# ---------------------------------------------------------------------- versions, orders, pairs, names


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["n.nii", "n.nii.gz", "N.NII", "N.NII.GZ"])
def test_versions_orders_and_capitals(tmp_path: Path, version: int, order: str, name: str) -> None:
    source = open_source(written(tmp_path / name, diagonal(2, 2, 2), version=version, order=order))
    holds(source)
    lies(source, (2, 2, 2), (10, 11, -12))
    assert source.streamed != name.lower().endswith(".gz")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "suffixes", [(".hdr", ".img"), (".HDR", ".IMG"), (".hdr.gz", ".img.gz"), (".hdr", ".img.gz")]
)
@pytest.mark.parametrize("version", [1, 2])
def test_pairs(tmp_path: Path, version: int, suffixes: tuple[str, str], order: str) -> None:
    kind = {1: nibabel.Nifti1Pair, 2: nibabel.Nifti2Pair}[version]
    made = kind(ARRAY.transpose(2, 1, 0), diagonal(2, 3, 4), kind.header_class(endianness=order))
    made.header.set_data_dtype(np.int16)
    made.header.set_xyzt_units("mm")
    nibabel.save(made, tmp_path / "p.hdr")
    for suffix, plain in zip(suffixes, (".hdr", ".img"), strict=True):
        content = (tmp_path / f"p{plain}").read_bytes()
        (tmp_path / f"q{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    for suffix in suffixes:
        source = open_source(tmp_path / f"q{suffix}")
        holds(source)
        lies(source, (4, 3, 2), (10, 11, -12))
        assert source.kind == "NIfTI"
        assert {f.name for f in source.files} == {f"q{s}" for s in suffixes}


def test_half_a_pair_is_named(tmp_path: Path) -> None:
    made = nibabel.Nifti1Pair(ARRAY.transpose(2, 1, 0), diagonal(2, 3, 4))
    nibabel.save(made, tmp_path / "p.hdr")
    (tmp_path / "p.img").unlink()
    with pytest.raises(VolumeError, match=r"p\.hdr is one of a pair; expected p\.img beside it"):
        open_source(tmp_path / "p.hdr")


@pytest.mark.parametrize("dtype", ["int64", "uint64", "int8", "uint32"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_wide_integers_are_exact(tmp_path: Path, dtype: str, order: str) -> None:
    info = np.iinfo(dtype)
    array = np.full((2, 3, 4), info.max, dtype=dtype)
    array[0, 0, :3] = info.min, info.max - 1, 1
    image = nibabel.Nifti1Image(
        array.transpose(2, 1, 0), np.eye(4), nibabel.Nifti1Header(endianness=order), dtype=dtype
    )
    nibabel.save(image, tmp_path / "w.nii")
    holds(open_source(tmp_path / "w.nii"), array)


# ---------------------------------------------------------------------- slope and intercept


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64", "int64"])
@pytest.mark.parametrize(("slope", "inter"), [(0.5, -1000), (1, 7), (-2, 0), (2, 3.25), (1e-3, 0)])
def test_scaled_values_are_those_of_nibabel(tmp_path: Path, dtype: str, slope: float, inter: float) -> None:
    array = (np.arange(60).reshape(3, 4, 5) % 200).astype(dtype)
    path = written(tmp_path / "s.nii", diagonal(1, 1, 1), array=array, scl_slope=slope, scl_inter=inter)
    values = open_source(path).read()
    assert values.dtype == (np.float32 if dtype in ("uint8", "int16", "uint16", "float32") else np.float64)
    expected = np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0)
    np.testing.assert_allclose(values[0], expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("slope", [0, np.nan, np.inf])
def test_slopes_that_mean_no_scaling(tmp_path: Path, slope: float) -> None:
    source = open_source(written(tmp_path / "s.nii", diagonal(2, 2, 2), scl_slope=slope, scl_inter=5))
    holds(source)
    assert "scl_inter 5 is not applied" in source.notes[0]
    assert not open_source(written(tmp_path / "s.nii", diagonal(2, 2, 2), scl_slope=slope)).notes


def test_an_intercept_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"s\.nii.*invalid intercept"):
        open_source(written(tmp_path / "s.nii", diagonal(2, 2, 2), scl_slope=2, scl_inter=np.inf))


# ---------------------------------------------------------------------- claims and damage


@pytest.mark.parametrize("name", ["b.nii", "b.nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
def test_claims_beyond_the_file_are_refused_by_arithmetic(tmp_path: Path, name: str, version: int) -> None:
    side = 32767 if version == 1 else 10**9
    path = written(tmp_path / name, diagonal(2, 2, 2), version=version, dim=[3, side, side, side, 1, 1, 1, 1])
    begin = time.process_time()
    with pytest.raises(VolumeError, match=rf"b\.nii.*({2 * side**3}|truncated)"):
        open_source(path)
    assert time.process_time() - begin < 1


def test_a_packed_claim_within_reach_of_gzip_is_refused_when_read(tmp_path: Path) -> None:
    path = written(tmp_path / "b.nii.gz", diagonal(2, 2, 2), dim=[3, 20, 24, 29, 1, 1, 1, 1])
    with pytest.raises(VolumeError, match=r"b\.nii\.gz cannot be read.*bytes of voxels, expected"):
        open_source(path).read()


@pytest.mark.parametrize(
    "dim", [[3, 0, 4, 5, 1, 1, 1, 1], [3, -4, 4, 5, 1, 1, 1, 1], [0] * 8, [9] + [1] * 7, [1, 9] + [1] * 6]
)
def test_impossible_sizes(tmp_path: Path, dim: list[int]) -> None:
    with pytest.raises(VolumeError, match=r"d\.nii"):
        open_source(written(tmp_path / "d.nii", diagonal(2, 2, 2), dim=dim))


@pytest.mark.parametrize("offset", [np.inf, np.nan, -8, 12, 352.5, -0.5, 1e30])
def test_impossible_offsets(tmp_path: Path, offset: float) -> None:
    with pytest.raises(VolumeError, match=r"o\.nii"):
        open_source(written(tmp_path / "o.nii", diagonal(2, 2, 2), vox_offset=offset))


@pytest.mark.parametrize("name", ["o.nii", "o.nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
def test_no_offset_means_behind_the_header(tmp_path: Path, version: int, name: str) -> None:
    source = open_source(written(tmp_path / name, diagonal(2, 2, 2), version=version, vox_offset=0))
    holds(source)
    assert f"at byte {352 if version == 1 else 544}" in source.notes[0]


@pytest.mark.parametrize("place", [-1, -5, -8, -30])
def test_one_damaged_byte_of_a_packed_file_is_noticed(tmp_path: Path, place: int) -> None:
    path = written(tmp_path / "c.nii.gz", diagonal(2, 2, 2))
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10  # in the length, the checksum or the voxels
    path.write_bytes(bytes(content))
    with pytest.raises(VolumeError, match=r"c\.nii\.gz cannot be read"):
        open_source(path).read()


def test_what_follows_a_packed_stream(tmp_path: Path) -> None:
    path = written(tmp_path / "c.nii.gz", diagonal(2, 2, 2))
    content = path.read_bytes()
    path.write_bytes(content + bytes(512))  # padding, as tapes and archives leave it
    holds(open_source(path))
    path.write_bytes(content + b"something else")
    with pytest.raises(VolumeError, match=r"c\.nii\.gz cannot be read"):
        open_source(path).read()


def test_bytes_behind_the_voxels_are_said(tmp_path: Path) -> None:
    path = written(tmp_path / "t.nii", diagonal(2, 2, 2))
    path.write_bytes(path.read_bytes() + bytes(100))
    source = open_source(path)
    holds(source)
    assert "100 bytes follow the 26880 of its voxels" in source.notes[0]
