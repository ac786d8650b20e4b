"""What verbs leave on disk: records of today and of before, newer ones, damaged ones, and folders that are full."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phantoms import store_pair
from result_folder import write_result_folder
from trained_run import write_run

from comir_hpc.blocks import Figures
from comir_hpc.errors import CheckpointError, ComirError, RegistrationError
from comir_hpc.infer import InferResult
from comir_hpc.ingest import IngestResult
from comir_hpc.representations.encoding import load_encoder
from comir_hpc.runs.checkpoints import read_tensors
from comir_hpc.runs.folder import require_room
from comir_hpc.runs.html import table
from comir_hpc.runs.model import Model, read_model, write_model
from comir_hpc.runs.record import FORMAT, as_json, make_record
from comir_hpc.runs.result import Result, read_result, write_result
from comir_hpc.runs.result_html import result_html
from comir_hpc.train import TrainResult
from comir_hpc.volumes.volume import Volume
from comir_hpc.warp import WarpResult

BEFORE = Path(__file__).with_name("format_0")  # as version 0.1.0 wrote them, of the demo
IDENTITY = np.eye(4).tolist()


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def registration(folder: Path, **changes: object) -> Path:
    """A folder with the result of before, with changes."""
    folder.mkdir(exist_ok=True)
    record = {**content(BEFORE / "registration" / "result.json"), **changes}
    (folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


# ---------------------------------------------------------------------- of before there was a version


def test_a_result_of_before_is_read_without_loss() -> None:
    result = read_result(BEFORE / "registration")
    assert result.format == 0
    assert result.as_dict() == content(BEFORE / "registration" / "result.json")
    assert result.verdict == "PASS"
    assert result.transform is not None
    assert result.transform.rotation_deg == pytest.approx(result.rotation_deg)
    assert [c.rank for c in result.candidates] == list(range(1, 9))
    fixed = result.inputs["fixed"].space
    assert fixed is not None
    assert fixed.shape_zyx == (96, 114, 96)
    assert result.truth is not None
    assert result.baseline is not None
    assert result.truth.tre_mm < result.baseline.tre_mm


def test_a_model_of_before_is_read_without_loss() -> None:
    model = read_model(BEFORE / "run")
    assert model.format == 0
    assert model.as_dict() == content(BEFORE / "run" / "model.json")
    assert model.modalities == ("t1w", "t2w")
    assert model.reference.expected_agreement == 0.8275  # over all voxels, not the mean over patches
    assert model.options.widths == (16, 32, 64, 64)


def test_what_is_written_again_has_the_version_and_all_else(tmp_path: Path) -> None:
    registration(tmp_path, of_a_later_version={"a": [1, 2.5, None]})
    before = content(tmp_path / "result.json")
    write_result(tmp_path, read_result(tmp_path).with_entries(notes=["checked"]))
    after = content(tmp_path / "result.json")
    assert next(iter(after)) == "format"
    assert after == {**before, "notes": ["checked"], "format": FORMAT}
    write_model(tmp_path, read_model(BEFORE / "run"))
    assert content(tmp_path / "model.json") == {**content(BEFORE / "run" / "model.json"), "format": FORMAT}


def test_numbers_that_json_has_no_word_for_become_null() -> None:
    record = make_record(
        Result, {"matrix_lps_mm": IDENTITY, "agreement": float("nan"), "x": {"y": float("inf")}}
    )
    assert json.loads(as_json(record)) == {
        "format": FORMAT,
        "matrix_lps_mm": IDENTITY,
        "agreement": None,
        "x": {"y": None},
    }
    assert "NaN" not in as_json(record)


# ---------------------------------------------------------------------- newer, wrong and damaged ones


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    registration(tmp_path, format=3, verdict=17)
    with pytest.raises(RegistrationError) as refused:
        read_result(tmp_path)
    expected = f"written by a newer comir-hpc (format 3; this one reads up to {FORMAT}): upgrade"
    assert str(refused.value) == f"{tmp_path / 'result.json'} was {expected}"
    record = {**content(BEFORE / "run" / "model.json"), "format": 2}
    (tmp_path / "model.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model\.json was written by a newer comir-hpc \(format 2"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"agreement": "high"}, 'agreement is the text "high", expected a number'),
        ({"verdict": "MAYBE"}, "verdict is the text \"MAYBE\", expected 'PASS', 'WARN' or 'FAIL'"),
        ({"reasons": "none"}, 'reasons is the text "none", expected a list'),
        ({"reasons": [1]}, "reasons.0 is 1, expected text"),
        ({"inputs": [1, 2]}, "inputs is a list of 2, expected an object"),
        ({"inputs": {"fixed": {"path": 3}}}, "inputs.fixed.path is 3, expected text"),
        (
            {"inputs": {"fixed": {"path": "a", "grid": {"shape_zyx": 1}}}},
            "inputs.fixed.grid is an object of 1 keys",
        ),
        ({"candidates": [{"rank": 1}]}, "candidates.0.matrix_lps_mm is missing"),
        ({"timings_s": {"search": "long"}}, 'timings_s.search is the text "long", expected a number'),
        ({"matrix_lps_mm": "x"}, 'matrix_lps_mm is the text "x", expected a list'),
        ({"matrix_lps_mm": [[0, 0, 0, 0]] * 4}, "expected an affine map that can be inverted"),
        ({"matrix_lps_mm": [[1, 0, 0, None], *IDENTITY[1:]]}, "matrix_lps_mm.0.3 is null, expected a number"),
        ({"settings": None}, "settings is null, expected an object"),
        ({"truth": {"tre_mm": [1]}}, "truth.tre_mm is a list of 1, expected a number"),
        ({"metric": 7}, "metric is 7, expected an object"),
        ({"format": "new"}, 'format is the text "new", expected a whole number'),
        ({"format": -1}, "format is -1, expected a whole number"),
        ({"versions": {"x": "y" * 10**6, "z": 1}}, "versions.z is 1, expected text"),
        ({"notes": "n" * 10**6}, "notes is the text"),
    ],
)
def test_a_wrong_type_is_one_line_with_file_key_found_and_expected(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(RegistrationError) as refused:
        read_result(registration(tmp_path, **changes))
    line = str(refused.value)
    assert line.startswith(f"{tmp_path / 'result.json'}: ")
    assert said in line
    assert line.endswith("run the registration again")
    assert "\n" not in line
    assert len(line) < 500


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"matrix_lps_mm": 1e999}',
        b'{"a": "\\ud800"}',
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "result.json").write_bytes(damage)
    (tmp_path / "model.json").write_bytes(damage)
    for read, refusal in ((read_result, RegistrationError), (read_model, CheckpointError)):
        with pytest.raises(refusal, match=r"\.json") as refused:
            read(tmp_path)
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 500


def test_a_folder_in_place_of_the_file_and_a_file_of_gigabytes_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "result.json").open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(RegistrationError, match="3221225472 bytes"):
        read_result(tmp_path)
    (tmp_path / "result.json").unlink()
    (tmp_path / "result.json").mkdir()
    with pytest.raises(RegistrationError, match="does not exist"):
        read_result(tmp_path)


# ---------------------------------------------------------------------- a model that cannot be


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("trained") / "run")


def changed_model(run: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(run, folder)
    record = content(folder / "model.json")
    for key, value in changes.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    (folder / "model.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"options": {"widths": [10**6, 10**6]}},
            "holds .* weights, but the unet that model.json describes has at least",
        ),
        ({"options": {"widths": [4, 10**9]}}, "has at least 4000000008"),
        ({"options": {"widths": [10**30, 8]}}, "has at least 1000000000"),
        ({"options": {"widths": [8] * 10**5}}, "options.widths is .*, expected .*at most 32 items"),
        ({"options": {"convs_per_level": 10**6}}, "options.convs_per_level"),
        ({"options": {"convs_per_level": [1, 60], "widths": [4, 90]}}, "has at least"),
        ({"options": {"widths": [4, -8]}}, "options.widths.1 is -8, expected"),
        ({"options": {"widths": "wide"}}, 'options.widths is the text "wide", expected a list'),
        ({"latent_channels": 10**9}, "has at least"),
        ({"in_channels": {"one": 10**9, "two": 1}}, "has at least"),
        ({"in_channels": 1}, "in_channels is 1, expected an object"),
        ({"spacing_mm": [2, 2]}, "spacing_mm.2 is missing"),
        ({"spacing_mm": [2, 2, 0]}, "spacing_mm.2 is 0, expected greater than 0"),
        ({"modalities": []}, "modalities is a list of 0"),
        ({"step": "7"}, 'step is the text "7", expected a whole number'),
    ],
)
def test_an_absurd_model_is_refused_before_it_is_allocated(
    run: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = changed_model(run, tmp_path / "absurd", **changes)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=said) as refused:
        load_encoder(folder, "one")
    assert time.process_time() - start < 5
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_shape_without_memory_behind_it_does_not_count(run: Path, tmp_path: Path) -> None:
    folder = changed_model(run, tmp_path / "claimed", options={"widths": [10**6, 10**6]})
    torch.save({"w": torch.zeros(1).expand(10**13)}, folder / "model" / "one.pt")
    with pytest.raises(CheckpointError, match="holds 1 weights, but"):
        load_encoder(folder, "one")


class Code:
    """What pickle would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code ran",)


def test_damaged_weights_are_one_line_without_advice_to_open_them_unsafely(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed_model(run, tmp_path / "damaged")
    path = folder / "model" / "one.pt"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damages: list[bytes] = [
        b"",
        b"\x80\x02.",
        b"PK\x03\x04" + b"\0" * 50,
        whole[: len(whole) // 2],
        b"not torch",
    ]
    for _ in range(40):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 20):
            broken[place] = rng.integers(256)
        damages.append(bytes(broken))
    said: list[str] = []
    for damage in damages:
        path.write_bytes(damage)
        try:
            load_encoder(folder, "one")
        except CheckpointError as error:
            said.append(str(error))
    assert len(said) >= 5
    assert not [line for line in said if "internal miniz error" in line]
    assert not [line for line in said if "weights_only" in line or "\n" in line or len(line) > 600]
    torch.save({"a": Code()}, path)
    with pytest.raises(CheckpointError, match="can run code"):
        load_encoder(folder, "one")
    torch.save([torch.zeros(2)], path)
    with pytest.raises(CheckpointError, match="holds no table of weights"):
        load_encoder(folder, "one")
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="is damaged"):
        read_tensors(tmp_path / "missing.pt")


# ---------------------------------------------------------------------- folders


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    require_room(tmp_path / "a" / "b", 1000, RegistrationError)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    require_room(tmp_path / "kept", 1000, RegistrationError)
    assert (tmp_path / "kept").is_dir()


def test_a_folder_without_room_or_without_permission_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ComirError, match=r"of free disk space, .* are needed") as refused:
        require_room(tmp_path / "a", 10**18, ComirError)
    assert "\n" not in str(refused.value)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RegistrationError, match="cannot be written to"):
        require_room(tmp_path / "file" / "below", 1, RegistrationError)
    with pytest.raises(
        RegistrationError, match="cannot be written to"
    ):  # no file is made there, by root neither
        require_room(Path("/proc/comir-hpc"), 1, RegistrationError)


# ---------------------------------------------------------------------- in a notebook


def test_a_result_in_a_notebook_shows_verdict_reasons_numbers_and_pictures(tmp_path: Path) -> None:
    folder = write_result_folder(tmp_path)
    evil = "<script>alert(1)</script>"
    html = result_html(folder, read_result(folder).with_entries(notes=[evil]))
    assert ">PASS</strong>" in html
    assert "agree to 0.71 after alignment" in html
    assert "117.33 degrees" in html
    assert html.count("data:image/png;base64,") == 6  # three planes before and after
    assert evil not in html
    (folder / "panels.npz").write_bytes(b"torn")
    assert "there are no pictures" in result_html(folder, read_result(folder))


def test_a_table_escapes_what_it_shows() -> None:
    assert table("a & b", {"<k>": "<v>"}).count("&lt;") == 2


def test_every_record_is_frozen() -> None:
    model = read_model(BEFORE / "run")
    with pytest.raises(ValueError, match="frozen"):
        model.step = 1  # type: ignore[misc]
    assert isinstance(model, Model)


def test_results_of_the_other_verbs_are_tables(tmp_path: Path) -> None:
    store = store_pair(tmp_path, (24, 24, 24))["one"]
    grid = Volume.open(store).grid
    figures = Figures(1, 1.0, 1, 1, 1)
    shown = [
        IngestResult(store, grid, 1, 1, 0, 1.5, 10, figures, figures, ("mm was <assumed>",)),
        InferResult(store, grid, 0, 1, 1, 2, 1.5, 10.0, None, figures, figures),
        WarpResult(store, grid=grid, inside=0.5),
        WarpResult(store, points=3),
        TrainResult(store, 6, 0.25, {"agreement": 0.5}, 1.0),
    ]
    tables = [one._repr_html_() for one in shown]
    assert all(str(store) in text and text.count("<table>") == 1 for text in tables)
    assert "mm was &lt;assumed&gt;" in tables[0]
    assert "blocks of other parts" in tables[1]
    assert "50%" in tables[2]
    assert str(grid) in tables[2]
    assert "points" in tables[3]
    assert "0.5" in tables[4]
