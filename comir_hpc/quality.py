"""Measure maps: agreement of two modalities, retrieval, effective rank.

Axes: n patches or cubes, l latent channels, z y x space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comir_hpc.critics import scores


def agreement(maps_u: Tensor, maps_v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Correlation of every map of one set with every map of another over common valid voxels, (n, n)."""
    return scores(maps_u, maps_v, "correlation", mask_u=valid, mask_v=valid)


def foreground_agreement(maps_u: Tensor, maps_v: Tensor, mask: Tensor) -> float:
    """Correlation of two sets of maps over all voxels of a mask together, which is how `register` measures it.

    Parameters
    ----------
    maps_u, maps_v : (n, l, z, y, x)
    mask : (n, 1, z, y, x) bool
    """
    u, v = (one.movedim(1, 0).reshape(1, one.shape[1], 1, 1, -1) for one in (maps_u, maps_v))
    kept = mask.reshape(1, 1, 1, 1, -1)
    return float(scores(u, v, "correlation", mask_u=kept, mask_v=kept))


def retrieval(table: Tensor, ignore: Tensor | None = None) -> float:
    """Share of patches, of either modality, whose partner is the most similar of all.

    Parameters
    ----------
    table : (n, n)
        Similarity of every patch of one modality with every patch of the other, partners on the diagonal.
    ignore : (n, n) bool, optional
        Pairs of places too near each other to be told apart; the diagonal does not matter.
    """
    partner = table.diagonal()
    others = table.clone()
    if ignore is not None:
        others[ignore] = -torch.inf
    others.fill_diagonal_(-torch.inf)
    found = torch.cat([partner > others.amax(dim=dim) for dim in (0, 1)])
    return float(found.double().mean())


def effective_rank(maps: Tensor, mask: Tensor | None = None) -> float:
    """Number of latent channels that vary: exponential of the entropy of the covariance's spectrum.

    1 for one channel; less than the number of channels says that some repeat others (Roy and Vetterli 2007).
    0 if nothing varies.

    Parameters
    ----------
    maps : (n, l, z, y, x)
    mask : (n, 1, z, y, x) bool, optional
        Voxels that count; all by default.
    """
    values = maps.transpose(0, 1).flatten(1).double()
    if mask is not None:
        values = values[:, mask.flatten()]
    spectrum = torch.linalg.eigvalsh(torch.cov(values).reshape(len(values), -1)).clamp_min(0)
    if not spectrum.sum() > 0:
        return 0.0
    return float(torch.special.entr(spectrum / spectrum.sum()).sum().exp())
