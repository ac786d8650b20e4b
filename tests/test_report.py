from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from browser import page_source
from phantoms import store_pair
from PIL import Image
from result_folder import GRID, write_panels, write_result_folder, write_run

from comir_hpc.errors import ComirError
from comir_hpc.report import charts, panels, report
from comir_hpc.report.contents import read_contents
from comir_hpc.transforms import Transform, save_transform
from comir_hpc.volumes.points import read_point_table
from comir_hpc.volumes.volume import Volume

PROBE = """
<script>
addEventListener("load", () => {
  const found = {
    images: document.images.length,
    broken: [...document.images].filter((i) => i.naturalWidth === 0).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    verdict: document.querySelector(".word")?.checkVisibility() ? document.querySelector(".word").textContent : "",
    charts: [...document.querySelectorAll(".chart svg")].filter((s) => s.getBoundingClientRect().width > 100).length,
    pageInk: getComputedStyle(document.body).color,
  };
  const viewer = document.querySelector(".viewer");
  if (viewer) {
    const slider = viewer.querySelector("input");
    slider.value = 80;
    slider.dispatchEvent(new Event("input"));
    viewer.querySelector("[data-show=before]").click();
    viewer.querySelector("[data-blink]").click();
    found.cut = viewer.style.getPropertyValue("--cut");
    found.top = viewer.dataset.top;
    found.blinking = viewer.classList.contains("blinking");
    viewer.querySelector("[data-blink]").click();
    found.still = !viewer.classList.contains("blinking");
  }
  document.body.dataset.probe = JSON.stringify(found);
});
</script>
</body>"""


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `register` with everything in it; tests that change it copy it first."""
    return write_result_folder(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    return copied(complete, tmp_path / "demo")


def copied(complete: Path, place: Path) -> Path:
    shutil.copytree(complete.parent, place)
    change(place / "registration", run=str(place / "run"))
    return place / "registration"


@pytest.fixture(scope="module")
def page(complete: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of that folder; no test writes to it."""
    return report(copied(complete, tmp_path_factory.mktemp("page") / "demo"))


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a training run; no test writes to it."""
    return report(write_run(tmp_path_factory.mktemp("alone") / "run"))


def change(folder: Path, **entries: object) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **entries}))


def text_of(page: Path) -> str:
    """Words of a page without its markup."""
    html = re.sub(r"<(style|script|svg).*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


# ---------------------------------------------------------------------- a whole page


def test_the_page_holds_what_a_user_asks_for(folder):
    page = report(folder)
    assert page == folder / "report.html"
    text = text_of(page)
    for expected in (
        "PASS The volumes are aligned.",
        "The representations agree to 0.71 after alignment",
        "a demonstration, not a benchmark",
        "mutual information, same global search",
        "117.33°",
        "1.4 GiB",
        "chance",
        "maps a point of the fixed volume to the corresponding point of the moving volume",
        "comir-hpc warp --zarr /data/moving.zarr",
        "sitk.ReadTransform(",
        "60 x 108 x 90 voxels of 3 x 2 x 2 millimeter",
        "1f3a9c0d1f3a9c0d",
        "Further curves (1)",
    ):
        assert expected in text or expected in page.read_text(encoding="utf-8"), expected
    assert len(re.findall(r"<img ", page.read_text(encoding="utf-8"))) == 3 * 10 + 2


@pytest.mark.parametrize(("given", "title"), [(True, "moving.zarr"), (False, "scan.nii.gz")])
def test_the_page_is_named_after_what_the_user_gave(tmp_path, given, title):
    """A store that was given keeps its name; one that `register` made in its own folder has that of its file."""
    folder = write_result_folder(tmp_path)
    path = folder / "result.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    place = tmp_path if given else folder
    record["inputs"]["moving"] |= {"path": str(place / "moving.zarr"), "source": "/data/scan.nii.gz"}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert f"<h1>{title} on fixed.zarr</h1>" in report(folder).read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside_and_is_small(page):
    html = page.read_text(encoding="utf-8")
    for address in re.findall(r'(?:src|href|xlink:href)="([^"]*)"', html):
        assert address.startswith(("data:", "#")), address[:80]
    assert "@import" not in html
    assert "url(http" not in html
    assert len(html.encode()) < 3e6


def test_noisy_panels_of_a_large_volume_do_not_make_a_large_page(folder):
    rng = np.random.default_rng(0)
    names = [f"{k}{r}" for k in ("fixed", "before", "after") for r in ("", "_representation")]
    large = {f"{p}_{n}": rng.random((700, 600), dtype=np.float32) for p in panels.PLANES for n in names}
    np.savez(folder / "panels.npz", **large)
    assert report(folder).stat().st_size < 3e6


def test_ids_of_the_drawings_do_not_meet(page):
    ids = re.findall(r'\bid="([^"]*)"', page.read_text(encoding="utf-8"))
    assert len(ids) == len(set(ids))


def test_checksums_are_those_of_the_files(folder):
    import hashlib

    html = report(folder).read_text(encoding="utf-8")
    for name in ("transform.tfm", "transform.json"):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() in html


@pytest.mark.parametrize(
    ("verdict", "meaning", "advice"),
    [
        ("WARN", "Check it before you use it", "Go through the pictures"),
        ("FAIL", "Do not use this transform", "Check under Provenance"),
    ],
)
def test_every_verdict_says_what_to_do_next(folder, verdict, meaning, advice):
    change(folder, verdict=verdict)
    text = text_of(report(folder))
    assert f"{verdict} " in text
    assert meaning in text
    assert advice in re.sub(r"\s+", " ", text)


def test_words_from_the_input_are_words_on_the_page(folder):
    evil = '<script>alert("1")</script><img src=x onerror=alert(2)>'
    change(folder, reasons=[evil], notes=[evil], settings={"fixed": evil}, direction=evil)
    (folder.parent / "run" / "config.yaml").write_text(evil, encoding="utf-8")
    html = report(folder).read_text(encoding="utf-8")
    assert evil not in html
    assert "<img src=x" not in html
    assert html.count("<script>") == 1
    assert html.count("&lt;script&gt;") >= 4


# ---------------------------------------------------------------------- pieces that are not there


def test_missing_pieces_are_named(folder):
    for name in ("panels.npz", "search.npz", "transform.tfm", "transform.json"):
        (folder / name).unlink()
    shutil.rmtree(folder.parent / "run")
    text = text_of(report(folder))
    assert "panels.npz is not in this folder." in text
    assert "search.npz is not in this folder." in text
    assert "is not there any more (no metrics.jsonl in it)" in text
    assert "There is no transform file in this folder." in text


def test_torn_arrays_are_named(folder):
    (folder / "panels.npz").write_bytes((folder / "panels.npz").read_bytes()[:1000])
    (folder / "search.npz").write_bytes(b"")
    text = text_of(report(folder))
    assert "panels.npz cannot be read" in text
    assert "search.npz cannot be read" in text


def test_a_result_of_the_least_content_is_reported(tmp_path):
    least = {"matrix_lps_mm": np.eye(4).tolist(), "agreement": None, "margin": None, "verdict": "FAIL"}
    (tmp_path / "result.json").write_text(json.dumps(least), encoding="utf-8")
    text = text_of(report(tmp_path))
    assert "the moving volume on the fixed volume" in text
    assert "Rotation 0.00°" in text
    assert "compares the intensities themselves" in text


def test_a_search_without_any_finite_score_is_named(folder):
    np.savez(folder / "search.npz", rotations=np.eye(3)[None], scores=np.array([-np.inf]))
    assert "search.npz holds no finite score." in text_of(report(folder))


def test_panels_without_representations_are_shown_without(folder):
    write_panels(folder, Transform.identity(), Transform.identity(), representations=False)
    text = text_of(report(folder))
    assert "panels.npz holds no representations." in text
    assert "Checkerboard" in text


def test_a_folder_that_was_moved_with_its_run_still_finds_it(folder):
    moved = folder.parent.rename(folder.parent.with_name("elsewhere")) / "registration"
    change(moved, run="/nowhere/any/more/run")
    assert read_contents(moved).run == moved.parent / "run"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds neither result.json nor metrics.jsonl"),
        ("{", "is damaged"),
        ('{"verdict": "PASS"}', "holds no matrix_lps_mm.*expected what register wrote"),
    ],
)
def test_a_folder_without_a_result_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "result.json").write_text(content, encoding="utf-8")
    with pytest.raises(ComirError, match=message):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"agreement": "high"}, 'agreement is the text "high", expected a number'),
        ({"inputs": "none"}, 'inputs is the text "none", expected an object'),
        ({"candidates": {"rank": 1}}, "candidates is an object of 1 keys, expected a list"),
        ({"matrix_lps_mm": [[1, 2], [3, 4]]}, "matrix_lps_mm.0.2 is missing"),
        ({"format": 99}, "written by a newer comir-hpc"),
    ],
)
def test_a_result_of_wrong_types_is_one_line(folder, changes, said):
    change(folder, **changes)
    with pytest.raises(ComirError, match=re.escape(said)) as refused:
        report(folder)
    assert str(folder / "result.json") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_result_of_version_0_1_0_is_reported(tmp_path):
    shutil.copytree(Path(__file__).with_name("format_0") / "registration", tmp_path / "old")
    text = text_of(report(tmp_path / "old"))
    assert "PASS The volumes are aligned." in text
    assert "moving_t2w.zarr on fixed_t1w.zarr" in text
    assert "mutual information, same global search" in text


def test_a_damaged_model_is_named_and_the_rest_is_shown(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "model.json").write_text('{"modalities": 3}', encoding="utf-8")
    text = text_of(report(run))
    assert "model.json: modalities is 3, expected a list" in text
    assert "Steps 250" in text


@pytest.mark.parametrize(
    ("name", "arrays", "said"),
    [
        ("panels.npz", {"axial_fixed": np.zeros(3)}, "axial_fixed is float64 of shape (3,)"),
        (
            "search.npz",
            {"rotations": np.zeros((4, 3)), "scores": np.zeros(4)},
            "rotations is float64 of shape",
        ),
        ("search.npz", {"scores": np.array(["a"])}, "scores is <U1 of shape (1,)"),
    ],
)
def test_arrays_that_register_does_not_write_are_named(folder, name, arrays, said):
    np.savez(folder / name, **arrays)
    assert f"{name} cannot be read ({said}" in text_of(report(folder)).replace("&lt;", "<")


# ---------------------------------------------------------------------- what is copied from the page


def snippets_of(page: Path) -> list[str]:
    html = page.read_text(encoding="utf-8")
    return [
        unescape(text) for text in re.findall(r"<pre><code>(.*?)</code></pre></div>", html, flags=re.DOTALL)
    ]


def test_snippets_run_where_they_are_pasted(tmp_path, monkeypatch):
    """A result of before has its paths as they were typed; folders have spaces; the page is read from elsewhere."""
    work, elsewhere = tmp_path / "my work", tmp_path / "elsewhere"
    elsewhere.mkdir()
    stores = store_pair(work, (24, 24, 24))
    monkeypatch.chdir(work)
    half = Transform.rigid(np.diag([-1.0, -1.0, 1.0]), (1.0, 2.0, 3.0), (20.0, 20.0, 20.0))
    save_transform(half, Path("out"))
    inputs = {
        role: {"path": f"{name}.zarr", "grid": Volume.open(stores[name]).grid.as_dict()}
        for role, name in (("fixed", "one"), ("moving", "two"))
    }
    record = {"verdict": "PASS", "matrix_lps_mm": half.matrix_mm.tolist(), "inputs": inputs}
    (work / "out" / "result.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.chdir(elsewhere)
    warp, points, itk, numpy = snippets_of(report(work / "out"))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "comir-hpc"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m comir_hpc "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    shell = ["sh", "-ec", f"{warp}\n{points}"]
    subprocess.run(shell, check=True, cwd=elsewhere, env=environment, capture_output=True)
    assert Volume.open(elsewhere / "warped.zarr").grid.agrees_with(Volume.open(stores["one"]).grid)
    middle = Volume.open(stores["one"]).grid.centre_mm
    (row,) = read_point_table(elsewhere / "moved.csv").points_mm
    np.testing.assert_allclose(row, half.apply(middle), atol=1e-2)
    found: dict[str, object] = {}
    exec(compile(itk, "itk", "exec"), found)
    assert found["aligned"].GetSize() == found["fixed"].GetSize()
    exec(compile(numpy, "numpy", "exec"), found)
    np.testing.assert_allclose(found["moving_points"], half.apply(middle)[None], atol=1e-2)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ComirError, match="does not exist"):
        report(tmp_path / "no")


def test_the_demo_s_own_folder_points_to_the_registration_in_it(folder):
    (folder.parent / "result.json").write_text('{"verdict": "PASS", "tre_voxels": 0.3}', encoding="utf-8")
    with pytest.raises(ComirError, match=r"did you mean .*registration"):
        report(folder.parent)


# ---------------------------------------------------------------------- a training run alone


def test_a_training_run_gets_a_report_of_its_own(tmp_path):
    run = write_run(tmp_path / "run", pictures=7)
    (run / "pictures" / "step-00000400.png").write_bytes(b"\x89PNG torn")
    html = report(run).read_text(encoding="utf-8")
    text = text_of(run / "report.html")
    assert "Training report" in text
    assert "Steps 250" in text
    assert "pairs_per_step: 12" in html
    assert "spacing_mm" in text
    assert "step-00000100" in text
    assert "step-00000400 cannot be read." in text
    assert "step-00000700" in text
    assert "Verdict" not in text
    assert 'id="transform"' not in html


def test_a_run_that_has_just_begun_is_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "time": 5.0, "loss": 3.0}\n{"step": 2, "lo', encoding="utf-8"
    )
    text = text_of(report(tmp_path))
    assert "no curve of two points or more" in text
    assert "There are no pictures in this run." in text
    assert "config.yaml is not in this folder." in text


def test_the_chance_level_is_that_of_the_batch(run_page):
    html = run_page.read_text(encoding="utf-8")
    assert f"chance, {math.log(23):.2f}" in html
    assert f"ceiling, {math.log(23):.2f}" in html


def test_another_bound_has_no_chance_level(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("loss:\n  bound: jsd\n", encoding="utf-8")
    html = report(run).read_text(encoding="utf-8")
    assert "chance, " not in html
    assert "ceiling, " in html


def test_a_run_says_what_its_encoders_can_do(run_page):
    text = text_of(run_page)
    assert "Agreement, aligned 0.84 5 % of the patches below 0.71" in text
    assert "Equivariance error, t2w 0.021 share of the variance; worst rotation 0.033" in text
    assert "Agreement when shifted" in text
    assert "Effective rank" not in text


# ---------------------------------------------------------------------- pictures and drawings


def test_an_overlay_of_equals_is_grey():
    grey = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    colours = panels.overlay(grey, grey)
    np.testing.assert_allclose(colours, np.repeat(grey[..., None], 3, axis=-1), atol=1e-6)
    alone = panels.overlay(grey, np.zeros_like(grey))
    assert alone[2, 3].argmax() == 2  # fixed is blue
    assert panels.overlay(np.zeros_like(grey), grey)[2, 3].argmax() == 0  # moving is orange


def colour_of(picture: panels.Picture) -> np.ndarray:
    """How far each pixel is from grey, 0 to 255."""
    pixels = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",")[1]))).convert("RGB"), int
    )
    return pixels.max(axis=-1) - pixels.min(axis=-1)


@pytest.mark.parametrize("sign", [1, -1])
def test_representations_that_agree_but_for_amplitude_and_offset_are_grey(sign):
    """As on the demo: .82 and .31 in amplitude, most values near 0, and a bright structure in one volume only."""
    rng = np.random.default_rng(0)
    rows, columns = np.indices((80, 80))
    inside = (rows - 40) ** 2 + (columns - 40) ** 2 < 34**2
    structure = sign * rng.gamma(0.6, 1.0, (80, 80)) * inside
    intensity = np.where(inside, 1.0 + rng.random((80, 80)), 0.0)
    only_fixed = np.where((rows > 30) & (rows < 36) & (columns > 20) & (columns < 60), sign * 6.0, 0.0)
    record = {f"axial_{kind}": intensity.astype(np.float32) for kind in ("fixed", "before", "after")}
    record["axial_fixed_representation"] = (0.82 * structure + only_fixed).astype(np.float32)
    for kind in ("before", "after"):
        record[f"axial_{kind}_representation"] = (0.31 * structure + 0.1).astype(np.float32)
    (plane,) = panels.plane_pictures(record)
    colour = colour_of(plane.pictures["representation_overlay"])
    agreeing = inside & (only_fixed == 0)
    assert np.median(colour[agreeing]) < 15
    assert np.percentile(colour[agreeing], 90) < 40
    assert np.median(colour[only_fixed != 0]) > 60  # what differs is still seen
    record["axial_fixed_representation"] = (0.82 * structure).astype(np.float32)
    (plane,) = panels.plane_pictures(record)
    assert colour_of(plane.pictures["representation_overlay"])[inside].max() <= 2


def test_one_volume_at_twice_the_brightness_and_with_more_air_is_as_bright(tmp_path):
    rng = np.random.default_rng(1)
    brain = 50 + 100 * rng.random((30, 30))
    fixed, moving = np.zeros((40, 40), np.float32), np.full((40, 40), -7, np.float32)
    fixed[5:35, 5:35] = brain
    moving[5:35, 5:35] = 2 * brain
    moving[:, :3] = np.nan
    record = {"axial_fixed": fixed, "axial_before": moving, "axial_after": moving}
    (plane,) = panels.plane_pictures(record)
    assert colour_of(plane.pictures["overlay_after"])[5:35, 5:35].max() <= 2


def test_a_checkerboard_shows_both_in_equal_parts():
    ones, zeros = np.ones((64, 32), np.float32), np.zeros((64, 32), np.float32)
    board = panels.checkerboard(ones, zeros)
    assert board.mean() == 0.5
    assert board[0, 0] == 1
    assert board[0, 8] == 0
    np.testing.assert_array_equal(panels.checkerboard(ones, ones), ones)


def marked_panels(plane: str, spacing: tuple[float, float], row: int, column: int) -> dict[str, np.ndarray]:
    values = np.zeros((12, 20), np.float32)
    values[row, column] = 1
    record = {f"{plane}_{kind}": values for kind in ("fixed", "before", "after")}
    return record | {f"{plane}_spacing_mm": np.asarray(spacing)}


def brightest(picture: panels.Picture) -> tuple[int, int]:
    import base64
    import io

    from PIL import Image

    raw = base64.b64decode(picture.uri.split(",")[1])
    pixels = np.asarray(Image.open(io.BytesIO(raw)))
    assert pixels.shape == (picture.height, picture.width)
    row, column = np.unravel_index(pixels.argmax(), pixels.shape)
    return int(row), int(column)


def test_pixels_are_square_in_millimetres():
    (plane,) = panels.plane_pictures(marked_panels("axial", (3.0, 1.5), 0, 0))
    assert (plane.pictures["fixed"].width, plane.pictures["fixed"].height) == (20, 24)
    assert plane.width_mm == 30.0


@pytest.mark.parametrize(
    ("plane", "signs", "shown"),
    [
        # Index (row 0, column 0) lies in front and to the right in the patient: top left on the page.
        ("axial", (1, 1, 1), (0, 0)),
        ("axial", (-1, 1, 1), (0, 19)),
        ("axial", (1, -1, 1), (11, 0)),
        # z grows to the head, which belongs on top.
        ("coronal", (1, 1, 1), (11, 0)),
        ("coronal", (1, 1, -1), (0, 0)),
        ("sagittal", (1, 1, 1), (11, 0)),
        ("sagittal", (1, -1, 1), (11, 19)),
    ],
)
def test_planes_stand_upright_whatever_the_axes(plane, signs, shown):
    (pictures,) = panels.plane_pictures(marked_panels(plane, (1.0, 1.0), 0, 0), np.diag(signs))
    assert brightest(pictures.pictures["fixed"]) == shown


def test_planes_with_nan_or_without_contrast_are_drawn():
    record = marked_panels("axial", (1.0, 1.0), 3, 3)
    record["axial_before"] = np.full((12, 20), np.nan, np.float32)
    record["axial_after"] = np.full((12, 20), 7, np.float32)
    record["axial_fixed"] = np.full((12, 20), 7, np.float32)
    (plane,) = panels.plane_pictures(record)
    assert len(plane.pictures) == 7


def test_the_middle_of_the_map_is_the_answer():
    rng = np.random.default_rng(3)
    for direction in (*np.eye(3), *rng.normal(size=(5, 3))):
        unit = direction / np.linalg.norm(direction)
        turn = charts._to_the_middle(unit)
        np.testing.assert_allclose(turn @ unit, (1, 0, 0), atol=1e-12)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)


def test_the_map_shows_the_best_score_near_each_direction():
    rng = np.random.default_rng(4)
    directions = rng.normal(size=(3000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    scores = directions[:, 0]
    longitude, latitude, best = charts._best_by_direction(directions, scores)
    row, column = np.unravel_index(best.argmax(), best.shape)
    assert abs(latitude[row]) < 0.3
    assert abs(longitude[column]) < 0.3
    assert best.shape == (len(latitude), len(longitude))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((6e-6, 9e-6), {"6e\u221206", "9e\u221206"}),
        ((2e6, 5e6), {"2e+06", "5e+06"}),
        ((0.2, 0.8), {"0.2", "0.8"}),
    ],
)
def test_the_ticks_of_a_curve_are_its_values_whatever_their_size(values, expected):
    svg = charts.curve("one", [1, 2], values)
    words = set(re.findall(r">([^<>]+)</text>", svg))
    assert expected <= words
    assert not words & {"1e\u22126", "1e6"}  # a common power of ten has no room


def test_drawings_take_the_page_s_colour():
    svg = charts.curve("one", [1, 2, 3], [3, 2, 1], reference=(3.1, "chance, 3.10"))
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "chance, 3.10" in svg
    assert 'width="' not in svg[: svg.index(">")]


# ---------------------------------------------------------------------- in a browser


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_the_whole_page(page, tmp_path, width):
    found, console = probe(page, tmp_path, width)
    assert console == []
    assert (found["images"], found["broken"]) == (32, 0)
    assert found["overflow"] == 0
    assert found["verdict"] == "PASS"
    assert found["charts"] == 10
    assert (found["cut"], found["top"], found["blinking"], found["still"]) == ("80%", "before", True, True)


@pytest.mark.browser
def test_a_browser_shows_a_training_run_and_the_dark_page(run_page, tmp_path):
    found, console = probe(run_page, tmp_path, 1280, "--blink-settings=preferredColorScheme=0")
    assert console == []
    assert (found["images"], found["broken"], found["overflow"]) == (2, 0, 0)
    assert found["pageInk"] == "rgb(230, 234, 239)"


def probe(page: Path, folder: Path, width: int, *flags: str) -> tuple[dict[str, object], list[str]]:
    """What a script finds on a copy of the page in a browser window of a width, and the lines of its console."""
    copy = folder / page.name
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    source, console = page_source(copy.as_uri(), f"--window-size={width},900", *flags)
    found = re.search(r'data-probe="([^"]*)"', source)
    assert found, "the page's own script did not run to its end"
    return json.loads(found.group(1).replace("&quot;", '"')), console


def test_the_phantom_s_grid_is_anisotropic():
    assert len(set(GRID.spacing_zyx)) > 1
