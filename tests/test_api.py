"""The verbs from Python: known answers, the same from every kind of input, and errors of one line."""

from __future__ import annotations

import gc
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from registration_cases import seen, specimen, turn
from trained_run import write_run

from comir_hpc import api
from comir_hpc.api import Image
from comir_hpc.config import (
    CompareSettings,
    EvaluateSettings,
    InferSettings,
    IngestSettings,
    RefineSettings,
    RegisterPairSettings,
    Settings,
    TrainSettings,
    WarpSettings,
)
from comir_hpc.errors import ComirError
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Affine

KINDS: dict[str, type[Settings]] = {
    "ingest": IngestSettings,
    "train": TrainSettings,
    "infer": InferSettings,
    "register": RegisterPairSettings,
    "warp": WarpSettings,
    "refine": RefineSettings,
    "evaluate": CompareSettings,
    "diagnose": EvaluateSettings,
}
VALUES, _ = specimen(brightness=5)
VALUES = (20 * VALUES).clip(0).astype(np.float32)
GRID = Grid(VALUES.shape, (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))
CENTRE = GRID.centre_mm
TRUTH = Affine.rigid(turn(12), (2.5, -1.5, 3.0), CENTRE)
FIXED = Image.on_grid(VALUES, GRID, name="fixed")
MOVING = Image.on_grid(seen(VALUES, GRID, GRID, TRUTH), GRID, name="moving")
QUICK: dict[str, Any] = {"representation": "intensity", "initial": "moments", "checks": "quick", "threads": 1}
POINTS = GRID.world_mm(np.argwhere(VALUES > 60)[::50])


def distance(found: Affine, true: Affine = TRUTH) -> float:
    """Mean distance in mm, which is voxels here."""
    return float(found.distance_mm(true, POINTS).mean())


@pytest.fixture(scope="module")
def result() -> Any:
    return api.register(FIXED, MOVING, **QUICK)


# ---------------------------------------------------------------------- what a notebook shows


@pytest.mark.parametrize("verb", KINDS)
def test_signature_and_help_name_every_setting(verb: str) -> None:
    function, kind = getattr(api, verb), KINDS[verb]
    parameters = inspect.signature(function).parameters
    run_settings = {"config", "run", "overrides"}
    assert set(kind.model_fields) <= set(parameters)
    assert set(parameters) <= set(kind.model_fields) | {"folder", "progress"} | run_settings
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, field in kind.model_fields.items():
        assert f"\n{name} : " in function.__doc__
        assert " ".join((field.description or name).split()) in function.__doc__
        if not field.is_required() and not field.default_factory and field.default is not None:
            assert parameters[name].default == field.default


def test_import_has_no_effect_and_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "numpy", "SimpleITK", "zarr", "scipy", "matplotlib", "mlflow")
    code = f"import sys, comir_hpc.api; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_results_show_themselves(result: Any, tmp_path: Path) -> None:
    assert "data:image/png" in FIXED._repr_html_()
    assert "rotation" in result._repr_html_()
    stored = api.ingest(FIXED, tmp_path / "a.zarr")
    assert stored._repr_html_().count("<img") == 3
    warped = api.warp(stored, result, FIXED, out=tmp_path / "w.zarr")
    assert warped._repr_html_().count("<img") == 3
    assert "inside the moving volume" in warped._repr_html_()
    table = api.evaluate(result, TRUTH)
    assert table._repr_html_().count("<tr>") == 2


# ---------------------------------------------------------------------- known answers


def test_a_known_rotation_and_shift_is_found(result: Any) -> None:
    assert result.verdict in ("PASS", "WARN")
    assert result.transform.rotation_deg == pytest.approx(12, abs=0.5)
    assert distance(result.transform) < 0.3
    assert result.report.is_file()
    assert api.report(result) == result.report
    row = api.evaluate(result, TRUTH, points=None).rows[0]
    assert row.tre_mm == pytest.approx(distance(result.transform), rel=0.2)
    assert row.success


def test_a_truth_that_does_not_say_its_form_is_read_in_the_form_that_is_named(
    result: Any, tmp_path: Path
) -> None:
    np.savetxt(tmp_path / "truth.txt", TRUTH.matrix_mm)
    row = api.evaluate(result, tmp_path / "truth.txt", form="matrix-lps").rows[0]
    assert row.tre_mm == pytest.approx(distance(result.transform), rel=0.2)


def test_a_known_shift_is_found_of_a_slice() -> None:
    plane = VALUES[20]
    shifted = np.roll(plane, (3, -2), (0, 1))
    found = api.register(Image(plane, (1, 1)), Image(shifted, (1, 1)), **QUICK)
    np.testing.assert_allclose(found.transform.apply([[10, 12, 0]]), [[8, 15, 0]], atol=0.1)


def test_array_sitk_and_path_inputs_give_the_same_transform(result: Any, tmp_path: Path) -> None:
    images = [FIXED.to_sitk(), MOVING.to_sitk()]
    paths = [tmp_path / "fixed.mha", tmp_path / "moving.nrrd"]
    for image, path in zip(images, paths, strict=True):
        sitk.WriteImage(image, path)
    stores = [api.ingest(path, tmp_path / f"{path.stem}.zarr") for path in paths]
    for pair in (images, paths, list(map(str, paths)), stores):
        found = api.register(*pair, **QUICK)
        np.testing.assert_array_equal(found.transform.matrix_mm, result.transform.matrix_mm)


def test_images_of_two_dimensions_are_slices() -> None:
    plane = sitk.GetImageFromArray(VALUES[20])
    plane.SetOrigin((3.0, 4.0))
    shifted = sitk.GetImageFromArray(np.roll(VALUES[20], (3, -2), (0, 1)))
    shifted.SetOrigin((3.0, 4.0))
    found = api.register(plane, shifted, **QUICK)
    np.testing.assert_allclose(found.transform.apply([[10, 12, 0]]), [[8, 15, 0]], atol=0.1)
    back = api.warp(shifted, found, plane)
    assert (back.GetSize(), back.GetOrigin()) == ((36, 44, 1), (3.0, 4.0, 0.0))
    difference = sitk.GetArrayFromImage(back)[0] - VALUES[20]
    assert np.abs(difference[5:-5, 5:-5]).max() < 0.1 * VALUES.max()


def test_results_stand_for_what_they_wrote(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", spacing=(1.0, 1.0, 1.0))
    encoded = [
        api.infer(image, run, name, folder=tmp_path, window=16)
        for image, name in ((FIXED, "one"), (MOVING, "two"))
    ]
    assert [each.path.name for each in encoded] == ["one_representation.zarr", "two_representation.zarr"]
    assert api.read(encoded[0]).grid == GRID
    modalities = {"model": run, "fixed_modality": "one", "moving_modality": "two", "initial": "identity"}
    ready = {"fixed_representation": encoded[0], "moving_representation": encoded[1]}
    found = api.register(FIXED, MOVING, folder=tmp_path, **ready, **modalities)
    compared = found.result.inputs["fixed"].compared
    assert compared is not None
    assert compared["path"] == str(encoded[0].path)


def test_other_units_place_the_same(result: Any) -> None:
    fixed, moving = (
        Image(i.array, [1000] * 3, "um", [1000 * o for o in i.origin_xyz]) for i in (FIXED, MOVING)
    )
    found = api.register(fixed, moving, **QUICK)
    np.testing.assert_allclose(found.transform.matrix_mm, result.transform.matrix_mm, atol=1e-6)


# ---------------------------------------------------------------------- warp


def resampled(transform: sitk.Transform) -> np.ndarray[Any, Any]:
    image = sitk.Resample(MOVING.to_sitk(), FIXED.to_sitk(), transform, sitk.sitkLinear, 0.0)
    array: np.ndarray[Any, Any] = sitk.GetArrayFromImage(image)
    return array


def test_warp_gives_back_what_was_given(result: Any, tmp_path: Path) -> None:
    expected = resampled(result.transform.to_sitk())
    image = api.warp(MOVING, result, FIXED)
    assert isinstance(image, Image)
    assert image.grid == GRID
    np.testing.assert_allclose(image, expected, atol=1e-4)
    of_itk = api.warp(MOVING.to_sitk(), result, FIXED.to_sitk())
    assert of_itk.GetOrigin() == GRID.origin_mm
    np.testing.assert_array_equal(sitk.GetArrayFromImage(of_itk), image.array)
    sitk.WriteImage(MOVING.to_sitk(), tmp_path / "moving.mha")
    stored = api.warp(tmp_path / "moving.mha", result, FIXED, folder=tmp_path)
    assert stored.path == tmp_path / "warped.zarr"
    np.testing.assert_array_equal(api.read(stored), image.array)
    written = api.warp(MOVING, result, FIXED, out=tmp_path / "on_fixed.nii.gz")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(written.path)), image.array)


@pytest.mark.parametrize("form", ["ours", "file", "linear", "field"])
def test_warp_takes_every_form_of_a_transform(form: str, tmp_path: Path) -> None:
    shifts = np.zeros((*GRID.shape_zyx, 3))
    shifts[..., 0] = 4 + np.linspace(0, 1, GRID.shape_zyx[0])[:, None, None]
    image = sitk.GetImageFromArray(shifts, isVector=True)
    image.CopyInformation(FIXED.to_sitk())
    sitk.WriteTransform(TRUTH.to_sitk(), tmp_path / "t.tfm")
    given: Any = {
        "ours": TRUTH,
        "file": tmp_path / "t.tfm",
        "linear": sitk.Euler3DTransform(CENTRE.tolist(), 0.1, 0.0, 0.2, (1, 2, 3)),
        "field": sitk.DisplacementFieldTransform(image),
    }[form]
    expected = resampled(TRUTH.to_sitk() if form in ("ours", "file") else given)
    np.testing.assert_allclose(api.warp(MOVING, given, FIXED), expected, atol=1e-3)


def test_labels_stay_labels() -> None:
    labels = (VALUES > 60).astype(np.uint16) * 7
    image = api.warp(Image.on_grid(labels, GRID, "labels"), TRUTH.inverse(), FIXED)
    assert image.kind == "labels"
    assert set(np.unique(image.array)) == {0, 7}


def test_points_of_a_file_are_carried(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("x,y,z\n1,2,3\n", encoding="utf-8")
    done = api.warp(points=tmp_path / "p.csv", transform=TRUTH, out=tmp_path / "q.csv")
    assert done.points == 1
    row = done.path.read_text(encoding="utf-8").splitlines()[2].split(",")
    np.testing.assert_allclose([float(v) for v in row[:3]], TRUTH.apply([1, 2, 3]), rtol=1e-8)


def test_a_transform_goes_to_sitk_and_back() -> None:
    form = TRUTH.to_sitk()
    np.testing.assert_allclose(form.TransformPoint((1.0, 2.0, 3.0)), TRUTH.apply([1, 2, 3]))
    back = TRUTH.inverse().to_sitk()
    np.testing.assert_allclose(back.TransformPoint(form.TransformPoint((1.0, 2.0, 3.0))), (1, 2, 3))


# ---------------------------------------------------------------------- stores and folders


@pytest.mark.parametrize("channels", [1, 2])
def test_what_is_ingested_is_read_back(channels: int, tmp_path: Path) -> None:
    values = np.stack([VALUES, VALUES[::-1]])[:channels].astype(np.uint16)
    direction = ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, -1.0))
    image = Image(values, (2, 1, 0.5), "um", (3, 4, 5), direction, name="cells")
    back = api.read(api.ingest(image, tmp_path / "cells.zarr", chunk=16))
    np.testing.assert_array_equal(back.array, values[0] if channels == 1 else values)
    assert back.array.dtype == np.uint16
    assert back.grid == image.grid
    assert back.name == "cells"
    half = api.read(tmp_path / "cells.zarr", level=1)
    assert half.grid == image.grid.downsampled((1, 1, 2))


def test_a_folder_keeps_stores_and_result_for_the_next_time(tmp_path: Path) -> None:
    first = api.register(FIXED, MOVING, folder=tmp_path, **QUICK)
    assert not first.skipped
    assert first.folder == tmp_path / "registration"
    assert len(list(tmp_path.glob("*.zarr"))) == 2
    again = api.register(FIXED, MOVING, folder=tmp_path, **QUICK)
    assert again.skipped
    np.testing.assert_array_equal(again.transform.matrix_mm, first.transform.matrix_mm)


def test_the_same_voxels_elsewhere_are_another_store(tmp_path: Path) -> None:
    moved = Image(VALUES, (1, 1, 1), origin_xyz=(5.0, -8.0, 26.0), name="fixed")
    found = api.register(FIXED, moved, folder=tmp_path, **QUICK)
    np.testing.assert_allclose(found.transform.apply([1, 2, 3]), [1, 2, 9], atol=0.05)


def test_a_temporary_folder_lives_as_long_as_its_result() -> None:
    found = api.register(FIXED, MOVING, **QUICK)
    folder = found.folder.parent
    assert len(list(folder.glob("*.zarr"))) == 2
    del found
    gc.collect()
    assert not folder.exists()


def test_what_is_assumed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from comir_hpc.data.embedded import write_nifti

    write_nifti(tmp_path / "f.nii", VALUES, GRID)
    header = (tmp_path / "f.nii").read_bytes()
    (tmp_path / "f.nii").write_bytes(header[:123] + b"\0" + header[124:])  # xyzt_units: unknown
    api.read(tmp_path / "f.nii")
    assert "millimetres" in caplog.text
    mirror = np.diag([-1.0, 1, 1, 1])
    mirror[0, 3] = 2 * CENTRE[0]
    caplog.clear()
    api.warp(MOVING, Affine(mirror), FIXED)
    assert "left" in caplog.text


def test_nothing_is_left_behind_by_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ComirError):
        api.register(FIXED, Image(np.ones((8, 8, 8)), (1, 1, 1)), **QUICK)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- errors


def test_only_options_become_keywords(tmp_path: Path) -> None:
    with pytest.raises(ComirError, match=r"scan--out\.nii"):
        api.read(tmp_path / "scan--out.nii")


WRONG = {
    "setting": (
        lambda: api.register(FIXED, MOVING, rotatons=3, **QUICK),
        "rotatons; did you mean rotations?",
    ),
    "nested": (
        lambda: api.train(modalities=["a", "b"], pairs=[{"a": "a", "b": "b"}], optimiser={"step": 1}),
        "unknown key optimiser.step; did you mean steps?",
    ),
    "array": (lambda: api.register(VALUES, MOVING, **QUICK), r"give Image\(array, spacing_zyx"),
    "array in a pair": (
        lambda: api.train(modalities=["a", "b"], pairs=[{"a": VALUES, "b": FIXED}]),
        r"give Image\(array, spacing_zyx",
    ),
    "array to ingest": (lambda: api.ingest(VALUES, "out.zarr"), r"give Image\(array, spacing_zyx"),
    "shape": (lambda: Image(np.zeros(5), (1, 1, 1)), r"shape \(5,\); expected \(z, y, x\)"),
    "channels last": (lambda: Image(np.zeros((9, 9, 9, 3)), (1, 1, 1)), "channels last"),
    "spacing of two": (lambda: Image(VALUES, (1, 1)), "spacing_zyx has 2 numbers"),
    "spacing in words": (lambda: Image(VALUES, "mm"), "spacing_zyx is 'mm'; expected numbers"),
    "origin of two": (lambda: Image(VALUES, (1, 1, 1), origin_xyz=(0, 0)), "origin_xyz 2"),
    "sheared": (lambda: Image(VALUES, (1, 1, 1), direction=np.tri(3)), "not orthonormal"),
    "spacing of zero": (lambda: Image(VALUES, (1, 0, 1)), "is not positive; give the true one with spacing"),
    "unit": (lambda: Image(VALUES, (1, 1, 1), "furlong"), "unknown unit of length 'furlong'"),
    "model": (lambda: api.register(FIXED, MOVING, model="nowhere"), "nowhere does not exist"),
    "nothing to warp": (lambda: api.warp(transform=TRUTH), "zarr M.zarr"),
    "no transform": (lambda: api.warp(MOVING, like=FIXED), "transform is missing"),
    "level": (lambda: api.read(FIXED, level=9), "there is no level 9"),
    "missing file": (lambda: api.register("nowhere.nii", MOVING, **QUICK), "nowhere.nii"),
    "spacing of an image": (lambda: api.ingest(FIXED, "a.zarr", spacing=(1, 1, 1)), "spacing mean nothing"),
    "overrides": (lambda: api.train(overrides=["a=1"]), "give config"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, words = WRONG[case]
    with pytest.raises(ComirError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "--" not in re.sub("`[^`]*`", "", str(caught.value))  # a command in backticks keeps its options
    assert list(tmp_path.iterdir()) == []
