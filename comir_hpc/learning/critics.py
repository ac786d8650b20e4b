"""Measure how alike two representations are, for every pair of many, by matrix products. Such a measure is a critic.

Every critic is symmetric, and does not change when both maps are turned alike. It is a function of a few sums of
products of the two maps over jointly valid voxels. Over all pairs, such sums are matrix products of flattened maps.
So memory grows with N*V (the maps) and N*N (the scores), never with N*N*V. Definitions: docs/theory.md, sections 3
and 7.

Shapes: A and B maps, N of one set, L latent channels, V = Z*Y*X voxels.

Everything runs in float32, or in float64 when the maps are float64; autocast changes nothing. TF32 is the caller's
choice (`torch.set_float32_matmul_precision`). At "highest", torch's default, products are exact float32.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from comir_hpc.errors import ConfigError

# Below this mean square a map counts as constant. Its direction is then only noise, and dividing by its length would
# turn rounding errors into gradients.
FLAT = 1e-8
# Rows of blocks that a symmetric product is made of. With 4 rows, 10 of the 16 blocks are computed.
_GRAM_BLOCKS = 4


@dataclass(frozen=True)
class Maps:
    """Maps (..., L, Z, Y, X), or flattened (..., L, V).

    They are zero where `valid`, bool (..., 1, Z, Y, X) or (..., 1, V), is false. Without a mask it is None.
    """

    values: Tensor
    valid: Tensor | None

    @cached_property
    def energy(self) -> Tensor:
        """Return the sum of squares of flattened maps over channels and voxels, (...)."""
        # A norm takes one pass over the maps, and its gradient another one. Squares and their sum would take five.
        norm: Tensor = torch.linalg.vector_norm(self.values, dim=(-2, -1))
        return norm.square()

    @cached_property
    def energy_map(self) -> Tensor:
        """Return the sum of squares of flattened maps over channels, (..., V)."""
        return self.values.square().sum(dim=-2)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Maps:
        """Return the maps after an operation that changes the layout of values and of validity in the same way."""
        return Maps(function(self.values), None if self.valid is None else function(self.valid))


@dataclass(frozen=True)
class PairSums:
    """Sums over the jointly valid voxels of pairs of maps u and v; their shapes broadcast to that of the pairs."""

    count: Tensor
    """Number of jointly valid voxels."""
    channels: int
    """Number of latent channels, L."""
    cross: Tensor
    """Sum of u v over voxels and channels."""
    square_u: Tensor
    """Sum of u^2 over voxels and channels."""
    square_v: Tensor
    """Sum of v^2 over voxels and channels."""

    @property
    def num_values(self) -> Tensor:
        """Number of values that each sum runs over; at least one voxel's, because it is divided by."""
        return self.channels * self.count.clamp_min(1)

    def floor(self, energy: Tensor) -> Tensor:
        """Keep a sum of squares away from zero, so that constant maps have finite scores and gradients."""
        return torch.maximum(energy, FLAT * self.num_values)

    def centred(self, sums_u: Tensor, sums_v: Tensor) -> PairSums:
        """Take off each channel's mean over the joint voxels; `sums_u` and `sums_v` are sums of channels, (L, ...)."""
        count = self.count.clamp_min(1)
        # The difference of two nearly equal sums holds mostly rounding errors. So the result is kept above 100 times
        # the rounding of the sum that it comes from.
        rounding = 100 * torch.finfo(self.cross.dtype).eps
        return PairSums(
            self.count,
            self.channels,
            self.cross - (sums_u * sums_v).sum(dim=0) / count,
            torch.maximum(self.square_u - sums_u.square().sum(dim=0) / count, rounding * self.square_u),
            torch.maximum(self.square_v - sums_v.square().sum(dim=0) / count, rounding * self.square_v),
        )


def _mse(sums: PairSums) -> Tensor:
    return -(sums.square_u + sums.square_v - 2 * sums.cross) / sums.num_values


def _cosine(sums: PairSums) -> Tensor:
    return sums.cross * sums.floor(sums.square_u).rsqrt() * sums.floor(sums.square_v).rsqrt()


def _tanimoto(sums: PairSums) -> Tensor:
    return sums.cross / sums.floor(sums.square_u + sums.square_v - sums.cross)


_CRITICS: dict[str, Callable[[PairSums], Tensor]] = {
    "mse": _mse,
    "cosine": _cosine,
    "correlation": _cosine,  # of sums that `all_pairs` and `partners` have centred
    "tanimoto": _tanimoto,
}
CRITICS = tuple(_CRITICS)


def score(sums: PairSums, critic: str) -> Tensor:
    """Return the critic's value for sums made for it by `all_pairs` or `partners`; 0 where no voxel is shared."""
    return _CRITICS[critic](sums)


def require_known(kind: str, name: str, names: Sequence[str]) -> None:
    """Refuse a name that is not among `names`, and say which one is nearest.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"unknown {kind} {name!r}; {hint}expected one of {', '.join(names)}")


def scores(
    maps_u: Tensor, maps_v: Tensor, critic: str, *, mask_u: Tensor | None = None, mask_v: Tensor | None = None
) -> Tensor:
    """Score every map of one set with every map of another, without temperature.

    ============= =======================================================================
    mse           minus the mean squared difference over channels and voxels
    cosine        <u, v> / (|u| |v|), over channels and voxels together
    correlation   the cosine after each channel's mean is taken off
    tanimoto      <u, v> / (|u|^2 + |v|^2 - <u, v>)
    ============= =======================================================================

    Without masks, everything but the norms comes from one matrix product, <u_i, v_j>. With masks m, every sum of a pair
    runs over its jointly valid voxels m_i m_j. It is again a matrix product, of maps that are zero where invalid. The
    cross term is <m_i u_i, m_j v_j>, and the count is m_i . m_j. The energies are (m_i |u_i|^2) . m_j and
    m_i . (m_j |v_j|^2). The sums of a channel are (m_i u_i) . m_j and m_i . (m_j v_j).

    Parameters
    ----------
    maps_u : (A, L, Z, Y, X)
        The first set of maps.
    maps_v : (B, L, Z, Y, X)
        The second set of maps.
    critic : one of `CRITICS`
        Name of the measure.
    mask_u, mask_v : bool (A, 1, Z, Y, X) and (B, 1, Z, Y, X), both or none
        True where a voxel is valid, in the frame of the maps (any rotation is undone). Invalid voxels may hold any
        value, also NaN.

    Returns
    -------
    (A, B) float32, or float64 when the maps are. A pair that shares no valid voxel scores 0.

    Raises
    ------
    ConfigError
        If the critic is unknown or shapes disagree.
    """
    require_known("critic", critic, CRITICS)
    if (mask_u is None) != (mask_v is None):
        raise ConfigError("one of two sets of maps has a mask; give both sets a mask, or none")
    masks = None if mask_u is None or mask_v is None else (mask_u, mask_v)
    require_shapes((maps_u, maps_v), masks)
    with torch.autocast(maps_u.device.type, enabled=False):
        u, v = (maps.apply(lambda x: x.flatten(-3)) for maps in prepare((maps_u, maps_v), masks, critic))
        return score(all_pairs(u, v, critic), critic)


def exact(maps: Tensor) -> Tensor:
    """Return maps in the precision of the loss: float64 stays, anything else becomes float32."""
    return maps if maps.dtype == torch.float64 else maps.float()


def require_shapes(maps: Sequence[Tensor], masks: Sequence[Tensor] | None) -> None:
    """Refuse sets of maps that differ in more than their number, and masks that do not belong to them.

    Raises
    ------
    ConfigError
        If shapes differ, or a mask has another shape than its maps or is not boolean.
    """
    shapes = [tuple(one.shape) for one in maps]
    if any(len(shape) != 5 or shape[1:] != shapes[0][1:] for shape in shapes):
        raise ConfigError(f"maps of shapes {shapes}; expected (n, channels, z, y, x), alike but for n")
    if masks is None:
        return
    expected = [(shape[0], 1, *shape[2:]) for shape in shapes]
    if [tuple(mask.shape) for mask in masks] != expected or any(mask.dtype != torch.bool for mask in masks):
        found = [(tuple(mask.shape), str(mask.dtype)) for mask in masks]
        raise ConfigError(f"masks are {found}; expected boolean ones of shapes {expected}")


def prepare(maps: Sequence[Tensor], masks: Sequence[Tensor] | None, critic: str) -> list[Maps]:
    """Bring sets of maps to the loss's precision, set invalid voxels to zero, and take off what a critic cannot see.

    |u|^2 + |v|^2 - 2 <u, v> loses its digits when the maps share a large offset. The mse critic does not see an offset
    that all maps share, and the correlation does not see one of each map. So these means are taken off first, as
    constants without gradient. Values and gradients stay what they would be in exact arithmetic.
    """
    each = [Maps(exact(one), None if masks is None else masks[i]) for i, one in enumerate(maps)]
    if critic in ("mse", "correlation"):
        means = [_channel_means(one) for one in each]
        if critic == "mse":
            means = [torch.cat(means).mean(dim=0)] * len(means)
        each = [Maps(one.values - mean, one.valid) for one, mean in zip(each, means, strict=True)]
    return [
        one if one.valid is None else Maps(one.values.masked_fill(~one.valid, 0), one.valid) for one in each
    ]


def _channel_means(maps: Maps) -> Tensor:
    values, voxels = maps.values.detach(), (-3, -2, -1)
    if maps.valid is None:
        return values.mean(dim=voxels, keepdim=True)
    total = values.masked_fill(~maps.valid, 0).sum(dim=voxels, keepdim=True)
    return total / maps.valid.sum(dim=voxels, keepdim=True).clamp_min(1)


class _Gram(torch.autograd.Function):
    """Compute X X^T from little more than the half above the diagonal; the gradient is one product, (G + G^T) X."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        product = rows.new_empty(len(rows), len(rows))
        size = -(-len(rows) // _GRAM_BLOCKS)
        for start in range(0, len(rows), size):
            block = rows[start : start + size] @ rows[start:].T
            product[start : start + size, start:] = block
            product[start:, start : start + size] = block.T
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        rows: Tensor = ctx.saved_tensors[0]
        return (grad + grad.T) @ rows


def _gram(rows: Tensor) -> Tensor:
    product: Tensor = _Gram.apply(rows)  # type: ignore[no-untyped-call]
    return product


def all_pairs(u: Maps, v: Maps, critic: str) -> PairSums:
    """Sum up over every pair of flattened maps, (A, L, V) and (B, L, V), by matrix products (`scores` says which)."""
    channels, voxels = u.values.shape[1:]
    rows_u, rows_v = u.values.flatten(1), v.values.flatten(1)
    cross = _gram(rows_u) if u is v else rows_u @ rows_v.T
    if u.valid is None or v.valid is None:
        # Without masks the energy of a map is the same for all its partners: one number a map, not one a pair.
        count = cross.new_tensor(float(voxels))
        sums = PairSums(count, channels, cross, u.energy[:, None], v.energy[None])
        if critic != "correlation":
            return sums
        return sums.centred(u.values.sum(dim=2).T[:, :, None], v.values.sum(dim=2).T[:, None])
    within_u, within_v = _Within(u.valid, cross.dtype), _Within(v.valid, cross.dtype)
    # If both sets are one, both tables of sums are the same; the second one is used transposed below.
    over_v = within_v.sums(u.energy_map)
    over_u = over_v if u is v else within_u.sums(v.energy_map)
    sums = PairSums(within_v.sums(u.valid[:, 0].to(cross.dtype)), channels, cross, over_v, over_u.T)
    if critic != "correlation":
        return sums
    over_v = within_v.sums(u.values.transpose(0, 1))
    over_u = over_v if u is v else within_u.sums(v.values.transpose(0, 1))
    return sums.centred(over_v, over_u.transpose(1, 2))


class _Within:
    """Sums of many maps over the voxels of many masks, bool (B, 1, V)."""

    def __init__(self, valid: Tensor, dtype: torch.dtype) -> None:
        masks = valid[:, 0]
        self._column: Tensor | None = None
        if valid.device.type == "cpu":  # a GPU would have to be waited for
            # Most masks leave nothing out. They share one column, the first, which makes the product smaller.
            partial = ~masks.all(dim=-1)
            if not partial.all():
                self._column = torch.where(partial, partial.cumsum(dim=0), 0)
                masks = torch.cat([torch.ones_like(masks[:1]), masks[partial]])
        self._columns = masks.to(dtype)

    def sums(self, rows: Tensor) -> Tensor:
        """Sum rows (..., A, V), which are zero outside their own masks, over every mask: (..., A, B)."""
        sums = rows @ self._columns.T
        return sums if self._column is None else sums.index_select(-1, self._column)


def partners(u: Maps, v: Maps, critic: str) -> PairSums:
    """Sum up over each flattened map and the one of the same index; both sets are (A, L, V)."""
    channels, voxels = u.values.shape[1:]
    if u.valid is None or v.valid is None:
        count = u.values.new_tensor(float(voxels))
    else:
        joint = (u.valid & v.valid).to(u.values.dtype)
        count = joint.sum(dim=(1, 2))
        u, v = (Maps(one.values * joint, None) for one in (u, v))
    cross = torch.linalg.vecdot(u.values.flatten(1), v.values.flatten(1))
    sums = PairSums(count, channels, cross, u.energy, v.energy)
    return sums if critic != "correlation" else sums.centred(u.values.sum(dim=2).T, v.values.sum(dim=2).T)
