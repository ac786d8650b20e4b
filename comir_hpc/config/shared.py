"""Settings that several verbs have, defined once."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, model_validator

from comir_hpc.config.base import Input, Length, OnCommandLine, Output, Positive, Resource, Settings
from comir_hpc.config.words import Device, Precision, Symmetry, TransformForm


def _part_of_text(part: Any) -> Any:
    """Take the text I/N, too, as the command line has it."""
    if not isinstance(part, str):
        return part
    number, separator, parts = part.partition("/")
    if not separator or not all(text.isascii() and text.isdecimal() for text in (number, parts)):
        raise ValueError(f"{part} is no part; expected I/N, e.g. 3/16")
    return int(number), int(parts)


def _existing_part(part: tuple[int, int]) -> tuple[int, int]:
    if part[0] > part[1]:
        raise ValueError(
            f"part {part[0]}/{part[1]} does not exist; expected 1/{part[1]} to {part[1]}/{part[1]}"
        )
    return part


Part = Annotated[
    tuple[Positive, Positive],
    BeforeValidator(_part_of_text),
    AfterValidator(_existing_part),
    OnCommandLine(metavar="I/N"),
]


class Replacing(Settings):
    """What becomes of an earlier result."""

    overwrite: Output[bool] = False
    """Replace a result that was made from other inputs or with other settings."""


class Followed(Settings):
    """Where MLflow hears of a registration."""

    mlflow: Annotated[Output[str | None], OnCommandLine(metavar="URI")] = None
    """Send settings, evidence, verdict and page to MLflow at this tracking URI; auto is a database beside the folder
    of the result; nothing is sent when not given."""
    experiment: Output[str] = "registrations"
    """Name of the MLflow experiment."""


class InForm(Settings):
    """How the file of a transform is read."""

    form: Annotated[Input[TransformForm | None], OnCommandLine(names=("--from",))] = None
    """Form of the transform's file, where the file does not say it itself, as a matrix in text."""


class Blocks(Replacing):
    """How the blocks of a volume are done, and by whom."""

    part: Resource[Part] = (1, 1)
    """Do part I of N and leave the others to other jobs (job arrays)."""
    workers: Resource[Positive] = 1
    """Number of processes that work side by side."""
    cluster: Annotated[Resource[str | None], OnCommandLine(metavar="WHERE")] = None
    """Where the `workers` run: dask://HOST:PORT, or slurm; this machine when not given."""
    verify: Resource[bool] = False
    """Check the content of blocks that are done already, and do damaged ones again."""


class Stored(Settings):
    """How a volume lies on disk."""

    chunk: Output[Positive] = 64
    """Voxels along each side of a chunk, the unit of reading."""
    shard: Output[Positive] = 256
    """Voxels along each side of a shard, the unit of writing: one file."""
    checksums: Output[bool] = False
    """Follow every chunk with a checksum: a flipped bit is an error then. Reading takes a tenth more processor time."""


class MemoryLimit(Settings):
    """How much memory may be used."""

    max_memory_gib: Annotated[
        Resource[Length | None], OnCommandLine(names=("--max-memory-gib", "--max-memory"))
    ] = None
    """Memory that may be used, in GiB; what is free when not given."""

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, record: Any) -> Any:
        """Take `max_memory`, too, which the setting was called once."""
        if not isinstance(record, dict) or "max_memory" not in record:
            return record
        if "max_memory_gib" in record:
            raise ValueError("max_memory is another name of max_memory_gib; leave one of them out")
        return {("max_memory_gib" if key == "max_memory" else key): value for key, value in record.items()}


class Encoding(Settings):
    """How encoders are run."""

    precision: Resource[Precision] = "auto"
    """Arithmetic of the encoder; auto is bf16 where the device multiplies it fast, fp32 otherwise."""
    device: Resource[Device] = "auto"
    """Where the encoder runs; auto is a GPU when there is one."""


class Symmetrised(Encoding):
    """How encoders are run, and what is averaged over."""

    symmetrise: Symmetry = "none"
    """Average the representation over the rotations of this group: exact equivariance, for as many passes as the group
    has elements. C2 and C4 are for single slices."""
