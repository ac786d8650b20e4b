"""What the CPU can do that the tests run on: some kernels, and so some figures, are others without it."""

from __future__ import annotations

import torch

from comir_hpc.host.launch import choose_precision

HAS_BF16 = choose_precision("auto", torch.device("cpu")) == "bf16"
"""Whether it multiplies bf16. CPUs without these instructions mostly have no AVX-512 either, and torch takes kernels
there that keep more and leave channels_last."""
