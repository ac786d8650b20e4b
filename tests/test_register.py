import json
import re

import numpy as np
import pytest
import SimpleITK as sitk
from registration_cases import FLIPPED, OBLIQUE, errors_vox, seen, specimen, store, turn

from comir_hpc.config import RegisterSettings
from comir_hpc.errors import ComirError, ConfigError, RegistrationError, VolumeError
from comir_hpc.register import plan_register, register
from comir_hpc.representations.features import Features
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform, load_transform

PLAIN = Grid((40, 44, 36), (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))
CENTRE = PLAIN.centre_mm


def pair(folder, truth, onto=PLAIN, seed=0, brightness=4.0):
    """Stores of both volumes and of stand-in representations: the structure itself, seen from both sides."""
    values, mask = specimen(seed=seed, brightness=brightness)
    rng = np.random.default_rng(seed)
    moved = seen(values, PLAIN, onto, truth)
    shape = seen(mask.astype(np.float32), PLAIN, onto, truth)
    noise = rng.normal(size=moved.shape).astype(np.float32) * 0.1
    paths = {}
    for name, grid, image, inside in (
        ("fixed", PLAIN, values, mask.astype(np.float32)),
        ("moving", onto, moved + noise * (moved > 0.5), shape),
    ):
        volume = store(folder / f"{name}.zarr", image, grid)
        source = {"fingerprint": volume.fingerprint(), "level": 0}
        structure = np.where(inside > 0.5, image - brightness, 0).astype(np.float32)
        store(folder / f"{name}_rep.zarr", structure, grid, kind="representation", source=source)
        paths[name], paths[f"{name}_representation"] = folder / f"{name}.zarr", folder / f"{name}_rep.zarr"
    return paths


def settings(folder, paths, **changes):
    base = {"out": folder / "result", "rotations": 300, "search_voxels": 20, "candidates": 4, "threads": 2}
    return RegisterSettings(**{**paths, **base, **changes})


def only_volumes(paths):
    return {name: paths[name] for name in ("fixed", "moving")}


def error(result, truth):
    values, mask = specimen()
    return errors_vox(result.transform, truth, Features(values[None], mask, PLAIN))


def turned(onto=PLAIN, degrees=137):
    shift = onto.centre_mm - CENTRE + np.array([2.0, -1.5, 1.0])
    return Transform.rigid(turn(degrees), shift, CENTRE)


GRIDS = {
    "plain": PLAIN,
    "oblique": Grid((44, 44, 44), (1.1, 1.1, 1.1), (30.0, 10.0, 60.0), OBLIQUE),
    "flipped": Grid((44, 46, 44), (1.0, 1.0, 1.0), (45.0, -8.0, 18.0), FLIPPED),
    "anisotropic": Grid((24, 46, 40), (1.9, 1.0, 1.0), (3.0, -9.0, 18.0)),
}


# ------------------------------------------------------------------------------------------- known answers


def test_aligned_volumes_give_identity(tmp_path):
    result = register(settings(tmp_path, pair(tmp_path, Transform.identity())))
    assert error(result, Transform.identity()) < 0.05
    assert result.transform.rotation_deg < 0.2
    assert result.agreement > 0.95


@pytest.mark.parametrize("onto", GRIDS)
def test_a_turn_of_137_degrees_is_found_on_any_grid(onto, tmp_path):
    truth = turned(GRIDS[onto])
    result = register(settings(tmp_path, pair(tmp_path, truth, GRIDS[onto])))
    assert error(result, truth) < 0.15
    assert result.margin is not None
    assert result.margin > 0.3


def test_moments_and_identity_start_where_they_say(tmp_path):
    shifted = Transform.rigid(turn(8), (30.0, -20.0, 10.0), CENTRE)
    far = Grid(PLAIN.shape_zyx, PLAIN.spacing_zyx, (35.0, -28.0, 30.0))
    paths = pair(tmp_path, shifted, far)
    result = register(settings(tmp_path, paths, initial="moments", checks="quick"))
    assert error(result, shifted) < 0.15
    assert not (tmp_path / "result" / "search.npz").exists()
    near = pair(tmp_path / "near", Transform.rigid(turn(4), (1.0, 0, 0), CENTRE))
    found = register(settings(tmp_path, near, initial="identity", checks="quick", out=tmp_path / "other"))
    assert error(found, Transform.rigid(turn(4), (1.0, 0, 0), CENTRE)) < 0.15


def test_identity_is_refused_where_the_grids_do_not_overlap(tmp_path):
    away = Grid(PLAIN.shape_zyx, PLAIN.spacing_zyx, (500.0, 0.0, 0.0))
    paths = pair(tmp_path, Transform.rigid(np.eye(3), away.centre_mm - CENTRE, CENTRE), away)
    with pytest.raises(RegistrationError, match="--initial global or moments"):
        register(settings(tmp_path, paths, initial="identity"))
    assert not (tmp_path / "result").exists()


def test_mutual_information_with_the_same_search_finds_an_inverted_volume(tmp_path):
    truth = turned(degrees=100)
    values, _ = specimen(brightness=4.0)
    moved = seen(values, PLAIN, PLAIN, truth)
    store(tmp_path / "fixed.zarr", values, PLAIN)
    store(tmp_path / "moving.zarr", np.where(moved > 0.5, 9 - moved, 0).astype(np.float32), PLAIN)
    paths = {"fixed": tmp_path / "fixed.zarr", "moving": tmp_path / "moving.zarr"}
    result = register(settings(tmp_path, paths, representation="intensity", search_voxels=24))
    assert error(result, truth) < 0.5
    assert result.agreement < 0
    with np.load(tmp_path / "result" / "panels.npz") as panels:
        assert not any("representation" in name for name in panels)


def test_affine_is_found_when_asked_for(tmp_path):
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[1.06, 0.02, 0], [0, 0.95, 0], [0, 0.03, 1.0]])
    centred = Transform(matrix).apply(CENTRE) - CENTRE
    matrix[:3, 3] = -centred
    truth = Transform(matrix)
    paths = pair(tmp_path, truth)
    result = register(settings(tmp_path, paths, initial="identity", checks="quick", transform="affine"))
    assert error(result, truth) < 0.15
    assert not result.transform.is_rigid


# ------------------------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("register")
    chosen = settings(folder, pair(folder, turned()))
    calls = []
    return chosen, register(chosen, progress=lambda *a: calls.append(a)), calls


def test_the_folder_holds_all_of_the_result(done):
    chosen, result, _ = done
    names = {p.name for p in chosen.out.iterdir()}
    assert names == {"transform.tfm", "transform.json", "result.json", "search.npz", "panels.npz"}
    record = json.loads((chosen.out / "result.json").read_text(encoding="utf-8"))
    keys = """
        verdict reasons metric margin agreement matrix_lps_mm rotation_deg translation_mm candidates timings_s
        peak_memory_mib versions inputs settings model run direction fingerprint
    """
    for key in keys.split():
        assert key in record
    assert record["verdict"] == result.verdict
    assert record["run"] is None
    assert record["peak_memory_mib"] > 10
    assert set(record["inputs"]) == {"fixed", "moving"}
    assert Grid.from_dict(record["inputs"]["fixed"]["grid"]).agrees_with(PLAIN)
    ranks = [c["rank"] for c in record["candidates"]]
    assert ranks == list(range(1, len(ranks) + 1))
    scores = [c["refined_score"] for c in record["candidates"] if c["failure"] is None]
    assert scores == sorted(scores, reverse=True)
    assert np.allclose(record["candidates"][0]["matrix_lps_mm"], record["matrix_lps_mm"])


def test_the_files_say_the_same(done):
    chosen, result, _ = done
    record = json.loads((chosen.out / "result.json").read_text(encoding="utf-8"))
    points = np.random.default_rng(0).uniform(-50, 50, size=(20, 3))
    expected = result.transform.apply(points)
    for name in ("transform.tfm", "transform.json"):
        assert np.allclose(load_transform(chosen.out / name).apply(points), expected)
    assert np.allclose(Transform(np.asarray(record["matrix_lps_mm"])).apply(points), expected)
    assert record["rotation_deg"] == pytest.approx(137, abs=0.5)


def test_the_landscape_has_every_rotation(done):
    chosen, result, _ = done
    with np.load(chosen.out / "search.npz") as search:
        assert search["rotations"].shape == (301, 3, 3)
        assert search["scores"].shape == search["angles_deg"].shape == (301,)
        best = search["rotations"][search["scores"].argmax()]
    assert Transform.rigid(best @ result.transform.rotation_xyz.T, (0, 0, 0), (0, 0, 0)).rotation_deg < 30


def test_progress_tells_the_parts_in_order(done):
    _, _, calls = done
    parts = [name for name, _, _ in calls]
    assert list(dict.fromkeys(parts)) == ["search", "refine", "check"]
    assert all(0 < count <= total for _, count, total in calls)


def test_a_rerun_skips_and_other_inputs_are_refused(done, tmp_path):
    chosen, result, _ = done
    stamp = (chosen.out / "result.json").stat().st_mtime_ns
    again = register(chosen)
    assert again.skipped
    assert again.verdict == result.verdict
    assert np.array_equal(again.transform.matrix_mm, result.transform.matrix_mm)
    assert register(chosen.model_copy(update={"threads": 1})).skipped
    assert (chosen.out / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(RegistrationError, match="--overwrite"):
        register(chosen.model_copy(update={"seed": 1}))


def test_a_stopped_run_is_redone_to_the_same_result(done):
    chosen, result, _ = done
    (chosen.out / "result.json").unlink()
    again = register(chosen)
    assert not again.skipped
    assert np.array_equal(again.transform.matrix_mm, result.transform.matrix_mm)


def test_a_torn_result_is_not_trusted(done, tmp_path):
    chosen, _, _ = done
    out = tmp_path / "torn"
    out.mkdir()
    (out / "result.json").write_text('{"fingerprint": ', encoding="utf-8")
    with pytest.raises(RegistrationError, match="--overwrite"):
        register(chosen.model_copy(update={"out": out}))


def test_itk_resamples_with_the_written_file(done):
    """The snippet of docs/conventions.md: the moving volume on the fixed grid looks like the fixed one."""
    chosen, _, _ = done
    values, mask = specimen(brightness=4.0)
    moving = sitk.GetImageFromArray(seen(values, PLAIN, PLAIN, turned()))
    moving.SetOrigin(PLAIN.origin_mm)
    fixed = sitk.GetImageFromArray(values)
    fixed.SetOrigin(PLAIN.origin_mm)
    transform = sitk.ReadTransform(str(chosen.out / "transform.tfm"))
    warped = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, 0.0))
    assert np.corrcoef(warped[mask], values[mask])[0, 1] > 0.9


# ------------------------------------------------------------------------------------------- refusals and plans


def test_plan_reads_no_voxels_and_names_the_levels(done):
    chosen, _, _ = done
    plan = plan_register(chosen)
    assert "level 0" in plan["fixed"]
    assert "301 rotations" in plan["search"]
    assert re.fullmatch(r"[\d.]+ [MG]iB", plan["memory"])  # what this process held before counts, too
    assert "fallback" not in plan  # representations are given
    assert ("last step" in plan) == chosen.refines_on_intensities
    small = plan_register(chosen.model_copy(update={"max_memory_gib": 0.003}))
    assert "level 1" in small["fixed"]


def test_a_level_that_fits_is_used_and_named(tmp_path):
    paths = pair(tmp_path, Transform.rigid(turn(5), (1.0, 0, 0), CENTRE))
    result = register(settings(tmp_path, paths, initial="identity", checks="quick", max_memory_gib=0.003))
    assert result.record["inputs"]["fixed"]["compared"]["level"] == 1
    assert error(result, Transform.rigid(turn(5), (1.0, 0, 0), CENTRE)) < 0.5


def test_too_little_memory_is_refused_with_numbers(done):
    chosen, _, _ = done
    with pytest.raises(
        RegistrationError, match=r"needs .* KiB, .* are allowed; allow more with --max-memory-gib"
    ):
        register(chosen.model_copy(update={"max_memory_gib": 1e-5}))


def test_bad_volumes_are_refused(tmp_path):
    paths = only_volumes(pair(tmp_path, Transform.identity()))
    values, _ = specimen(brightness=4.0)

    def refused(kind, match, **changes):
        with pytest.raises(kind, match=match):
            register(settings(tmp_path, {**paths, **changes}, representation="intensity"))
        assert not (tmp_path / "result").exists()

    refused(VolumeError, "does not exist", fixed=tmp_path / "none.zarr")
    store(tmp_path / "rep.zarr", values, PLAIN, kind="representation")
    refused(VolumeError, "no intensity statistics", moving=tmp_path / "rep.zarr")
    store(tmp_path / "dark.zarr", values, PLAIN, foreground_above=1e6)
    refused(RegistrationError, "no foreground", moving=tmp_path / "dark.zarr")
    store(tmp_path / "thin.zarr", values[19:21], Grid((2, 44, 36), (1, 1, 1)))
    refused(RegistrationError, "fewer than 4 voxels", moving=tmp_path / "thin.zarr")
    broken = values.copy()
    broken[20, 20, 20] = np.nan
    store(tmp_path / "nan.zarr", broken, PLAIN)
    refused(RegistrationError, "NaN or infinite", moving=tmp_path / "nan.zarr")


def test_representations_of_other_volumes_are_refused(tmp_path):
    paths = pair(tmp_path, Transform.identity())
    swapped = {**paths, "fixed_representation": paths["moving_representation"]}
    with pytest.raises(RegistrationError, match="made from another volume"):
        register(settings(tmp_path, swapped))
    with pytest.raises(VolumeError, match="kind image, expected a representation"):
        register(settings(tmp_path, {**paths, "fixed_representation": paths["fixed"]}))
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "t1w.pt").write_bytes(b"weights")
    with pytest.raises(RegistrationError, match="not by the present weights"):
        register(settings(tmp_path, paths, model=run, fixed_modality="t1w", moving_modality="t2w"))


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mean nothing"):
        RegisterSettings(
            fixed=tmp_path,
            moving=tmp_path,
            out=tmp_path,
            representation="intensity",
            fixed_representation=tmp_path,
        )
    assert issubclass(ConfigError, ComirError)
