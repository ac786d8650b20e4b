"""Memory of a registration besides what its voxels take."""

from __future__ import annotations

import math
import os

import torch

from comir_hpc.config import RegisterSettings
from comir_hpc.geometry import Triple
from comir_hpc.launch import DTYPES
from comir_hpc.networks import predict_encoding
from comir_hpc.windows import Encoder

LIBRARY_BYTES = 24 << 20
"""Memory of what is loaded on the way: measured up to 20 MiB."""
_ENCODING_LIBRARY_BYTES = 24 << 20  # the same of the first window that is encoded
_WINDOW = 3.4  # memory of a window that is encoded, over that of its tensors between layers
_SEARCH_BYTES = 160  # of each thread, for each voxel of a spectrum of the global search


def encoding_bytes(encoder: Encoder | None, shape_zyx: Triple) -> int:
    """Predict the memory for the windows that are encoded at once; 0 without an encoder."""
    if encoder is None:
        return 0
    if encoder.device.type != "cpu":
        return _ENCODING_LIBRARY_BYTES
    window = encoder.windows(shape_zyx).window_zyx
    tensors = predict_encoding(encoder.network, window, DTYPES[encoder.precision])
    return _ENCODING_LIBRARY_BYTES + math.ceil(_WINDOW * torch.get_num_threads() * tensors)


def search_bytes(settings: RegisterSettings) -> int:
    """Predict the memory for the spectra of the global search; its maps are padded to twice their sides."""
    if settings.initial != "global":
        return 0
    threads = settings.threads or len(os.sched_getaffinity(0))
    return threads * _SEARCH_BYTES * (2 * settings.search_voxels) ** 3
