"""Measure a model: equivariance, agreement, retrieval, rank, and the bias of a registration.

Axes: n cubes, c image channels, l latent channels, z y x space.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from comir_hpc import __version__
from comir_hpc.config.evaluate import EvaluateSettings
from comir_hpc.errors import RegistrationError
from comir_hpc.evaluate.checkpoint import Subject, open_subject
from comir_hpc.evaluate.cubes import Places, place_cubes, read_cubes
from comir_hpc.evaluate.measures import (
    as_triple,
    core_mask,
    cube_sides,
    curve_angles_deg,
    describe_elements,
    encode_singly,
    error_at_border,
    error_over_angles,
    error_over_group,
    flat_metrics,
    metrics_on_patches,
    specimen_of,
)
from comir_hpc.evaluate.plots import draw_diagnosis
from comir_hpc.evaluate.registration import specimen_points
from comir_hpc.host.progress import Progress, part_of
from comir_hpc.learning.specimens import Specimen
from comir_hpc.representations.quality import effective_rank, foreground_agreement
from comir_hpc.runs.checkpoints import write_file
from comir_hpc.runs.result import read_result
from comir_hpc.volumes.volume import Volume

RECORD_FILE, PICTURE_FILE = "diagnostics.json", "diagnostics.png"


@dataclass(frozen=True)
class Bias:
    """Where the registration of an aligned pair ends that starts at the identity, which is the right answer.

    Attributes
    ----------
    voxels : float
        Mean displacement of the specimen's points, in voxels of the finest spacing of the grid.
    degrees : float
        Angle of the rotation that was found, in degrees.
    shift_voxels : float
        Displacement of the points' centre, in voxels.
    agreement : float or None
        Correlation of the representations at the end.
    verdict : str
        Verdict of the registration: PASS, WARN or FAIL.
    """

    voxels: float
    degrees: float
    shift_voxels: float
    agreement: float | None
    verdict: str


@dataclass(frozen=True)
class Diagnosis:
    """What was measured of a model, and where it was written.

    Attributes
    ----------
    folder : Path
        Folder that holds diagnostics.json and diagnostics.png.
    record : dict
        Content of diagnostics.json.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def summary(self) -> str:
        """One line for the user: worst equivariance error, agreement, and where the aligned pair ended."""
        worst = ", ".join(
            f"{name} {_text(one['equivariance']['worst'])}" for name, one in self.record["modalities"].items()
        )
        bias = self.record["bias"]
        ended = (
            f"aligned pair {bias['voxels']:.3f} voxel and {bias['degrees']:.3f} degrees off"
            if bias
            else f"no registration of the aligned pair ({self.record['bias_missing']})"
        )
        return (
            f"{self.record['run']} at step {self.record['step']}: worst equivariance error over "
            f"{self.record['group']} {worst}; agreement {_text(self.record['agreement'])}; {ended}"
        )


def plan_diagnosis(settings: EvaluateSettings) -> dict[str, Any]:
    """Say what `diagnose` would do, without encoding anything.

    Raises
    ------
    ComirError
        If the run, the checkpoint or a volume cannot be used, as `open_subject` says.
    """
    # A checkpoint has to become a model before it can be opened; a plan must leave nothing behind.
    with TemporaryDirectory() as spare:
        subject = open_subject(settings, folder=Path(spare))
    side, trim = cube_sides(settings, subject)
    angles, axes = len(curve_angles_deg(settings)), 1 if side[0] == 1 else settings.axes
    passes = settings.cubes * len(subject.encoders) * (1 + len(subject.group) + angles * (axes + 1))
    return {
        "model": f"{subject.run}, step {subject.step}",
        "volumes": ", ".join(str(volume.path) for volume in subject.volumes.values()),
        "rotations": f"{len(subject.group)} of {subject.group.name}, and {angles} angles about {axes} axes",
        "cubes": f"at most {settings.cubes} of {side} voxels (z, y, x), {trim} off each face",
        "passes": f"{passes} of one cube through a network",
        "out": str(subject.out),
    }


def diagnose(
    settings: EvaluateSettings,
    subject: Subject,
    *,
    aligned: Path | None = None,
    bias_missing: str = "not asked for",
    progress: Progress | None = None,
) -> Diagnosis:
    """Measure a model, and write diagnostics.json and diagnostics.png.

    Equivariance is measured on cubes of the specimen that start at multiples of the network's total stride, over the
    foreground of their cores (docs/diagnostics.md).

    Parameters
    ----------
    aligned : Path, optional
        Folder in which `register` put the registration of the pair's own representations, started at the identity.
    bias_missing : str
        Why there is none.

    Raises
    ------
    ConfigError, VolumeError
        If no cube or patch holds specimen.
    """
    start = time.perf_counter()
    side, trim = cube_sides(settings, subject)
    # The cubes are chosen by what is in their cores, since only these are measured.
    core = as_triple(np.asarray(side) - 2 * np.asarray(trim))
    stride = next(iter(subject.encoders.values())).network.total_stride_zyx
    specimen = specimen_of(subject, core)
    places = place_cubes(specimen, settings.cubes, side, trim, stride)
    measured = _measure_cubes(settings, subject, specimen, places, progress)
    patches = metrics_on_patches(subject)
    bias = None
    if aligned is not None:
        try:
            bias = registration_bias(aligned)
        except RegistrationError as error:
            bias_missing = str(error)
    record = {
        "version": __version__,
        "run": str(subject.run),
        "step": subject.step,
        "time": round(time.time(), 3),
        "own_volumes": subject.own,
        "volumes": {name: str(volume.path) for name, volume in subject.volumes.items()},
        "precision": settings.precision,
        "group": subject.group.name,
        "trained_group": subject.trained_group.name,
        "elements": describe_elements(subject),
        "cubes": asdict(places),
        **measured,
        "patches": patches,
        "bias": None if bias is None else asdict(bias),
        "bias_missing": None if bias else bias_missing,
        "seconds": round(time.perf_counter() - start, 1),
    }
    record["metrics"] = flat_metrics(record)
    _write(subject.out, record)
    return Diagnosis(subject.out, record)


def _measure_cubes(
    settings: EvaluateSettings,
    subject: Subject,
    specimen: Specimen,
    places: Places,
    progress: Progress | None,
) -> dict[str, Any]:
    """Measure each modality on the cubes, and how alike the representations of both are there."""
    side, trim = places.side_zyx, places.trim_zyx
    modalities, maps, masks = {}, [], []
    for number, (name, encoder) in enumerate(subject.encoders.items()):
        images, mask = read_cubes(specimen, number, places, side)
        encode = encode_singly(encoder)
        maps.append(encode(torch.from_numpy(images)))
        masks.append(mask & core_mask(side, trim))
        # All figures of one modality come from the same cubes, so that they can be compared with each other.
        modalities[name] = {
            "equivariance": error_over_group(encode, images, masks[-1], subject),
            "so3": error_over_angles(
                encode, number, specimen, places, settings, part_of(progress, f"rotations, {name}")
            ),
            "effective_rank": effective_rank(maps[-1], torch.from_numpy(masks[-1])[:, None]),
            "border": error_at_border(encode, number, specimen, places, encoder.network.total_stride_zyx),
        }
    # Where one modality shows nothing, its representation has nothing to agree with.
    both = torch.from_numpy(masks[0] & masks[1])[:, None]
    agreement = foreground_agreement(maps[0], maps[1], both) if both.any() else None
    return {"modalities": modalities, "agreement": agreement}


def registration_bias(folder: Path) -> Bias:
    """Read how far from the identity a registration of an aligned pair ended.

    Parameters
    ----------
    folder : Path
        Folder that `register` wrote, for two volumes that are aligned and on one grid.

    Raises
    ------
    RegistrationError
        If there is no result, or it holds no transform.
    """
    result = read_result(folder)
    found, fixed = result.transform, result.inputs.get("fixed")
    grid = None if fixed is None else fixed.space
    if found is None or fixed is None or grid is None:
        reasons = "; ".join(result.reasons) or "its result names no volume and no transform"
        raise RegistrationError(f"{folder}: the registration of the aligned pair failed ({reasons})")
    # The pair is aligned, so the true transform is the identity: every displacement is an error.
    points = specimen_points(Volume.open(fixed.path))
    moved = found.apply(points) - points
    return Bias(
        voxels=float(np.linalg.norm(moved, axis=-1).mean() / grid.finest_mm),
        degrees=float(found.rotation_deg),
        shift_voxels=float(np.linalg.norm(moved.mean(axis=0)) / grid.finest_mm),
        agreement=result.agreement,
        verdict=str(result.verdict),
    )


# ---------------------------------------------------------------------- the parts


def _write(folder: Path, record: dict[str, Any]) -> None:
    """Write the picture, then the record; the record comes last, because it stands for both."""
    draw_diagnosis(folder / PICTURE_FILE, record)
    write_file(folder / RECORD_FILE, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3g}"
