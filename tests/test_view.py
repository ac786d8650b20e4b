"""The page of `view`: what is in it, and what headless Chromium shows of it without any network."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from browser import page_source
from registration_cases import OBLIQUE, seen, specimen, store, turn
from test_conventions import bspline

from comir_hpc import __version__
from comir_hpc.config.view import ViewSettings
from comir_hpc.errors import ComirError, ConfigError, VolumeError
from comir_hpc.recipes.view import NIIVUE_SHA256, view
from comir_hpc.runs.record import make_record
from comir_hpc.runs.result import Result, write_result
from comir_hpc.space.grid import Grid
from comir_hpc.transforms import (
    Affine,
    Composite,
    ItkTransform,
    PointMap,
    itk_image,
    save_itk,
    save_transform,
)

WEBGL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")
FIXED = Grid((20, 24, 18), (2.0, 1.5, 2.0), (5.0, -8.0, 20.0), OBLIQUE)
MOVING = Grid((22, 22, 22), (2.0, 2.0, 2.0), tuple(FIXED.centre_mm - 20.0))
TRUTH = Affine.rigid(turn(20), (3.0, -1.0, 2.0), FIXED.centre_mm)
POINT = FIXED.world_mm((9, 11, 8))


def result(folder: Path, transform: PointMap | None, *, fixed: Grid = FIXED, verdict: str = "PASS") -> Path:
    """A folder as `register` leaves it: two small stores, the transform, result.json."""
    values = np.round(100 + 50 * specimen(fixed.shape_zyx)[0]).astype(np.int16)
    store(folder / "fixed.zarr", values, fixed, foreground_above=60.0)
    shown = TRUTH if transform is None else transform
    moved = seen(values, fixed, MOVING, shown) if isinstance(shown, Affine) else np.ones(MOVING.shape_zyx)
    store(folder / "moving.zarr", moved.astype(np.float32), MOVING, foreground_above=60.0)
    record: dict[str, Any] = {
        "format": 1, "version": __version__, "verdict": verdict, "matrix_lps_mm": None,
        "inputs": {n: {"path": str(folder / f"{n}.zarr")} for n in ("fixed", "moving")},
    }  # fmt: skip
    if isinstance(transform, Affine):
        save_transform(transform, folder)
        record["matrix_lps_mm"] = transform.matrix_mm.tolist()
    elif transform is not None:
        save_itk(transform, folder / "transform.h5")
    write_result(folder, make_record(Result, record))
    return folder


def content_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="content">(.*?)</script>', page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found is not None
    content: dict[str, Any] = json.loads(found[1])
    return content


def image_of(record: dict[str, Any], path: Path) -> nibabel.Nifti1Image:
    path.write_bytes(gzip.decompress(base64.b64decode(record["nifti"])))
    return nibabel.load(path)


def test_the_page_holds_the_volumes_where_they_lie(tmp_path: Path) -> None:
    done = view(ViewSettings(shown=(result(tmp_path / "r", TRUTH),), open_page=False))
    assert done.path == tmp_path / "r" / "view.html"
    content = content_of(done.path)
    assert [one["name"] for one in content["over"]] == ["moving before", "moving after"]
    np.testing.assert_allclose(content["matrix"], TRUTH.matrix_mm, atol=1e-12)
    fixed = image_of(content["fixed"], tmp_path / "f.nii")
    assert fixed.get_data_dtype() == np.int16
    world = fixed.affine @ (8, 11, 9, 1)
    np.testing.assert_allclose(world[:3] * (-1, -1, 1), POINT, atol=1e-4)
    after = image_of(content["over"][1], tmp_path / "a.nii")
    one, two = np.asarray(fixed.dataobj, float), np.asarray(after.dataobj, float)
    inner = (slice(5, -5),) * 3
    assert np.corrcoef(one[inner].ravel(), two[inner].ravel())[0, 1] > 0.9
    before = np.asarray(image_of(content["over"][0], tmp_path / "b.nii").dataobj, float)
    assert np.corrcoef(one[inner].ravel(), before[inner].ravel())[0, 1] < 0.85


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = view(ViewSettings(shown=(result(tmp_path / "r", TRUTH),))).path.read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", text)
    assert "default-src 'none'" in text
    assert text.count("</script>") == 3
    assert len(NIIVUE_SHA256) == 64
    assert view(ViewSettings(shown=(tmp_path / "r",))).path.read_text(encoding="utf-8") == text


def test_a_bent_transform_is_sampled(tmp_path: Path) -> None:
    bent = Composite((bspline(FIXED), TRUTH))
    content = content_of(view(ViewSettings(shown=(result(tmp_path / "r", bent),))).path)
    field = content["field"]
    assert field["shape"] == list(FIXED.shape_zyx)
    values = np.reshape(field["values"], (*FIXED.shape_zyx, 3))
    np.testing.assert_allclose(values[9, 11, 8], bent.apply(POINT) - POINT, atol=1e-3)
    place = np.asarray(field["indexFromLps"]) @ (*POINT, 1)
    np.testing.assert_allclose(place[:3], (9, 11, 8), atol=1e-6)


def test_volumes_of_any_kind_and_unit(tmp_path: Path) -> None:
    small = Grid((6, 7, 8), (2.0, 1.0, 1.0), (10.0, 0.0, 0.0), unit="um")
    labels = np.random.default_rng(0).integers(0, 2**40, small.shape_zyx)
    store(tmp_path / "labels.zarr", labels, small, kind="labels")
    sitk.WriteImage(
        itk_image(np.random.default_rng(1).random((9, 9, 9)), Grid((9, 9, 9), (1, 1, 1))),
        str(tmp_path / "v.nrrd"),
    )
    done = view(ViewSettings(shown=(tmp_path / "labels.zarr", tmp_path / "v.nrrd")))
    assert done.path == tmp_path / "labels-view.html"
    content = content_of(done.path)
    assert (content["unit"], content["mmPerUnit"], content["sameGrid"]) == ("um", 1e-3, False)
    assert "matrix" not in content
    shown = image_of(content["fixed"], tmp_path / "l.nii")
    np.testing.assert_array_equal(np.asarray(shown.dataobj).T, labels)  # exact beyond 2^24
    np.testing.assert_allclose(shown.affine[:3, 3], (-10, 0, 0))
    assert [p.name for p in tmp_path.glob("*.zarr")] == ["labels.zarr"]  # nothing is left of the ingest


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    failed = result(tmp_path / "r", None, verdict="FAIL")
    done = view(ViewSettings(shown=(failed,)))
    assert "no transform (verdict FAIL)" in done.notes[0]
    assert [one["name"] for one in content_of(done.path)["over"]] == ["moving before"]
    with pytest.raises(ConfigError, match="give one result, or volumes alone"):
        view(ViewSettings(shown=(failed, tmp_path / "r" / "fixed.zarr")))
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        view(ViewSettings(shown=(failed,), out=tmp_path / "x.txt"))
    with pytest.raises(VolumeError, match="allow more with --side"):
        view(ViewSettings(shown=(failed,), side=16))
    with pytest.raises(ComirError, match="does not exist"):
        view(ViewSettings(shown=(tmp_path / "none.nii",)))
    (tmp_path / "mine.html").write_text("mine", encoding="utf-8")
    with pytest.raises(VolumeError, match="no page of `comir-hpc view`"):
        view(ViewSettings(shown=(failed,), out=tmp_path / "mine.html"))
    assert (tmp_path / "mine.html").read_text(encoding="utf-8") == "mine"


def test_the_matrices_for_napari_put_the_moving_volume_on_the_fixed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = result(tmp_path / "r", TRUTH)
    text = (Path(__file__).parent.parent / "docs" / "transforms.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {
        "fixed_path": folder / "fixed.zarr", "moving_path": folder / "moving.zarr",
        "transform_path": folder / "transform.tfm",
    }  # fmt: skip
    exec(block, names)
    assert capsys.readouterr().out
    place = (names["fixed_affine"] @ (9, 11, 8, 1))[:3]
    np.testing.assert_allclose(place[::-1], POINT)
    seen_at = MOVING.index_zyx(TRUTH.apply(POINT))
    np.testing.assert_allclose((names["moving_affine"] @ (*seen_at, 1))[:3], place, atol=1e-9)


def readout(source: str) -> dict[str, str]:
    return dict(re.findall(r'<td data-name="([^"]+)">[^:]+: ([^<]*)</td>', source))


@pytest.mark.browser
@pytest.mark.parametrize("bent", [False, True])
def test_chromium_shows_values_and_displacement(tmp_path: Path, bent: bool) -> None:
    transform = ItkTransform(bspline(FIXED).itk) if bent else TRUTH
    page = view(ViewSettings(shown=(result(tmp_path / "r", transform),))).path
    ras = ",".join(map(str, POINT * (-1, -1, 1)))
    source, console = page_source(f"{page.as_uri()}#way=checker&mm={ras}", *WEBGL, budget_ms=20_000)
    assert 'data-ready="4"' in source, console  # three volumes and the checkerboard
    assert "&quot;way&quot;:&quot;checker&quot;" in source
    assert not [line for line in console if "rror" in line or "efused" in line]
    found = readout(source)
    content = content_of(page)
    for record, name in ((content["fixed"], "fixed"), (content["over"][1], "moving after")):
        value = float(np.asarray(image_of(record, tmp_path / "x.nii").dataobj)[8, 11, 9])
        assert float(found[name]) == pytest.approx(value, rel=1e-3)
    moved = transform.apply(POINT) - POINT
    length, *parts = map(float, re.findall(r"-?[\d.]+", found["displacement"]))
    np.testing.assert_allclose([length, *parts], [np.linalg.norm(moved), *moved], atol=0.05 if bent else 2e-3)
