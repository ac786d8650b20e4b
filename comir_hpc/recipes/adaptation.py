"""Find candidates for the alignment of a pair, and train encoders on them: the parts of `adapt`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comir_hpc.config.adapt import AdaptSettings
from comir_hpc.config.register import RegisterSettings
from comir_hpc.config.train import (
    EngineSettings,
    LossSettings,
    NetworkSettings,
    OptimiserSettings,
    SamplingSettings,
    SyntheticSettings,
    TrackingSettings,
    TrainSettings,
)
from comir_hpc.config.words import Checks
from comir_hpc.errors import RegistrationError
from comir_hpc.host.progress import Progress
from comir_hpc.recipes.working_pair import AlignedStores, WorkingPair
from comir_hpc.runs.model import MODEL_FILE, WEIGHTS_FOLDER, Model, general_model, read_model
from comir_hpc.transforms import Transform

METHODS = ("comir", "mind", "intensity")
"""What searches for candidates, the slowest last: on some pairs only one of them finds the way (docs/general.md)."""

_SAME_SHARE = 0.05  # answers that are nearer to each other than this share of the mean side are one
# Share of held-out cells that have to find their place; 1/27 is chance. Right alignments had 0.44 (ten steps of
# training on a phantom) and 0.72 (sixty on T1w and EPI), wrong ones 0.01 to 0.18.
SURE = 1 / 3
_WORSE = 0.02  # by which that share may fall from round to round, which is about one cell in fifty
# Mean motion of a round from which there is nothing more to do. Encoders that have seen two thirds of the specimen
# moved by 0.28 voxel from the alignment that they were trained on (T1w and EPI); a training on that was worse.
_STILL_VOXELS = 0.3
# Shifts of negatives: while the alignment is a guess, a shift of one voxel may be the truth.
_GUESSED, _KNOWN = (2, 6), (1, 4)
_RATE = 3e-3


@dataclass(frozen=True)
class Alignment:
    """One alignment that encoders were trained on.

    `held_out` says which of several is right. `correlation` decides between those with an equal share.

    Attributes
    ----------
    transform : Transform
        From fixed to moving.
    origin : str
        What found it.
    run : Path or None
        Folder of the training on it.
    held_out : float
        Share of the held-out cells that find their place with these encoders; 1/27 is chance.
    correlation : float
        Mean correlation of those cells.
    methods : int
        Number of methods whose best answer this is.
    """

    transform: Transform
    origin: str
    run: Path | None = None
    held_out: float = 0.0
    correlation: float = 0.0
    methods: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        return {
            "origin": self.origin,
            "run": None if self.run is None else str(self.run),
            "held_out_retrieval": round(self.held_out, 4),
            "held_out_correlation": round(self.correlation, 4),
            "methods": self.methods,
            "matrix_lps_mm": self.transform.matrix_mm.tolist(),
        }


class Adaptation:
    """Searches and trainings of one pair; each is found again in its folder if it was done before."""

    def __init__(self, settings: AdaptSettings, progress: Progress | None) -> None:
        self.settings, self.progress = settings, progress
        self.start = settings.model or general_model()
        self.model: Model = read_model(self.start)
        self.pair = WorkingPair.open(settings.fixed, settings.moving, self.model)

    # ------------------------------------------------------------------ searches

    def candidates(self) -> list[Alignment]:
        """Search with one method after the other, train on the different answers, and sort them, the best first.

        Methods that measure different things do not agree on a wrong answer by chance. So where two of them agree, and
        the held-out part confirms it, neither the last method nor the other candidates get any time.
        """
        answers: list[tuple[Alignment, int]] = []
        agreed: Alignment | None = None
        for method in METHODS:
            answers += self._search(method)
            kept = self.distinct(answers)
            if agreed is None and kept and kept[0].methods > 1:
                agreed = self.try_out(kept[0], "candidates/agreed")
                if agreed.held_out >= SURE:
                    return [agreed]
        rest = [
            one for one in self.distinct(answers) if agreed is None or one.transform is not agreed.transform
        ]
        trained = ([] if agreed is None else [agreed]) + self.tried(rest)
        return sorted(trained, key=lambda one: (one.held_out, one.correlation), reverse=True)

    def tried(self, candidates: list[Alignment]) -> list[Alignment]:
        """Train on candidates, a short time on each first: a right one shows soon, and only it is trained on longer.

        Where none shows, all are trained on for the whole time: on some pairs it takes longer.
        """
        briefly = [self._briefly(one, f"candidates/{number}-brief") for number, one in enumerate(candidates)]
        shows = [one.held_out >= SURE for one in briefly]
        return [
            self.try_out(one, f"candidates/{number}") if shows[number] or not any(shows) else briefly[number]
            for number, one in enumerate(candidates)
        ]

    def distinct(self, answers: list[tuple[Alignment, int]]) -> list[Alignment]:
        """Keep the answers that differ; those that most methods found come first, then the winners, then rivals.

        Parameters
        ----------
        answers : list of (Alignment, int)
            With their rank among the answers of their method, from 0.
        """
        kept: list[Alignment] = []
        for alignment, rank in sorted(answers, key=lambda one: one[1]):
            wins = int(rank == 0)
            for number, one in enumerate(kept):
                apart_mm = self.pair.distance_mm(alignment.transform, one.transform)
                if apart_mm <= _SAME_SHARE * self.pair.side_mm:
                    also = f"{one.origin}; {alignment.origin}" if wins else one.origin
                    kept[number] = replace(one, methods=one.methods + wins, origin=also)
                    break
            else:
                kept.append(replace(alignment, methods=wins))
        return sorted(kept, key=lambda one: -one.methods)[: self.settings.candidates]

    def _search(self, method: str) -> list[tuple[Alignment, int]]:
        from comir_hpc.register import register

        first, second = self.settings.modalities
        named = {} if self.model.shared else {"fixed_modality": first, "moving_modality": second}
        model = {"model": self.settings.model, **named} if method == "comir" else {}
        try:
            result = register(
                self._register_settings(f"search/{method}", representation=method, checks="quick", **model),
                progress=self._progress(method),
            )
        except RegistrationError:
            return []  # this method has nothing to say on this pair; the others may
        places: dict[int, Alignment] = {}
        for one in result.result.candidates:
            if one.failure is None and one.answer is not None and one.answer not in places:
                places[one.answer] = Alignment(one.transform, f"{method}, answer {one.answer + 1}")
        # The winner and its first rival.
        return [(alignment, answer) for answer, alignment in sorted(places.items())[:2]]

    def _progress(self, where: str) -> Progress | None:
        """Say of a stage's progress also which of the many searches and trainings it is."""
        tell = self.progress
        return None if tell is None else lambda what, done, total: tell(f"{where}: {what}", done, total)

    def _register_settings(self, folder: str, **changes: Any) -> RegisterSettings:
        settings = self.settings
        given: dict[str, Any] = {
            "fixed": settings.fixed,
            "moving": settings.moving,
            "out": settings.run / folder,
            "rotations": settings.rotations,
            "seed": settings.seed,
            "threads": settings.threads,
            "device": settings.device,
            "max_memory_gib": settings.max_memory_gib,
            "overwrite": True,
            # The candidates of every method are wanted, and held-out voxels choose among them.
            "fallback": "none",
        }
        return RegisterSettings(**(given | changes))

    # ------------------------------------------------------------------ trainings

    def _briefly(self, candidate: Alignment, folder: str) -> Alignment:
        # Measured on concrete and on T1w and EPI, after 25 steps: right ones 0.99 and 0.68, wrong ones at most 0.04.
        return self.train_on(candidate, folder, self.start, self.settings.brief_steps, _GUESSED)

    def try_out(self, candidate: Alignment, folder: str) -> Alignment:
        """Train on a candidate, half as long as in a round: a wrong one shows at once, a right one is refined later."""
        return self.train_on(candidate, folder, self.start, self.settings.half_steps, _GUESSED)

    def train_on(
        self, alignment: Alignment, folder: str, start: Path, steps: int, negatives: tuple[int, int]
    ) -> Alignment:
        """Train encoders on one alignment, on the part that is not held out, and judge them on the other part."""
        run = self.settings.run / folder
        stores = self.pair.aligned(alignment.transform, run / "volumes", self.settings.held_out)
        if stores is None:
            return replace(alignment, origin=f"{alignment.origin} (too little overlap to learn from)")
        self._train(stores, run, start, steps, negatives)
        judged = stores.judge(run, self.settings.modalities, self.settings.device)
        return replace(alignment, run=run, held_out=judged.share, correlation=judged.correlation)

    def train_on_all(self, best: Alignment) -> Path:
        """Train the encoders of the best alignment on the held-out part, too: nothing is to be judged by it any more.

        Encoders that have seen one end of the specimen only pull the other end their own way: on T1w and EPI the
        registration ended 1.8 mm off, with encoders that saw all of it 1.3 mm.
        """
        assert best.run is not None
        run = self.settings.run / "whole"
        stores = self.pair.aligned(best.transform, run / "volumes", None)
        assert stores is not None  # a part of it was trained on before
        self._train(stores, run, best.run, self.settings.half_steps, _KNOWN)
        return run

    def _train(
        self, stores: AlignedStores, run: Path, start: Path, steps: int, negatives: tuple[int, int]
    ) -> None:
        from comir_hpc.train import train

        # The new model has an encoder for each modality, even where both begin as the one that serves all.
        network = {key: value for key, value in self.model.network.as_dict().items() if key != "shared"}
        first, second = self.settings.modalities
        train(
            TrainSettings(
                modalities=(first, second),
                pairs=({first: stores.fixed, second: stores.moving},),
                seed=self.settings.seed,
                network=NetworkSettings(**network),
                start_from=str(start),
                synthetic=SyntheticSettings(share=self.settings.replay),
                loss=LossSettings(displacement_voxels=negatives),
                sampling=SamplingSettings(patch=stores.patch, within=stores.within, foreground=0.3),
                optimiser=OptimiserSettings(steps=steps, learning_rate=_RATE),
                engine=EngineSettings(device=self.settings.device),
                tracking=TrackingSettings(mlflow=None),
            ),
            run,
            progress=self._progress(run.relative_to(self.settings.run).as_posix()),
        )

    def improve(self, best: Alignment) -> tuple[list[Alignment], Any]:
        """Search and train in turn until nothing moves or it gets worse, train the best on all, and hand it over."""
        rounds: list[Alignment] = []
        for number in range(1, self.settings.rounds + 1):
            assert best.run is not None
            found = self._with_encoders(best.run, f"rounds/{number}/registration", checks="quick").transform
            if found is None:
                break
            moved = self.pair.distance_mm(found, best.transform)
            # The first guess was trained on with blunt negatives: it gets one sharp training even if nothing moved.
            if moved < _STILL_VOXELS * self.pair.spacing_mm and number > 1:
                break
            next_one = Alignment(found, f"round {number}")
            folder = f"rounds/{number}/training"
            next_one = self.train_on(next_one, folder, best.run, self.settings.steps, _KNOWN)
            if next_one.held_out < best.held_out - _WORSE:
                break
            rounds.append(next_one)
            best = next_one
        self._hand_over(self.train_on_all(best))
        return rounds, self._with_encoders(self.settings.run, "registration")

    def _with_encoders(self, run: Path, folder: str, checks: Checks = "full") -> Any:
        """Register with the encoders of a run; only the last answer needs all checks: cells judge the others."""
        from comir_hpc.register import register

        first, second = self.settings.modalities
        named = {"fixed_modality": first, "moving_modality": second}
        return register(
            self._register_settings(folder, model=run, checks=checks, **named),
            progress=self._progress(folder),
        )

    def _hand_over(self, run: Path) -> None:
        """Copy a finished training to the run folder; model.json comes last, because it stands for all of it."""
        for name in (WEIGHTS_FOLDER, "config.yaml", MODEL_FILE):
            source, target = run / name, self.settings.run / name
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target)
            else:
                shutil.copy2(source, target)
