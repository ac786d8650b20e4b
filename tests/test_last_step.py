"""The last refinement, on the intensities: it comes nearer to the truth, or the answer stays where it was."""

import json
from dataclasses import replace

import numpy as np
import pytest
from registration_cases import errors_vox, features_pair, seen, specimen, store, turn
from scipy import ndimage

from comir_hpc.config import RegisterSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.register import inputs, last_step, register
from comir_hpc.register.inputs import open_inputs
from comir_hpc.register.last_step import refined_on_intensities
from comir_hpc.register.ranking import Ranking
from comir_hpc.runs.result import read_result
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Transform

GRID = Grid((40, 44, 36), (1.0, 1.0, 1.0), (5.0, -8.0, 20.0))
TRUTH = Transform.rigid(turn(4), (0.7, -0.4, 0.9), GRID.centre_mm)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two stores: a specimen, and the same displaced by a known motion, with another contrast."""
    folder = tmp_path_factory.mktemp("pair")
    values, mask = specimen(GRID.shape_zyx)
    inside = ndimage.binary_erosion(mask, iterations=1)
    store(folder / "fixed.zarr", np.where(mask, 10 + values, 0).astype(np.float32), GRID)
    other = np.where(inside, 10 - values + 0.3 * values**2, 0).astype(np.float32)
    store(folder / "moving.zarr", seen(other, GRID, GRID, TRUTH), GRID)
    return folder


def registered(pair, out, **given):
    """Register the pair on its self-similarities from where the grids put it."""
    return register(
        RegisterSettings(
            fixed=pair / "fixed.zarr", moving=pair / "moving.zarr", out=out, initial="identity", checks="quick",
            threads=1, **{"representation": "mind"} | given,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(pair, tmp_path_factory):
    """The same registration with the last step, and without it."""
    out = tmp_path_factory.mktemp("results")
    return registered(pair, out / "auto"), registered(pair, out / "none", last_step="none")


def test_the_error_becomes_smaller_and_the_result_says_how(both):
    features = features_pair(TRUTH, GRID)[0]
    with_step, without = (errors_vox(result.transform, TRUTH, features) for result in both)
    assert without < 0.5  # or this test would not say what the last step is good for
    assert with_step < 0.8 * without
    record = read_result(both[0].folder).last_step
    assert record.used
    assert record.halves_mm[1] < record.halves_mm[0]
    assert record.moved_mm == pytest.approx(
        both[0]
        .transform.distance_mm(both[1].transform, features.grid.world_mm(np.argwhere(features.mask)))
        .mean(),
        rel=0.2,
    )
    assert any("refined once more on the intensities" in note for note in read_result(both[0].folder).notes)
    assert read_result(both[1].folder).last_step is None
    assert not any("refined once more" in note for note in read_result(both[1].folder).notes)


def test_intensities_are_not_refined_on_themselves(pair, tmp_path):
    assert registered(pair, tmp_path / "out", representation="intensity").result.last_step is None


def test_representations_that_agree_less_there_keep_the_answer_where_it_was(
    pair, both, tmp_path, monkeypatch
):
    monkeypatch.setattr(last_step, "_KEPT", 1e6)
    result = registered(pair, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "result.json").read_text())["last_step"]
    assert not record["used"]
    assert "the representations agree less" in record["sentence"]
    np.testing.assert_array_equal(result.transform.matrix_mm, both[1].transform.matrix_mm)


def test_halves_that_are_no_nearer_keep_the_answer_where_it_was(pair, both, tmp_path, monkeypatch):
    distances = iter((1.0, float("inf")))  # a half cannot be registered on its intensities
    monkeypatch.setattr(last_step, "halves_distance_mm", lambda *given: next(distances))
    result = registered(pair, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "result.json").read_text())["last_step"]
    assert not record["used"]
    assert record["halves_mm"] == [1.0, None]
    assert "two halves do not agree better" in record["sentence"]
    np.testing.assert_array_equal(result.transform.matrix_mm, both[1].transform.matrix_mm)


def test_a_second_estimate_of_the_information_has_to_rise(pair, both, tmp_path, monkeypatch):
    measured = last_step.Similarity.at
    # Information that is the same everywhere: nothing has risen.
    monkeypatch.setattr(
        last_step.Similarity,
        "at",
        lambda self, transform: replace(measured(self, transform), information=0.1),
    )
    result = registered(pair, tmp_path / "out")
    assert "does not rise" in result.result.last_step.sentence
    np.testing.assert_array_equal(result.transform.matrix_mm, both[1].transform.matrix_mm)


def test_intensities_that_cannot_be_compared_are_said_and_lose_nothing(pair, both, tmp_path, monkeypatch):
    class Stopped:
        def __init__(self, *args, **kwargs):
            pass

        def refine(self, *args, **kwargs):
            raise RegistrationError("the optimiser stopped: no voxel of the two specimens overlaps")

    monkeypatch.setattr(last_step, "Refiner", Stopped)
    result = registered(pair, tmp_path / "out")
    assert result.result.last_step.sentence.startswith("the intensities could not be compared")
    np.testing.assert_array_equal(result.transform.matrix_mm, both[1].transform.matrix_mm)


def test_without_the_step_nothing_is_read():
    settings = RegisterSettings(fixed="a.zarr", moving="b.zarr", last_step="none")
    ranking = Ranking(())
    assert refined_on_intensities(None, ranking, None, None, settings) == (ranking, None)


def test_a_large_volume_and_one_that_needs_much_memory_are_read_at_a_coarser_level(pair, monkeypatch):
    volume = open_inputs(
        RegisterSettings(fixed=pair / "fixed.zarr", moving=pair / "moving.zarr", representation="mind")
    ).fixed
    assert volume.intensities(2**30)[1] == 0
    assert volume.intensities(2**20)[1] == 1
    monkeypatch.setattr(inputs, "_MOST_INTENSITIES", 1000)
    assert volume.intensities(2**30)[1] > 0


def test_its_memory_is_predicted(pair, monkeypatch):
    # What this process holds already would hide so small a difference.
    monkeypatch.setattr(inputs, "expected_peak", lambda more: more)
    given = {
        "fixed": pair / "fixed.zarr",
        "moving": pair / "moving.zarr",
        "representation": "gradient",  # encoding takes less of it than of MIND, and would decide the prediction
        "initial": "identity",
        "checks": "quick",
    }
    with_step, without = (
        open_inputs(RegisterSettings(**given, last_step=kind)).predicted_bytes for kind in ("auto", "none")
    )
    assert with_step - without >= 2 * 30 * np.prod(GRID.shape_zyx)
