"""docs/python.md runs from top to bottom, and what it says is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that the page defines."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
            exec(block, found)
        found["place"] = Path.cwd() / found["folder"]
    return found


def test_the_known_transform_is_found(names: dict[str, Any]) -> None:
    assert names["result"].verdict == "PASS"  # which the page says
    assert names["table"].rows[0].tre_voxels < 0.5
    assert names["table"].rows[0].success
    assert (names["place"] / "result" / "report.html").is_file()


def test_the_warped_image_lies_on_the_fixed_one(names: dict[str, Any]) -> None:
    on_fixed, t2w = names["on_fixed"], names["t2w"]
    assert on_fixed.grid.agrees_with(names["t1w"].grid)
    inside = t2w.array > 20
    before = np.corrcoef(names["moving"].array[inside], t2w.array[inside])[0, 1]
    after = np.corrcoef(on_fixed.array[inside], t2w.array[inside])[0, 1]
    assert after > 0.95 > before
    written = sitk.GetArrayFromImage(sitk.ReadImage(names["place"] / "on_fixed.nii.gz"))
    for other in (sitk.GetArrayFromImage(names["on_fixed_itk"]), written):
        np.testing.assert_array_equal(other, on_fixed.array)


def test_points_are_carried_there_and_back(names: dict[str, Any]) -> None:
    np.testing.assert_allclose(names["back"], names["fixed_points"], atol=1e-9)
    expected = names["truth"].apply(names["fixed_points"])
    np.testing.assert_allclose(names["moving_points"], expected, atol=2)  # half a voxel
    moved = names["for_itk"].TransformPoint((10.0, -20.0, 30.0))
    np.testing.assert_allclose(moved, names["moving_points"][0])


def test_encoders_are_trained_and_used(names: dict[str, Any]) -> None:
    assert names["trained"].steps == 3
    assert np.isfinite(names["trained"].loss)
    assert names["representation"].array.shape == names["t1w"].array.shape
    assert names["representation"].array.std() > 0
