"""Fit the verdict's model to the rows of `run.py`, and measure it on families that it has not seen.

    python benchmarks/verdict/fit.py benchmarks/verdict/rows.csv --model comir_hpc/data/verdict.json

Each specimen is left out in turn: the model and its cuts are fitted to the others, and judge its rows. So is each
representation. All figures are of these judgements. The model that is written is fitted to all rows. Answers between
2 and 4 % of the mean side off count as right: the rows' volumes are coarse, and the finer grids of a registration lead
on from there.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import optimize

from comir_hpc.register.checks.calibration import MEASURES_VERSION, Calibration, turned
from comir_hpc.register.checks.measured import Measured
from comir_hpc.runs.record import make_record

FORMS = {
    "chance": "logarithm",
    "margin": "as it is",
    "second": "less is better, logarithm",
    "loosest": "as it is",
    "undone": "less is better, logarithm",
    "halves": "less is better, logarithm",
    "settled": "less is better, logarithm",
    "information": "logarithm",
}
"""The terms of the logistic, and how each is turned so that more is better.

They were chosen on the first 728 of these rows. Without `settled` half as many right answers passed, and no fewer wrong
ones. With `information` 3 instead of 6 of 49 near answers passed. Agreement and swapped added nothing. No distance has
a limit of its own: the least one of any wrong answer shrinks with every row, until no right answer keeps it.
"""
WEAKEST = ("second", "settled", "halves", "undone", "loosest")
"""The weakest of these counts once more. When there were 247 right answers, 212 instead of 200 of them passed that way
with their specimen left out, and no wrong one either way."""
NAMES = (*FORMS, "agreement", "swapped", "overlap", "mirror")
"""What is listed with the spread of right and of wrong answers."""
DISTANCES = ("settled", "halves", "undone", "swapped", "second")
GROUPS = {
    "avg152_t2": "avg152",
    "avg152_pd": "avg152",
    "template_epi": "templates",
    "template_pet": "templates",
}
"""Families that share a specimen are left out together."""
RIDGE = 0.002
SHARE = 0.9
ONE_IN = 1000  # wrong answers of which one may pass
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MIRROR_FAILS, MIRROR_DOUBT = (
    -0.03,
    0.02,
)  # the rules of register/checks/verdict.py, which stand beside the model
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read the rows as numbers."""
    texts = {"family", "seed", "pair", "representation", "kind", "loosest_words", "start"}
    with path.open(encoding="utf-8") as file:
        lines = csv.DictReader(line for line in file if not line.startswith("#"))
        return [
            {k: v if k in texts else (float(v) if v not in ("", "inf") else None) for k, v in row.items()}
            for row in lines
        ]


def measured_of(row: Row) -> Measured:
    """Make what the package would have measured."""
    return Measured(**{field.name: row.get(field.name) for field in fields(Measured)})


def fit(rows: Sequence[Row]) -> Calibration:
    """Fit the logistic, its cuts and the bound.

    Mirrored pairs take no part: apart from the mirror, all evidence of a mirrored head is that of a right answer. Only
    the rule on mirrors tells them, so that no cut has to.
    """
    used: list[Row] = [
        row | {"kind": "wrong" if row["kind"] == "wrong" else "right"}
        for row in rows
        if row["pair"] != "mirrored"
    ]
    right = np.array([row["kind"] == "right" for row in used])
    terms = [_term(name, form, used) for name, form in FORMS.items()]
    draft = make_record(Calibration, _record(terms, np.zeros(len(terms) + 2), used, (0.5, 0.1)))
    table = np.array([_scaled(draft, measured_of(row)) for row in used])
    # Right and wrong answers count the same together, however many there are of each.
    weights = np.where(right, 0.5 / right.mean(), 0.5 / (1 - right.mean()))

    def loss(parameters: np.ndarray) -> float:
        logits = parameters[0] + table @ parameters[1:]
        return float(
            (weights * np.logaddexp(0, np.where(right, -logits, logits))).mean()
            + RIDGE * (parameters[1:] ** 2).mean()
        )

    size = table.shape[1]
    bounds = [(None, None)] + [(0, None)] * size
    found = optimize.minimize(loss, np.zeros(size + 1), bounds=bounds, method="L-BFGS-B").x
    odds = 1 / (1 + np.exp(-(found[0] + table @ found[1:])))
    return make_record(Calibration, _record(terms, found, used, _cuts(odds, right)))


def _scaled(model: Calibration, measured: Measured) -> list[float]:
    """Scale the terms of one answer; the weakest comes last."""
    scaled = {term.name: term.scaled(measured) for term in model.terms}
    return [*scaled.values(), model.weakest.of(scaled)[0]]


def _cuts(odds: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Choose the cuts: PASS above every wrong answer, with room to spare; FAIL below right ones.

    The best tenth of the wrong answers is taken to thin out exponentially. So the room is as large as that the next
    wrong answer passes once in `ONE_IN`: the fewer there are, the larger it is.
    """
    wrong = np.log(odds[~right] / (1 - odds[~right]))
    from_here = np.quantile(wrong, 0.9)
    excess = float((wrong[wrong > from_here] - from_here).mean())
    logit = float(wrong.max()) + excess * max(0.0, float(np.log(ONE_IN / len(wrong))))
    above = float(1 / (1 + np.exp(-logit)))
    return float(np.clip(above, 0.6, 0.995)), float(np.clip(np.quantile(odds[right], 0.01), 0.01, 0.2))


def _term(name: str, form: str, rows: Sequence[Row]) -> Row:
    """Scale a measure by the range between poor wrong answers and typical right ones."""
    values = {
        kind: np.array(
            [turned(row[name], form) for row in rows if row["kind"] == kind and row[name] is not None]
        )
        for kind in ("right", "wrong")
    }
    low, high = float(np.quantile(values["wrong"], 0.1)), float(np.quantile(values["right"], 0.75))
    if high <= low:
        low, high = float(min(map(np.min, values.values()))), float(max(map(np.max, values.values())))
    span = max(high - low, 1e-6)
    missing = float(np.clip((np.quantile(values["wrong"], 0.5) - low) / span, 0, 1))
    return {"name": name, "form": form, "low": low, "high": low + span, "weight": 0.0, "missing": missing}


def _record(terms: list[Row], parameters: np.ndarray, rows: Sequence[Row], cuts: tuple[float, float]) -> Row:
    weighted = [
        {**term, "weight": round(float(w), 4)} for term, w in zip(terms, parameters[1:-1], strict=True)
    ]
    return {
        "measures": MEASURES_VERSION,
        "made_from": {
            "rows": "benchmarks/verdict/rows.csv",
            "families": dict(Counter(row["family"] for row in rows)),
            "representations": dict(Counter(row["representation"] for row in rows)),
            "answers": dict(Counter(row["kind"] for row in rows)),
        },
        "intercept": float(parameters[0]),
        "terms": weighted,
        "weakest": {"among": WEAKEST, "weight": round(float(parameters[-1]), 4)},
        "pass_from": cuts[0],
        "fail_below": cuts[1],
        "bound": _bound(rows),
        "spreads": {
            name: _spread(name, rows)
            for name in Measured.__dataclass_fields__
            if name not in ("loosest_words", "again", "itself")
        },
    }


def _bound(rows: Sequence[Row]) -> Row:
    """Fit the error's quantile, and widen it until it holds on specimens that it was not fitted to.

    One specimen after the other is left out, and the errors of its rows are divided by the bound that the others give.
    The bound is widened by the quantile of these ratios (a conformal quantile: one more than there are rows), in which
    every specimen counts the same. A fit alone covers its share of its own rows, and fewer of others.
    """
    right = [row for row in rows if row["kind"] == "right" and all(row[d] is not None for d in DISTANCES)]
    groups = list(dict.fromkeys(group_of(row) for row in right))
    ratios, weights = [], []
    for group in groups if len(groups) > 1 else []:
        inside = [row for row in right if group_of(row) == group]
        bound = _quantile([row for row in right if group_of(row) != group])
        ratios += [row["tre_mm"] / row["voxel_mm"] / _of(bound, row) for row in inside]
        weights += [1 / (len(inside) + 1)] * len(inside)
    found = _quantile(right)
    if not ratios:
        return found
    order = np.argsort(ratios)
    # The missing weight of each specimen is that of the row to come.
    reached = np.cumsum(np.array(weights)[order]) / len(groups)
    factor = float(np.array(ratios)[order][min(int(np.searchsorted(reached, SHARE)), len(ratios) - 1)])
    return {
        "share": SHARE,
        "constant": round(factor * found["constant"], 4),
        "weights": {name: round(factor * weight, 4) for name, weight in found["weights"].items()},
    }


def _of(bound: Row, row: Row) -> float:
    return float(bound["constant"] + sum(weight * row[name] for name, weight in bound["weights"].items()))


def _quantile(right: Sequence[Row]) -> Row:
    """Fit the quantile: least absolute deviations, weighted to `SHARE`, with weights that are not negative."""
    errors = np.array([row["tre_mm"] / row["voxel_mm"] for row in right])
    table = np.array([[1.0, *(row[d] for d in DISTANCES)] for row in right])
    count, size = table.shape
    # Minimise SHARE * above + (1 - SHARE) * below, errors = table @ w + above - below.
    cost = np.concatenate([np.full(size, 1e-3), np.full(count, SHARE), np.full(count, 1 - SHARE)])
    equal = np.hstack([table, np.eye(count), -np.eye(count)])
    found = optimize.linprog(cost, A_eq=equal, b_eq=errors, bounds=(0, None)).x[:size]
    weights = {name: round(float(w), 4) for name, w in zip(DISTANCES, found[1:], strict=True)}
    return {"share": SHARE, "constant": round(float(found[0]), 4), "weights": weights}


def _spread(name: str, rows: Sequence[Row]) -> Row:
    values = {
        kind: [row[name] for row in rows if row["kind"] == kind and row[name] is not None]
        for kind in ("right", "wrong")
    }
    return {
        k: [round(float(q), 4) for q in np.quantile(v, (0.05, 0.25, 0.5, 0.75, 0.95))]
        for k, v in values.items()
        if v
    }


def judged(rows: Sequence[Row], model: Calibration) -> list[Row]:
    """Judge rows: probability, verdict, and whether the bound holds the error."""
    found = []
    for row in rows:
        measured = measured_of(row)
        odds = model.probability(measured)
        verdict = "PASS" if odds >= model.pass_from else "FAIL" if odds < model.fail_below else "WARN"
        # The mirror of the right answer would give the wrong ones away: a search may find neither. So the rules count
        # only where the pair itself is mirrored.
        lead = (measured.mirror or 0) if row["pair"] == "mirrored" else 1.0
        if lead < MIRROR_FAILS or (measured.margin or 0) < 0:
            verdict = "FAIL"
        if lead < MIRROR_DOUBT and verdict == "PASS":
            verdict = "WARN"
        if row["overlap"] < 0.5 and verdict == "PASS":
            verdict = "WARN"
        bound = model.bound_vox(measured) * row["voxel_mm"]
        covered = "" if row["kind"] == "wrong" else bool(row["tre_mm"] <= bound)
        keys = ("family", "seed", "pair", "representation", "kind", "tre_mm")
        found.append(
            {
                **{k: row[k] for k in keys},
                "probability": odds,
                "verdict": verdict,
                "bound_mm": bound,
                "covered": covered,
            }
        )
    return found


def left_out(rows: Sequence[Row], by: Callable[[Row], str]) -> list[Row]:
    """Judge each group of rows, specimens or representations, by a model that has not seen it."""
    found = []
    for group in dict.fromkeys(by(row) for row in rows):
        seen = [row for row in rows if by(row) != group]
        found += judged([row for row in rows if by(row) == group], fit(seen))
    return found


def representation_of(row: Row) -> str:
    """Name what is left out together: all specialists are one."""
    return str(row["representation"])


def split(rows: Sequence[Row], by: Callable[[Row], str]) -> str:
    """Make a table of the verdicts of each group, as docs/verdict.md has it."""
    lines = [
        "| left out | right: PASS, WARN, FAIL | 2 to 4 % off | wrong | bound holds |",
        "|---|---|---|---|---|",
    ]
    for group in [*dict.fromkeys(by(row) for row in rows), "all"]:
        some = [row for row in rows if group in (by(row), "all")]
        counts = [
            Counter(row["verdict"] for row in some if row["kind"] == kind)
            for kind in ("right", "near", "wrong")
        ]
        cells = [", ".join(str(count[v]) for v in ("PASS", "WARN", "FAIL")) for count in counts]
        covered = [row["covered"] for row in some if row["covered"] != ""]
        lines.append(f"| {group} | {' | '.join(cells)} | {sum(covered)} of {len(covered)} |")
    return "\n".join(lines)


def group_of(row: Row) -> str:
    """Name the specimen of a family."""
    return GROUPS.get(row["family"], row["family"])


def figures(rows: Sequence[Row]) -> str:
    """Say how often each kind of answer got each verdict."""
    lines = []
    for kind in ("right", "near", "wrong"):
        verdicts = Counter(row["verdict"] for row in rows if row["kind"] == kind)
        counts = ", ".join(f"{v} {verdicts[v]}" for v in ("PASS", "WARN", "FAIL"))
        lines.append(f"{kind}: {sum(verdicts.values())} answers, {counts}")
    covered = [row["covered"] for row in rows if row["covered"] != ""]
    lines.append(f"bound covers {sum(covered)} of {len(covered)}")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw how often answers of a probability were right, specimen by specimen left out.

    As in the fit, right and wrong answers weigh the same together, and mirrored pairs take no part.
    """
    some = [row for row in rows if row["pair"] != "mirrored"]
    odds = np.array([row["probability"] for row in some])
    right = np.array([row["kind"] != "wrong" for row in some])
    weights = np.where(right, 0.5 / right.mean(), 0.5 / (1 - right.mean()))
    edges = np.linspace(0, 1, 6)
    figure, axes = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for low, high in itertools.pairwise(edges):
        inside = (odds >= low) & ((odds < high) | (high == 1))
        if inside.any():
            place = [np.average(one[inside], weights=weights[inside]) for one in (odds, right)]
            axes.plot(*place, "o", color="#1f5fa8")
            axes.annotate(str(int(inside.sum())), place, (6, -4), textcoords="offset points", fontsize=8)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), title="Specimens left out of the fit")
    axes.set(xlabel="probability that the model gives", ylabel="share of right answers")
    matplotlib.rcParams["svg.hashsalt"] = "verdict"
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write the judgements as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(
                [f"{v:.4g}" if isinstance(v, float) else "" if v is None else v for v in row.values()]
            )


def main() -> None:
    """Fit, judge, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", type=Path, help="write the model that is fitted to all rows")
    parser.add_argument("--table", type=Path, help="write the judgements of left-out families")
    parser.add_argument("--representations", type=Path, help="write those of left-out representations")
    parser.add_argument("--diagram", type=Path, help="draw their reliability")
    options = parser.parse_args()
    rows = read_rows(options.rows)
    model = fit(rows)
    unseen = left_out(rows, group_of)
    print("all rows in the fit\n" + figures(judged(rows, model)))
    print("each specimen left out\n" + figures(unseen) + "\n" + split(unseen, group_of))
    print("the same by representation\n" + split(unseen, representation_of))
    others = left_out(rows, representation_of)
    print("each representation left out\n" + figures(others) + "\n" + split(others, representation_of))
    for term in model.terms:
        print(f"  {term.name}: {term.weight:.2f} (from {term.low:.3g} to {term.high:.3g})")
    print(f"  weakest: {model.weakest.weight:.2f}")
    print(
        f"  intercept {model.intercept:.2f}, PASS from {model.pass_from:.3f}, FAIL below {model.fail_below:.3f}"
    )
    print(f"  bound {model.bound}")
    if options.model:
        options.model.write_text(json.dumps(model.as_dict(), indent=1) + "\n", encoding="utf-8")
    if options.table:
        write_table(unseen, options.table)
    if options.representations:
        write_table(others, options.representations)
    if options.diagram:
        draw(unseen, options.diagram)


if __name__ == "__main__":
    main()
