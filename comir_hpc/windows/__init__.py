"""Slide an encoder over a volume in windows: `infer` does it block by block, `register` in memory."""

from comir_hpc.windows.encoder import Encoder
from comir_hpc.windows.grid import Blend, WindowGrid, plan_windows
from comir_hpc.windows.loading import Symmetry, load_encoder, nearest_level
from comir_hpc.windows.reader import NormalisedReader
from comir_hpc.windows.sweep import Sweep

__all__ = [
    "Blend",
    "Encoder",
    "NormalisedReader",
    "Sweep",
    "Symmetry",
    "WindowGrid",
    "load_encoder",
    "nearest_level",
    "plan_windows",
]
