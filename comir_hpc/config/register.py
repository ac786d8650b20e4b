"""Settings of `comir-hpc register`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from comir_hpc.config.base import Input, Length, OnCommandLine, Output, Positive, Resource, Seed
from comir_hpc.config.shared import Followed, InForm, MemoryLimit, Replacing, Symmetrised
from comir_hpc.config.words import (
    BENDING,
    FALLBACKS,
    REPRESENTATIONS,
    Checks,
    Fallback,
    Initial,
    LastStep,
    Require,
    TransformKind,
)

_PACKED = (".gz", ".bz2", ".xz", ".zst")
_FORMATS = (
    ".nii", ".hdr", ".img", ".mgh", ".mgz", ".nrrd", ".nhdr", ".mha", ".mhd", ".tif", ".tiff", ".svs", ".lsm", ".h5",
    ".hdf5", ".hdf", ".ims", ".npy", ".zarr", ".dcm", ".png", ".jpg", ".jpeg",
)  # fmt: skip


def _offered(word: str) -> str:
    """Refuse a word that stands for no representation, in pydantic's words for such an error."""
    if word not in REPRESENTATIONS:
        *others, last = map(repr, REPRESENTATIONS)
        expected = f"{', '.join(others)} or {last}"
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
    return word


def _named_after(given: dict[str, Any]) -> Path:
    """Return the folder of a result that nobody named: FIXED-MOVING, in the current folder."""
    return Path("-".join(volume_name(given[role]) for role in ("fixed", "moving") if role in given))


def volume_name(path: Path) -> str:
    """Return the name of a volume: its file's or folder's name without the suffixes that say the format."""
    name = path.name or path.absolute().name
    for suffixes in (_PACKED, _FORMATS, (".ome",)):
        stem, dot, suffix = name.rpartition(".")
        name = stem if stem and (dot + suffix).lower() in suffixes else name
    return name


def _way_or_file(given: Any) -> Any:
    """Take a word, or the path of a file; refuse what is neither, in pydantic's words for such an error."""
    words = get_args(Initial)
    if str(given) in words:
        return str(given)
    if isinstance(given, str | Path) and (Path(given).suffix or Path(given).exists()):
        return Path(given)
    raise PydanticCustomError(
        "literal_error",
        "Input should be {expected}",
        {"expected": f"{', '.join(map(repr, words))} or a file"},
    )


InitialOrFile = Annotated[
    Initial | Path,
    BeforeValidator(_way_or_file),
    OnCommandLine(words=get_args(Initial), metavar=f"{'|'.join(get_args(Initial))}|FILE"),
]
RepresentationName = Annotated[str, AfterValidator(_offered), OnCommandLine(words=tuple(REPRESENTATIONS))]


class RegisterSettings(InForm, Replacing, MemoryLimit, Symmetrised):
    """`comir-hpc register`: two volumes in, a transform and a verdict out."""

    volume_fields: ClassVar[tuple[str, ...]] = ("fixed", "moving")

    fixed: Input[Path]
    """Volume whose space the result lives in: a store, or any file that ingest reads."""
    moving: Input[Path]
    """Volume to be aligned with the fixed one: a store, or any file that ingest reads."""
    fixed_mask: Input[Path | None] = None
    """Mask of the fixed volume, on any grid: only where it is not zero, the specimen is compared. A store, or any file
    that ingest reads."""
    moving_mask: Input[Path | None] = None
    """Mask of the moving volume, on any grid, in the same way."""
    out: Output[Path] = Field(default_factory=_named_after)
    """Folder for the transform, the result and the report."""
    representation: RepresentationName = "comir"
    """What is compared: learned representations (comir), intensities by mutual information (intensity),
    self-similarities of intensities (mind), or their gradient magnitudes (gradient)."""
    model: Input[Path | None] = None
    """Run folder that train wrote; the general model, which knows every contrast, when not given (comir)."""
    fixed_modality: Input[str | None] = None
    """Modality of the fixed volume: which encoder of the run is used; a model for all modalities needs none (comir)."""
    moving_modality: Input[str | None] = None
    """Modality of the moving volume: which encoder of the run is used; a model for all modalities needs none
    (comir)."""
    fixed_representation: Input[Path | None] = None
    """Representation of the fixed volume that infer wrote; computed in memory when not given (comir)."""
    moving_representation: Input[Path | None] = None
    """Representation of the moving volume that infer wrote; computed in memory when not given (comir)."""
    initial: InitialOrFile = "global"
    """Where the refinement starts: where the two grids put the volumes (identity), at equal centres and main axes of
    the specimens (moments), at the best answers of a search over all rotations and shifts (global), where matching
    keypoints agree (features: quick, for volumes with distinct structures), or at a file: a transform
    (docs/transforms.md), or a table of landmarks (.csv) with x, y, z and moving_x, moving_y, moving_z."""
    transform: TransformKind = "rigid"
    """Kind of transform to find: rigid turns and shifts, affine also scales and shears, field and bspline then bend: a
    smooth field without folds, or the same as a B-spline."""
    smoothness_mm: Length | None = None
    """Smoothness length of a bend in mm: the deviation of the window that moves as one; 8 percent of the specimen's
    mean side when not given. Control points of a B-spline are two thirds of it apart."""
    rotations: Positive = 4000
    """Number of rotations in the global search, spread evenly over SO(3); of single slices up to 360 turns in their
    plane."""
    candidates: Positive = 8
    """Number of distinct answers, of the global search or of keypoints, that are refined."""
    search_voxels: Positive = 32
    """Voxels along the longest side of the fixed specimen in the global search; twice as many for single slices."""
    keypoints: Annotated[int, Field(ge=12)] = 600
    """Largest number of keypoints in each volume, the strongest ones (--initial features)."""
    match_ratio: Annotated[float, Field(gt=0, le=1)] = 0.95
    """How much nearer the best match of a keypoint has to be than the next best one elsewhere: its distance is at most
    this share of the other's. 1 keeps all that are each other's nearest (--initial features)."""
    checks: Checks = "full"
    """How thoroughly the answer is checked: full searches twice more, for the mirrored moving volume and from another
    position; quick leaves that out, and is never more than WARN."""
    fallback: Fallback = "auto"
    """What happens where the general model's answer is not PASS: self-similarities (mind) and then mutual information
    are compared in its place, until one of them is PASS or two agree (auto), or nothing (none). If that does not
    happen, the likeliest of the answers that are WARN is given, or the model's own where that is FAIL. The result
    names what was tried. Each is a registration of its own, so that it takes up to three times as long. There is no
    fallback of a model that you name, none with quick checks, which cannot give PASS, and none without a global
    search."""
    last_step: LastStep = "auto"
    """Whether the answer is refined once more on the intensities, by mutual information: where two halves of the
    specimen agree better on them than on the representations (auto), or never (none)."""
    seed: Seed = 0
    """Seed of the metric's sampling."""
    max_memory_gib: Annotated[Resource[Length], OnCommandLine(names=("--max-memory-gib", "--max-memory"))] = (
        4.0
    )
    """Memory that may be used, in GiB: the volumes are compared at the finest level of their pyramids that fits."""
    threads: Resource[Annotated[int, Field(ge=0)]] = 0
    """Number of threads; 0 takes as many as the machine gives."""

    def modality_of(self, role: Literal["fixed", "moving"]) -> str | None:
        """Modality of one of the two volumes."""
        return self.fixed_modality if role == "fixed" else self.moving_modality

    def representation_of(self, role: Literal["fixed", "moving"]) -> Path | None:
        """Representation that is given of one of the two volumes."""
        return self.fixed_representation if role == "fixed" else self.moving_representation

    @property
    def uses_general_model(self) -> bool:
        """Whether the volumes are encoded by the general model, since no other is named."""
        stored = self.fixed_representation is not None and self.moving_representation is not None
        return REPRESENTATIONS[self.representation].trained and self.model is None and not stored

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Representations to compare where the general model's answer is not PASS."""
        # From one given start all ways would end at one place: that they agree would say nothing.
        wanted = self.fallback == "auto" and self.checks == "full" and self.initial == "global"
        return FALLBACKS if wanted and self.uses_general_model else ()

    @property
    def linear_transform(self) -> Literal["rigid", "affine"]:
        """Kind of transform that the starts and the refinement find; what bends comes after an affine one."""
        return "rigid" if self.transform == "rigid" else "affine"

    @property
    def finds_starts(self) -> bool:
        """Whether the starts are found in the volumes, several of them, and not only one taken as it is."""
        return self.initial in ("global", "features")

    @property
    def refines_on_intensities(self) -> bool:
        """Whether there is a last refinement on the intensities; not where they are what is compared anyway."""
        return self.last_step == "auto" and self.representation != "intensity"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.smoothness_mm is not None and self.transform not in BENDING:
            raise ValueError(
                f"--smoothness-mm says how smoothly a transform bends, and --transform {self.transform} does not bend; "
                f"leave it out, or give --transform {' or '.join(BENDING)}"
            )
        if self.form is not None and not isinstance(self.initial, Path):
            raise ValueError("--from says how the file of --initial is read; give it with --initial FILE")
        given = self.fixed_representation is not None, self.moving_representation is not None
        trained = REPRESENTATIONS[self.representation].trained
        if trained and any(given) and not all(given) and self.model is None:
            role = "moving" if given[0] else "fixed"
            raise ValueError(
                f"one representation is given and the other is not: give --{role}-representation, or --model with the "
                "run that made the one"
            )
        if not trained and any(given):
            raise ValueError(
                "--fixed-representation and --moving-representation mean nothing with --representation "
                f"{self.representation}"
            )
        return self


class RegisterPairSettings(Followed, RegisterSettings):
    """`comir-hpc register`: what is made of the answer, beside the settings of the registration itself."""

    warped: Output[Path | None] = None
    """Moving volume on the fixed grid, to write unless the verdict is FAIL: an OME-Zarr store (any size), .nii,
    .nii.gz, .nrrd, .mha, .tif or .ome.tif."""
    require: Output[Require] = "warn"
    """Poorest verdict that ends with exit code 0; pass makes WARN end with 1. What was found is written in any case."""
    report: Output[bool] = True
    """Write report.html, one self-contained page, into the folder of the result."""

    @property
    def registration(self) -> RegisterSettings:
        """Settings of the registration alone."""
        given = self.model_fields_set & RegisterSettings.model_fields.keys() | {"out"}
        return RegisterSettings(**{name: getattr(self, name) for name in given})
