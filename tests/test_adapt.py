"""Specialising on a pair that nobody has aligned: what is held out tells the right alignment from a wrong one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comir_hpc.config.adapt import AdaptSettings
from comir_hpc.data.embedded import Displacement, displace, phantom_pair
from comir_hpc.ingest import ingest_array
from comir_hpc.recipes import adapt as recipe
from comir_hpc.recipes import adaptation
from comir_hpc.recipes.adapt import plan_adapt
from comir_hpc.recipes.adaptation import Adaptation, Alignment
from comir_hpc.recipes.working_pair import WorkingPair
from comir_hpc.representations.held_out import PlaceRetrieval
from comir_hpc.runs.model import general_model, read_model
from comir_hpc.space.grid import Grid
from comir_hpc.space.rotations import rotation_by
from comir_hpc.transforms import Transform

SHAPE = (52, 46, 40)
GRID = Grid(SHAPE, (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Transform]:
    """A phantom in two contrasts; the second one is turned by 30 degrees and shifted."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = phantom_pair(SHAPE, seed=3, num_structures=40)
    moved = Displacement(rotation_by("y", 30), np.array([3.0, -2.0, 4.0]))
    values, grid, truth = displace(second, GRID, moved, 60)
    ingest_array(first, GRID, folder / "fixed.zarr")
    ingest_array(values, grid, folder / "moving.zarr")
    return folder / "fixed.zarr", folder / "moving.zarr", truth


@pytest.fixture(scope="module")
def pair(case: tuple[Path, Path, Transform]) -> WorkingPair:
    return WorkingPair.open(case[0], case[1], read_model(general_model()))


def _off(pair: WorkingPair, truth: Transform) -> Transform:
    """A wrong answer: turned by 25 degrees about the specimen's middle, beside the truth."""
    centre = pair.points_mm.mean(axis=0)
    return truth.compose(Transform.rigid(rotation_by("z", 25), (4.0, 3.0, -3.0), centre))


def test_both_volumes_come_to_one_spacing(pair: WorkingPair) -> None:
    assert pair.fixed_grid.spacing_mm == pytest.approx((pair.spacing_mm,) * 3)
    assert pair.moving_grid.spacing_mm == pytest.approx((pair.spacing_mm,) * 3)
    assert pair.distance_mm(Transform.identity(), Transform.identity()) == 0
    shift = Transform.rigid(np.eye(3), (3.0, 4.0, 0.0), np.zeros(3))
    assert pair.distance_mm(Transform.identity(), shift) == pytest.approx(5.0)


def test_what_is_trained_on_and_what_is_held_out_are_apart(
    pair: WorkingPair, case: tuple[Path, Path, Transform], tmp_path: Path
) -> None:
    stores = pair.aligned(case[2], tmp_path, 1 / 3)
    assert stores is not None
    start, stop = stores.within
    trained = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    assert not stores.held_out[trained].any()
    share = stores.held_out.sum() / pair.fixed_mask.sum()
    assert 0.15 < share < 0.4
    assert all(side <= b - a for side, a, b in zip(stores.patch, start, stop, strict=True))


def test_nothing_is_held_out_at_the_end(
    pair: WorkingPair, case: tuple[Path, Path, Transform], tmp_path: Path
) -> None:
    stores = pair.aligned(case[2], tmp_path, None)
    assert stores is not None
    assert not stores.held_out.any()
    assert stores.within == ((0, 0, 0), stores.held_out.shape)


def test_held_out_cells_tell_right_from_wrong(
    pair: WorkingPair, case: tuple[Path, Path, Transform], tmp_path: Path
) -> None:
    """The general model's own maps, without any training, find their places only on the right alignment."""
    found: dict[str, PlaceRetrieval] = {}
    for name, transform in {"right": case[2], "wrong": _off(pair, case[2])}.items():
        stores = pair.aligned(transform, tmp_path / name, 1 / 3)
        assert stores is not None
        found[name] = stores.judge(general_model(), ("a", "b"), "cpu")
    assert found["right"].cells >= 10
    assert found["right"].share > 0.5
    assert found["wrong"].share < 0.25


def test_nothing_in_common_is_nothing_to_learn_from(pair: WorkingPair, tmp_path: Path) -> None:
    away = Transform.rigid(np.eye(3), (900.0, 0.0, 0.0), np.zeros(3))
    assert pair.aligned(away, tmp_path, 1 / 3) is None


def test_two_equal_answers_and_weak_ones_are_doubted() -> None:
    one = Alignment(Transform.identity(), "comir, answer 1", held_out=0.8)
    assert recipe._doubt([one]) == ""
    assert "two different alignments" in recipe._doubt([one, one])
    assert "30%" in recipe._doubt([Alignment(Transform.identity(), "mind, answer 1", held_out=0.3)])
    assert "no method" in recipe._doubt([])


def test_methods_that_agree_save_the_other_trainings(
    pair: WorkingPair, case: tuple[Path, Path, Transform], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed, moving, truth = case
    work = Adaptation(AdaptSettings(fixed=fixed, moving=moving, run=tmp_path / "run"), None)
    wrong = _off(pair, truth)
    answers = {
        "comir": [(Alignment(truth, "comir, answer 1"), 0), (Alignment(wrong, "comir, answer 2"), 1)],
        "intensity": [(Alignment(wrong, "intensity, answer 1"), 0)],
        "mind": [(Alignment(truth, "mind, answer 1"), 0)],
    }
    searched: list[str] = []
    monkeypatch.setattr(work, "_search", lambda method: searched.append(method) or answers[method])
    for share, tried, methods in ((0.8, 1, ["comir", "mind"]), (0.1, 2, ["comir", "mind", "intensity"])):
        searched.clear()
        monkeypatch.setattr(work, "try_out", lambda one, _, share=share: replace(one, held_out=share))
        monkeypatch.setattr(work, "_briefly", lambda one, _, share=share: replace(one, held_out=share))
        found = work.candidates()
        assert searched == methods
        assert len(found) == tried
        assert found[0].origin == "comir, answer 1; mind, answer 1"
        assert found[0].methods == 2


@pytest.mark.parametrize(
    ("briefly", "trained_on"),
    [((0.9, 0.04, 0.1), [0]), ((0.2, 0.04, 0.1), [0, 1, 2]), ((0.9, 0.8, 0.1), [0, 1])],
)
def test_only_what_shows_after_a_short_time_is_trained_on(
    case: tuple[Path, Path, Transform],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    briefly: tuple[float, ...],
    trained_on: list[int],
) -> None:
    """A clear one; none that is clear yet, so each gets its time; two that are clear, between which cells decide."""
    work = Adaptation(AdaptSettings(fixed=case[0], moving=case[1], run=tmp_path / "run"), None)
    shares = {f"candidates/{number}-brief": share for number, share in enumerate(briefly)}
    longer: list[int] = []

    def whole_time(one: Alignment, folder: str) -> Alignment:
        longer.append(int(folder.rsplit("/", 1)[1]))
        return replace(one, held_out=0.95)

    monkeypatch.setattr(work, "_briefly", lambda one, folder: replace(one, held_out=shares[folder]))
    monkeypatch.setattr(work, "try_out", whole_time)
    found = work.tried([Alignment(Transform.identity(), f"answer {n}") for n in range(3)])
    assert longer == trained_on
    assert [one.held_out for one in found] == [
        0.95 if n in trained_on else share for n, share in enumerate(briefly)
    ]


@pytest.mark.slow
def test_a_candidate_is_found_and_tried_out(
    case: tuple[Path, Path, Transform], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptation, "METHODS", ("comir",))
    fixed, moving, truth = case
    settings = AdaptSettings(
        fixed=fixed, moving=moving, run=tmp_path / "run", steps=5, candidates=1, rotations=150, device="cpu"
    )
    assert "held_out" in plan_adapt(settings)
    work = Adaptation(settings, None)
    (found,) = work.distinct(work._search("comir"))
    points = np.argwhere(np.ones((4, 4, 4))) * 12.0
    assert found.transform.distance_mm(truth, points).mean() < 1.0
    tried = work.try_out(found, "candidates/0")
    assert tried.held_out > 1 / 3
    assert tried.run is not None
    work._hand_over(tried.run)
    model = read_model(tmp_path / "run")
    assert model.modalities == ("fixed", "moving")
    assert model.started_from["run"] == str(general_model())
    assert set(tried.as_dict()) >= {"origin", "held_out_retrieval", "matrix_lps_mm"}


def test_modalities_need_two_names(case: tuple[Path, Path, Transform], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two different names"):
        AdaptSettings(fixed=case[0], moving=case[1], run=tmp_path, modalities=("a", "a"))
