"""Settings of `comir-hpc demo`."""

from __future__ import annotations

from pathlib import Path

from comir_hpc.config.base import Input, Output, Seed, Settings
from comir_hpc.config.words import Displacement


class DemoSettings(Settings):
    """`comir-hpc demo`: the main job on the embedded pair."""

    out: Output[Path] = Path("demo")
    """Folder for everything that the demo writes."""
    seed: Seed = 0
    """Seed of the displacement, the bias field and the noise."""
    train_seed: Seed = 0
    """Seed of the training."""
    model: Input[Path | None] = None
    """Trained run that is used instead of a training."""
    displacement: Displacement = "so3"
    """How the moving volume is displaced: turned anywhere in SO(3) and shifted (so3), or not at all (none)."""
