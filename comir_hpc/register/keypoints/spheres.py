"""Describe the neighbourhood of a point by spheres around it, so that turning the volume changes nothing.

On every sphere the values are written in spherical harmonics, up to a degree L. A rotation mixes the 2l + 1
coefficients of a degree l among themselves, by the same orthogonal matrix D_l on all spheres and in all channels. So
the products of two spheres' coefficients, summed over the orders of one degree, do not change. They are the
descriptor: the power spectrum over spheres and channels (Kazhdan, Funkhouser and Rusinkiewicz, SGP 2003; with products
of different spheres: Bartok, Kondor and Csanyi, Physical Review B 2013).

The coefficients of two matching points say more: how one is turned against the other. Their correlation under a
rotation R is the sum over l of the products of D_l(R) with the matrix of all products of coefficients of degree l. One
product of matrices gives it for thousands of rotations and pairs of points.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import sph_harm_y

from comir_hpc.space.grid import FloatArray
from comir_hpc.space.rotations import reverse_axes, so3_grid

Array32 = NDArray[np.float32]

DEGREE = 4
"""Largest degree of the spherical harmonics."""
_POLAR, _AZIMUTHS = 6, 12  # points of the quadrature: exact for products of two harmonics of that degree
_TURNS = 1500  # rotations under which a pair of keypoints is compared: 15 degrees to the nearest one at most
_BLOCK = 2048  # pairs that are compared at once


@dataclass(frozen=True, eq=False)
class Spheres:
    """Directions on the unit sphere, with what is needed to write values there in real spherical harmonics.

    Attributes
    ----------
    directions_xyz : (P, 3)
        Directions.
    analysis : (P, B)
        Carries values at the directions to the B = (DEGREE + 1)^2 coefficients.
    """

    directions_xyz: FloatArray
    analysis: FloatArray

    @cached_property
    def rotations_xyz(self) -> FloatArray:
        """Rotations (K, 3, 3) under which pairs are compared."""
        return reverse_axes(so3_grid(_TURNS))

    @cached_property
    def mixtures(self) -> Array32:
        """Entries of D_l(R) of all degrees in a row, (K, sum of (2l + 1)^2), of each of the rotations.

        D carries the coefficients of a function f to those of f(R^T x).
        """
        turned = np.einsum("kji,pj->kpi", self.rotations_xyz, self.directions_xyz)
        basis = _harmonics(turned.reshape(-1, 3)).reshape(*turned.shape[:2], -1)
        full = np.einsum("pb,kpc->kbc", self.analysis, basis)
        return np.concatenate([full[:, a:b, a:b].reshape(_TURNS, -1) for a, b in _bands()], axis=1).astype(
            np.float32
        )


@lru_cache(maxsize=1)
def spheres() -> Spheres:
    """Make the directions of a product of Gauss and Legendre's points and even azimuths."""
    cosines, weights = np.polynomial.legendre.leggauss(_POLAR)
    azimuths = 2 * np.pi * np.arange(_AZIMUTHS) / _AZIMUTHS
    cosine, azimuth = (a.ravel() for a in np.meshgrid(cosines, azimuths, indexing="ij"))
    sine = np.sqrt(1 - cosine**2)
    directions = np.stack([sine * np.cos(azimuth), sine * np.sin(azimuth), cosine], axis=1)
    weight = np.repeat(weights, _AZIMUTHS) * 2 * np.pi / _AZIMUTHS
    return Spheres(directions, _harmonics(directions) * weight[:, None])


def invariants(coefficients: Array32) -> Array32:
    """Make the descriptors (N, D), of length 1, of coefficients (N, K, B) on K spheres of all channels."""
    first, second = np.triu_indices(coefficients.shape[1])
    parts = []
    for start, stop in _bands():
        band = coefficients[..., start:stop]
        products = np.einsum("nib,njb->nij", band, band)[:, first, second]
        parts.append(products * np.where(first == second, 1.0, np.sqrt(2.0)).astype(np.float32))
    power = np.concatenate(parts, axis=1)
    # Products are squares of values: their roots keep a few large ones from deciding everything.
    rooted = np.sign(power) * np.sqrt(np.abs(power))
    return np.asarray(
        rooted / np.maximum(np.linalg.norm(rooted, axis=1, keepdims=True), 1e-12), dtype=np.float32
    )


def turned_likeness(
    fixed: Array32, moving: Array32, pairs: NDArray[np.int64]
) -> tuple[FloatArray, FloatArray]:
    """Find how pairs of points are turned against each other.

    Parameters
    ----------
    fixed, moving : (F, K, B), (M, K, B) float32
        Coefficients of both volumes' points, each of length 1.
    pairs : (N, 2)
        Numbers of the points of each pair.

    Returns
    -------
    likeness : (N,)
        Correlation under the best rotation.
    rotations_xyz : (N, 3, 3)
        That rotation, from fixed to moving.
    """
    mixtures = spheres().mixtures
    best, values = np.zeros(len(pairs), dtype=np.int64), np.zeros(len(pairs))
    for start in range(0, len(pairs), _BLOCK):
        some = pairs[start : start + _BLOCK]
        one, other = fixed[some[:, 0]], moving[some[:, 1]]
        products = [np.einsum("nkb,nkc->nbc", other[..., a:b], one[..., a:b]) for a, b in _bands()]
        found = np.concatenate([p.reshape(len(some), -1) for p in products], axis=1) @ mixtures.T
        best[start : start + _BLOCK] = found.argmax(axis=1)
        values[start : start + _BLOCK] = found.max(axis=1)
    return values, spheres().rotations_xyz[best]


def _bands() -> list[tuple[int, int]]:
    """List where the coefficients of each degree begin and end."""
    return [(degree**2, (degree + 1) ** 2) for degree in range(DEGREE + 1)]


def _harmonics(directions_xyz: FloatArray) -> FloatArray:
    """Evaluate the real spherical harmonics, (P, B), which are orthonormal on the sphere."""
    x, y, z = directions_xyz.T
    polar, azimuth = np.arccos(np.clip(z, -1, 1)), np.arctan2(y, x)
    columns = []
    for degree in range(DEGREE + 1):
        for order in range(-degree, degree + 1):
            complex_one = sph_harm_y(degree, abs(order), polar, azimuth)
            part = complex_one.imag if order < 0 else complex_one.real
            columns.append(part * (np.sqrt(2.0) if order else 1.0))
    return np.stack(columns, axis=1)
