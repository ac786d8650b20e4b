"""Means and modes against slow references, and levels that become isotropic."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comir_hpc.space.grid import Grid
from comir_hpc.volumes.pyramid import downsample, planned_levels


def slow_mean(values: np.ndarray, step: tuple[int, int, int]) -> np.ndarray:
    shape = [-(-n // s) for n, s in zip(values.shape[1:], step, strict=True)]
    out = np.zeros((len(values), *shape), values.dtype)
    for c, z, y, x in np.ndindex(*out.shape):
        where = [
            np.minimum(np.arange(i * s, i * s + s), n - 1)
            for i, s, n in zip((z, y, x), step, values.shape[1:], strict=True)
        ]
        mean = values[c][np.ix_(*where)].astype(np.longdouble).mean()
        out[c, z, y, x] = np.rint(mean) if values.dtype.kind in "iu" else mean
    return out


@given(
    st.tuples(st.integers(1, 2), *[st.integers(1, 7)] * 3),
    st.tuples(*[st.sampled_from([1, 2])] * 3),
    st.sampled_from(["uint8", "int16", "uint16", "int32", "uint32", "float16", "float32", "float64"]),
)
@settings(max_examples=100, deadline=None)
def test_downsampling_is_the_mean(shape: tuple[int, ...], step: tuple[int, int, int], dtype: str) -> None:
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        values = rng.normal(0, 100, shape).astype(dtype)
        np.testing.assert_allclose(
            downsample(values, step),
            slow_mean(values, step),
            rtol=1e-3 if dtype == "float16" else 1e-5,
            atol=1e-3,
        )
        return
    info = np.iinfo(dtype)
    # The whole range: sums must not overflow, and 32-bit means must not go through float32.
    values = rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
    np.testing.assert_array_equal(downsample(values, step), slow_mean(values, step))
    full = np.full(shape, info.max, dtype)
    assert (downsample(full, step) == info.max).all()


def test_labels_take_the_most_frequent_value() -> None:
    block = np.array([[[5, 5], [3, 3]], [[3, 9], [9, 9]]], np.int32)[None]
    # 3 and 9 are equally frequent: the first that occurs is taken.
    assert downsample(block, (2, 2, 2), labels=True).ravel() == [3]
    assert downsample(block, (1, 2, 2), labels=True).ravel().tolist() == [5, 9]
    labels = np.random.default_rng(0).integers(0, 4, (1, 9, 8, 7)).astype(np.uint8)
    found = downsample(labels, (2, 2, 2), labels=True)
    padded = np.pad(labels, ((0, 0), (0, 1), (0, 0), (0, 1)), mode="edge")
    for z, y, x in np.ndindex(*found.shape[1:]):
        values, counts = np.unique(
            padded[0, 2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2], return_counts=True
        )
        assert counts[values == found[0, z, y, x]] == counts.max()


@given(st.tuples(*[st.integers(1, 3000)] * 3), st.tuples(*[st.floats(0.01, 100)] * 3))
@settings(max_examples=200, deadline=None)
def test_levels_end_small_and_become_isotropic(
    shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    grid = Grid(shape, spacing)
    factors = planned_levels(grid)
    assert factors[0] == (1, 1, 1)
    assert max(grid.downsampled(factors[-1]).shape_zyx) <= 32
    for before, after in itertools.pairwise(factors):
        steps = [b // a for a, b in zip(before, after, strict=True)]
        assert set(steps) <= {1, 2}
        assert 2 in steps
        level = grid.downsampled(before)
        halved = [s for s, step in zip(level.spacing_zyx, steps, strict=True) if step == 2]
        others = [
            s
            for s, step, n in zip(level.spacing_zyx, steps, level.shape_zyx, strict=True)
            if step == 1 and n > 1
        ]
        assert max(halved) <= min(halved) * 1.42
        assert not others or min(others) > min(halved)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_the_largest_integers_do_not_wrap_around(dtype: type[np.integer[Any]]) -> None:
    values = np.full((1, 4, 4, 4), np.iinfo(dtype).max, dtype=dtype)
    coarse = downsample(values, (2, 2, 2))
    assert coarse.dtype == dtype
    assert coarse.min() >= int(np.iinfo(dtype).max) - 2**12
