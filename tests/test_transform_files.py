"""Files given as transforms: read right, or refused by what they are with what to do; never an error of a parser."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from comir_hpc.errors import ComirError, RegistrationError
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import (
    Affine,
    Composite,
    ItkTransform,
    PointMap,
    as_affine,
    itk_image,
    itk_on_grid,
    itk_transform,
    load_transform,
    notes_on,
    read_transform,
    save_itk,
    save_transform,
)
from comir_hpc.volumes.points import read_point_table

POINTS = np.random.default_rng(0).uniform(-40, 40, size=(40, 3))
ROTATION = Rotation.from_rotvec((0.3, -0.5, 1.1)).as_matrix()
RIGID = Affine.rigid(ROTATION, (3.0, -7.5, 11.0), (4.0, 5.0, 6.0))
OBLIQUE = tuple(map(tuple, ROTATION.tolist()))
FIELD_GRID = Grid((9, 8, 7), (12.0, 13.0, 14.0), (-40.0, -42.0, -44.0), OBLIQUE)
SHIFTS = np.random.default_rng(1).normal(0, 3, size=(3, *FIELD_GRID.shape_zyx)).astype(np.float32)


def itk_text(parameters: str, kind: str = "AffineTransform", fixed: str = "0 0 0", more: str = "") -> str:
    return (
        f"#Insight Transform File V1.0\n#Transform 0\nTransform: {kind}_double_3_3\nParameters: {parameters}\n"
        f"FixedParameters: {fixed}\n{more}"
    )


def apply_sitk(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(point.tolist()) for point in points])


def bspline() -> sitk.Transform:
    domain = itk_image(np.zeros((8, 8, 8), np.uint8), Grid((8, 8, 8), (15.0,) * 3, (-50.0,) * 3))
    spline = sitk.BSplineTransformInitializer(domain, [4, 4, 4])
    spline.SetParameters(np.random.default_rng(1).uniform(-4, 4, len(spline.GetParameters())).tolist())
    return spline


def warp_field() -> sitk.Image:
    return itk_image(SHIFTS, FIELD_GRID)


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("name", ["t.tfm", "t.txt", "t.h5", "t.mat"])
def test_every_kind_of_itk_file_is_read(tmp_path: Path, name: str) -> None:
    sitk.WriteTransform(itk_transform(RIGID), str(tmp_path / name))
    read = read_transform(tmp_path / name)
    np.testing.assert_allclose(read.apply(POINTS), RIGID.apply(POINTS), atol=1e-12)
    np.testing.assert_allclose(read.inverse().apply(read.apply(POINTS)), POINTS, atol=1e-10)
    np.testing.assert_allclose(load_transform(tmp_path / name).matrix_mm, RIGID.matrix_mm, atol=1e-12)


@pytest.mark.parametrize("name", ["t.h5", "t.tfm"])
def test_a_composite_of_itk_is_applied_in_its_order(tmp_path: Path, name: str) -> None:
    scale = sitk.ScaleTransform(3, (2.0, 1.0, 0.5))
    spline, rigid = bspline(), itk_transform(RIGID)
    whole = sitk.CompositeTransform([rigid, scale, spline])
    sitk.WriteTransform(whole, str(tmp_path / name))
    read = read_transform(tmp_path / name)
    np.testing.assert_allclose(read.apply(POINTS), apply_sitk(whole, POINTS), atol=1e-9)
    assert [type(part).__name__ for part in read.parts] == ["ItkTransform", "Affine", "Affine"]
    np.testing.assert_allclose(Composite(read.parts).apply(POINTS), apply_sitk(whole, POINTS), atol=1e-9)
    assert as_affine(read) is None
    with pytest.raises(RegistrationError, match=r"CompositeTransform is not a linear transform"):
        load_transform(tmp_path / name)
    with pytest.raises(RegistrationError, match="no inverse in closed form"):
        read.inverse()


def test_a_composite_has_an_inverse_where_every_part_has_one() -> None:
    both = Composite((RIGID, ItkTransform(sitk.ScaleTransform(3, (2.0, 1.0, 0.5)))))
    expected = RIGID.apply(POINTS) * (2.0, 1.0, 0.5)
    np.testing.assert_allclose(both.apply(POINTS), expected, atol=1e-12)
    np.testing.assert_allclose(both.inverse().apply(expected), POINTS, atol=1e-12)
    np.testing.assert_allclose(as_affine(both).apply(POINTS), expected, atol=1e-12)
    np.testing.assert_allclose(
        both.apply_to_grid(FIELD_GRID)[2, 3, 4], both.apply(FIELD_GRID.world_mm((2, 3, 4))), atol=1e-12
    )
    with pytest.raises(RegistrationError, match="without a part"):
        Composite(())
    with pytest.raises(RegistrationError, match=r"BSplineTransform.* no inverse"):
        Composite((RIGID, ItkTransform(bspline()))).inverse()


def test_a_matrix_as_c3d_and_greedy_write_it_is_read(tmp_path: Path) -> None:
    """SimpleITK applies a MatrixOffsetTransformBase, but cannot hand it out of a composite."""
    numbers = " ".join(map(repr, itk_transform(RIGID.about((0, 0, 0))).GetParameters()))
    linear = itk_text(numbers, "MatrixOffsetTransformBase")
    (tmp_path / "t.tfm").write_text(linear, encoding="utf-8")
    read = read_transform(tmp_path / "t.tfm")
    np.testing.assert_allclose(read.apply(POINTS), RIGID.apply(POINTS), atol=1e-12)
    np.testing.assert_allclose(
        load_transform(tmp_path / "t.tfm").apply(POINTS), RIGID.apply(POINTS), atol=1e-12
    )
    np.testing.assert_allclose(read.inverse().apply(RIGID.apply(POINTS)), POINTS, atol=1e-10)
    sitk.WriteTransform(sitk.CompositeTransform([bspline(), bspline()]), str(tmp_path / "c.tfm"))
    # A composite of it and a B-spline, which is the last one and so applied first.
    head, _, others = (tmp_path / "c.tfm").read_text(encoding="utf-8").partition("#Transform 1\n")
    first = linear.split("\n", 2)[2]
    text = f"{head}#Transform 1\n{first}{others[others.index('#Transform 2') :]}"
    (tmp_path / "c.tfm").write_text(text, encoding="utf-8")
    bent = read_transform(tmp_path / "c.tfm")
    np.testing.assert_allclose(bent.apply(POINTS), RIGID.apply(apply_sitk(bspline(), POINTS)), atol=1e-9)
    assert [type(part).__name__ for part in bent.parts] == ["ItkTransform", "Affine"]


def test_a_field_that_simpleitk_has_no_name_for_is_applied(tmp_path: Path) -> None:
    """As antsRegistration writes it into composites."""
    size, shifts = (3, 3, 3), np.tile((1.0, -2.0, 3.0), 27)
    fixed = [*size, -50, -50, -50, 50, 50, 50, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    kind = "GaussianSmoothingOnUpdateDisplacementFieldTransform"
    text = itk_text(" ".join(map(str, shifts)), kind, " ".join(map(str, fixed)))
    (tmp_path / "t.tfm").write_text(text, encoding="utf-8")
    read = read_transform(tmp_path / "t.tfm")
    np.testing.assert_allclose(read.apply(POINTS), POINTS + np.array([1.0, -2.0, 3.0]), atol=1e-9)
    assert as_affine(read) is None
    assert read.parts == (read,)


@pytest.mark.parametrize("name", ["t.h5", "t.tfm"])
def test_what_is_saved_for_itk_is_what_itk_applies(tmp_path: Path, name: str) -> None:
    both = Composite((RIGID, ItkTransform(bspline())))
    save_itk(both, tmp_path / name)
    expected = apply_sitk(bspline(), RIGID.apply(POINTS))
    np.testing.assert_allclose(
        apply_sitk(sitk.ReadTransform(str(tmp_path / name)), POINTS), expected, atol=1e-9
    )
    np.testing.assert_allclose(read_transform(tmp_path / name).apply(POINTS), expected, atol=1e-9)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    save_itk(RIGID, tmp_path / name)
    assert sitk.ReadTransform(str(tmp_path / name)).GetName() == "AffineTransform"

    class Unknown(PointMap):
        def apply(self, points_mm: np.ndarray) -> np.ndarray:
            return points_mm

    with pytest.raises(RegistrationError, match="ITK has no form of a Unknown"):
        save_itk(Composite((RIGID, Unknown())), tmp_path / "u.h5")


def test_a_warp_of_ants_is_a_displacement_field_in_lps(tmp_path: Path) -> None:
    path = tmp_path / "sub_1Warp.nii.gz"
    sitk.WriteImage(warp_field(), str(path))
    assert nibabel.load(path).shape == (7, 8, 9, 1, 3)
    read = read_transform(path)
    expected = sitk.DisplacementFieldTransform(sitk.Cast(warp_field(), sitk.sitkVectorFloat64))
    np.testing.assert_allclose(read.apply(POINTS), apply_sitk(expected, POINTS), atol=1e-4)
    voxel = FIELD_GRID.world_mm((4, 3, 2))
    np.testing.assert_allclose(read.apply(voxel) - voxel, SHIFTS[:, 4, 3, 2], atol=1e-4)
    assert "0GenericAffine.mat), which is not applied here" in read.notes[0]
    assert notes_on(Composite((RIGID, read)), "x") == read.notes


def test_any_transform_crosses_to_simpleitk_on_a_grid() -> None:
    grid = Grid((6, 7, 8), (2.0, 3.0, 4.0), (-5.0, 1.0, 2.0), OBLIQUE)
    bent = Composite((RIGID, ItkTransform(bspline())))
    points = grid.world_mm([(0, 0, 0), (5, 6, 7), (2, 3, 4)])
    np.testing.assert_allclose(apply_sitk(itk_on_grid(bent, grid), points), bent.apply(points), atol=1e-9)


def test_a_reflection_is_allowed_and_said() -> None:
    mirror = Affine(np.diag([-1.0, 1, 1, 1]))
    assert (
        "a reflection (its determinant is negative), which turns left into right"
        in notes_on(mirror, "m.tfm")[0]
    )
    assert notes_on(Composite((mirror, RIGID)), "m.tfm")
    assert notes_on(Composite((mirror, mirror)), "m.tfm") == ()
    assert notes_on(ItkTransform(itk_transform(mirror)), "m.tfm")
    assert notes_on(RIGID, "m.tfm") == ()


# ----------------------------------------------------------------------------------------------- what is refused

SINGULAR = {
    "zeros": np.zeros((3, 3)),
    "rank 1": np.outer((1, 2, 3), (4, 5, 6)),
    "rank 2": np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]),
    "one axis flat": np.diag([1.0, 1, 1e-9]),
    "large and flat": np.diag([1e6, 1e6, 1.0]),
    "turned and flat": ROTATION @ np.diag([1.0, 1e-5, 1]) @ ROTATION.T,
}


@pytest.mark.parametrize("name", ["t.tfm", "t.h5", "t.json", "t.mat", "composite.h5", "bent.h5"])
@pytest.mark.parametrize("kind", SINGULAR)
def test_a_singular_transform_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    path, matrix = tmp_path / name, SINGULAR[kind]
    affine = sitk.AffineTransform(3)
    affine.SetParameters([*matrix.ravel().tolist(), 1.0, 2.0, 3.0])
    if name == "t.json":
        whole = np.eye(4)
        whole[:3, :3] = matrix
        path.write_text(json.dumps({"matrix_lps_mm": whole.tolist()}), encoding="utf-8")
    else:
        others = {"composite.h5": [itk_transform(RIGID)], "bent.h5": [bspline()]}.get(name)
        sitk.WriteTransform(sitk.CompositeTransform([*others, affine]) if others else affine, str(path))
    for reader in (read_transform, load_transform):
        with pytest.raises(
            RegistrationError, match=rf"{name}: transform .* not an invertible affine map: it flatt"
        ):
            reader(path)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e4])
def test_a_small_or_large_scale_alone_is_not_singular(scale: float) -> None:
    matrix = np.diag([scale, scale, scale, 1.0])
    np.testing.assert_allclose(Affine(matrix).inverse().apply((scale, 0, 0)), (1, 0, 0))


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999", "zero"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, number: str) -> None:
    text = tmp_path / "t.tfm"
    text.write_text(itk_text(f"{number} 0 0 0 1 0 0 0 1 0 0 0"), encoding="utf-8")
    with pytest.raises(RegistrationError, match=f"'{number}' stands where a finite number is expected"):
        read_transform(text)
    affine = sitk.AffineTransform(3)
    sitk.WriteTransform(affine, str(tmp_path / "t.h5"))
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        file["TransformGroup/0/TransformParameters"][3] = np.nan
    with pytest.raises(RegistrationError, match=r"t\.h5: transform .* is not finite"):
        read_transform(tmp_path / "t.h5")
    SHIFTS_BAD = SHIFTS.copy()
    SHIFTS_BAD[1, 2, 3, 4] = np.nan
    sitk.WriteImage(itk_image(SHIFTS_BAD, FIELD_GRID), str(tmp_path / "w.nii.gz"))
    with pytest.raises(RegistrationError, match=r"w\.nii\.gz.*not finite"):
        read_transform(tmp_path / "w.nii.gz")


MATRIX = "1 0 0 10\n0 1 0 20\n0 0 1 30\n0 0 0 1\n"
TEXTS = [
    ("fsl.mat", MATRIX, r"a matrix in text \(4 x 4.*say which with --from: matrix-lps or .* fsl \(flirt -omat\)"),
    ("m.txt", MATRIX.replace(" ", ","), r"a matrix in text \(4 x 4 numbers\) that does not say of which world"),
    ("m.csv", MATRIX.replace(" ", ", "), r"a matrix in text"),
    ("m.txt", "# comment\n" + MATRIX.replace("10", "1.0e+01"), r"a matrix in text"),
    ("m.txt", MATRIX[:-8], r"a matrix in text \(3 x 4 numbers\)"),
    ("a.aff12.1D", "# 3dAllineate matrices\n1 0 0 10 0 1 0 20 0 0 1 30\n", r"a matrix in text \(one row of 12"),
    ("x.xfm", "MNI Transform File\nTransform_Type = Linear;\n", r"an \.xfm file of MINC; convert it"),
    ("p.csv", "name,x,y,z\nA,1,2,3\n", r"a table of points; give it with --points"),
    ("p.txt", "x\ty\tz\n1\t2\t3\n", r"a table of points; give it with --points"),
    ("F.fcsv", "# Markups fiducial file version = 4.11\n# columns = id,x,y,z\n1,1,2,3\n", r"a list of points"),
    ("t.csv", "a,b\n1,c\n", r"is a table; expected ITK's \.tfm"),
    ("t.xml", "<?xml version='1.0'?><a/>", r"an XML file; expected ITK's \.tfm"),
    ("t.txt", "nonsense", r"is a text that is no transform; expected ITK's \.tfm"),
    ("t.dat", itk_text("1 0 0 0 1 0 0 0 1 0 0 0"), r"rename it to end in \.tfm"),
    ("t.tfm", itk_text("1 0 0 0 1 0"), r"t\.tfm is a transform of ITK that is damaged, cut off"),
    ("t.tfm", itk_text("1 0 0 0 1 0 0 0 1 0 0 0", kind="StrangeTransform"), r"damaged, cut off or of a kind"),
    ("t.tfm", itk_text("1 0 0 0 1 0 0 0 1 0 0 0", more=itk_text("1 2 3", "TranslationTransform", "")[29:]),
     r"is a list of 2 transforms that does not say in which order"),
    ("t.tfm", "", r"t\.tfm is empty \(0 bytes\)"),
    ("t.json", "[1, 2]", r"holds no matrix_lps_mm"),
    ("t.json", '{"matrix_lps_mm": [[1, 0], [0, 1]]}', r"t\.json: a transform of shape \(2, 2\)"),
    ("t.json", '{"matrix_lps_mm": [[NaN,0,0,0],[0,1,0,0],[0,0,1,0],[0,0,0,1]]}', r"t\.json: .* is not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), TEXTS)
def test_other_texts_are_refused_by_what_they_are(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    _refused(tmp_path / name, message)


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    image = itk_image(np.zeros((4, 5, 6), np.float32), Grid((4, 5, 6), (1.0, 1.0, 1.0)))
    for name in ("i.nii.gz", "i.nii", "i.nrrd", "i.mha", "I.MHA"):
        sitk.WriteImage(image, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).rename(tmp_path / name)
        _refused(tmp_path / name, rf"{name} is an image, no transform; give it with --zarr or --like")
    sitk.WriteImage(itk_image(SHIFTS, FIELD_GRID), str(tmp_path / "1InverseWarp.nii.gz"))
    _refused(tmp_path / "1InverseWarp.nii.gz", r"the inverse warp of ANTs.*give the one from fixed to moving")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = 1
    _refused(tmp_path / "other.h5", r"an HDF5 file without a transform of ITK")
    np.save(tmp_path / "m.npy", np.eye(4))
    _refused(tmp_path / "m.npy", r"a numpy file without a transform of ITK")
    (tmp_path / "sn.mat").write_bytes(b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + bytes(100))
    _refused(tmp_path / "sn.mat", r"a MATLAB 5 file without a transform of ITK")
    (tmp_path / "torn.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    _refused(tmp_path / "torn.h5", r"torn\.h5")
    (tmp_path / "torn.nii.gz").write_bytes(b"\x1f\x8b\x08" + bytes(100))
    _refused(tmp_path / "torn.nii.gz", r"torn\.nii\.gz is a NIfTI file that cannot be read")
    save_transform(RIGID, tmp_path / "result")
    _refused(tmp_path / "result", r"a folder; give the file in it: .*result/transform\.tfm")
    (tmp_path / "v.zarr").mkdir()
    _refused(tmp_path / "v.zarr", r"a volume, no transform; give it with --zarr or --like")
    _refused(tmp_path / "none.tfm", r"does not exist")
    flat = sitk.TranslationTransform(2, (1.0, 0.0))
    sitk.WriteTransform(flat, str(tmp_path / "flat.tfm"))
    _refused(tmp_path / "flat.tfm", r"has 2 dimensions, expected 3")


@pytest.mark.parametrize(
    ("shape", "intent", "word", "message"),
    [
        ((4, 5, 6, 1, 3), 1007, "Mapping", "a field of vectors of SPM"),
        ((4, 5, 6, 1, 3), 1007, "NREG_TRANS", "a field of vectors of NiftyReg"),
        ((4, 5, 6, 1, 3), 1006, "", "a field of vectors .*intent 1006"),
        ((4, 5, 6, 3), 2006, "", "a field of vectors of FSL"),
        ((4, 5, 6, 2, 3), 1007, "", "a field of vectors"),
        ((4, 5, 6, 3), 0, "", "an image, no transform"),
    ],
)
def test_fields_of_other_tools_are_refused_by_name(
    tmp_path: Path, shape: tuple[int, ...], intent: int, word: str, message: str
) -> None:
    image = nibabel.Nifti1Image(np.zeros(shape, np.float32), np.eye(4))
    image.header["intent_code"], image.header["intent_name"] = intent, word
    nibabel.save(image, tmp_path / "y.nii.gz")
    _refused(tmp_path / "y.nii.gz", message)


def test_a_list_in_hdf5_is_refused(tmp_path: Path) -> None:
    whole = sitk.CompositeTransform([itk_transform(RIGID), sitk.TranslationTransform(3, (1.0, 2.0, 3.0))])
    sitk.WriteTransform(whole, str(tmp_path / "t.h5"))
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        del file["TransformGroup/0"]
    _refused(tmp_path / "t.h5", "is a list of 2 transforms")


@pytest.mark.parametrize(
    "name", ["a.tfm", "a.mat", "a.h5", "c.h5", "c.tfm", "1Warp.nii", "transform.json", "F.fcsv"]
)
def test_a_damaged_file_is_read_or_refused_in_words(tmp_path: Path, name: str) -> None:
    """Bytes changed, cut out and put in at random: never another error than ours."""
    save_transform(RIGID, tmp_path)
    save_itk(RIGID, tmp_path / "a.tfm")
    save_itk(RIGID, tmp_path / "a.h5")
    sitk.WriteTransform(itk_transform(RIGID), str(tmp_path / "a.mat"))
    for composite in ("c.h5", "c.tfm"):
        save_itk(Composite((RIGID, ItkTransform(bspline()))), tmp_path / composite)
    sitk.WriteImage(warp_field(), str(tmp_path / "1Warp.nii"))
    (tmp_path / "F.fcsv").write_text(
        "# CoordinateSystem = RAS\n# columns = id,x,y,z\n1,1,2,3\n", encoding="utf-8"
    )
    content, rng = (tmp_path / name).read_bytes(), np.random.default_rng(len(name))
    read = read_point_table if name.endswith(".fcsv") else read_transform
    refused: list[str] = []
    for _ in range(40):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(damaged), 500), rng.integers(1, 5)).tolist():
            kind, width = rng.integers(0, 3), int(rng.integers(1, 20))
            new = rng.integers(0, 256, 1 if kind == 0 else width, dtype=np.uint8).tobytes()
            damaged[place : place + (0 if kind == 2 else len(new))] = b"" if kind == 1 else new
        (tmp_path / name).write_bytes(damaged)
        try:
            read(tmp_path / name)
        except ComirError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert all(name in message and len(message) < 800 for message in refused)


def _refused(path: Path, message: str) -> None:
    with pytest.raises(RegistrationError, match=message) as refused:
        read_transform(path)
    text = str(refused.value)
    assert path.name in text
    assert len(text) < 700
    assert "itk::" not in text
    assert "0x" not in text
    assert "\n" not in text
