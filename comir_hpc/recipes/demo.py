"""The main job on the embedded brain pair, with a known answer: every verb once, on real input.

T1w stays as it is (fixed); T2w is turned anywhere in SO(3), shifted, resampled, given a bias field and noise (moving).
First the two are registered as they come, with the general model. Then encoders are trained on the aligned originals,
and the two are registered with these. So training and test share one specimen. The demo shows that the pipeline works.
It says nothing of how well it does on another specimen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comir_hpc.config.demo import DemoSettings
from comir_hpc.config.infer import InferSettings
from comir_hpc.config.ingest import IngestSettings
from comir_hpc.config.register import RegisterSettings
from comir_hpc.config.train import TrainSettings
from comir_hpc.config.warp import WarpSettings
from comir_hpc.data.embedded import Displacement, degrade, displace, embedded_volume, write_nifti
from comir_hpc.errors import RegistrationError
from comir_hpc.host.files import write_json
from comir_hpc.host.progress import Progress
from comir_hpc.runs.record import Record, make_record, write_record
from comir_hpc.runs.result import RESULT_FILE, read_result, write_result
from comir_hpc.transforms.files import save_transform
from comir_hpc.volumes.volume import Volume

Tell = Callable[[str], None]

FIXED, MOVING = "t1w", "t2w"
SCANNER_SIDE = 112  # voxels: the turned head fits, a strong shift cuts a little of it off
NOTE = (
    "The demo trains and tests on one specimen: it shows that the pipeline works and is no benchmark of how well "
    "the method does on another specimen."
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; the same numbers are in result.json.

    Attributes
    ----------
    report : Path
        Page of the registration with the trained encoders, which shows the errors of all three.
    verdict, reasons : str, list of str
        Verdict of that registration, and its reasons.
    tre_voxels, tre_mm : float
        Mean target registration error over the specimen, of the trained encoders.
    mi_tre_voxels : float
        Mean target registration error in voxels of mutual information, with the same global search.
    general_tre_voxels : float
        Mean target registration error in voxels of the general model, without training; NaN if it found no answer.
    general_verdict : str
        Verdict of the registration with the general model.
    seconds : float
        Wall-clock seconds of this call.
    """

    report: Path
    verdict: str
    reasons: list[str]
    tre_voxels: float
    tre_mm: float
    mi_tre_voxels: float
    general_tre_voxels: float
    general_verdict: str
    seconds: float

    @property
    def summary(self) -> str:
        """Summary for the user in one line: verdict, errors in voxels and mm, and time."""
        return (
            f"{self.verdict}: target registration error {self.tre_voxels:.2f} voxels ({self.tre_mm:.2f} mm) with "
            f"encoders trained here; {self.general_tre_voxels:.2f} voxels without training ({self.general_verdict}); "
            f"mutual information {self.mi_tre_voxels:.2f} voxels; {self.seconds:.0f} s. {NOTE}"
        )


@dataclass(frozen=True)
class Case:
    """The two volumes of the demo, and the true transform between them.

    `aligned` is the moving volume before it was displaced. Only the training sees it.

    Attributes
    ----------
    fixed, moving, aligned : Path
        Stores of T1w, of the displaced T2w, and of the T2w before.
    truth : Path
        File of the true transform, from fixed to moving points.
    """

    fixed: Path
    moving: Path
    aligned: Path
    truth: Path


def demo(settings: DemoSettings, *, progress: Progress | None = None, tell: Tell | None = None) -> DemoResult:
    """Displace the embedded pair, and bring it together again: as it comes, and with encoders trained for it.

    Every step is skipped if it is done already, so a stopped demo continues where it was.

    Parameters
    ----------
    progress : callable, optional
        Function that is called as ``progress(what, done, total)``.
    tell : callable, optional
        Function that is called with the result of the general model, minutes before the end.
    """
    # Here, so that a recipe loads only the verbs that it comes to.
    from comir_hpc.evaluate import evaluate
    from comir_hpc.report import report

    start = time.perf_counter()
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    _claim(settings)
    case = _make_case(settings)
    general = _register_without_training(case, out, start, progress, tell)
    comir = _register_trained(settings, case, progress)
    information = _register_intensities(case, out, progress)
    table = evaluate([comir, information, general], case.truth, out=out / "evaluation.csv")
    by_comir, by_information, by_general = table.rows
    _annotate(comir, information, general)
    page = report(comir)
    _follow(settings, comir, information, general)
    result = DemoResult(
        report=page,
        verdict=by_comir.verdict,
        reasons=list(read_result(comir).reasons),
        tre_voxels=by_comir.tre_voxels,
        tre_mm=by_comir.tre_mm,
        mi_tre_voxels=by_information.tre_voxels,
        general_tre_voxels=by_general.tre_voxels,
        general_verdict=by_general.verdict,
        seconds=time.perf_counter() - start,
    )
    _write_summary(out, result)
    return result


def _register_without_training(
    case: Case, out: Path, start: float, progress: Progress | None, tell: Tell | None
) -> Path:
    """Register the pair with the general model, and say how well that went; return the folder."""
    from comir_hpc.evaluate import evaluate
    from comir_hpc.register import register
    from comir_hpc.report import report

    settings = RegisterSettings(fixed=case.fixed, moving=case.moving, out=out / "general")
    register(settings, progress=progress)
    (row,) = evaluate([settings.out], case.truth).rows
    page = report(settings.out)
    if tell is not None:
        tell(
            f"without training: {row.verdict}, target registration error {row.tre_voxels:.2f} voxels "
            f"({row.tre_mm:.2f} mm), {time.perf_counter() - start:.0f} s after the start; {page}"
        )
    return settings.out


def _register_trained(settings: DemoSettings, case: Case, progress: Progress | None) -> Path:
    """Train encoders on the aligned pair, encode and register with them, and warp; return the folder.

    Raises
    ------
    RegistrationError
        If no answer was found.
    """
    from comir_hpc.infer import infer
    from comir_hpc.register import register
    from comir_hpc.report import report
    from comir_hpc.train import train
    from comir_hpc.warp import warp

    out, run = settings.out, settings.model or settings.out / "run"
    if settings.model is None:
        train(training_settings(case.fixed, case.aligned, settings.train_seed), run, progress=progress)
    maps = {"fixed": out / "fixed_representation.zarr", "moving": out / "moving_representation.zarr"}
    for store, modality, target in (
        (case.fixed, FIXED, maps["fixed"]),
        (case.moving, MOVING, maps["moving"]),
    ):
        infer(InferSettings(zarr=store, model=run, modality=modality, out=target), progress=progress)
    comir = RegisterSettings(
        fixed=case.fixed,
        moving=case.moving,
        out=out / "registration",
        model=run,
        fixed_modality=FIXED,
        moving_modality=MOVING,
        fixed_representation=maps["fixed"],
        moving_representation=maps["moving"],
    )
    found = register(comir, progress=progress)
    if found.transform is None:
        raise RegistrationError(f"registration FAILED: {'; '.join(found.reasons)}; see {report(comir.out)}")
    transform = comir.out / "transform.tfm"
    target = out / "moving_on_fixed.zarr"
    warp(WarpSettings(transform=transform, zarr=case.moving, like=case.fixed, out=target), progress=progress)
    return comir.out


def _register_intensities(case: Case, out: Path, progress: Progress | None) -> Path:
    """Register the pair by mutual information, with the same search; return the folder."""
    from comir_hpc.register import register

    settings = RegisterSettings(
        fixed=case.fixed,
        moving=case.moving,
        out=out / "mutual_information",
        representation="intensity",
        checks="quick",  # a figure to compare with: only its error counts
    )
    register(settings, progress=progress)
    return settings.out


def plan_demo(settings: DemoSettings) -> dict[str, Any]:
    """Predict what the demo will do and need."""
    steps = [
        "displace",
        "ingest",
        "register without training",
        "train",
        "infer",
        "register",
        "warp",
        "mutual information",
        "evaluate",
        "report",
    ]
    if settings.model:
        steps.remove("train")
    return {"steps": " > ".join(steps), "folder": str(settings.out), "note": NOTE}


def training_settings(fixed: Path, aligned: Path, seed: int) -> TrainSettings:
    """Return the settings that the demo trains with: the defaults, on the embedded pair."""
    return TrainSettings(modalities=(FIXED, MOVING), pairs=({FIXED: fixed, MOVING: aligned},), seed=seed)


def _make_case(settings: DemoSettings) -> Case:
    """Displace T2w, and make stores of everything."""
    out, truth = settings.out, _make_moving(settings)
    return Case(
        fixed=_ingest(embedded_volume(FIXED), out / "fixed_t1w.zarr"),
        aligned=_ingest(embedded_volume(MOVING), out / "aligned_t2w.zarr"),
        moving=_ingest(out / "moving_t2w.nii.gz", out / "moving_t2w.zarr"),
        truth=truth,
    )


def _make_moving(settings: DemoSettings) -> Path:
    """Write the displaced T2w and the true transform; return the transform's path."""
    out = settings.out
    truth = out / "truth" / "transform.tfm"
    if truth.is_file():
        return truth
    aligned = Volume.open(_ingest(embedded_volume(MOVING), out / "aligned_t2w.zarr"))
    rng = np.random.default_rng(settings.seed)
    grid = aligned.grid
    displaced = settings.displacement == "so3"
    drawn = Displacement.draw(rng, grid.shape_zyx) if displaced else Displacement.none()
    values, scanner, transform = displace(aligned.read()[0], grid, drawn, SCANNER_SIDE)
    write_nifti(out / "moving_t2w.nii.gz", degrade(values, rng) if displaced else values, scanner)
    # The truth is written last: it stands for the whole step.
    save_transform(transform, truth.parent, {"made_by": "comir-hpc demo", "seed": settings.seed})
    return truth


def _ingest(source: Path, store: Path) -> Path:
    from comir_hpc.ingest import ingest

    ingest(IngestSettings(source=source, out=store))
    return store


def _claim(settings: DemoSettings) -> None:
    """Refuse a folder that holds a demo with other settings: its finished steps would be taken for this one's."""
    path = settings.out / "demo.json"
    record = {**settings.model_dump(mode="json", exclude={"out"})}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != record:
            changed = ", ".join(
                f"{k} {before.get(k)} -> {v}" for k, v in record.items() if before.get(k) != v
            )
            raise RegistrationError(
                f"{settings.out} holds a demo with other settings ({changed}); use another --out"
            )
    write_json(path, record)


def _annotate(folder: Path, information: Path, general: Path) -> None:
    """Put the errors of other registrations, and what the demo shows and does not, into a result."""
    entries = {
        "baseline": _errors_of(information, "mutual information, same global search"),
        "others": [_errors_of(general, "the general model, without training")],
    }
    write_result(folder, read_result(folder).with_entries(**entries, notes=[NOTE]))


def _follow(settings: DemoSettings, *folders: Path) -> None:
    """Put the registrations beside the training in MLflow; with a model that was there before, there is none."""
    if settings.model is not None:
        return
    from comir_hpc.runs.tracking.registration import log_registration

    for folder in folders:
        log_registration(folder, "auto", "registrations", again=True)


def _errors_of(folder: Path, name: str) -> dict[str, Any]:
    truth = read_result(folder).truth
    errors = {} if truth is None else {k: v for k, v in truth.as_dict().items() if k != "matrix_lps_mm"}
    return {"name": name, **errors}


def _write_summary(out: Path, result: DemoResult) -> None:
    record = {
        "verdict": result.verdict,
        "tre_voxels": result.tre_voxels,
        "tre_mm": result.tre_mm,
        "mi_tre_voxels": result.mi_tre_voxels,
        "general_tre_voxels": result.general_tre_voxels,
        "general_verdict": result.general_verdict,
        "seconds": result.seconds,
        "reasons": result.reasons,
        "report": str(result.report),
        "note": NOTE,
    }
    write_record(out / RESULT_FILE, make_record(Record, record))
