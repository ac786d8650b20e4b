"""Measure single properties of a model: over the group, over all angles, at borders, on patches.

Axes: n cubes, c image channels, l latent channels, z y x space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from comir_hpc.config.evaluate import EvaluateSettings
from comir_hpc.evaluate.cubes import Places, choose_sides, read_cubes
from comir_hpc.learning.patches import PatchSampler
from comir_hpc.learning.specimens import Specimen, prepare_specimens
from comir_hpc.representations.encoding.encoder import Encoder
from comir_hpc.representations.equivariance import equivariance_errors, so3_curve
from comir_hpc.representations.reference import reference_metrics
from comir_hpc.representations.turning import spread_axes
from comir_hpc.space.grid import Triple
from comir_hpc.space.rotations import angle_deg

if TYPE_CHECKING:
    from comir_hpc.evaluate.checkpoint import Subject


def cube_sides(settings: EvaluateSettings, subject: Subject) -> tuple[Triple, Triple]:
    """Choose the sides of the cubes, and what is trimmed off each face; both in voxels (z, y, x)."""
    network = next(iter(subject.encoders.values())).network
    planar = subject.settings.sampling.patch[0] == 1
    return choose_sides(settings.side, network.total_stride_zyx, network.receptive_halo_zyx, planar=planar)


def curve_angles_deg(settings: EvaluateSettings) -> NDArray[np.float64]:
    """List the angles, degrees up to 180, at which the curve over SO(3) is measured."""
    # A little more than 180, so that 180 itself is among them.
    return np.arange(settings.angle_step, 180 + 1e-9, settings.angle_step)


def specimen_of(subject: Subject, patch_zyx: Triple) -> Specimen:
    """Prepare the volumes with the share of specimen in patches of `patch_zyx` voxels."""
    sampling = subject.settings.sampling.model_copy(update={"patch": patch_zyx, "level": subject.level})
    return prepare_specimens([list(subject.volumes.values())], sampling)[0]


def encode_singly(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """Make a function that encodes one cube after another, to need the memory of one only; results are on the CPU."""

    def encode(images: Tensor) -> Tensor:
        return torch.from_numpy(np.concatenate([encoder.evaluate(one[None].numpy()) for one in images]))

    return encode


def error_over_group(
    encode: Callable[[Tensor], Tensor], images: NDArray[np.float32], mask: NDArray[np.bool_], subject: Subject
) -> dict[str, Any]:
    """Measure the equivariance error for every element of the group: each, their mean, the worst and its number."""
    errors = equivariance_errors(encode, torch.from_numpy(images), subject.group, mask=torch.from_numpy(mask))
    return {
        "errors": [significant(e) for e in errors],
        "mean": significant(errors.mean()),
        "worst": significant(errors.max()),
        "worst_element": int(errors.argmax()),
    }


def error_over_angles(
    encode: Callable[[Tensor], Tensor],
    number: int,
    specimen: Specimen,
    places: Places,
    settings: EvaluateSettings,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Measure the equivariance error over all angles, with what resampling alone can add (docs/diagnostics.md)."""
    around, mask = read_cubes(specimen, number, places, places.around_zyx)
    planar = places.side_zyx[0] == 1
    curve = so3_curve(
        encode,
        around,
        places.side_zyx,
        angles_deg=curve_angles_deg(settings).tolist(),
        axes_zyx=None if planar else spread_axes(settings.axes),
        spacing_zyx=specimen.grid.spacing_mm,
        trim_zyx=places.trim_zyx,
        mask=mask,
        progress=progress,
    )
    return {
        **curve.as_dict(),
        "mean": significant(curve.errors.mean()),
        "worst": significant(curve.errors.max()),
    }


def error_at_border(
    encode: Callable[[Tensor], Tensor], number: int, specimen: Specimen, places: Places, stride_zyx: Triple
) -> float | None:
    """Measure how much the values in the first core change when the network sees what is around the cube.

    The result is the mean squared change as a share of the variance; None where there is nothing to compare.
    """
    # The same voxels are encoded twice: in the cube, and in a larger cube about the same middle. What is added on each
    # side is a multiple of the stride, so that both pool the same voxels together.
    one = Places(places.starts[:1], places.side_zyx, places.trim_zyx, places.around_zyx)
    side, stride = np.asarray(places.side_zyx), np.asarray(stride_zyx)
    more = np.where(side == 1, 0, np.ceil(side / 4 / stride) * stride).astype(int)
    small, mask = read_cubes(specimen, number, one, places.side_zyx)
    large, _ = read_cubes(specimen, number, one, as_triple(side + 2 * more))
    kept = mask[0] & core_mask(places.side_zyx, places.trim_zyx)
    if not kept.any():
        return None
    near = encode(torch.from_numpy(small))[0].double().numpy()
    # The voxels of the small cube, within the large one.
    inner = tuple(slice(m, m + n) for m, n in zip(more, side, strict=True))
    far = encode(torch.from_numpy(large))[0].double().numpy()[(slice(None), *inner)]
    variance = float(far[:, kept].var(axis=1).mean())
    return significant(np.square(near - far)[:, kept].mean() / variance) if variance > 0 else None


def metrics_on_patches(subject: Subject) -> dict[str, Any]:
    """Measure agreement and retrieval on patches, or take what `train` wrote when it ended, if it fits."""
    # `train` has measured the finished model in the same way. Runs of older versions have no retrieval there.
    written = next(iter(subject.encoders.values())).reference
    if subject.own and "retrieval" in written:
        return written
    sampling = subject.settings.sampling.model_copy(update={"level": subject.level})
    specimens = prepare_specimens([list(subject.volumes.values())], sampling)
    sampler = PatchSampler(specimens, sampling, subject.trained_group, subject.settings.seed, augment=False)
    encoders = [encode_singly(encoder) for encoder in subject.encoders.values()]
    return reference_metrics(
        lambda number, images: encoders[number](images),
        sampler,
        list(subject.encoders),
        torch.device("cpu"),
    )


def describe_elements(subject: Subject) -> list[dict[str, Any]]:
    """Describe each element of the group: its angle, its matrix (3, 3) in zyx order, whether it was trained on."""
    # By their entries: the numbers of the elements differ from group to group.
    trained = {tuple(matrix.ravel()) for matrix in subject.trained_group.matrices}
    return [
        {
            "angle_deg": round(float(angle_deg(matrix))),
            "matrix_zyx": matrix.tolist(),
            "trained": tuple(matrix.ravel()) in trained,
        }
        for matrix in subject.group.matrices
    ]


def flat_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Pick the numbers that are worth comparing between runs, by the names that they have in MLflow."""
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


def core_mask(side_zyx: Triple, trim_zyx: Triple) -> NDArray[np.bool_]:
    """Mark the voxels (z, y, x) of a cube that are left when each face is trimmed."""
    core = np.zeros(side_zyx, dtype=np.bool_)
    core[tuple(slice(cut, n - cut) for n, cut in zip(side_zyx, trim_zyx, strict=True))] = True
    return core


def significant(value: float | np.floating[Any]) -> float | None:
    """Round to five significant digits, as JSON can keep it: None where the value is not finite."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def as_triple(values: NDArray[Any]) -> Triple:
    """Make a tuple of int from an array (3,)."""
    z, y, x = (int(v) for v in values)
    return z, y, x
