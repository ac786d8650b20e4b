"""Draw pictures of patches and of their representations while a training runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from comir_hpc.host.files import written_whole
from comir_hpc.runs.checkpoints import unwritable


def draw_picture(
    path: Path, images: Sequence[Tensor], maps: Sequence[Tensor], modalities: Sequence[str], step: int
) -> None:
    """Write a PNG of middle slices: one row for each modality and each representation, one column for each patch.

    Parameters
    ----------
    path : Path
        File to write.
    images, maps : sequences of M tensors (n, c, z, y, x) and (n, l, z, y, x)
        Patches and their representations, with group elements undone. The first channel of at most six patches is
        drawn. The representations of all modalities have one grey scale, so that they can be compared.
    modalities : sequence of M str
        Names of the modalities.
    step : int
        Optimiser step, for the title.

    Raises
    ------
    CheckpointError
        If the file cannot be written (a full disk).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(6, len(images[0]))
    rows = [(name, _slices(one, columns)) for name, one in zip(modalities, images, strict=True)]
    seen = [_slices(one, columns) for one in maps]
    # One scale for the representations of all modalities: where they agree, they look alike.
    low, high = np.percentile(np.stack(seen), (1, 99))
    rows += [(f"{name}: representation", one) for name, one in zip(modalities, seen, strict=True)]
    figure = Figure(figsize=(1.5 * columns, 1.6 * len(rows)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, slices) in enumerate(rows):
        limits = {"vmin": low, "vmax": high} if row >= len(modalities) else {}
        for column in range(columns):
            place = axes[row, column]
            place.imshow(slices[column], cmap="gray", **limits)
            place.set_xticks([])
            place.set_yticks([])
        axes[row, 0].set_title(name, loc="left", fontsize=8)
    figure.suptitle(f"step {step}, middle slices, {columns} of {len(images[0])} patches", fontsize=9)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as spare:
            figure.savefig(spare, format="png")
    except OSError as error:
        raise unwritable(path, error) from error


def _slices(tensor: Tensor, count: int) -> np.ndarray[Any, Any]:
    middle = tensor[:count, 0, tensor.shape[2] // 2]
    return middle.detach().float().cpu().numpy()
