"""Registrations in MLflow: settings, evidence, verdict and page; a server that is away costs one line."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from registration_record import write

from comir_hpc.config import RegisterPairSettings
from comir_hpc.recipes import pair as recipe
from comir_hpc.runs.result import RESULT_FILE, read_result
from comir_hpc.runs.tracking import registration
from comir_hpc.runs.tracking.registration import log_registration, metrics_of, parameters_of, tags_of


def test_what_is_sent_is_what_the_result_says(tmp_path: Path) -> None:
    result = read_result(write(tmp_path))
    assert metrics_of(result) == {
        "probability": 0.71, "bound_mm": 2.5, "overlap": 0.97, "evidence/chance": 31.0, "seconds/search": 4.0,
        "seconds/check": 2.0, "tre_mm": 1.25,
    }  # fmt: skip
    assert parameters_of(result) == {
        "fixed": "a.zarr", "moving": "b.zarr", "representation": "mind", "fingerprint": "12ab",
    }  # fmt: skip
    tags = tags_of(result)
    assert tags.pop("mlflow.note.content") == f"WARN: {tags['reasons']}"
    assert tags == {
        "verdict": "WARN", "causes": "symmetric",
        "reasons": "the mirrored moving volume agrees as well; right with a probability of 71 %",
    }  # fmt: skip


def test_a_server_that_is_away_is_one_line_and_the_result_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "one")
    before = (folder / RESULT_FILE).read_bytes()
    with caplog.at_level(logging.WARNING, logger="comir_hpc.runs.tracking"):
        assert not log_registration(folder, "http://user:secret@127.0.0.1:9", "brains")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "comir_hpc.runs.tracking"]
    assert "cannot be reached" in line
    assert "the same command sends it later" in line
    assert "secret" not in line
    assert (folder / RESULT_FILE).read_bytes() == before


@pytest.mark.parametrize("mlflow", [None, "auto"])
def test_register_sends_its_result_only_where_that_is_asked_for(
    mlflow: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comir_hpc import register as stage
    from comir_hpc.register.outputs import RegisterResult

    folder, sent = write(tmp_path / "one"), []
    monkeypatch.setattr(recipe, "_require_seen", lambda settings: None)
    done = RegisterResult(folder, read_result(folder), skipped=True)
    monkeypatch.setattr(stage, "register", lambda settings, progress: done)
    monkeypatch.setattr(registration, "log_registration", lambda *given, **named: sent.append((given, named)))
    settings = RegisterPairSettings(
        fixed=Path("a.zarr"), moving=Path("b.zarr"), out=folder, report=False, mlflow=mlflow, experiment="e"
    )
    recipe.register_pair(settings)
    assert sent == ([] if mlflow is None else [((folder, "auto", "e"), {"again": True})])
    assert not hasattr(
        settings.registration, "mlflow"
    )  # where it is sent is no part of what a result depends on
