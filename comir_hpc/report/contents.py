"""What a result folder holds, read once; a piece that is not there is named with the reason."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.errors import CheckpointError, ComirError
from comir_hpc.runs.model import MODEL_FILE, Model, read_model
from comir_hpc.runs.pictures import Arrays
from comir_hpc.runs.record import brief
from comir_hpc.runs.refinement import SLICES_FILE, RefinementRecord, read_refinement
from comir_hpc.runs.result import RESULT_FILE, Result, read_result
from comir_hpc.runs.tracking import METRICS_FILE, read_diagnostics, read_metrics

TRANSFORM_FILES = ("transform.tfm", "transform.h5", "transform.json", "inverse.h5", "affine.tfm")


@dataclass(frozen=True, eq=False)
class Contents:
    """Everything that the page is made from.

    A piece that is not there is None, and `missing` says why. The page is made of the rest.

    Attributes
    ----------
    folder : Path
        Absolute path of the folder.
    result : Result or None
        result.json of `register`; None for a training run's own report.
    panels, search, deformation : mapping of str to array, or None
        Arrays of panels.npz, search.npz and deformation.npz, which `register` wrote; None where there are none.
    refinement, refined : RefinementRecord, mapping of str to array, or None
        refinement.json and refinement.npz, which `refine` wrote of this very registration; None where there are none.
    run : Path or None
        Folder of the training run, where one is found.
    metrics : list of dict
        Lines of the run's metrics.jsonl, in order.
    config, model : str, Model or None
        The run's config.yaml as text, and its model.json.
    pictures : tuple of Path
        Files of the run's pictures, the oldest first.
    diagnoses : tuple of dict
        Figures that `evaluate` measured of the run's checkpoints, by step.
    missing : dict
        Why a piece (``panels``, ``search``, ``deformation``, ``refinement``, ``training``, ``model``) is not there, as
        a sentence.
    """

    folder: Path
    result: Result | None
    panels: Arrays | None = None
    search: Arrays | None = None
    deformation: Arrays | None = None
    refinement: RefinementRecord | None = None
    refined: Arrays | None = None
    run: Path | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    config: str | None = None
    model: Model | None = None
    pictures: tuple[Path, ...] = ()
    diagnoses: tuple[dict[str, Any], ...] = ()
    missing: dict[str, str] = field(default_factory=dict)


def read_contents(folder: Path) -> Contents:
    """Read a folder of `register` or `train`.

    Raises
    ------
    ComirError
        If there is nothing to report on, or result.json is damaged or of a newer format.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise ComirError(f"{folder} does not exist; expected a folder that register or train wrote")
    result = read_result(folder) if (folder / RESULT_FILE).is_file() else None
    if result is None and not (folder / METRICS_FILE).is_file():
        raise ComirError(
            f"{folder} holds neither {RESULT_FILE} nor {METRICS_FILE}; expected a folder that register or train wrote"
        )
    missing: dict[str, str] = {}
    panels = search = deformation = refined = refinement = None
    if result is not None:
        panels = _read_arrays(folder / "panels.npz", "panels", missing)
        search = _read_arrays(folder / "search.npz", "search", missing)
        if result.deformation is not None and result.deformation.held_out is not None:
            deformation = _read_arrays(folder / "deformation.npz", "deformation", missing)
        refinement = read_refinement(folder)
        if refinement is not None and refinement.registration != result.fingerprint:
            refinement = None  # of an earlier registration into this folder
        if refinement is not None:
            refined = _read_arrays(folder / SLICES_FILE, "refinement", missing)
    run = folder if result is None else _find_run(folder, result, missing)
    if run is None:
        return Contents(folder, result, panels, search, deformation, refinement, refined, missing=missing)
    return Contents(
        folder,
        result,
        panels,
        search,
        deformation,
        refinement,
        refined,
        run=run,
        metrics=read_metrics(run),
        config=_read_text(run / "config.yaml"),
        model=_read_model(run, missing),
        pictures=tuple(sorted((run / "pictures").glob("*.png"))),
        diagnoses=tuple(record for _, record in read_diagnostics(run)),
        missing=missing,
    )


def file_sums(folder: Path) -> list[dict[str, Any]]:
    """List name, bytes and SHA-256 of each transform file in a folder."""
    paths = [folder / name for name in TRANSFORM_FILES if (folder / name).is_file()]
    return [
        {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in paths
    ]


def _read_model(run: Path, missing: dict[str, str]) -> Model | None:
    if not (run / MODEL_FILE).is_file():
        missing["model"] = f"{MODEL_FILE} is not in this folder: the run has not ended."
        return None
    try:
        return read_model(run)
    except CheckpointError as error:
        missing["model"] = f"{error}."
        return None


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _read_arrays(path: Path, name: str, missing: dict[str, str]) -> Arrays | None:
    if not path.is_file():
        missing[name] = f"{path.name} is not in this folder."
        return None
    try:
        # Report pages are made of folders that others sent: an array of objects would run code.
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        missing[name] = f"{path.name} cannot be read ({brief(error)})."
        return None
    # A foreign panels.npz is a missing piece of the page, and no reason to have no page.
    strange = [key for key, array in found.items() if not _expected(key, array)]
    if strange:
        shape = f"{found[strange[0]].dtype} of shape {found[strange[0]].shape}"
        missing[name] = (
            f"{path.name} cannot be read ({strange[0]} is {shape}, which `register` does not write)."
        )
        return None
    return found


def _expected(key: str, array: NDArray[Any]) -> bool:
    """Return whether an array has the type and the number of axes that `register` gives it."""
    if key == "rotations":
        axes = 3
    elif key in ("scores", "angles_deg", "overlaps") or key.endswith("_spacing_mm"):
        axes = 1
    else:
        axes = 2
    return bool(np.issubdtype(array.dtype, np.floating)) and array.ndim == axes and array.size > 0


def _find_run(folder: Path, result: Result, missing: dict[str, str]) -> Path | None:
    named = result.run_folder
    if not named:
        missing["training"] = (
            "No encoder was trained for this result: it compares the intensities themselves."
        )
        return None
    # As it was named, then beside the result: folders are moved and copied together.
    for run in (Path(named), folder / named, folder.parent / Path(named).name):
        if (run / METRICS_FILE).is_file():
            return run.absolute()
    missing["training"] = f"The training run {named} is not there any more (no {METRICS_FILE} in it)."
    return None
