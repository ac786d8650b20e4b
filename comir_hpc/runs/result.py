"""The result.json of a registration: the verdict, what it rests on, the transform, and where everything came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from comir_hpc.errors import RegistrationError
from comir_hpc.runs.deformation import DeformationRecord
from comir_hpc.runs.record import Record, make_record, read_record, write_record
from comir_hpc.runs.result_parts import (
    CandidateRecord,
    Figure,
    Finite,
    InputRecord,
    LastStepRecord,
    Matrix,
    Metric,
    PieceRecord,
    Point,
    TriedRecord,
    Verdict,
)
from comir_hpc.transforms.affine import Affine

RESULT_FILE = "result.json"
AFFINE_FILE, BENT_FILE = "transform.tfm", "transform.h5"
"""The whole transform, in a file of ITK: where it is affine, and where it bends."""
INVERSE_FILE = "inverse.h5"
"""Map from moving to fixed points of a transform that bends."""

_REMEDY = "run the registration again"


class Errors(Record):
    """How far a registration is from a known truth; see `evaluate.Evaluation`."""

    matrix_lps_mm: Matrix | None = None
    num_points: int | None = None
    tre_mm: Figure = None
    tre_median_mm: Figure = None
    tre_p95_mm: Figure = None
    tre_voxels: Figure = None
    rotation_error_deg: Figure = None
    success: bool | None = None


class Baseline(Errors):
    """The errors of another method on the same pair."""

    name: str = "baseline"


class Result(Record):
    """Content of result.json.

    Attributes
    ----------
    format : int
        Version of the file's format; 0 for files from before there was one.
    verdict : str or None
        PASS, WARN or FAIL; None where no verdict was given.
    reasons, notes : tuple of str
        Sentences on what the verdict rests on, and on what the user has to know besides.
    probability : float or None
        Probability that the answer is right, by the calibration; None in results from before there was one.
    bound_mm : float or None
        Mean error in mm that 90 % of right answers with such evidence keep.
    evidence : tuple of PieceRecord
        What was measured of the answer on the grids of the checks.
    causes : tuple of str
        Names of what is probably wrong with the pair.
    mirrored_axis : str or None
        Axis of the moving volume (x, y, z) that is probably flipped in a header.
    agreement, reference_agreement, margin, overlap : float or None
        Figures of the finest level that was compared; None where one could not be measured.
    deviation : float or None
        Spread of the maps over that of the model's training.
    candidates : tuple of CandidateRecord
        Candidates that were refined, the best first.
    timings_s : dict
        Wall-clock seconds of each part of the work, by its name.
    inputs : dict of str to InputRecord
        Both volumes that were registered, under ``fixed`` and ``moving``.
    settings : dict
        Settings of the registration, as the user gave them.
    model : dict or None
        Model that the representations came from; None where nothing was learned.
    fingerprint : str or None
        Digest of everything that the result depends on; None where it is not known.
    matrix_lps_mm : 4 x 4 or None
        Fixed to moving, LPS, mm. None: the registration failed without an answer.
    truth, baseline : Errors, Baseline or None
        Errors against a known truth and the baseline's, which `evaluate` and `demo` add; None without them.
    others : tuple of Baseline
        Errors of further methods on the same pair, which `demo` adds.
    representation : str or None
        What was compared; None in results from before there was a choice.
    tried : tuple of TriedRecord
        Ways that were tried, where the general model's answer was not PASS; empty otherwise.
    last_step : LastStepRecord or None
        What became of the last refinement, on the intensities; None where it was not asked for.
    deformation : DeformationRecord or None
        What bends space after the affine answer; None where nothing that bends was asked for.
    """

    format: int = 0
    verdict: Verdict | None = None
    reasons: tuple[str, ...] = ()
    probability: Figure = None
    bound_mm: Figure = None
    evidence: tuple[PieceRecord, ...] = ()
    causes: tuple[str, ...] = ()
    mirrored_axis: str | None = None
    metric: Metric | None = None
    agreement: Figure = None
    reference_agreement: Figure = None
    margin: Figure = None
    overlap: Figure = None
    halves_distance_mm: Figure = None
    consensus: str | None = None
    drift_mm: Figure = None
    deviation: Figure = None
    representation: str | None = None
    tried: tuple[TriedRecord, ...] = ()
    last_step: LastStepRecord | None = None
    candidates: tuple[CandidateRecord, ...] = ()
    timings_s: dict[str, Finite] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    inputs: dict[str, InputRecord] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] | None = None
    run: str | None = None
    fingerprint: str | None = None
    notes: tuple[str, ...] = ()
    matrix_lps_mm: Matrix | None = None
    centre_lps_mm: Point | None = None
    rotation_deg: Figure = None
    translation_mm: Point | None = None
    direction: str = ""
    peak_memory_mib: Figure = None
    truth: Errors | None = None
    baseline: Baseline | None = None
    others: tuple[Baseline, ...] = ()
    deformation: DeformationRecord | None = None

    @property
    def bends(self) -> bool:
        """Whether the transform bends space; then `transform` is its affine part only."""
        return self.deformation is not None and self.deformation.kept

    @property
    def transform_file(self) -> str:
        """Name of the file that holds the whole transform, in the folder of the result."""
        return BENT_FILE if self.bends else AFFINE_FILE

    @property
    def transform(self) -> Affine | None:
        """Map from fixed to moving points in LPS, in mm; None where no answer was found.

        Where the transform bends, it is the affine part (`bends`).
        """
        if self.matrix_lps_mm is None:
            return None
        centre = (0.0, 0.0, 0.0) if self.centre_lps_mm is None else self.centre_lps_mm
        return Affine(self.matrix_lps_mm, centre)  # type: ignore[arg-type]  # which makes arrays of them

    @property
    def run_folder(self) -> str | None:
        """Folder of the training run as it was named; None where nothing was learned."""
        named = self.run or (self.model or {}).get("run")
        return named if isinstance(named, str) else None

    def with_entries(self, **entries: Any) -> Result:
        """Return the same result with other keys, checked.

        Raises
        ------
        pydantic.ValidationError
            If a value is of another type: a mistake of the caller.
        """
        return make_record(Result, {**self.as_dict(), **entries})


def read_result(folder: Path) -> Result:
    """Read the result.json of a folder that `register` wrote.

    Raises
    ------
    RegistrationError
        If there is none, it is damaged or of a newer format, it is no result of a registration, or a key is of another
        type.
    """
    path = folder / RESULT_FILE
    if not path.is_file():
        raise RegistrationError(f"{path} does not exist; expected a folder that `comir-hpc register` wrote")
    result = read_record(path, Result, RegistrationError, _REMEDY)
    if "matrix_lps_mm" not in result.model_fields_set:
        inner = sorted(str(p.parent) for p in folder.glob(f"*/{RESULT_FILE}"))
        remedy = f"did you mean {' or '.join(inner[:3])}?" if inner else "expected what register wrote"
        raise RegistrationError(
            f"{path} holds no matrix_lps_mm, so it is no result of a registration; {remedy}"
        )
    return result


def write_result(folder: Path, result: Result) -> None:
    """Replace the result.json of a folder as a whole.

    Raises
    ------
    OSError
        If the file system refuses, e.g. because the disk is full.
    """
    write_record(folder / RESULT_FILE, result)
