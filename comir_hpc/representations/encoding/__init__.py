"""Slide an encoder over a volume in windows: `infer` does it block by block, `register` in memory."""

from comir_hpc.representations.encoding.encoder import Encoder
from comir_hpc.representations.encoding.grid import Blend, WindowGrid, plan_windows
from comir_hpc.representations.encoding.loading import Symmetry, load_encoder, nearest_level
from comir_hpc.representations.encoding.reader import NormalisedReader
from comir_hpc.representations.encoding.sweep import Sweep

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
