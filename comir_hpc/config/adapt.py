"""Settings of `comir-hpc adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from comir_hpc.config.base import (
    Input,
    Length,
    OnCommandLine,
    Output,
    Positive,
    Resource,
    Seed,
    Share,
)
from comir_hpc.config.shared import Followed
from comir_hpc.config.words import Device


class AdaptSettings(Followed):
    """`comir-hpc adapt`: two volumes that are not aligned in, encoders for their two modalities out."""

    volume_fields: ClassVar[tuple[str, ...]] = ("fixed", "moving")

    fixed: Input[Path]
    """Volume of the first modality: a store, or any file that ingest reads."""
    moving: Input[Path]
    """Volume of the second modality, of the same specimen: a store, or any file that ingest reads."""
    run: Output[Path]
    """Folder for the model, the registration and everything on the way; the work goes on if it holds a part of it."""
    model: Input[Path | None] = None
    """Run folder of the encoders to start from; the general model when not given."""
    modalities: Annotated[Input[tuple[str, str]], OnCommandLine(metavar="FIXED MOVING")] = ("fixed", "moving")
    """Names of the two modalities in the new model, and in the one to start from if that has an encoder for each."""
    steps: Positive = 150
    """Number of training steps in each round. Before the rounds each of several candidates gets a sixth of them, and
    the one that is right by then half of them."""
    candidates: Positive = 4
    """Largest number of different alignments that are trained on."""
    rounds: Annotated[int, Field(ge=0)] = 2
    """Largest number of times that the search is done again with the new encoders, and the training after it."""
    replay: Share = 0.3
    """Share of made-up pairs in the training, so that the encoders do not forget other contrasts."""
    held_out: Annotated[float, Field(gt=0.1, lt=0.6)] = 1 / 3
    """Share of the specimen that is not trained on, and by which the candidates are judged."""
    rotations: Positive = 4000
    """Number of rotations in each global search."""
    seed: Seed = 0
    """Seed of the searches and the trainings."""
    device: Resource[Device] = "auto"
    """Where the networks run; auto is a GPU when there is one."""
    max_memory_gib: Annotated[Resource[Length], OnCommandLine(names=("--max-memory-gib", "--max-memory"))] = (
        4.0
    )
    """Memory that each registration may use, in GiB."""
    threads: Resource[Annotated[int, Field(ge=0)]] = 0
    """Number of threads of each registration; 0 takes as many as the machine gives."""

    @property
    def brief_steps(self) -> int:
        """Number of steps of the first, short training on each of several candidates."""
        return max(1, self.steps // 6)

    @property
    def half_steps(self) -> int:
        """Number of steps on the candidate that shows, and at the end on all of the specimen."""
        return max(1, self.steps // 2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.modalities[0] == self.modalities[1]:
            raise ValueError(
                f"modalities are both named {self.modalities[0]!r}; expected two different names"
            )
        return self
