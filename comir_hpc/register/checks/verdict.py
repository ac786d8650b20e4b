"""Judge a registration by its evidence: PASS, WARN or FAIL, the probability that it is right, and a bound in mm.

PASS, WARN and FAIL are cuts of the probability that the calibration gives (`calibration`). What it does not know can
only lower a verdict: a mirrored volume that agrees better, a search that does not repeat itself, evidence that is
missing. The worst outcome is a wrong answer that is reported as PASS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from comir_hpc.register.checks.calibration import Calibration, own_calibration
from comir_hpc.register.checks.causes import FOUND_VOX
from comir_hpc.register.checks.sentences import Piece, deviation_piece, pieces_of
from comir_hpc.runs.result_parts import Verdict, in_percent

if TYPE_CHECKING:
    from comir_hpc.register.checks.evidence import Evidence

_ORDER: tuple[Verdict, ...] = ("PASS", "WARN", "FAIL")

# Rules beside the calibration. They are no rates: nothing was fitted, and each can only lower a verdict.
_MIRROR_FAILS, _MIRROR_DOUBT = -0.03, 0.02
"""Lead over the mirrored volume below which the answer is refused, and below which it is in doubt."""
_DRIFT_SHARE = 0.3
"""Share of the mean side by which refinement may move an answer; it moved right ones by up to 0.19. If it moves one
further, it has left the place that the search proposed."""
_OTHER_SPREAD = 4.0
"""Times that maps may vary more, or less, than in training."""
_FEWEST_ROWS = 20
"""Rows of a representation from which the calibration speaks for it."""
_SHOWN = 4  # measures that are named when the probability is low


@dataclass(frozen=True)
class Judgement:
    """What follows from the evidence.

    Attributes
    ----------
    verdict : str
        PASS, WARN or FAIL.
    reasons : tuple of str
        Sentences, the most serious first. For PASS they say what was found.
    probability : float or None
        Probability that the answer is right, as the calibration knows it; None if nothing could be measured.
    bound_mm : float or None
        Mean error that 90 % of right answers with such evidence keep, in mm.
    pieces : tuple of Piece
        Every piece of evidence.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    probability: float | None = None
    bound_mm: float | None = None
    pieces: tuple[Piece, ...] = ()


def judge(evidence: Evidence, calibration: Calibration | None = None) -> Judgement:
    """Judge the evidence; without a calibration, by the one of the package.

    Raises
    ------
    RegistrationError
        If the package's calibration is damaged or of another version.
    """
    model = own_calibration() if calibration is None else calibration
    rules = [*_rules(evidence), *_uncalibrated(evidence, model)]
    failures = [text for text, verdict in rules if verdict == "FAIL"]
    doubts = [text for text, verdict in rules if verdict == "WARN"]
    if evidence.measured is None:
        return Judgement("FAIL" if failures else "WARN", tuple(failures + doubts))
    probability = model.probability(evidence.measured)
    bound_mm = model.bound_vox(evidence.measured) * evidence.voxel_mm
    pieces = pieces_of(evidence.measured, evidence.voxel_mm, evidence.compared, model.spreads)
    if evidence.deviation is not None:
        pieces.append(deviation_piece(evidence.deviation))
    verdict: Verdict = "PASS" if probability >= model.pass_from else "WARN"
    if probability < model.fail_below:
        verdict = "FAIL"
    lowered = _lowest(verdict, *("FAIL" for _ in failures), *("WARN" for _ in doubts))
    odds = f"right with a probability of {in_percent(probability)}"
    within = f"then within {bound_mm:.2g} mm ({100 * model.bound.share:.0f} %)"
    found = [] if verdict == "PASS" else _poorest(evidence, model, pieces)
    if lowered == "PASS":
        reasons = [
            f"probably within {bound_mm:.2g} mm ({100 * model.bound.share:.0f} %)",
            odds,
            *_best(pieces),
        ]
    else:
        reasons = [*failures, *doubts, f"{odds}, {within}", *found]
    return Judgement(lowered, tuple(reasons), probability, bound_mm, tuple(pieces))


def _rules(evidence: Evidence) -> list[tuple[str, Verdict]]:
    """Apply what no calibration knows: each rule has a sentence, and the best verdict that it leaves."""
    found: list[tuple[str, Verdict]] = []
    measured = evidence.measured
    if measured is not None and measured.mirror is not None:
        found += _mirror_rule(measured.mirror, evidence.mirror_axis)
    if measured is not None and measured.margin is not None and measured.margin < 0:
        found.append((f"another answer agrees better, by {-100 * measured.margin:.0f} %", "FAIL"))
    found += [(cause.sentence, "FAIL" if cause.name == "unrelated" else "WARN") for cause in evidence.causes]
    found += [(text, "WARN") for text in evidence.unchecked]
    if not evidence.thorough:
        text = (
            "the checks were quick: neither the mirrored moving volume was searched nor the search repeated"
        )
        found.append((text, "WARN"))
    if measured is not None and measured.again is not None and measured.again > FOUND_VOX:
        away = measured.again * evidence.voxel_mm
        found.append(
            (f"a search from another position did not find it again: it ends {away:.2g} mm away", "WARN")
        )
    if evidence.drift_mm > _DRIFT_SHARE * evidence.side_mm:
        share = 100 * evidence.drift_mm / evidence.side_mm
        found.append((f"refinement moved it by {share:.0f} % of the specimen's side from its start", "WARN"))
    spread = evidence.deviation
    if spread is not None and max(spread, 1 / max(spread, 1e-9)) > _OTHER_SPREAD:
        text = (
            f"the maps vary {spread:.2g} times as much as in training: the encoders do not know such images"
        )
        found.append((text, "WARN"))
    if measured is not None and measured.agreement <= 0:
        found.append((f"the {evidence.compared} do not agree ({measured.agreement:.2f})", "FAIL"))
    return found


def _uncalibrated(evidence: Evidence, model: Calibration) -> list[tuple[str, Verdict]]:
    """Keep what no calibration has seen from PASS: the probability would be that of something else."""
    if model.rows_of(evidence.representation) >= _FEWEST_ROWS:
        return []
    text = (
        f"the verdict has not been calibrated for --representation {evidence.representation}: the probability is that "
        "of other representations with such evidence; look at the pictures"
    )
    return [(text, "WARN")]


def _mirror_rule(lead: float, axis: str | None) -> list[tuple[str, Verdict]]:
    if lead < _MIRROR_FAILS:
        named = "" if axis is None else f", probably the {axis} axis of the moving volume or of the fixed one"
        text = (
            f"the mirrored moving volume agrees better, by {-100 * lead:.0f} %: the header of one of the two files has "
            f"a flipped axis{named}"
        )
        return [(text, "FAIL")]
    if lead < _MIRROR_DOUBT:
        text = (
            "the mirrored moving volume agrees as well: the specimen looks like its mirror at this scale, and a "
            "flipped axis in a header would not be seen"
        )
        return [(text, "WARN")]
    return []


def _lowest(*verdicts: str) -> Verdict:
    return max((v for v in _ORDER if v in verdicts), key=_ORDER.index)


def _poorest(evidence: Evidence, model: Calibration, pieces: list[Piece]) -> list[str]:
    """Name the measures that cost most, with what right answers have."""
    assert evidence.measured is not None
    by_name = {piece.name: piece for piece in pieces}
    found = [
        by_name[name].sentence + _usual(by_name[name]) for name in model.poorest(evidence.measured)[:_SHOWN]
    ]
    return found


def _usual(piece: Piece) -> str:
    if not piece.right:
        return ""
    scale = 100.0 if piece.unit == "share" else 1.0
    unit = {"mm": " mm", "share": " %"}.get(piece.unit, "")
    return f" (right answers: {piece.right[0] * scale:.2g} to {piece.right[-1] * scale:.2g}{unit})"


def _best(pieces: list[Piece]) -> list[str]:
    shown = ("margin", "chance", "second", "halves")
    return [piece.sentence for piece in pieces if piece.name in shown and piece.value is not None]
