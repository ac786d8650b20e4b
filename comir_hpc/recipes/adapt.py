"""`comir-hpc adapt`: make encoders for the pair at hand, without an aligned pair.

The general model and MIND each search for the alignment, and mutual information where they do not agree. The different
answers are candidates. Encoders are trained on each candidate, as if it were right, on two thirds of the specimen. The
last third judges: only on a right alignment do the encoders learn what holds there too. Of several candidates, each is
trained on for a short time first, and only what shows by then gets more. The best encoders search again from
nothing, are trained on what they find, and so on, until nothing moves. A round that judges worse than the one before is
taken back. At last the encoders are trained on the held-out part as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comir_hpc.config.adapt import AdaptSettings
from comir_hpc.host.files import write_json
from comir_hpc.host.progress import Progress
from comir_hpc.recipes.adaptation import METHODS, SURE, Adaptation, Alignment
from comir_hpc.runs.html import table
from comir_hpc.runs.model import WEIGHTS_FOLDER

RECORD = "adapt.json"
"""File of the run folder with every candidate and round, and how it was judged."""


@dataclass(frozen=True)
class AdaptResult:
    """What an adaptation has left.

    Every alignment that was tried is in it, with its share of held-out cells: the user sees what was chosen from.

    Attributes
    ----------
    run : Path
        Folder of the new model; `register --model` takes it.
    verdict : str
        Verdict of the last registration, or FAIL if no alignment could be learned from.
    reasons : tuple of str
        What the verdict rests on.
    candidates, rounds : tuple of Alignment
        Alignments that were tried, the best first, and those that followed from the best one.
    registration : Path or None
        Folder of the last registration.
    """

    run: Path
    verdict: str
    reasons: tuple[str, ...]
    candidates: tuple[Alignment, ...]
    rounds: tuple[Alignment, ...]
    registration: Path | None

    def _repr_html_(self) -> str:
        """Show the verdict and how the candidates were judged in a notebook."""
        rows = {
            one.origin: f"{one.held_out:.0%} of the held-out cells"
            for one in (*self.candidates, *self.rounds)
        }
        return table("Adaptation", {"verdict": self.verdict, **rows, "reasons": "; ".join(self.reasons)})

    @property
    def summary(self) -> str:
        """One line for the user."""
        if self.registration is None:
            return f"{self.run}: {self.verdict}, no model"
        best = self.rounds[-1] if self.rounds else self.candidates[0]
        return (
            f"{self.run}: {self.verdict}, {best.held_out:.0%} of the held-out cells find their place, "
            f"{len(self.rounds)} rounds"
        )


def adapt(settings: AdaptSettings, *, progress: Progress | None = None) -> AdaptResult:
    """Find the alignment of two volumes, and train encoders for their modalities on it.

    Parameters
    ----------
    settings : AdaptSettings
        The volumes, which are stores, the folder, and how long to train.
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.

    Raises
    ------
    VolumeError, CheckpointError, ConfigError
        If a volume or the model to start from cannot be used.
    """
    work = Adaptation(settings, progress)
    trained = work.candidates()
    doubt = _doubt(trained)
    if doubt:
        result = AdaptResult(settings.run, "FAIL", (doubt,), tuple(trained), (), None)
    else:
        rounds, registration = work.improve(trained[0])
        verdict, reasons = registration.verdict, tuple(registration.reasons)
        result = AdaptResult(
            settings.run, verdict, reasons, tuple(trained), tuple(rounds), registration.folder
        )
        if settings.mlflow is not None:
            from comir_hpc.runs.tracking.registration import log_registration

            log_registration(
                registration.folder, settings.mlflow, settings.experiment, again=registration.skipped
            )
    write_json(
        settings.run / RECORD,
        {
            "verdict": result.verdict,
            "reasons": list(result.reasons),
            "candidates": [one.as_dict() for one in result.candidates],
            "rounds": [one.as_dict() for one in result.rounds],
        },
    )
    return result


def plan_adapt(settings: AdaptSettings) -> dict[str, Any]:
    """Say what `adapt` would do; it raises what that would raise before it searches."""
    work = Adaptation(settings, None)
    pair = work.pair
    return {
        "start": str(work.start),
        "working_grid": f"{pair.fixed_grid} (fixed), {pair.moving_grid} (moving)",
        "search": f"{settings.rotations} rotations, by each of {', '.join(METHODS)}",
        "train": f"{settings.brief_steps} steps on each of at most {settings.candidates} candidates, "
        f"{settings.half_steps} on the one that shows, {settings.steps} in each of at most {settings.rounds} "
        f"rounds, and {settings.half_steps} at the end on all of the specimen",
        "held_out": f"{settings.held_out:.0%} of the specimen",
        "files": f"model.json, {WEIGHTS_FOLDER}/, registration/, {RECORD}, and what was done on the way",
    }


def _doubt(trained: list[Alignment]) -> str:
    """Say why the best candidate is not to be trusted; empty if it is."""
    if not trained:
        return "no method found an alignment of the two volumes to learn from"
    best = trained[0]
    if best.held_out < SURE:
        return (
            f"of {len(trained)} candidates the best one ({best.origin}) lets {best.held_out:.0%} of the held-out cells "
            f"find their place; {SURE:.0%} have to: the volumes may share nothing, or too little of what is shared "
            "is visible in both"
        )
    if len(trained) > 1 and trained[1].held_out >= best.held_out:
        return (
            f"two different alignments ({best.origin} and {trained[1].origin}) let {best.held_out:.0%} of the held-out "
            "cells find their place: the specimen looks alike in two positions"
        )
    return ""
