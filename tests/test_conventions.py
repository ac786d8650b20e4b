"""Points through every form in which other tools keep transforms, and back, against the tools' own readers."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import nitransforms
import numpy as np
import pytest
import SimpleITK as sitk
from nitransforms.io.fsl import FSLLinearTransform
from nitransforms.io.itk import ITKLinearTransform
from nitransforms.io.lta import FSLinearTransform
from registration_cases import FLIPPED, OBLIQUE, turn

from comir_hpc.errors import RegistrationError
from comir_hpc.space.grid import IDENTITY, Grid
from comir_hpc.transforms import (
    Affine,
    Composite,
    GridPair,
    ItkTransform,
    PointMap,
    itk_image,
    read_transform,
)
from comir_hpc.transforms.conventions.exported import default_ending, export_transform
from comir_hpc.transforms.conventions.grids import RAS_FROM_LPS, matrix_in_ras, ras_from_index
from comir_hpc.transforms.inversion import inverse_of

FORMS = ["itk", "ants", "elastix", "fsl", "lta", "matrix-ras", "matrix-lps", "ngff"]
GRIDS = {
    "oblique and flipped": GridPair(
        Grid((20, 26, 31), (2.5, 0.8, 1.1), (-14.0, 33.0, 7.5), OBLIQUE),
        Grid((14, 40, 22), (3.0, 0.7, 1.9), (60.0, -20.0, -11.0), FLIPPED),
    ),
    "flipped and plain": GridPair(
        Grid((20, 26, 31), (1.0, 2.0, 0.5), (0.0, 5.0, -9.0), FLIPPED),
        Grid((24, 30, 21), (1.5, 1.0, 4.0), (2.0, -3.0, 8.0), IDENTITY),
    ),
    "micrometres": GridPair(
        Grid((20, 26, 31), (2000, 1000, 700), (1e4, -5e3, 0), OBLIQUE, "um"),
        Grid((24, 30, 21), (3.0, 1.0, 1.0), (0.0, 0.0, 0.0), ((0, 1, 0), (0, 0, 1), (1, 0, 0))),
    ),
}
RIGID = Affine.rigid(turn(137.0), (3.0, -7.5, 11.0), (40.0, 50.0, 60.0))
SHEARED = Affine(
    np.vstack(
        [
            np.c_[turn(-40.0) @ np.array([[1.2, 0.1, 0], [0, 0.8, -0.2], [0, 0, 1.1]]), (9, -4, 2)],
            [0, 0, 0, 1],
        ]
    )
)
CLOSE_MM = 1e-3


def points_of(grid: Grid) -> np.ndarray:
    return grid.world_mm(np.random.default_rng(0).uniform(0, np.asarray(grid.shape_zyx) - 1, (60, 3)))


def bspline(grid: Grid) -> ItkTransform:
    size, *frame = grid.shape_zyx[::-1], grid.spacing_mm[::-1], grid.origin_mm
    image = sitk.Image(list(size), sitk.sitkFloat32)
    image.SetSpacing(frame[0])
    image.SetOrigin(frame[1])
    image.SetDirection([n for row in grid.direction for n in row])
    spline = sitk.BSplineTransformInitializer(image, (4, 5, 3))
    spline.SetParameters(np.random.default_rng(1).normal(0, 2, len(spline.GetParameters())).tolist())
    return ItkTransform(spline)


def field(grid: Grid) -> ItkTransform:
    shifts = np.random.default_rng(2).normal(0, 1.5, (3, *grid.shape_zyx))
    return ItkTransform(sitk.DisplacementFieldTransform(itk_image(shifts, grid)))


def there_and_back(transform: PointMap, form: str, grids: GridPair, path: Path, *, say: bool) -> PointMap:
    export_transform(transform, form, path, grids)
    return read_transform(path, form if say else None, grids)


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transform", [RIGID, SHEARED, RIGID.inverse()], ids=["rigid", "sheared", "inverse"])
def test_a_matrix_comes_back_from_every_form(
    tmp_path: Path, form: str, grids: GridPair, transform: Affine
) -> None:
    assert grids.fixed is not None
    points = points_of(grids.fixed)
    path = tmp_path / f"t{default_ending(transform, form)}"
    for say in (True, False):
        if form == "fsl" and not say:  # does not say what it is
            with pytest.raises(RegistrationError, match="--from"):
                there_and_back(transform, form, grids, path, say=say)
            continue
        found = there_and_back(transform, form, grids, path, say=say)
        assert np.abs(found.apply(points) - transform.apply(points)).max() < 1e-9
        assert np.abs(found.inverse().apply(transform.apply(points)) - points).max() < 1e-9
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_other_readers_find_the_same_points(tmp_path: Path, grids: GridPair) -> None:
    """The readers of SimpleITK and nitransforms, in their own worlds."""
    assert grids.fixed is not None
    assert grids.moving is not None
    points = points_of(grids.fixed)
    images = {
        name: nibabel.Nifti1Image(np.zeros(grid.shape_zyx[::-1], np.uint8), ras_from_index(grid))
        for name, grid in (("reference", grids.fixed), ("moving", grids.moving))
    }
    expected = SHEARED.apply(points) @ RAS_FROM_LPS[:3, :3]
    for form, reader in (
        ("fsl", FSLLinearTransform),
        ("lta", FSLinearTransform),
        ("itk", ITKLinearTransform),
    ):
        path = tmp_path / f"t{default_ending(SHEARED, form)}"
        export_transform(SHEARED, form, path, grids)
        # What nitransforms calls `to_ras` maps points of the reference to points of the moving image, in RAS.
        ras = reader.from_filename(path).to_ras(**images)
        found = nitransforms.linear.Affine(ras).map(points @ RAS_FROM_LPS[:3, :3])
        assert np.abs(found - expected).max() < CLOSE_MM, form
    for form in ("itk", "ants"):
        path = tmp_path / f"s{default_ending(SHEARED, form)}"
        export_transform(SHEARED, form, path, grids)
        itk = sitk.ReadTransform(str(path))
        assert np.abs([itk.TransformPoint(p) for p in points.tolist()] - SHEARED.apply(points)).max() < 1e-9
    text = np.loadtxt(export_to(tmp_path / "m.txt", "matrix-ras", grids))
    np.testing.assert_allclose(text, matrix_in_ras(SHEARED), atol=1e-12)


def export_to(path: Path, form: str, grids: GridPair) -> Path:
    export_transform(SHEARED, form, path, grids)
    return path


def test_what_other_tools_wrote_is_read(tmp_path: Path) -> None:
    """Files of nitransforms' writers; voxel-to-voxel LTA; Euler and similarity of elastix; NGFF in another order."""
    grids = GRIDS["oblique and flipped"]
    assert grids.fixed is not None
    assert grids.moving is not None
    points, path = points_of(grids.fixed), tmp_path / "x"
    images = {
        name: nibabel.Nifti1Image(np.zeros(grid.shape_zyx[::-1], np.uint8), ras_from_index(grid))
        for name, grid in (("reference", grids.fixed), ("moving", grids.moving))
    }
    path.write_text(
        FSLLinearTransform.from_ras(matrix_in_ras(SHEARED), **images).to_string(), encoding="utf-8"
    )
    found = read_transform(path, "fsl", grids)
    assert np.abs(found.apply(points) - SHEARED.apply(points)).max() < CLOSE_MM
    voxels = np.linalg.inv(matrix_in_ras(SHEARED))
    voxels = np.linalg.inv(ras_from_index(grids.fixed)) @ voxels @ ras_from_index(grids.moving)
    export_transform(SHEARED, "lta", tmp_path / "ras.lta", grids)
    text = (tmp_path / "ras.lta").read_text(encoding="utf-8")
    head, rest = text[: text.index("1 4 4\n") + 6], text[text.index("src volume info") :]
    rows = "\n".join(" ".join(f"{v:.15e}" for v in row) for row in voxels)
    (tmp_path / "vox.lta").write_text(f"{head.replace('= 1', '= 0', 1)}{rows}\n{rest}", encoding="utf-8")
    assert np.abs(read_transform(tmp_path / "vox.lta").apply(points) - SHEARED.apply(points)).max() < 1e-9

    euler = sitk.Euler3DTransform((5.0, -3.0, 2.0), 0.3, -0.5, 0.9, (4.0, 5.0, -6.0))
    similarity = sitk.Similarity3DTransform()
    similarity.SetParameters((0.1, -0.2, 0.3, 1.0, 2.0, -3.0, 1.25))
    similarity.SetCenter((5.0, -3.0, 2.0))
    for itk, kind in ((euler, "EulerTransform"), (similarity, "SimilarityTransform")):
        numbers, centre = (" ".join(map(repr, n)) for n in (itk.GetParameters(), itk.GetCenter()))
        path = tmp_path / f"{kind}.txt"
        path.write_text(
            f'// a comment\n(Transform "{kind}")\n(TransformParameters {numbers})\n(CenterOfRotationPoint {centre})\n'
            '(InitialTransformParametersFileName "NoInitialTransform")\n(HowToCombineTransforms "Compose")\n',
            encoding="utf-8",
        )
        expected = [itk.TransformPoint(p) for p in points.tolist()]
        assert np.abs(read_transform(path).apply(points) - expected).max() < 1e-9
    zyx_um = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    ras = [axis | {"orientation": {"type": "anatomical", "value": v}} for axis, v in zip(
        zyx_um, ("inferior-to-superior", "posterior-to-anterior", "left-to-right"), strict=True)]  # fmt: skip
    shift = {"type": "translation", "translation": [1000.0, 2000.0, 3000.0]}
    record = {"ome": {"version": "0.6", "scene": {
        "coordinateSystems": [{"name": "a", "axes": ras}, {"name": "b", "axes": ras}],
        "coordinateTransformations": [{"input": {"name": "a"}, "output": {"name": "b"}, **shift}],
    }}}  # fmt: skip
    (tmp_path / "n.json").write_text(json.dumps(record), encoding="utf-8")
    np.testing.assert_allclose(read_transform(tmp_path / "n.json").apply((1, 1, 1)), (-2, -1, 2), atol=1e-12)
    systems = record["ome"]["scene"]["coordinateSystems"]
    systems[0]["axes"] = systems[1]["axes"] = zyx_um
    (tmp_path / "n.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(RegistrationError, match=r"does not say where it points to.*--from ngff"):
        read_transform(tmp_path / "n.json")
    np.testing.assert_allclose(
        read_transform(tmp_path / "n.json", "ngff").apply((1, 1, 1)), (4, 3, 2), atol=1e-12
    )


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_fields_and_splines_and_composites_come_back(tmp_path: Path, grids: GridPair) -> None:
    assert grids.fixed is not None
    points = points_of(grids.fixed)
    kinds = {"spline": bspline(grids.fixed), "field": field(grids.fixed)}
    kinds["chain"] = Composite((kinds["spline"], RIGID))
    kinds["chain of a field"] = Composite((kinds["field"], SHEARED))
    held = {
        "spline": ("itk", "ants", "elastix"),
        "field": ("itk", "ants", "ngff"),
        "chain": ("itk", "ants", "elastix"),
        "chain of a field": ("itk", "ants", "ngff"),
    }
    for name, transform in kinds.items():
        for form in FORMS:
            path = tmp_path / f"{name} {form}{default_ending(transform, form)}"
            if form not in held[name]:
                with pytest.raises(RegistrationError, match=r"BSplineTransform|DisplacementFieldTransform"):
                    export_transform(transform, form, path, grids)
                assert not path.exists()
                continue
            found = there_and_back(transform, form, grids, path, say=False)
            worst = np.abs(found.apply(points) - transform.apply(points)).max()
            # A NIfTI holds the grid of a field in single precision.
            assert worst < (CLOSE_MM if path.suffix == ".gz" else 1e-9), (name, form, worst)


def test_any_transform_is_sampled_as_a_field(tmp_path: Path) -> None:
    grids = GRIDS["oblique and flipped"]
    assert grids.fixed is not None
    both = Composite((bspline(grids.fixed), RIGID))
    voxels = grids.fixed.world_mm([(0, 0, 0), (5, 6, 7), (19, 25, 30)])
    for name in ("f.nii.gz", "f.mha", "f.nrrd"):
        notes = export_transform(both, "itk", tmp_path / name, grids)
        assert "sampled on the fixed grid" in notes[0]
        found = read_transform(tmp_path / name, "itk")
        assert np.abs(found.apply(voxels) - both.apply(voxels)).max() < CLOSE_MM
    with pytest.raises(RegistrationError, match="--fixed FIXED"):
        export_transform(both, "itk", tmp_path / "g.mha", GridPair())
    with pytest.raises(RegistrationError, match=r"an image, no transform.*--from itk"):
        read_transform(tmp_path / "f.mha")


def test_what_a_form_lacks_is_said(tmp_path: Path) -> None:
    for form in ("fsl", "lta"):
        with pytest.raises(RegistrationError, match="--fixed FIXED and --moving MOVING"):
            export_transform(RIGID, form, tmp_path / f"t{default_ending(RIGID, form)}", GridPair())
    with pytest.raises(RegistrationError, match="name the volume with --fixed"):
        export_transform(RIGID, "elastix", tmp_path / "t.txt", GridPair())
    with pytest.raises(RegistrationError, match=r"ends in \.lta"):
        export_transform(RIGID, "lta", tmp_path / "t.tfm", GRIDS["micrometres"])
    grids = GRIDS["micrometres"]
    assert grids.fixed is not None
    chain = Composite((RIGID, bspline(grids.fixed)))
    with pytest.raises(
        RegistrationError, match=r"part 2 of 2 \(BSplineTransform\) bends space, and a matrix of FSL"
    ):
        export_transform(chain, "fsl", tmp_path / "t.mat", grids)
    with pytest.raises(
        RegistrationError, match=r"part 1 of 2 \(DisplacementFieldTransform\) has no form in elastix"
    ):
        export_transform(Composite((field(grids.fixed), RIGID)), "elastix", tmp_path / "t.txt", grids)
    assert list(tmp_path.iterdir()) == []


BAD = [
    ("t.lta", "type = 14\nnxforms = 1\n1 4 4\n", "type 14 .REGISTER_DAT.; convert it: lta_convert"),
    ("t.lta", "type = 1\nnxforms = 3\n", "an LTA file of 3 matrices"),
    ("t.lta", "type = 1\nnxforms = 1\n1 4 4\n1 0 0\n", "without a matrix of 4 x 4"),
    ("t.lta", "type = 0\nnxforms = 1\n1 4 4\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\nsrc volume info\nvalid = 0\n",
     "src volume info is missing or not valid"),
    ("t.txt", '(Transform "EulerTransform")\n(TransformParameters 0 0)\n', "holds 2 numbers; expected 6"),
    ("t.txt", '(Transform "AffineDTITransform")\n', "a AffineDTITransform of elastix, of which"),
    ("t.txt", '(Transform "TranslationTransform")\n(TransformParameters 1 2 3)\n'
     '(InitialTransformParametersFileName "x.txt")\n', r"x\.txt does not exist"),
    ("t.txt", '(Transform "TranslationTransform")\n(TransformParameters 1 2 3)\n'
     '(InitialTransformParametersFileName "x.txt")\n(HowToCombineTransforms "Add")\n', "adds its initial transform"),
    ("t.txt", '(Transform "TranslationTransform")\n(TransformParameters 1 2 3)\n(UseDirectionCosines "false")\n',
     "ignores where the volumes point to"),
    ("t.json", '{"ome": {"scene": {"coordinateSystems": [], "coordinateTransformations": []}}}', "holds 0 coordinate"),
    ("t.json", '{"ome": {"scene": {"coordinateSystems": [], "coordinateTransformations": [{"type": "affine"}]}}}',
     "damaged scene"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_damaged_forms_are_refused_in_words(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(RegistrationError, match=message) as refused:
        read_transform(tmp_path / name)
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize(("text", "message"), [
    ("1 0 0\n0 1 0\n", "holds 6 numbers"),
    ("1 0 0 a\n" * 4, "is no matrix in text"),
    ("1 0 0 nan\n" * 4, "not finite"),
    ("0 0 0 0\n" * 3 + "0 0 0 1\n", "flattens"),
    ("# comir-hpc matrix-ras: maps\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "says that it is matrix-ras"),
])  # fmt: skip
def test_damaged_matrices_are_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.txt").write_text(text, encoding="utf-8")
    with pytest.raises(RegistrationError, match=message):
        read_transform(tmp_path / "m.txt", "matrix-lps")


def test_the_inverse_of_a_bent_transform_is_a_field_with_its_residual(tmp_path: Path) -> None:
    fixed = Grid((24, 26, 28), (2.0, 2.0, 2.0), (-20.0, 5.0, 3.0), OBLIQUE)
    smooth = bspline(fixed)
    smooth.itk.SetParameters((0.5 * np.asarray(smooth.itk.GetParameters())).tolist())
    linear = Affine.rigid(turn(25.0), (4.0, -3.0, 2.0), fixed.centre_mm)
    transform = Composite((smooth, linear))
    moving = Grid((30, 30, 30), (2.0, 2.0, 2.0), tuple(linear.apply(fixed.centre_mm) - 29.0))
    found = inverse_of(transform, fixed, moving)
    assert 0.3 < found.covered < 1
    points = fixed.world_mm(np.random.default_rng(0).uniform(6, 18, (50, 3)))
    missed = np.linalg.norm(found.transform.apply(transform.apply(points)) - points, axis=1)
    # Between the voxels of 2 mm the field is linear: a hundredth of a voxel.
    assert missed.mean() < 0.02
    assert found.residual_mm < 0.05
    assert found.worst_mm >= found.residual_mm
    notes = export_transform(found.transform, "itk", tmp_path / "inverse.nii.gz", GridPair(moving, fixed))
    assert notes == ()
    again = read_transform(tmp_path / "inverse.nii.gz")
    assert np.linalg.norm(again.apply(transform.apply(points)) - points, axis=1).mean() < 0.02
    assert inverse_of(SHEARED, None, None).residual_mm == 0
    with pytest.raises(RegistrationError, match="name both volumes with --fixed FIXED and --moving MOVING"):
        inverse_of(transform, fixed, None)
