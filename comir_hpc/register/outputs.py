"""The folder that a registration leaves: written whole, result.json last, so that its presence means done."""

from __future__ import annotations

import json
import platform
import resource
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc import __version__
from comir_hpc.errors import RegistrationError
from comir_hpc.register.verdict import Verdict
from comir_hpc.transforms import DIRECTION, Transform, load_transform, save_transform

FILES = ("transform.tfm", "transform.json", "panels.npz", "result.json")


@dataclass(frozen=True, eq=False)
class RegisterResult:
    """What was found; ``result.json`` in `folder` holds the same and more.

    Attributes
    ----------
    transform : Transform
        Fixed to moving.
    agreement : float
        Correlation of what was compared, over the common specimen.
    margin : float or None
        Relative lead over the best other answer.
    skipped : bool
        Whether the folder already held this result.
    """

    folder: Path
    verdict: Verdict
    reasons: list[str]
    transform: Transform
    agreement: float
    margin: float | None
    record: dict[str, Any] = field(repr=False)
    skipped: bool = False

    @property
    def summary(self) -> str:
        """One line."""
        shift = float(np.linalg.norm(self.transform.translation_mm))
        return (
            f"{self.verdict}: turned by {self.transform.rotation_deg:.2f} degrees, shifted by {shift:.2f} mm; "
            f"agreement {self.agreement:.2f}; {self.folder / 'transform.tfm'}"
            + (" (already done)" if self.skipped else "")
        )


def finished(folder: Path, fingerprint: str, overwrite: bool) -> RegisterResult | None:
    """The result in a folder, if it is the one asked for; none if there is none or it is to be replaced.

    Raises
    ------
    RegistrationError
        If the folder holds another result and `overwrite` is not set.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = record["fingerprint"] == fingerprint and all((folder / name).is_file() for name in FILES)
    except (ValueError, KeyError, TypeError):
        record, same = {}, False
    if same:
        return RegisterResult(
            folder=folder,
            verdict=record["verdict"],
            reasons=list(record["reasons"]),
            transform=load_transform(folder / "transform.json"),
            agreement=record["agreement"],
            margin=record["margin"],
            record=record,
            skipped=True,
        )
    if not overwrite:
        raise RegistrationError(
            f"{folder} holds the result of other inputs or settings; choose another --out or pass --overwrite"
        )
    return None


def write_result(
    folder: Path,
    transform: Transform,
    record: dict[str, Any],
    panels: dict[str, NDArray[np.float32]],
    landscape: dict[str, NDArray[Any]] | None,
) -> RegisterResult:
    """Write everything; a result that was there before is withdrawn first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, "search.npz"):
        (folder / name).unlink(missing_ok=True)
    _write_arrays(folder / "panels.npz", panels)
    if landscape is not None:
        _write_arrays(folder / "search.npz", landscape)
    provenance = {key: record[key] for key in ("inputs", "settings", "versions", "verdict")}
    save_transform(transform, folder, provenance)
    record = {
        **record,
        "matrix_lps_mm": transform.matrix_mm.tolist(),
        "centre_lps_mm": transform.centre_mm.tolist(),
        "rotation_deg": transform.rotation_deg,
        "translation_mm": transform.translation_mm.tolist(),
        "direction": DIRECTION,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    partial = folder / ".result.json.partial"
    partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(folder / "result.json")
    return RegisterResult(
        folder=folder,
        verdict=record["verdict"],
        reasons=list(record["reasons"]),
        transform=transform,
        agreement=record["agreement"],
        margin=record["margin"],
        record=record,
    )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("numpy", "scipy", "SimpleITK", "torch")
    return {
        "comir-hpc": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _write_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)
