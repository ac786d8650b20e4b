"""The main job on the embedded brain pair, with a known answer: every verb once, on real input.

T1w stays as it is (fixed); T2w is turned anywhere in SO(3), shifted, resampled, given a bias field and noise (moving).
The encoders are trained on the aligned originals, so training and test share one specimen. The demo shows that the
pipeline works. It says nothing of how well it does on another specimen.
"""

from __future__ import annotations

import json
import time
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
    tre_voxels, tre_mm : float
        Mean target registration error over the specimen, of the learned representations.
    mi_tre_voxels : float
        Mean target registration error in voxels of mutual information, with the same global search.
    """

    report: Path
    verdict: str
    reasons: list[str]
    tre_voxels: float
    tre_mm: float
    mi_tre_voxels: float
    seconds: float

    @property
    def summary(self) -> str:
        """Summary for the user in one line: verdict, errors in voxels and mm, and time."""
        return (
            f"{self.verdict}: target registration error {self.tre_voxels:.2f} voxels ({self.tre_mm:.2f} mm); "
            f"mutual information {self.mi_tre_voxels:.2f} voxels; {self.seconds:.0f} s. {NOTE}"
        )


def demo(settings: DemoSettings, *, progress: Progress | None = None) -> DemoResult:
    """Displace, ingest, train, infer, register, warp, evaluate and report the embedded pair.

    Every step is skipped if it is done already, so a stopped demo continues where it was.
    """
    # Here, so that a recipe loads only the verbs that it comes to.
    from comir_hpc.evaluate import evaluate
    from comir_hpc.infer import infer
    from comir_hpc.register import register
    from comir_hpc.report import report
    from comir_hpc.train import train
    from comir_hpc.warp import warp

    start = time.perf_counter()
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    _claim(settings)
    truth = _make_moving(settings)
    stores = {
        "fixed": _ingest(embedded_volume(FIXED), out / "fixed_t1w.zarr"),
        "aligned": _ingest(embedded_volume(MOVING), out / "aligned_t2w.zarr"),
        "moving": _ingest(out / "moving_t2w.nii.gz", out / "moving_t2w.zarr"),
    }
    run = settings.model or out / "run"
    if settings.model is None:
        train(
            training_settings(stores["fixed"], stores["aligned"], settings.train_seed), run, progress=progress
        )
    for name, modality in (("fixed", FIXED), ("moving", MOVING)):
        infer(
            InferSettings(
                zarr=stores[name], model=run, modality=modality, out=out / f"{name}_representation.zarr"
            ),
            progress=progress,
        )
    comir = RegisterSettings(
        fixed=stores["fixed"],
        moving=stores["moving"],
        out=out / "registration",
        model=run,
        fixed_modality=FIXED,
        moving_modality=MOVING,
        fixed_representation=out / "fixed_representation.zarr",
        moving_representation=out / "moving_representation.zarr",
    )
    found = register(comir, progress=progress)
    if found.transform is None:
        raise RegistrationError(f"registration FAILED: {'; '.join(found.reasons)}; see {report(comir.out)}")
    information = RegisterSettings(
        fixed=comir.fixed, moving=comir.moving, out=out / "mutual_information", representation="intensity"
    )
    register(information, progress=progress)
    warp(
        WarpSettings(
            transform=out / "registration" / "transform.tfm",
            zarr=stores["moving"],
            like=stores["fixed"],
            out=out / "moving_on_fixed.zarr",
        ),
        progress=progress,
    )
    table = evaluate([comir.out, information.out], truth, out=out / "evaluation.csv")
    by_comir, by_information = table.rows
    _annotate(comir.out, information.out)
    result = DemoResult(
        report=report(comir.out),
        verdict=found.verdict,
        reasons=list(found.reasons),
        tre_voxels=by_comir.tre_voxels,
        tre_mm=by_comir.tre_mm,
        mi_tre_voxels=by_information.tre_voxels,
        seconds=time.perf_counter() - start,
    )
    _write_summary(out, result)
    return result


def plan_demo(settings: DemoSettings) -> dict[str, Any]:
    """Predict what the demo will do and need."""
    steps = [
        "displace",
        "ingest",
        "train",
        "infer",
        "register",
        "mutual information",
        "warp",
        "evaluate",
        "report",
    ]
    if settings.model:
        steps.remove("train")
    return {"steps": " > ".join(steps), "folder": str(settings.out), "note": NOTE}


def training_settings(fixed: Path, aligned: Path, seed: int) -> TrainSettings:
    """Return the settings that the demo trains with: the defaults, on the embedded pair."""
    return TrainSettings(modalities=(FIXED, MOVING), pairs=({FIXED: fixed, MOVING: aligned},), seed=seed)


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


def _annotate(folder: Path, other: Path) -> None:
    """Put the errors of another registration, and what the demo shows and does not, into a result."""
    truth = read_result(other).truth
    errors = {} if truth is None else {k: v for k, v in truth.as_dict().items() if k != "matrix_lps_mm"}
    baseline = {"name": "mutual information, same global search", **errors}
    write_result(folder, read_result(folder).with_entries(baseline=baseline, notes=[NOTE]))


def _write_summary(out: Path, result: DemoResult) -> None:
    record = {
        "verdict": result.verdict,
        "tre_voxels": result.tre_voxels,
        "tre_mm": result.tre_mm,
        "mi_tre_voxels": result.mi_tre_voxels,
        "seconds": result.seconds,
        "reasons": result.reasons,
        "report": str(result.report),
        "note": NOTE,
    }
    write_record(out / RESULT_FILE, make_record(Record, record))
