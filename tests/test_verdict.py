"""Every way a registration can be wrong lowers the verdict; nothing missing raises it."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest

from comir_hpc.config.words import REPRESENTATIONS
from comir_hpc.errors import RegistrationError
from comir_hpc.register.checks.calibration import (
    MEASURES_VERSION,
    Calibration,
    Weakest,
    own_calibration,
    read_calibration,
)
from comir_hpc.register.checks.causes import Cause
from comir_hpc.register.checks.evidence import Evidence
from comir_hpc.register.checks.measured import Measured
from comir_hpc.register.checks.sentences import pieces_of
from comir_hpc.register.checks.verdict import judge

ROOT = Path(__file__).parent.parent

GOOD = Measured(
    agreement=0.8,
    chance=40.0,
    information=150.0,
    margin=0.8,
    overlap=0.98,
    settled=0.05,
    halves=0.1,
    undone=0.02,
    swapped=0.02,
    second=0.03,
    loosest=0.4,
    loosest_words="turning about the long axis",
    mirror=0.4,
    again=0.1,
)
POOR = replace(
    GOOD, agreement=0.1, chance=3.0, information=10.0, margin=0.02, halves=8.0, undone=3.0, swapped=3.0, second=2.0,
    loosest=0.01, mirror=0.0,
)  # fmt: skip
RIGHT = Evidence(
    measured=GOOD, agreement=0.78, margin=0.86, halves_mm=0.3, overlap=0.97, consensus=3, starts=8, drift_mm=5.0,
    side_mm=170.0, voxel_mm=5.0, compared="representations",
)  # fmt: skip


def measured(**changes: float | None) -> Evidence:
    return replace(RIGHT, measured=replace(GOOD, **changes))


def test_a_right_answer_passes_with_millimetres_and_a_probability() -> None:
    found = judge(RIGHT)
    assert found.verdict == "PASS"
    assert found.probability is not None
    assert found.probability > 0.9
    assert found.bound_mm is not None
    assert found.reasons[0] == f"probably within {found.bound_mm:.2g} mm (90 %)"
    assert {piece.name for piece in found.pieces} >= {
        "margin",
        "halves",
        "undone",
        "swapped",
        "second",
        "again",
    }
    assert all(piece.sentence for piece in found.pieces)


def test_poor_evidence_fails_and_names_what_is_poor() -> None:
    found = judge(replace(RIGHT, measured=POOR))
    assert found.verdict == "FAIL"
    assert "right with a probability of" in " ".join(found.reasons)
    assert len(found.reasons) > 2


@pytest.mark.parametrize(
    ("evidence", "verdict", "words"),
    [
        (measured(mirror=-0.3), "FAIL", "mirrored moving volume agrees better, by 30 %"),
        (measured(mirror=0.0), "WARN", "a flipped axis in a header would not be seen"),
        (measured(margin=-0.1), "FAIL", "another answer agrees better"),
        (measured(again=9.0), "WARN", "did not find it again: it ends 45 mm away"),
        (replace(RIGHT, measured=None, unchecked=("it is too small",)), "WARN", "it is too small"),
        (replace(RIGHT, unchecked=("not checked",)), "WARN", "not checked"),
        (replace(RIGHT, thorough=False), "WARN", "the checks were quick"),
        (replace(RIGHT, drift_mm=80.0), "WARN", "47 % of the specimen's side"),
        (replace(RIGHT, deviation=0.1), "WARN", "0.1 times as much as in training"),
        (measured(agreement=-0.1), "FAIL", "do not agree"),
        (replace(RIGHT, causes=(Cause("sliver", "only 40 % overlaps"),)), "WARN", "only 40 % overlaps"),
        (replace(RIGHT, causes=(Cause("unrelated", "nothing agrees"),)), "FAIL", "nothing agrees"),
    ],
)  # fmt: skip
def test_each_rule_lowers_it_and_is_named_first(evidence: Evidence, verdict: str, words: str) -> None:
    found = judge(evidence)
    assert found.verdict == verdict
    assert words in found.reasons[0]


def test_a_second_criterion_that_disagrees_keeps_an_answer_from_pass() -> None:
    near, far = (judge(measured(second=distance)) for distance in (0.05, 1.0))
    assert near.verdict == "PASS"
    assert far.verdict == "WARN"
    assert near.probability is not None
    assert far.probability is not None
    assert far.probability < near.probability - 0.05


def test_the_flipped_axis_is_named() -> None:
    found = judge(replace(measured(mirror=-0.3), mirror_axis="x"))
    assert "header of one of the two files has a flipped axis, probably the x axis" in found.reasons[0]


def test_two_defects_are_both_named() -> None:
    found = judge(replace(measured(mirror=-0.3), thorough=False))
    assert found.verdict == "FAIL"
    assert any("quick" in reason for reason in found.reasons)


@pytest.mark.parametrize("base", [GOOD, POOR])
def test_better_evidence_never_lowers_the_probability(base: Measured) -> None:
    model = own_calibration()
    for term in model.terms:
        value = getattr(base, term.name)
        worse_first = [0.5 * value, value, 2 * value + 0.01]
        if term.form.startswith("less"):
            worse_first = worse_first[::-1]
        found = [model.probability(replace(base, **{term.name: v})) for v in worse_first]
        assert found == sorted(found), term.name


def test_what_was_not_measured_counts_as_poor() -> None:
    model, whole = own_calibration(), own_calibration().probability(GOOD)
    for field in fields(Measured):
        if field.name in {term.name for term in model.terms}:
            assert model.probability(replace(GOOD, **{field.name: None})) <= whole, field.name


def test_the_bound_grows_with_the_distances() -> None:
    model = own_calibration()
    assert model.bound_vox(POOR) > model.bound_vox(GOOD) > 0


def test_a_calibration_of_another_version_is_refused(tmp_path: Path) -> None:
    record = own_calibration().as_dict()
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(record | {"measures": MEASURES_VERSION + 1}), encoding="utf-8")
    with pytest.raises(RegistrationError, match=f"version {MEASURES_VERSION + 1} of the checks"):
        read_calibration(path)
    path.write_text(json.dumps(record | {"terms": [record["terms"][0] | {"weight": -1.0}]}), encoding="utf-8")
    with pytest.raises(RegistrationError, match="weight"):
        read_calibration(path)
    path.write_text(json.dumps(record | {"weakest": {"among": ["nothing"], "weight": 1.0}}), encoding="utf-8")
    with pytest.raises(RegistrationError, match="weakest: nothing is no term"):
        read_calibration(path)


def test_the_weakest_of_the_evidence_counts_once_more_and_is_named_first() -> None:
    model = own_calibration()
    assert model.weakest.weight > 0
    without = model.model_copy(update={"weakest": Weakest()})
    poor = replace(GOOD, undone=20.0)
    loss, loss_without = (one.probability(GOOD) - one.probability(poor) for one in (model, without))
    assert loss > loss_without >= 0
    assert model.poorest(poor)[0] == "undone"


def test_the_calibration_says_what_it_was_made_from() -> None:
    model: Calibration = own_calibration()
    assert model.made_from["rows"].endswith("rows.csv")
    assert {"right", "wrong"} <= set(model.made_from["answers"])
    assert 0 < model.fail_below < model.pass_from < 1


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / "verdict" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def answers_of_the_calibration() -> list[tuple[dict[str, str], Evidence]]:
    """What the calibration was fitted to: each row, and the evidence as a registration would have it."""
    found = []
    for row in rows_of("rows.csv"):
        texts = {field.name: row.get(field.name) or None for field in fields(Measured)}
        numbers = {k: v if k == "loosest_words" or v is None else float(v) for k, v in texts.items()}
        if row["pair"] != "mirrored":
            numbers["mirror"] = 1.0  # the mirror of the right answer would give the wrong ones away
        evidence = replace(
            RIGHT,
            measured=Measured(**numbers),  # type: ignore[arg-type]
            voxel_mm=float(row["voxel_mm"]),
            side_mm=float(row["side_mm"]),
            drift_mm=0.0,
            representation=row["representation"] if row["representation"] in REPRESENTATIONS else "comir",
        )
        found.append((row, evidence))
    return found


def test_no_wrong_answer_of_the_calibration_passes_and_most_right_ones_do() -> None:
    """Other specimens, mirrors, half turns, wrong pre-alignments, shuffled blocks, noise of the same outline."""
    judged = [(row, judge(evidence).verdict) for row, evidence in answers_of_the_calibration()]
    verdicts = Counter((row["kind"], verdict) for row, verdict in judged)
    assert verdicts["wrong", "PASS"] == 0
    assert sum(row["kind"] == "wrong" for row, _ in judged) >= 300
    right = [(row, verdict == "PASS") for row, verdict in judged if row["kind"] == "right"]
    assert len(right) >= 300
    assert sum(passed for _, passed in right) >= 0.9 * len(right)


def test_specimens_that_the_model_has_not_seen_are_judged_as_well() -> None:
    """What `fit.py` wrote: each specimen judged by a model of the others."""
    rows = rows_of("left_out.csv")
    keys = ("family", "seed", "pair", "representation", "kind")
    judged, measured_rows = (
        [tuple(row[k] for k in keys) for row in some] for some in (rows, rows_of("rows.csv"))
    )
    assert sorted(judged) == sorted(measured_rows)
    verdicts = Counter((row["kind"], row["verdict"]) for row in rows)
    assert verdicts["wrong", "PASS"] == 0
    assert verdicts["right", "PASS"] >= 0.8 * sum(row["kind"] == "right" for row in rows)
    covered = [row["covered"] == "True" for row in rows if row["kind"] != "wrong"]
    assert 0.85 <= sum(covered) / len(covered) <= 0.95


def test_the_rows_have_every_kind_of_wrong_pair_and_every_representation_that_may_pass() -> None:
    rows = [row for row, _ in answers_of_the_calibration()]
    assert {row["pair"] for row in rows if row["kind"] == "wrong"} >= {
        "plain", "noisy", "thick", "cropped", "deformed", "padded", "mirrored", "shuffled", "noise", "other",
    }  # fmt: skip
    assert {row["start"] for row in rows if row["kind"] == "wrong"} >= {"truth", "half turn"}
    counts = Counter(row["representation"] for row in rows if row["pair"] != "mirrored")
    assert own_calibration().made_from["representations"] == dict(counts)


def test_the_spread_of_the_maps_is_a_piece_of_evidence() -> None:
    found = judge(replace(RIGHT, deviation=1.5))
    (piece,) = [piece for piece in found.pieces if piece.name == "deviation"]
    assert (piece.value, piece.unit) == (1.5, "times")
    assert "1.5 times as much" in piece.sentence
    assert found.verdict == "PASS"
    assert judge(replace(RIGHT, deviation=5.0)).verdict == "WARN"


def test_what_rounding_leaves_of_a_distance_is_none() -> None:
    pieces = {piece.name: piece for piece in pieces_of(replace(GOOD, swapped=3e-15), 6.0, "representations")}
    assert pieces["swapped"].value == 0
    assert "ends 0 mm away" in pieces["swapped"].sentence
    assert pieces["halves"].value == pytest.approx(6.0 * GOOD.halves)
