"""Counts that do not depend on the order of blocks, statistics against numpy, and a threshold that finds specimens."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from comir_hpc.data.embedded import Displacement, degrade, displace, embedded_volume, phantom_pair
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.histogram import Histogram, foreground_threshold, intensity_of


def image(dtype: str = "float64") -> np.ndarray:
    """A bright ball of varied values in dark noise."""
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 50, 36)), indexing="ij")
    inside = z**2 + y**2 + x**2 < 0.6
    return (
        np.where(inside, rng.normal(150, 25, z.shape), rng.normal(10, 2, z.shape)).clip(0, 250).astype(dtype)
    )


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [
        *((d, 1, 0) for d in ("float16", "float32", "float64", "int32", "uint32", "int64")),
        *((d, 1000, -50000) for d in ("float32", "float64", "int32", "int64")),
        *((d, 0.01, 300) for d in ("float32", "float64")),
        ("uint32", 10_000_000, 0),
    ],
)
def test_statistics_of_wide_types(dtype: str, scale: float, offset: float) -> None:
    """Right to 0.1 % of the spread, wherever the values lie."""
    values = (image("float64") * scale + offset).astype(dtype)
    histogram = Histogram(dtype, float(np.median(values.astype(np.float64))))
    histogram.add(values[:13])
    histogram.add(values[13:])
    found = intensity_of(histogram)
    wide = values.astype(np.float64)
    inside = wide[wide > found.foreground_above]
    low = np.percentile(wide, 0.1, method="inverted_cdf")
    high = np.percentile(inside, 99.9, method="inverted_cdf")
    clipped = np.clip(inside, low, high)
    tolerance = 1e-3 * (wide.max() - wide.min())
    assert found.low == pytest.approx(low, abs=tolerance)
    assert found.high == pytest.approx(high, abs=tolerance)
    assert found.mean == pytest.approx(clipped.mean(), abs=tolerance)
    assert found.std == pytest.approx(clipped.std(), abs=tolerance)
    assert (histogram.minimum, histogram.maximum) == (wide.min(), wide.max())
    assert abs(np.mean(wide > found.foreground_above) - np.mean(image("float64") > 80)) < 0.01


@pytest.mark.parametrize("dtype", ["int8", "uint16", "float16", "float32", "int32", "float64"])
def test_histograms_merge_in_any_order(dtype: str) -> None:
    values = np.random.default_rng(0).normal(0, 100, 5000).astype(dtype)
    whole, parts = Histogram(dtype, 3.0), Histogram(dtype, 3.0)
    whole.add(values)
    for piece in (values[4000:], values[:1000], values[1000:4000]):
        one = Histogram(dtype, 3.0)
        one.add(piece)
        parts.merge(one.record())
    assert intensity_of(whole) == intensity_of(parts)
    found, counts = whole.values()
    assert counts.sum() == values.size
    assert np.all(np.diff(found) > 0)
    if whole.exact:
        np.testing.assert_array_equal(found, np.unique(values.astype(np.float64)))


def test_far_outliers_do_not_blunt_the_statistics() -> None:
    values = np.append(image("float32").ravel(), np.float32([1e9, -1e12]))
    histogram = Histogram("float32", float(np.median(values)))
    histogram.add(values)
    found = intensity_of(histogram)
    assert 20 < found.foreground_above < 80
    assert found.high < 260


@pytest.mark.parametrize("values", [[0, 1], [0, 255], [-3, 7]])
def test_binary_images_can_be_normalised(values: list[int]) -> None:
    histogram = Histogram("int16")
    histogram.add(np.repeat(np.array(values, np.int16), (700, 300)))
    found = intensity_of(histogram)
    assert (found.low, found.high) == tuple(values)
    assert found.std > 0
    assert values[0] <= found.foreground_above < values[1]


def test_one_bright_voxel_is_enough_to_normalise() -> None:
    histogram = Histogram("uint8")
    histogram.add(np.append(np.zeros(100_000, np.uint8), np.uint8(9)))
    found = intensity_of(histogram)
    assert found.std > 0
    assert found.foreground_above < 9


@pytest.mark.parametrize("modality", ["t1w", "t2w"])
def test_foreground_of_a_head(modality: str) -> None:
    """Air stays out and dark tissue in, with empty corners, a bias field and noise as well."""
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(embedded_volume(modality))))
    grid = Grid(values.shape, (2.0, 2.0, 2.0))
    rng = np.random.default_rng(1)
    moved, _, _ = displace(values, grid, Displacement.draw(rng, values.shape), 112)
    shares = {}
    for name, volume in (("plain", values), ("moved", moved), ("degraded", degrade(moved, rng))):
        histogram = Histogram(volume.dtype)
        histogram.add(volume)
        mask = volume > foreground_threshold(*histogram.values())
        shares[name] = mask.sum() / values.size
        assert mask[:6, :6, :6].mean() == 0
        assert mask[-6:, :6, -6:].mean() < 0.01
    assert 0.35 < shares["plain"] < 0.5
    # The turned head is cut a little by the field of view.
    assert shares["moved"] == pytest.approx(shares["plain"], abs=0.12)
    assert shares["degraded"] == pytest.approx(shares["plain"], abs=0.12)


def test_foreground_of_a_phantom() -> None:
    for volume in phantom_pair((48, 48, 48)):
        histogram = Histogram(volume.dtype)
        histogram.add(volume)
        mask = volume > foreground_threshold(*histogram.values())
        # An ellipsoid of 0.85 of the half sides, less its blurred rim.
        assert mask.mean() == pytest.approx(np.pi / 6 * 0.85**3, abs=0.03)
