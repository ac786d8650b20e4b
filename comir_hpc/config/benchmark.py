"""Settings of `comir-hpc benchmark`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from comir_hpc.config.base import Input, Length, OnCommandLine, Output, Positive, Resource, Seed, Settings
from comir_hpc.config.shared import Part
from comir_hpc.config.words import (
    DEGRADATIONS,
    FAMILIES,
    LEVELS,
    PEERS,
    REPRESENTATIONS,
    Initial,
    nearest,
)

IDENTITY = "identity"
"""The method that leaves the pair as it lies."""
DEFAULT = "default"
"""Method that registers as the command line does when nothing but the two files is given, fallbacks included."""
ADAPT = "adapt"
"""The method that makes encoders for the pair first, without its answer."""
OF_MODEL = "@"
"""Between a method and the name of the model that it uses: comir@brain."""


def own_methods() -> dict[str, tuple[str, str]]:
    """List our own methods: representation and start by name; a name without a start searches everywhere."""
    found = {}
    for representation in REPRESENTATIONS:
        found[representation] = (representation, "global")
        for initial in get_args(Initial):
            if initial != "global":
                found[f"{representation}-{initial}"] = (representation, initial)
    return found


def all_methods() -> tuple[str, ...]:
    """List every method that a benchmark knows."""
    return (*own_methods(), DEFAULT, ADAPT, IDENTITY, *PEERS)


def _known(what: str, word: str, offered: Iterable[str]) -> str:
    """Refuse a word that is none of these, and name the nearest."""
    words = tuple(offered)
    if word not in words:
        raise ValueError(
            f"no {what} {word!r}; did you mean {nearest(word, words)}? There are {', '.join(words)}"
        )
    return word


def _method(word: str) -> str:
    """Refuse an unknown method; the model that one of ours uses is checked with the models."""
    plain, mark, _ = word.partition(OF_MODEL)
    trained = [name for name, (kind, _) in own_methods().items() if REPRESENTATIONS[kind].trained]
    _known("method with a model", plain, trained) if mark else _known("method", word, all_methods())
    return word


class NamedModel(Settings):
    """Encoders that a benchmark calls by a name."""

    run: Path
    """Run folder of the encoders."""
    modalities: tuple[str, str] = ("any", "any")
    """Names of the fixed and the moving modality in that run."""


class OwnPair(Settings):
    """A pair of the user's, with what is known of the answer: a transform, landmarks or labels."""

    volume_fields: ClassVar[tuple[str, ...]] = (
        *("fixed", "moving", "truth", "fixed_points", "moving_points", "fixed_labels", "moving_labels"),
    )

    name: str
    """Name of the pair in the table."""
    fixed: Path
    """Fixed volume: a file that SimpleITK reads (NIfTI, NRRD, MHA)."""
    moving: Path
    """Moving volume: a file that SimpleITK reads."""
    truth: Path | None = None
    """File of the known transform, which maps fixed to moving points."""
    fixed_points: Path | None = None
    """Table of landmarks of the fixed volume, with columns x, y, z."""
    moving_points: Path | None = None
    """Table of the same landmarks of the moving volume, in the same order."""
    fixed_labels: Path | None = None
    """Labels on the grid of the fixed volume; the centres of the labels are compared."""
    moving_labels: Path | None = None
    """The same labels on the grid of the moving volume."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {
            "truth": (self.truth,),
            "fixed_points and moving_points": (self.fixed_points, self.moving_points),
            "fixed_labels and moving_labels": (self.fixed_labels, self.moving_labels),
        }
        begun = [name for name, paths in given.items() if any(paths)]
        whole = [name for name, paths in given.items() if all(paths)]
        if len(begun) != 1 or begun != whole:
            raise ValueError(
                f"pair {self.name}: {' and '.join(begun) or 'nothing'} is given of the answer; expected one of "
                f"{', or '.join(given)}"
            )
        if self.name in FAMILIES:
            raise ValueError(f"pair {self.name} has the name of a family; give it another one")
        return self


def _pair(value: Any) -> Any:
    """Refuse an unknown family before pydantic says that it is no pair either."""
    if isinstance(value, str) and value not in FAMILIES:
        raise ValueError(
            f"no family {value!r}; did you mean {nearest(value, FAMILIES)}? There are {', '.join(FAMILIES)}; a pair of "
            "your own has a name, fixed, moving, and truth, points or labels"
        )
    return value


PairSetting = Annotated[str | OwnPair, BeforeValidator(_pair)]
Level = Annotated[str, AfterValidator(lambda word: _known("level", word, LEVELS))]
Degradation = Annotated[str, AfterValidator(lambda word: _known("degradation", word, DEGRADATIONS))]
Method = Annotated[str, AfterValidator(_method)]


class BenchmarkSettings(Settings):
    """`comir-hpc benchmark`: pairs, displacements, degradations and methods; every method meets every case."""

    pairs: tuple[PairSetting, ...]
    """Families by name, and pairs of your own."""
    data: Path | None = None
    """Folder that `comir-hpc datasets fetch` wrote the families to; the folder data in the current one
    when not given."""
    levels: tuple[Level, ...] = ("small", "medium", "large", "any")
    """How far the moving volume is displaced: none, or up to 10 (small), 30 (medium), 90 (large), 180 degrees (any)."""
    degradations: tuple[Degradation, ...] = ("none",)
    """What is done to the moving volume: none, noise, bias, thick (slices), cropped (a third cut off), padded."""
    methods: tuple[Method, ...] = ("comir", "mind", "gradient", "intensity", IDENTITY)
    """Methods: a representation, alone (searched everywhere) or with a start (comir-moments) or one of the models
    (comir@NAME); adapt, identity, and peers."""
    seeds: Positive = 10
    """Number of displacements of each pair at each level."""
    first_seed: Seed = 0
    """First seed of the displacements; from 0 on for figures, from 500 on for tuning."""
    model: Path | None = None
    """Run folder of the encoders for comir; the general model when not given."""
    modalities: tuple[str, str] = ("any", "any")
    """Names of the fixed and the moving modality in that run."""
    models: dict[str, NamedModel] = Field(default_factory=dict)
    """More encoders, by name: the method comir@NAME uses those of NAME."""
    peers: Path | None = None
    """Folder that peers were installed into with `pip install --target`; the environment itself when not given."""
    threads: Positive = 1
    """Number of threads of every method."""
    time_limit_s: Length = 3600
    """Seconds that a method may take for one case; then it is stopped, and the case counts as failed."""

    def placed_in(self, folder: Path) -> Self:
        """Return settings whose paths are relative to `folder`."""

        def place(path: Path) -> Path:
            # Messages and plans show the path, so it has no detour through "..".
            return Path(os.path.normpath(folder / path))

        placed = {
            name: place(path)
            for name in ("data", "model", "peers")
            if (path := getattr(self, name)) is not None
        }
        pairs = tuple(one if isinstance(one, str) else one.with_volumes(place) for one in self.pairs)
        models = {name: one.model_copy(update={"run": place(one.run)}) for name, one in self.models.items()}
        return self.model_copy(update={**placed, "pairs": pairs, "models": models})

    def model_of(self, method: str) -> tuple[Path | None, tuple[str, str]]:
        """Return run folder and modalities of the encoders that a method uses; no folder is the general model."""
        name = method.partition(OF_MODEL)[2]
        return (
            (self.models[name].run, self.models[name].modalities) if name else (self.model, self.modalities)
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [one if isinstance(one, str) else one.name for one in self.pairs]
        listed = {
            "pair": names,
            "level": self.levels,
            "degradation": self.degradations,
            "method": self.methods,
        }
        for what, words in listed.items():
            if not words:
                raise ValueError(f"{what}s is empty; expected at least one")
            twice = sorted({word for word in words if list(words).count(word) > 1})
            if twice:
                raise ValueError(f"{what} {twice[0]} is given twice")
        for name in filter(None, (method.partition(OF_MODEL)[2] for method in self.methods)):
            _known("model", name, self.models or ("(none is given)",))
        return self


class BenchmarkRunSettings(Settings):
    """Where a benchmark is described, where its table goes, and who runs it."""

    config: Annotated[Input[Path], OnCommandLine(metavar="CONFIG.yaml")]
    """YAML file with the settings of the benchmark; examples are configs/benchmark.yaml and others beside it."""
    overrides: Annotated[Input[tuple[str, ...]], OnCommandLine(names=("--set",), metavar="a=b")] = ()
    """Change one setting of the file, e.g. seeds=2; repeat the option for more."""
    out: Output[Path] = Path("benchmark.csv")
    """Table to write, a row for each case and method; the benchmark goes on if it holds a part of it."""
    work: Output[Path | None] = None
    """Folder for volumes on the way, emptied again; beside the table when not given."""
    workers: Resource[Positive] = 1
    """Number of cases that are worked on side by side."""
    part: Resource[Part] = (1, 1)
    """Do part I of N of the cases and leave the others to other jobs (job arrays)."""
