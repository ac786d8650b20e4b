"""Measure maps: agreement of two modalities, retrieval, effective rank.

Axes: n patches or cubes, l latent channels, z y x space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comir_hpc.learning.critics import scores


def agreement(maps_u: Tensor, maps_v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Correlate every map of one set with every map of another, over voxels that are valid in both: (n, n)."""
    return scores(maps_u, maps_v, "correlation", mask_u=valid, mask_v=valid)


def foreground_agreement(maps_u: Tensor, maps_v: Tensor, mask: Tensor) -> float:
    """Correlate two sets of maps over all voxels of a mask together, which is how `register` measures agreement.

    Parameters
    ----------
    maps_u, maps_v : (n, l, z, y, x)
        Representations of the two modalities, partners at the same index.
    mask : (n, 1, z, y, x) bool
        Voxels that count.
    """
    u, v = (one.movedim(1, 0).reshape(1, one.shape[1], 1, 1, -1) for one in (maps_u, maps_v))
    kept = mask.reshape(1, 1, 1, 1, -1)
    return float(scores(u, v, "correlation", mask_u=kept, mask_v=kept))


def retrieval(table: Tensor, ignore: Tensor | None = None) -> float:
    """Measure the share of patches, of either modality, whose partner is the most similar of all; in [0, 1].

    Parameters
    ----------
    table : (n, n)
        Similarity of every patch of one modality with every patch of the other, with partners on the diagonal.
    ignore : (n, n) bool, optional
        Pairs of places that are too near each other to be told apart. The diagonal does not matter.
    """
    partner = table.diagonal()
    others = table.clone()
    if ignore is not None:
        others[ignore] = -torch.inf
    others.fill_diagonal_(-torch.inf)
    # Along both dimensions: each modality in turn looks for its partner in the other one.
    found = torch.cat([partner > others.amax(dim=dim) for dim in (0, 1)])
    return float(found.double().mean())


def effective_rank(maps: Tensor, mask: Tensor | None = None) -> float:
    """Count the latent channels that vary independently: exponential of the entropy of the covariance's spectrum.

    It is 1 for one channel, and 0 if nothing varies. If it is less than the number of channels, some channels repeat
    others (Roy and Vetterli 2007).

    Parameters
    ----------
    maps : (n, l, z, y, x)
        Representations.
    mask : (n, 1, z, y, x) bool, optional
        Voxels that count; all by default.
    """
    values = maps.transpose(0, 1).flatten(1).double()
    if mask is not None:
        values = values[:, mask.flatten()]
    # For a single channel, torch.cov gives a scalar; rounding may give eigenvalues a little below zero.
    spectrum = torch.linalg.eigvalsh(torch.cov(values).reshape(len(values), -1)).clamp_min(0)
    if not spectrum.sum() > 0:
        return 0.0
    return float(torch.special.entr(spectrum / spectrum.sum()).sum().exp())
