"""Figures on clean patches: of encoders whose metrics are known, on a phantom whose modalities are monotone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from phantoms import store_pair
from torch import Tensor

from comir_hpc.config import SamplingSettings
from comir_hpc.learning.patches import PatchSampler
from comir_hpc.learning.specimens import prepare_specimens
from comir_hpc.representations.reference import Watch, reference_metrics
from comir_hpc.space.groups import rotation_group
from comir_hpc.volumes.volume import Volume

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> PatchSampler:
    volumes = [Volume.open(path) for path in store_pair(tmp_path_factory.mktemp("pair")).values()]
    settings = SamplingSettings(patch=(16, 16, 16), pairs_per_step=2)
    return PatchSampler(prepare_specimens([volumes], settings), settings, rotation_group("O"), 0)


def first_image(number: int, images: Tensor) -> Tensor:
    """An encoder that agrees with itself whatever the modality, as far as both see the same noise."""
    return images if number == 0 else images + torch.linspace(0, 1, 16)


def test_figures_of_encoders_that_pass_the_image_through(sampler: PatchSampler) -> None:
    clean = PatchSampler(sampler.specimens, sampler.settings, sampler.group, 0, augment=False)
    metrics = reference_metrics(first_image, clean, ("one", "two"), CPU)
    assert metrics["equivariance"]["one"] == {"mean": 0.0, "max": 0.0}
    assert metrics["equivariance"]["two"]["max"] > 0.01  # the ramp stays where it is when the image turns
    assert metrics["effective_rank"] == {"one": 1.0, "two": 1.0}
    assert 0 <= metrics["retrieval"] <= 1
    assert metrics == json.loads(json.dumps(metrics, allow_nan=False))


def test_a_very_small_error_is_kept_in_digits_not_in_decimals(sampler: PatchSampler) -> None:
    clean = PatchSampler(sampler.specimens, sampler.settings, sampler.group, 0, augment=False)

    def nearly(number: int, images: Tensor) -> Tensor:
        return images + 3e-3 * torch.linspace(0, 1, 16)

    metrics = reference_metrics(nearly, clean, ("one", "two"), CPU)
    error = metrics["equivariance"]["one"]
    assert 0 < error["mean"] <= error["max"] < 5e-5  # four decimals made 0 of it
    assert error["max"] == float(f"{error['max']:.5g}")


def test_maps_that_do_not_vary_are_said_so_in_json(sampler: PatchSampler) -> None:
    clean = PatchSampler(sampler.specimens, sampler.settings, sampler.group, 0, augment=False)
    metrics = reference_metrics(lambda number, x: x * 0, clean, ("one", "two"), CPU)
    assert metrics["equivariance"]["one"] == {"mean": None, "max": None}
    assert metrics["effective_rank"]["one"] == 0
    json.dumps(metrics, allow_nan=False)


def test_watched_patches_are_the_same_every_time_and_the_worst_modality_counts(sampler: PatchSampler) -> None:
    seen: list[Tensor] = []

    def encode(number: int, images: Tensor) -> Tensor:
        seen.append(images)
        return first_image(number, images)

    metrics = Watch(sampler, CPU).metrics(encode)
    assert set(metrics) == {"model_agreement", "model_equivariance_error", "model_effective_rank"}
    assert metrics["model_equivariance_error"] > 0.01
    assert metrics == Watch(sampler, CPU).metrics(encode)
    torch.testing.assert_close(seen[0], seen[len(seen) // 2])
    assert len(seen) == 2 * (2 + 2 * 4)  # twice: both modalities once, then straight and three turns each
    exact = Watch(sampler, CPU).metrics(lambda number, images: images)
    assert exact["model_equivariance_error"] == 0
    assert exact["model_effective_rank"] == pytest.approx(1)


def test_without_a_group_there_is_no_equivariance_to_watch(sampler: PatchSampler, tmp_path: Path) -> None:
    free = PatchSampler(sampler.specimens, sampler.settings, rotation_group("trivial"), 0)
    assert "model_equivariance_error" not in Watch(free, CPU).metrics(first_image)
    assert np.isfinite(list(Watch(free, CPU).metrics(first_image).values())).all()
