"""Where the general model's answer fails, other ways to compare are tried, and the result says so."""

import numpy as np
import pytest
from registration_cases import specimen, store

from comir_hpc import register as stage
from comir_hpc.config import RegisterSettings
from comir_hpc.config.words import FALLBACKS
from comir_hpc.errors import RegistrationError
from comir_hpc.register import plan_register
from comir_hpc.register.fallback import Answer, or_otherwise
from comir_hpc.register.unfinished import KEPT_FILE, forget, kept_file
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import Affine

SETTINGS = RegisterSettings(fixed="a.zarr", moving="b.zarr")


SIDE_MM = 100.0
POINTS_MM = np.array([(x, y, z) for x in (0, SIDE_MM) for y in (0, SIDE_MM) for z in (0, SIDE_MM)])


def answer(verdict, shift_mm=None, **more):
    """An answer that shifts the specimen along x; without a shift, one without a transform."""
    found = None if shift_mm is None else Affine.rigid(np.eye(3), (shift_mm, 0, 0), np.zeros(3))
    record = {"verdict": verdict, "reasons": [f"because of {verdict}"], **more}
    return Answer(found, record, {}, None, None, POINTS_MM)


def ways(**answers):
    """What registers by each fallback, and a list of those that were asked."""
    asked = []

    def register_by(settings):
        asked.append(settings.representation)
        found = answers[settings.representation]
        if isinstance(found, Exception):
            raise found
        return found

    return register_by, asked


def test_an_answer_that_holds_is_not_compared_otherwise():
    register_by, asked = ways()
    first = answer("PASS")
    assert or_otherwise(first, SETTINGS, register_by) is first
    assert asked == []
    assert "tried" not in first.record


@pytest.mark.parametrize("verdict", ["FAIL", "WARN"])
def test_the_first_fallback_that_passes_gives_the_answer(verdict):
    register_by, asked = ways(mind=answer("PASS", probability=0.98, notes=["voxels are thick"]))
    found = or_otherwise(answer(verdict, probability=0.1), SETTINGS, register_by)
    assert asked == ["mind"]
    assert found.record["verdict"] == "PASS"
    assert found.record["tried"] == [
        {
            "representation": "comir",
            "verdict": verdict,
            "probability": 0.1,
            "reason": f"because of {verdict}",
            "apart_mm": None,
        },
        {
            "representation": "mind",
            "verdict": "PASS",
            "probability": 0.98,
            "reason": "because of PASS",
            "apart_mm": None,
        },
    ]
    assert f"comir: {verdict}, mind: PASS" in found.record["notes"][0]
    assert "this is the answer of --representation mind" in found.record["notes"][0]
    assert found.record["notes"][1] == "voxels are thick"


def test_without_one_that_passes_the_first_answer_stays_with_all_that_was_tried():
    register_by, asked = ways(mind=RegistrationError("too little memory"), intensity=answer("WARN"))
    first = answer("FAIL")
    assert or_otherwise(first, SETTINGS, register_by) is first
    assert asked == list(FALLBACKS)
    assert [one["verdict"] for one in first.record["tried"]] == ["FAIL", "FAIL", "WARN"]
    assert first.record["tried"][1]["reason"] == "too little memory"
    assert "none of them is PASS, no two agree" in first.record["notes"][0]


def test_two_ways_that_agree_are_believed_before_one_that_stands_alone():
    first = answer("WARN", 70.0, probability=0.9)
    register_by, asked = ways(
        mind=answer("WARN", 10.0, probability=0.6), intensity=answer("WARN", 11.5, probability=0.7)
    )
    found = or_otherwise(first, SETTINGS, register_by)
    assert found.transform.apply(np.zeros(3))[0] == 11.5  # the likelier one of the two
    assert found.record["verdict"] == "WARN"
    assert [one["apart_mm"] for one in found.record["tried"]] == pytest.approx([58.5, 1.5, 0])
    assert "mind and intensity agree" in found.record["notes"][0]
    assert asked == list(FALLBACKS)


def test_where_the_second_agrees_with_the_first_no_third_is_asked():
    first = answer("WARN", 10.0, probability=0.9)
    register_by, asked = ways(mind=answer("WARN", 11.0, probability=0.6))
    assert or_otherwise(first, SETTINGS, register_by) is first
    assert asked == ["mind"]
    assert "comir and mind agree" in first.record["notes"][0]


@pytest.mark.parametrize(
    ("verdicts", "taken"),
    [(("WARN", "WARN", "WARN"), 30.0), (("FAIL", "WARN", "WARN"), 10.0), (("WARN", "FAIL", "FAIL"), 10.0)],
    ids=["the likeliest", "no verdict rises", "what failed is not taken"],
)
def test_where_no_two_agree(verdicts, taken):
    first, second, third = verdicts
    register_by, _ = ways(
        mind=answer(second, 30.0, probability=0.9), intensity=answer(third, 70.0, probability=0.7)
    )
    found = or_otherwise(answer(first, 10.0, probability=0.6), SETTINGS, register_by)
    assert found.transform.apply(np.zeros(3))[0] == taken
    assert found.record["verdict"] == first
    assert len(found.record["tried"]) == 3
    assert "no two agree" in found.record["notes"][0]
    if taken == 30.0:
        assert "that of --representation mind is the likeliest" in found.record["notes"][0]


@pytest.mark.parametrize(
    "other",
    [answer("FAIL", 10.0), answer("WARN", 12.5), answer("WARN")],
    ids=["it failed", "2.5 % away", "without a transform"],
)
def test_what_does_not_agree(other):
    first = answer("WARN", 10.0)
    register_by, _ = ways(mind=other, intensity=answer("FAIL", 10.0))
    assert or_otherwise(first, SETTINGS, register_by) is first
    assert "no two agree" in first.record["notes"][0]


@pytest.mark.parametrize(
    ("first", "given"),
    [
        (answer("FAIL", mirrored_axis="x"), {}),  # a header is wrong: no way to compare mends it
        (answer("FAIL"), {"fallback": "none"}),
        (answer("FAIL"), {"checks": "quick"}),  # it cannot give PASS
        (answer("FAIL"), {"initial": "identity"}),  # nor can a start without a search
        (answer("WARN"), {"initial": "features"}),
        (answer("FAIL"), {"model": "run"}),  # the user has chosen
        (answer("FAIL"), {"representation": "mind"}),
        (answer("FAIL"), {"fixed_representation": "f.zarr", "moving_representation": "m.zarr"}),
    ],
)
def test_there_are_fallbacks_of_the_general_model_alone(first, given):
    register_by, asked = ways()
    settings = RegisterSettings(fixed="a.zarr", moving="b.zarr", **given)
    assert or_otherwise(first, settings, register_by) is first
    assert asked == []


def test_every_search_that_was_kept_is_removed_at_the_end(tmp_path):
    files = [kept_file(tmp_path), *(kept_file(tmp_path, word) for word in FALLBACKS)]
    assert files[0].name == KEPT_FILE
    assert len(set(files)) == 1 + len(FALLBACKS)
    for file in files:
        file.write_bytes(b"")
    forget(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_has_room_for_the_fallbacks(tmp_path, monkeypatch):
    grid = Grid((40, 44, 36), (1.0, 1.0, 1.0))
    for name, seed in (("fixed", 0), ("moving", 1)):
        store(tmp_path / f"{name}.zarr", specimen(grid.shape_zyx, seed=seed, brightness=4.0)[0], grid)
    given = {"fixed": tmp_path / "fixed.zarr", "moving": tmp_path / "moving.zarr", "out": tmp_path / "out"}
    asked = []
    opened = stage.open_inputs
    monkeypatch.setattr(stage, "open_inputs", lambda s: asked.append(s.representation) or opened(s))
    plan = plan_register(RegisterSettings(**given))
    assert asked == ["comir", *FALLBACKS]
    assert "mind, then intensity" in plan["fallback"]
    asked.clear()
    assert "fallback" not in plan_register(RegisterSettings(**given, fallback="none"))
    assert asked == ["comir"]
