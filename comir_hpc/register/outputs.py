"""Write the folder of a registration. result.json comes last, so that a folder with it is complete."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from comir_hpc import __version__
from comir_hpc.config.register import RegisterSettings
from comir_hpc.config.words import BENDING
from comir_hpc.errors import RegistrationError, UnsavedResult
from comir_hpc.host.files import write_text, written_whole
from comir_hpc.host.memory import peak_bytes
from comir_hpc.register.global_search import Search
from comir_hpc.register.inputs import Input, Inputs
from comir_hpc.register.slices import SlicePlane
from comir_hpc.runs import result as results
from comir_hpc.runs.record import as_json, brief, make_record
from comir_hpc.runs.result import AFFINE_FILE, BENT_FILE, INVERSE_FILE, RESULT_FILE, Result
from comir_hpc.runs.result_html import PANELS_FILE, result_html
from comir_hpc.runs.result_parts import Verdict
from comir_hpc.space.rotations import angle_deg
from comir_hpc.transforms.affine import Affine as Transform
from comir_hpc.transforms.files import DIRECTION, itk_text, save_itk, save_transform

if TYPE_CHECKING:
    from comir_hpc.register.deform import Deformation
    from comir_hpc.register.ranking import Candidate

TRANSFORM_FILES = (AFFINE_FILE, "transform.json")
BENT_FILES = (BENT_FILE, INVERSE_FILE, "affine.tfm")
DEFORMATION_FILE = "deformation.npz"
SEARCH_FILE = "search.npz"
FAILED_START = "refinement led to no answer"
_PAGE_BYTES = 8 * 2**20  # room for the report (3 MB at most), the JSON files and what file systems add


@dataclass(frozen=True, eq=False)
class RegisterResult:
    """Result of a registration; the folder holds it and more.

    It reads what it says from `result`, the content of result.json, so that a result that was found again says the
    same.

    Attributes
    ----------
    folder : Path
        Folder that it was written to.
    result : Result
        Content of ``result.json``.
    skipped : bool
        Whether the folder already held this result.
    """

    folder: Path
    result: Result
    skipped: bool = False

    @property
    def verdict(self) -> Verdict:
        """Verdict of the registration: PASS, WARN or FAIL."""
        return cast(Verdict, self.result.verdict)

    @property
    def reasons(self) -> list[str]:
        """Reasons for the verdict, the most serious first."""
        return list(self.result.reasons)

    @property
    def transform(self) -> Transform | None:
        """Transform from fixed to moving points; None where no answer was found."""
        return self.result.transform

    @property
    def agreement(self) -> float | None:
        """Correlation of the compared values over the common specimen."""
        return self.result.agreement

    @property
    def margin(self) -> float | None:
        """Relative lead over the best other answer."""
        return self.result.margin

    @property
    def record(self) -> dict[str, Any]:
        """Content of ``result.json`` as plain data."""
        return self.result.as_dict()

    @property
    def report(self) -> Path:
        """Page that the command line and `comir_hpc.api.register` write."""
        return self.folder / "report.html"

    @property
    def summary(self) -> str:
        """One line for the user: verdict, motion, agreement and where the files are."""
        done = " (already done)" if self.skipped else ""
        if self.transform is None:
            return f"{self.verdict}: no transform was found; {self.folder / RESULT_FILE}{done}"
        shift = float(np.linalg.norm(self.transform.translation_mm))
        agreement = "undefined" if self.agreement is None else f"{self.agreement:.2f}"
        bound = self.result.bound_mm
        within = (
            f"probably within {bound:.2g} mm (90 %); "
            if self.verdict == "PASS" and bound and not self.result.bends
            else ""
        )
        return (
            f"{self.verdict}: {within}turned by {self.transform.rotation_deg:.2f} degrees, shifted by {shift:.2f} mm; "
            f"agreement {agreement}; {self._bent}{self.folder / self.result.transform_file}{done}"
        )

    @property
    def _bent(self) -> str:
        deformation = self.result.deformation
        if deformation is None:
            return ""
        if not deformation.kept:
            return f"not bent ({deformation.reason}); "
        return f"bent by {deformation.displacement_mm.get('mean', 0.0):.2f} mm on average; "

    def _repr_html_(self) -> str:
        """Show verdict, reasons, numbers and overlays in a notebook."""
        return result_html(self.folder, self.result)


def finished(folder: Path, fingerprint: str, overwrite: bool) -> RegisterResult | None:
    """Find the result in a folder, if it is the one asked for; None if there is none or it shall be replaced.

    Raises
    ------
    RegistrationError
        If the folder holds another result, or a damaged one, and `overwrite` is not set.
    """
    if not (folder / RESULT_FILE).is_file():
        return None
    try:
        found = results.read_result(folder)
    except RegistrationError as error:
        if overwrite:
            return None
        raise RegistrationError(f"{error}; or choose another --out, or pass --overwrite") from error
    files = BENT_FILES if found.bends else TRANSFORM_FILES
    needed = [PANELS_FILE, *(files if found.transform is not None else ())]
    if (
        found.verdict is not None
        and found.fingerprint == fingerprint
        and all((folder / n).is_file() for n in needed)
    ):
        return RegisterResult(folder, found, skipped=True)
    if not overwrite:
        raise RegistrationError(
            f"{folder} holds the result of other inputs or settings; choose another --out or pass --overwrite"
        )
    return None


def output_bytes(inputs: Inputs, settings: RegisterSettings) -> int:
    """Predict the bytes that a registration will write, its report included."""
    side = inputs.fixed
    shape = side.representation.grid(side.level).shape_zyx
    pixels = sum(math.prod(shape) // n for n in shape)
    kinds = 6 if side.representation.pictured else 3
    field = (
        4 * 24 * math.prod(shape) if settings.transform in BENDING else 0
    )  # both ways, in double precision, with margins
    per_rotation = 8 * (9 + 1 + 1 + 1 + 3)  # rotation, score, angle, overlap and pivot in search.npz
    return 4 * pixels * kinds + per_rotation * (settings.rotations + 1) + field + _PAGE_BYTES


def write_result(
    folder: Path,
    transform: Transform | None,
    record: dict[str, Any],
    panels: dict[str, NDArray[np.float32]],
    landscape: dict[str, NDArray[Any]] | None,
    deformation: Deformation | None = None,
) -> RegisterResult:
    """Write everything. A result that was there before is deleted first.

    Where the transform bends, `transform` is its affine part. It then goes to a file of another name, so that nobody
    takes it for the whole.

    Raises
    ------
    UnsavedResult
        If the file system refuses, e.g. because the disk is full.
    """
    found = make_record(
        Result,
        {
            **record,
            **_placed(transform),
            "direction": DIRECTION,
            "peak_memory_mib": peak_bytes() / 2**20,
        },
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # result.json is deleted first and written last: while it is there, all other files belong to it.
        old = (*TRANSFORM_FILES, *BENT_FILES, PANELS_FILE, SEARCH_FILE, DEFORMATION_FILE)
        for name in (RESULT_FILE, *old):
            (folder / name).unlink(missing_ok=True)
        _write_arrays(folder / PANELS_FILE, panels)
        if landscape is not None:
            _write_arrays(folder / SEARCH_FILE, landscape)
        if deformation is not None and deformation.planes:
            _write_arrays(folder / DEFORMATION_FILE, deformation.planes)
        if deformation is not None and deformation.transform is not None and transform is not None:
            _write_bent(folder, deformation, transform)
        elif transform is not None:
            provenance = {key: record[key] for key in ("inputs", "settings", "versions", "verdict")}
            save_transform(transform, folder, provenance)
        results.write_result(folder, found)
    except OSError as error:
        raise UnsavedResult(
            f"{folder} cannot be written to ({brief(error.strerror or str(error))}); the result stands above as JSON. "
            "Make room and run the same command again for the files",
            as_json(found),
        ) from error
    return RegisterResult(folder, found)


def _write_bent(folder: Path, deformation: Deformation, affine: Transform) -> None:
    assert deformation.transform is not None
    assert deformation.inverse is not None
    whole, inverse, part = (folder / name for name in BENT_FILES)
    save_itk(deformation.transform, whole)
    save_itk(deformation.inverse, inverse)
    write_text(part, itk_text(affine))


def _placed(transform: Transform | None) -> dict[str, Any]:
    if transform is None:
        return dict.fromkeys(("matrix_lps_mm", "centre_lps_mm", "rotation_deg", "translation_mm"))
    return {
        "matrix_lps_mm": transform.matrix_mm.tolist(),
        "centre_lps_mm": transform.centre_mm.tolist(),
        "rotation_deg": transform.rotation_deg,
        "translation_mm": transform.translation_mm.tolist(),
    }


def candidate_record(number: int, candidate: Candidate, frame: SlicePlane) -> dict[str, Any]:
    """Describe one candidate as it is written to result.json, in world coordinates."""
    transform = frame.world(candidate.transform)
    return {
        "rank": number,
        "answer": candidate.answer,
        "rotation_deg": transform.rotation_deg,
        "coarse_score": candidate.coarse_score,
        "refined_score": candidate.score,
        "agreement": candidate.agreement.correlation,
        "overlap": candidate.agreement.overlap,
        "failure": candidate.failure,
        "matrix_lps_mm": transform.matrix_mm.tolist(),
    }


def input_record(side: Input) -> dict[str, Any]:
    """Describe one volume as it is written to result.json, with absolute paths, which are valid from every folder."""
    return {
        "path": str(side.volume.path.absolute()),
        "source": side.volume.source,
        "fingerprint": side.volume.fingerprint(),
        "grid": side.volume.grid.as_dict(),
        **({"mask": str(side.volume.region.path.absolute())} if side.volume.region else {}),
        "compared": {
            "path": str(side.compared.path.absolute()),
            "level": side.level,
            "grid": side.representation.grid(side.level).as_dict(),
        },
    }


def landscape(found: Search | None, frame: SlicePlane) -> dict[str, NDArray[Any]] | None:
    """Make the arrays of search.npz, in world coordinates; None where nothing was searched."""
    if found is None:
        return None
    # Slices are searched in a plane of their own. Files speak of the world only.
    rotations = frame.world_rotations(found.rotations_xyz)
    return {
        "rotations": rotations,
        "scores": found.scores,
        "angles_deg": angle_deg(rotations),
        "overlaps": found.overlaps,
        "pivots_mm": frame.world_points_mm(found.pivots_mm),
    }


def versions() -> dict[str, str]:
    """List the versions of the libraries that the numbers depend on."""
    names = ("numpy", "scipy", "SimpleITK", "torch")
    return {
        "comir-hpc": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _write_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    with written_whole(path) as spare, spare.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
