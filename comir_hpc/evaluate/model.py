"""Everything that is measured of a model: equivariance, agreement, retrieval, rank, and the bias of a registration.

Axes: n cubes, c image channels, l latent channels, z y x space.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comir_hpc import __version__
from comir_hpc.checkpoints import write_file
from comir_hpc.config import EvaluateSettings
from comir_hpc.diagnostics import (
    effective_rank,
    equivariance_errors,
    foreground_agreement,
    so3_curve,
    spread_axes,
)
from comir_hpc.errors import RegistrationError
from comir_hpc.evaluate.checkpoint import Subject, open_subject
from comir_hpc.evaluate.cubes import Places, choose_sides, place_cubes, read_cubes
from comir_hpc.evaluate.plots import draw_diagnosis
from comir_hpc.evaluate.registration import specimen_points
from comir_hpc.geometry import Triple
from comir_hpc.patches import PatchSampler
from comir_hpc.reference import reference_figures
from comir_hpc.rotations import angle_deg
from comir_hpc.runs.result import read_result
from comir_hpc.specimens import Specimen, prepare_specimens
from comir_hpc.volume import Volume
from comir_hpc.windows import Encoder

Progress = Callable[[str, int, int], None]
RECORD_FILE, PICTURE_FILE = "diagnostics.json", "diagnostics.png"


@dataclass(frozen=True)
class Bias:
    """Where the registration of an aligned pair ends, started at the identity, which is the right answer.

    Attributes
    ----------
    voxels : float
        Mean displacement of the specimen's points, in the finest spacing of the grid.
    degrees : float
        Rotation found.
    shift_voxels : float
        Displacement of the points' centre.
    agreement : float or None
        Correlation of the representations there.
    verdict : str
    """

    voxels: float
    degrees: float
    shift_voxels: float
    agreement: float | None
    verdict: str


@dataclass(frozen=True)
class Diagnosis:
    """Figures of a model, and where they were written.

    Attributes
    ----------
    folder : Path
        Holds diagnostics.json and diagnostics.png.
    record : dict
        The content of diagnostics.json.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def summary(self) -> str:
        """One line."""
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
    """What `diagnose` would do.

    Raises
    ------
    ComirError
        As `open_subject`.
    """
    with TemporaryDirectory() as spare:
        subject = open_subject(settings, folder=Path(spare))
    side, trim = _sides(settings, subject)
    angles, axes = len(_angles(settings)), 1 if side[0] == 1 else settings.axes
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
    side, trim = _sides(settings, subject)
    core = _triple(np.asarray(side) - 2 * np.asarray(trim))
    stride = next(iter(subject.encoders.values())).network.total_stride_zyx
    specimen = _specimen(subject, core)
    places = place_cubes(specimen, settings.cubes, side, trim, stride)
    modalities, maps, masks = {}, [], []
    for number, (name, encoder) in enumerate(subject.encoders.items()):
        images, mask = read_cubes(specimen, number, places, side)
        encode = _encode(encoder)
        maps.append(encode(torch.from_numpy(images)))
        masks.append(mask & _core(side, trim))
        modalities[name] = {
            "equivariance": _over_group(encode, images, masks[-1], subject),
            "so3": _over_angles(encode, number, specimen, places, settings, _named(progress, name)),
            "effective_rank": effective_rank(maps[-1], torch.from_numpy(masks[-1])[:, None]),
            "border": _border(encode, number, specimen, places, stride),
        }
    both = torch.from_numpy(masks[0] & masks[1])[:, None]
    patches = _on_patches(subject)
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
        "elements": _elements(subject),
        "cubes": asdict(places),
        "modalities": modalities,
        "agreement": foreground_agreement(maps[0], maps[1], both) if both.any() else None,
        "patches": patches,
        "bias": None if bias is None else asdict(bias),
        "bias_missing": None if bias else bias_missing,
        "seconds": round(time.perf_counter() - start, 1),
    }
    record["metrics"] = _metrics(record)
    _write(subject.out, record)
    return Diagnosis(subject.out, record)


def registration_bias(folder: Path) -> Bias:
    """Read how far from the identity a registration of an aligned pair ended.

    Parameters
    ----------
    folder : Path
        That `register` wrote, of two volumes on one grid that are aligned.

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


def _sides(settings: EvaluateSettings, subject: Subject) -> tuple[Triple, Triple]:
    network = next(iter(subject.encoders.values())).network
    planar = subject.settings.sampling.patch[0] == 1
    return choose_sides(settings.side, network.total_stride_zyx, network.receptive_halo_zyx, planar=planar)


def _angles(settings: EvaluateSettings) -> NDArray[np.float64]:
    return np.arange(settings.angle_step, 180 + 1e-9, settings.angle_step)


def _specimen(subject: Subject, patch_zyx: Triple) -> Specimen:
    """The volumes with the share of specimen in patches of this size."""
    sampling = subject.settings.sampling.model_copy(update={"patch": patch_zyx, "level": subject.level})
    return prepare_specimens([list(subject.volumes.values())], sampling)[0]


def _encode(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """One cube after another, so that memory is that of one; results on the CPU."""

    def encode(images: Tensor) -> Tensor:
        return torch.from_numpy(np.concatenate([encoder.evaluate(one[None].numpy()) for one in images]))

    return encode


def _over_group(
    encode: Callable[[Tensor], Tensor], images: NDArray[np.float32], mask: NDArray[np.bool_], subject: Subject
) -> dict[str, Any]:
    errors = equivariance_errors(encode, torch.from_numpy(images), subject.group, mask=torch.from_numpy(mask))
    return {
        "errors": [_number(e) for e in errors],
        "mean": _number(errors.mean()),
        "worst": _number(errors.max()),
        "worst_element": int(errors.argmax()),
    }


def _over_angles(
    encode: Callable[[Tensor], Tensor],
    number: int,
    specimen: Specimen,
    places: Places,
    settings: EvaluateSettings,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    around, mask = read_cubes(specimen, number, places, places.around_zyx)
    planar = places.side_zyx[0] == 1
    curve = so3_curve(
        encode,
        around,
        places.side_zyx,
        angles_deg=_angles(settings).tolist(),
        axes_zyx=None if planar else spread_axes(settings.axes),
        spacing_zyx=specimen.grid.spacing_mm,
        trim_zyx=places.trim_zyx,
        mask=mask,
        progress=progress,
    )
    return {**curve.as_dict(), "mean": _number(curve.errors.mean()), "worst": _number(curve.errors.max())}


def _border(
    encode: Callable[[Tensor], Tensor], number: int, specimen: Specimen, places: Places, stride_zyx: Triple
) -> float | None:
    """Share of the variance by which the first core's values change when the cube's surroundings come into sight."""
    one = Places(places.starts[:1], places.side_zyx, places.trim_zyx, places.around_zyx)
    side, stride = np.asarray(places.side_zyx), np.asarray(stride_zyx)
    more = np.where(side == 1, 0, np.ceil(side / 4 / stride) * stride).astype(int)
    small, mask = read_cubes(specimen, number, one, places.side_zyx)
    large, _ = read_cubes(specimen, number, one, _triple(side + 2 * more))
    kept = mask[0] & _core(places.side_zyx, places.trim_zyx)
    if not kept.any():
        return None
    near = encode(torch.from_numpy(small))[0].double().numpy()
    inner = tuple(slice(m, m + n) for m, n in zip(more, side, strict=True))
    far = encode(torch.from_numpy(large))[0].double().numpy()[(slice(None), *inner)]
    variance = float(far[:, kept].var(axis=1).mean())
    return _number(np.square(near - far)[:, kept].mean() / variance) if variance > 0 else None


def _on_patches(subject: Subject) -> dict[str, Any]:
    """What `train` wrote into model.json when it ended, of this checkpoint and on these volumes."""
    written = next(iter(subject.encoders.values())).reference
    if subject.own and "retrieval" in written:
        return written
    sampling = subject.settings.sampling.model_copy(update={"level": subject.level})
    specimens = prepare_specimens([list(subject.volumes.values())], sampling)
    sampler = PatchSampler(specimens, sampling, subject.trained_group, subject.settings.seed, augment=False)
    encoders = [_encode(encoder) for encoder in subject.encoders.values()]
    return reference_figures(
        lambda number, images: encoders[number](images),
        sampler,
        list(subject.encoders),
        torch.device("cpu"),
    )


def _elements(subject: Subject) -> list[dict[str, Any]]:
    trained = {tuple(matrix.ravel()) for matrix in subject.trained_group.matrices}
    return [
        {
            "angle_deg": round(float(angle_deg(matrix))),
            "matrix_zyx": matrix.tolist(),
            "trained": tuple(matrix.ravel()) in trained,
        }
        for matrix in subject.group.matrices
    ]


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures worth comparing between runs, by the names that they have in MLflow."""
    found: dict[str, Any] = {
        "agreement": record["agreement"],
        "retrieval": record["patches"]["retrieval"],
        **{f"bias_{key}": (record["bias"] or {}).get(key) for key in ("voxels", "degrees")},
    }
    for name, one in record["modalities"].items():
        found[f"{name}/equivariance_worst"] = one["equivariance"]["worst"]
        found[f"{name}/equivariance_mean"] = one["equivariance"]["mean"]
        found[f"{name}/so3_mean"] = one["so3"]["mean"]
        found[f"{name}/effective_rank"] = one["effective_rank"]
    return {f"diagnostics/{name}": float(value) for name, value in found.items() if value is not None}


def _write(folder: Path, record: dict[str, Any]) -> None:
    """The picture first: the record stands for both."""
    draw_diagnosis(folder / PICTURE_FILE, record)
    write_file(folder / RECORD_FILE, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def _core(side_zyx: Triple, trim_zyx: Triple) -> NDArray[np.bool_]:
    core = np.zeros(side_zyx, dtype=np.bool_)
    core[tuple(slice(cut, n - cut) for n, cut in zip(side_zyx, trim_zyx, strict=True))] = True
    return core


def _named(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(f"rotations, {name}", done, total)


def _number(value: float | np.floating[Any]) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3g}"


def _triple(values: NDArray[Any]) -> Triple:
    z, y, x = (int(v) for v in values)
    return z, y, x
