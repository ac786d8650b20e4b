import doctest
import json
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from comir_hpc import transforms
from comir_hpc.errors import RegistrationError, VolumeError
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import (
    FIXED_WORLD,
    MOVING_WORLD,
    Transform,
    array_and_grid,
    from_itk,
    itk_image,
    itk_transform,
    load_transform,
    save_transform,
)

POINTS = np.random.default_rng(0).uniform(-200, 200, size=(50, 3))
OBLIQUE = tuple(map(tuple, Rotation.from_euler("xyz", (20, -35, 110), degrees=True).as_matrix().tolist()))
FLIPPED = ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def turn(degrees, axis=(1, 2, -0.5)):
    axis = np.asarray(axis, float)
    return Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis)).as_matrix()


def rigid(degrees=137.0):
    return Transform.rigid(turn(degrees), (3.0, -7.5, 11.0), (40.0, 50.0, 60.0))


def affine():
    matrix = np.eye(4)
    matrix[:3] = np.random.default_rng(1).normal(size=(3, 4)) + np.eye(3, 4) * 2
    return Transform(matrix, np.array([5.0, 6.0, 7.0]))


def test_known_rotation_about_a_centre():
    quarter = Transform.rigid(turn(90, (0, 0, 1)), (0, 0, 5), (10, 10, 0))
    assert np.allclose(quarter.apply((11, 10, 0)), (10, 11, 5))
    assert quarter.rotation_deg == pytest.approx(90)
    assert np.allclose(quarter.translation_mm, (0, 0, 5))


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 90.0, 137.0, 179.999, 180.0])
def test_rotation_angle(degrees):
    assert rigid(degrees).rotation_deg == pytest.approx(degrees, abs=1e-9)
    assert rigid(degrees).is_rigid
    assert not affine().is_rigid


@pytest.mark.parametrize("transform", [rigid(), affine(), Transform.identity()])
def test_inverse_and_composition(transform):
    assert np.allclose(transform.inverse().apply(transform.apply(POINTS)), POINTS, atol=1e-9)
    both = rigid(20).compose(transform)
    assert np.allclose(both.apply(POINTS), rigid(20).apply(transform.apply(POINTS)))
    assert np.allclose(transform.about((9, 9, 9)).apply(POINTS), transform.apply(POINTS))
    assert transform.distance_mm(transform, POINTS).max() == 0


@pytest.mark.parametrize("transform", [rigid(), rigid(180.0), affine()])
def test_tfm_is_read_by_simpleitk_and_gives_the_same_points(transform, tmp_path):
    tfm, _ = save_transform(transform, tmp_path)
    read = sitk.ReadTransform(str(tfm))
    moved = np.array([read.TransformPoint(p.tolist()) for p in POINTS])
    assert np.allclose(moved, transform.apply(POINTS), atol=1e-10)
    back = np.array([read.GetInverse().TransformPoint(p.tolist()) for p in moved])
    assert np.allclose(back, POINTS, atol=1e-9)
    assert "fixed volume to the corresponding point of the moving" in tfm.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["transform.tfm", "transform.json"])
@pytest.mark.parametrize("transform", [rigid(), rigid(180.0), affine()])
def test_round_trip_of_both_files(transform, name, tmp_path):
    save_transform(transform, tmp_path, {"fixed": "f.zarr"})
    read = load_transform(tmp_path / name)
    assert np.allclose(read.apply(POINTS), transform.apply(POINTS), atol=1e-10)
    assert np.allclose(read.centre_mm, transform.centre_mm)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["transform.json", "transform.tfm"]


def test_json_is_an_ngff_affine_from_fixed_to_moving(tmp_path):
    transform = affine()
    _, path = save_transform(transform, tmp_path, {"fixed": "f.zarr"})
    record = json.loads(path.read_text(encoding="utf-8"))
    scene = record["ome"]["scene"]
    (ngff,) = scene["coordinateTransformations"]
    assert (ngff["type"], ngff["input"]["name"], ngff["output"]["name"]) == (
        "affine",
        FIXED_WORLD,
        MOVING_WORLD,
    )
    matrix = np.asarray(ngff["affine"])
    assert np.allclose(POINTS @ matrix[:, :3].T + matrix[:, 3], transform.apply(POINTS))
    systems = {s["name"]: [a["name"] for a in s["axes"]] for s in scene["coordinateSystems"]}
    assert systems == {FIXED_WORLD: ["x", "y", "z"], MOVING_WORLD: ["x", "y", "z"]}
    assert record["provenance"] == {"fixed": "f.zarr"}


@pytest.mark.parametrize("kind", ["versor", "euler", "similarity", "translation", "composite"])
def test_every_linear_itk_transform_is_understood(kind, tmp_path):
    rotation = turn(71).ravel().tolist()
    versor = sitk.VersorRigid3DTransform()
    versor.SetMatrix(rotation, 1e-9)
    versor.SetTranslation((1, 2, 3))
    versor.SetCenter((10, -20, 30))
    euler = sitk.Euler3DTransform((1.0, 2.0, 3.0), 0.3, -0.7, 1.1, (4.0, 5.0, 6.0))
    similarity = sitk.Similarity3DTransform(1.2, (0.0, 0.0, 1.0), 0.4, (1.0, 1.0, 1.0), (3.0, 2.0, 1.0))
    shift = sitk.TranslationTransform(3, (1.0, -2.0, 3.0))
    transform = {
        "versor": versor,
        "euler": euler,
        "similarity": similarity,
        "translation": shift,
        "composite": sitk.CompositeTransform([versor, euler, shift]),
    }[kind]
    path = tmp_path / "t.h5"
    sitk.WriteTransform(transform, str(path))
    expected = np.array([transform.TransformPoint(p.tolist()) for p in POINTS])
    assert np.allclose(load_transform(path).apply(POINTS), expected, atol=1e-9)


def test_itk_transform_and_back():
    assert np.allclose(from_itk(itk_transform(affine())).matrix_mm, affine().matrix_mm, atol=1e-12)


@pytest.mark.parametrize("direction", [OBLIQUE, FLIPPED])
def test_image_puts_every_voxel_where_the_grid_does(direction):
    grid = Grid((4, 5, 6), (3.0, 2.0, 0.5), (10.0, -20.0, 30.0), direction)
    array = np.random.default_rng(0).normal(size=grid.shape_zyx).astype(np.float32)
    image = itk_image(array, grid)
    for z, y, x in ((0, 0, 0), (3, 4, 5), (1, 2, 3)):
        assert np.allclose(image.TransformIndexToPhysicalPoint((x, y, z)), grid.world_mm((z, y, x)))
        assert image[x, y, z] == array[z, y, x]
    back, same = array_and_grid(image)
    assert np.array_equal(back, array)
    assert same.agrees_with(grid)


def test_resampling_by_itk_moves_a_voxel_as_the_transform_says():
    grid = Grid((20, 22, 24), (1.0, 1.0, 1.0), (5.0, 6.0, 7.0))
    moving = np.zeros(grid.shape_zyx, np.float32)
    fixed_voxel, moving_voxel = np.array([4, 9, 11]), np.array([10, 7, 15])
    moving[tuple(moving_voxel)] = 1
    shift = grid.world_mm(moving_voxel) - grid.world_mm(fixed_voxel)
    transform = Transform.rigid(np.eye(3), shift, (0, 0, 0))
    image = itk_image(moving, grid)
    resampled, _ = array_and_grid(
        sitk.Resample(image, image, itk_transform(transform), sitk.sitkNearestNeighbor)
    )
    assert np.argwhere(resampled).tolist() == [fixed_voxel.tolist()]


def test_channels_units_and_types_cross_over():
    grid = Grid((2, 3, 4), (5.0, 5.0, 5.0), (100.0, 0.0, 0.0), unit="micrometer")
    vector = np.random.default_rng(0).normal(size=(3, 2, 3, 4)).astype(np.float32)
    image = itk_image(vector, grid)
    assert np.allclose(image.GetSpacing(), 0.005)
    assert np.allclose(image.GetOrigin(), (0.1, 0, 0))
    assert np.array_equal(array_and_grid(image)[0], vector)
    assert array_and_grid(itk_image(vector[0] > 0, grid))[0].dtype == np.uint8
    assert array_and_grid(itk_image(vector[0].astype(np.float16), grid))[0].dtype == np.float32
    with pytest.raises(VolumeError, match="does not fit"):
        itk_image(np.zeros((2, 2, 2)), grid)


def test_the_example_of_adding_a_transform_works():
    names = {"np": np, "PointMap": transforms.PointMap}
    example = doctest.DocTestParser().get_doctest(transforms.__doc__, names, "adding one", None, 0)
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    shift = example.globs["Shift"]((1, 2, 3))
    both = transforms.Composite((shift, affine()))
    assert np.allclose(both.apply(POINTS), affine().apply(np.add(POINTS, (1, 2, 3))))
    assert np.allclose(both.inverse().apply(both.apply(POINTS)), POINTS)


def test_refusals(tmp_path):
    with pytest.raises(RegistrationError, match="does not exist"):
        load_transform(tmp_path / "transform.tfm")
    (tmp_path / "torn.tfm").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: Affi", encoding="utf-8"
    )
    with pytest.raises(RegistrationError, match=r"torn\.tfm"):
        load_transform(tmp_path / "torn.tfm")
    (tmp_path / "torn.json").write_text('{"matrix_lps_mm": [[1, 0', encoding="utf-8")
    with pytest.raises(RegistrationError, match="matrix_lps_mm"):
        load_transform(tmp_path / "torn.json")
    (tmp_path / "flat.json").write_text(json.dumps({"matrix_lps_mm": np.zeros((4, 4)).tolist()}))
    with pytest.raises(RegistrationError, match=r"flat\.json.*not an invertible"):
        load_transform(tmp_path / "flat.json")
    sitk.WriteTransform(sitk.BSplineTransform(3), str(tmp_path / "bend.h5"))
    with pytest.raises(RegistrationError, match="not a linear"):
        load_transform(tmp_path / "bend.h5")
    with pytest.raises(RegistrationError, match="not finite"):
        Transform(np.full((4, 4), np.nan))


# ------------------------------------------------------------------------------------------- other tools


@pytest.fixture
def displaced_pair(tmp_path):
    """A blob on a plain and on an oblique grid, the transform between them, and SimpleITK's resampling."""
    fixed, moving = (
        Grid((30, 34, 28), (1.0, 1.0, 1.0), (5.0, -8.0, 20.0)),
        Grid((36, 36, 36), (1.1, 1.1, 1.1), (30.0, 10.0, 60.0), OBLIQUE),
    )
    transform = Transform.rigid(turn(137), moving.centre_mm - fixed.centre_mm + 2.0, fixed.centre_mm)
    rng = np.random.default_rng(0)
    values = sitk.SmoothingRecursiveGaussian(itk_image(rng.normal(size=moving.shape_zyx), moving), 2.0)
    image = itk_image(np.zeros(fixed.shape_zyx, np.float32), fixed)
    values = sitk.Cast(values, sitk.sitkFloat32)
    sitk.WriteImage(values, str(tmp_path / "moving.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / "fixed.nii.gz"))
    tfm, _ = save_transform(transform, tmp_path)
    expected = sitk.GetArrayFromImage(sitk.Resample(values, image, sitk.ReadTransform(str(tfm))))
    inner = (slice(8, -8),) * 3
    assert expected[inner].std() > 0.01
    return tmp_path, transform, image, expected, inner


@pytest.mark.peers
def test_ants_applies_the_file_as_simpleitk_does(displaced_pair):
    ants, pandas = pytest.importorskip("ants"), pytest.importorskip("pandas")
    folder, transform, _, expected, inner = displaced_pair
    tfm = [str(folder / "transform.tfm")]
    fixed, moving = (ants.image_read(str(folder / f"{name}.nii.gz")) for name in ("fixed", "moving"))
    warped = ants.apply_transforms(fixed, moving, tfm, interpolator="linear").numpy().T
    assert np.allclose(warped[inner], expected[inner], atol=1e-4)
    moved = ants.apply_transforms_to_points(3, pandas.DataFrame(POINTS, columns=list("xyz")), tfm)
    assert np.allclose(moved[["x", "y", "z"]].to_numpy(), transform.apply(POINTS), atol=1e-3)


@pytest.mark.peers
def test_transformix_applies_the_file_as_simpleitk_does(displaced_pair):
    itk = pytest.importorskip("itk")
    pytest.importorskip("itk.itkElastixRegistrationMethodPython")
    folder, _, image, expected, inner = displaced_pair
    text = (Path(__file__).parent.parent / "docs" / "conventions.md").read_text(encoding="utf-8")
    parameters = re.search(r"```text\n(.*?)```", text, flags=re.DOTALL).group(1)
    columns = np.array(image.GetDirection()).reshape(3, 3).T.ravel()
    for key, numbers in (
        ("TransformFileName", f'"{folder / "transform.tfm"}"'),
        ("Size", image.GetSize()),
        ("Spacing", image.GetSpacing()),
        ("Origin", image.GetOrigin()),
        ("Direction", columns),
    ):
        value = numbers if isinstance(numbers, str) else " ".join(str(n) for n in numbers)
        parameters = re.sub(rf"\({key} .*\)", f"({key} {value})", parameters)
    (folder / "parameters.txt").write_text(parameters)
    described = itk.ParameterObject.New()
    described.ReadParameterFile(str(folder / "parameters.txt"))
    moving = itk.imread(str(folder / "moving.nii.gz"), itk.F)
    warped = itk.array_from_image(itk.transformix_filter(moving, described, log_to_console=False))
    assert np.allclose(warped[inner], expected[inner], atol=1e-4)
