"""Every way a registration can be wrong lowers the verdict; nothing missing raises it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comir_hpc.register.checks.verdict import Evidence, judge

RIGHT = Evidence(
    agreement=0.78,
    reference=0.8,
    margin=0.86,
    disagreement=0.003,
    overlap=0.97,
    consensus=3,
    starts=8,
    drift=0.05,
    learned=True,
)


def test_a_right_answer_passes_and_says_why() -> None:
    verdict, reasons = judge(RIGHT)
    assert verdict == "PASS"
    assert any("0.78, 98 % of what they reach" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("change", "verdict", "word"),
    [
        ({"agreement": 0.05}, "FAIL", "6 % of what they reach"),  # noise, shuffled blocks
        ({"agreement": 0.54}, "WARN", "75 % is safe"),  # the mirrored head
        ({"agreement": -0.5}, "FAIL", "-0.50"),
        ({"margin": 0.02}, "FAIL", "leads the best other answer"),  # a symmetric specimen
        ({"margin": -0.1}, "FAIL", "leads the best other answer"),
        ({"margin": 0.2}, "WARN", "30 % is safe"),
        ({"margin": None}, "WARN", "no other answer"),
        ({"disagreement": 0.2}, "FAIL", "two halves"),
        ({"disagreement": 0.03}, "WARN", "1.5 % is safe"),
        ({"disagreement": float("inf")}, "WARN", "cannot be registered"),
        ({"overlap": 0.42}, "WARN", "42 % of the smaller specimen"),
        ({"drift": 0.5}, "WARN", "50 % of the specimen's side"),
        ({"reference": None}, "WARN", "no reference"),
        ({"reference": None, "agreement": -0.1}, "FAIL", "no reference"),
        ({"learned": False}, "WARN", "no scale"),
        ({"learned": False, "disagreement": 0.1}, "FAIL", "two halves"),
    ],
)
def test_each_defect_lowers_it_and_is_named_first(change: dict, verdict: str, word: str) -> None:
    found, reasons = judge(replace(RIGHT, **change))
    assert found == verdict
    assert word in reasons[0]


def test_intensities_never_pass() -> None:
    for margin in (0.1, 0.5, 0.99):
        evidence = replace(RIGHT, learned=False, margin=margin, agreement=1.0, disagreement=0.0, overlap=1.0)
        assert judge(evidence)[0] != "PASS"


def test_two_defects_are_both_named() -> None:
    verdict, reasons = judge(replace(RIGHT, agreement=0.05, overlap=0.42))
    assert verdict == "FAIL"
    assert any("42 %" in reason for reason in reasons)
