"""A run folder as `train` leaves it, with weights from a seed instead of from training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from comir_hpc.config import NetworkSettings
from comir_hpc.networks import build_network, network_options


def write_run(
    run: Path,
    modalities: tuple[str, ...] = ("one", "two"),
    *,
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    group: str = "O",
    in_channels: int = 1,
    seed: int = 0,
    **network: Any,
) -> Path:
    """Write model.json and the weights of small encoders whose running statistics are those of some data."""
    settings = NetworkSettings(**{"widths": (4, 8), "convs_per_level": 1, **network})
    options = network_options(settings, spacing_zyx=spacing, group=group)
    torch.manual_seed(seed)
    (run / "model").mkdir(parents=True, exist_ok=True)
    for name in modalities:
        encoder = build_network(
            settings.name, in_channels=in_channels, latent_channels=settings.latent_channels, **options
        )
        encoder.train()
        with torch.no_grad():
            for _ in range(3):
                encoder(torch.randn(2, in_channels, 16, 16, 16))
        torch.save(encoder.state_dict(), run / "model" / f"{name}.pt")
    record = {
        "version": "0",
        "modalities": list(modalities),
        "network": settings.model_dump(mode="json"),
        "options": options,
        "in_channels": dict.fromkeys(modalities, in_channels),
        "latent_channels": settings.latent_channels,
        "spacing_mm": list(spacing),
        "group": group,
        "patch": [16, 16, 16],
        "step": 7,
        "reference": {"agreement": 0.9},
    }
    (run / "model.json").write_text(json.dumps(record), encoding="utf-8")
    return run
