"""The command line as its user meets it: help, refusals, exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from comir_hpc import cli, config
from comir_hpc.datasets import write_nifti
from comir_hpc.errors import ComirError, ConfigError, StopRequested
from comir_hpc.geometry import Grid

VERBS = ("demo", "ingest", "train", "infer", "register", "warp", "evaluate", "report", "sync", "doctor")


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "comir_hpc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd, check=False)


def commands() -> dict[str, Any]:
    return dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def test_every_verb_is_there_with_an_example() -> None:
    assert set(commands()) == set(VERBS)
    for name, command in commands().items():
        assert command.epilog, name
        assert f"comir-hpc {name}" in command.epilog, name
        assert command.help, name


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_example_agree(verb: str) -> None:
    """Every option in an example exists."""
    command = commands()[verb]
    known = {option for parameter in command.params for option in parameter.opts}
    for option in re.findall(r"(?<=\s)--[a-z-]+", command.epilog or ""):
        assert option in known, option
    assert CliRunner().invoke(cli.app, [verb, "--help"]).exit_code == 0


def test_defaults_in_the_help_are_those_of_the_settings() -> None:
    renamed = {"labels": "kind", "part": "part"}
    for verb, command in commands().items():
        settings = getattr(config, f"{verb.capitalize()}Settings", None)
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            stated = re.search(r"\(default: ([^)]+)\)", text)
            if stated is None:
                continue
            assert settings is not None
            field = settings.model_fields[renamed.get(str(parameter.name), str(parameter.name))]
            assert str(field.default) == stated.group(1), f"{verb} --{parameter.name}"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from comir_hpc import cli; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'zarr', 'SimpleITK', 'dask', 'mlflow', 'deepspeed', 'numpy', 'pydantic', 'matplotlib'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr


def refused(*arguments: object, cwd: Path | None = None) -> str:
    """Run a command that must be refused: exit code 1, one line, no traceback; return the line."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    return lines[-1]


def test_missing_files_are_one_line(tmp_path: Path) -> None:
    line = refused("ingest", tmp_path / "none.nii", tmp_path / "o.zarr")
    assert "none.nii" in line
    assert not (tmp_path / "o.zarr").exists()
    line = refused("train", tmp_path / "none.yaml", "--run", tmp_path / "run")
    assert "none.yaml" in line
    line = refused("report", tmp_path)
    assert str(tmp_path) in line


def test_unknown_keys_name_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "modalities: [a, b]\npairs: [{a: a.zarr, b: b.zarr}]\noptimizer: {steps: 3}\n", encoding="utf-8"
    )
    assert "did you mean optimiser?" in refused("train", path, "--run", tmp_path / "run")


def test_register_without_model_says_what_is_missing(tmp_path: Path) -> None:
    line = refused("register", "--fixed", "f.zarr", "--moving", "m.zarr", "--out", tmp_path / "o")
    assert "--fixed-modality" in line
    assert "--representation intensity" in line


def test_usage_errors_exit_with_2() -> None:
    assert run("ingest").returncode == 2
    assert run("warp", "--nonsense").returncode == 2


@pytest.mark.parametrize("text", ["3", "a/b", "1/"])
def test_part_must_be_a_fraction(text: str) -> None:
    with pytest.raises(ConfigError, match="I/N"):
        cli._part(text)


def test_part_is_read() -> None:
    assert cli._part("3/16") == (3, 16)
    assert cli._part(None) is None


@pytest.mark.parametrize(
    ("error", "code"),
    [(ComirError("found\nthis"), 1), (StopRequested("saved"), 85), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def raise_it(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", raise_it)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    assert capsys.readouterr().err.count("\n") == 1


def test_files_are_accepted_where_stores_are(tmp_path: Path) -> None:
    values = np.zeros((12, 12, 12), np.uint8)
    values[3:9, 3:9, 3:9] = np.arange(216).reshape(6, 6, 6)
    write_nifti(tmp_path / "a.nii.gz", values, Grid((12, 12, 12), (1, 1, 1)))
    store = cli._as_zarr(tmp_path / "a.nii.gz", tmp_path, False, "fixed")
    assert store == tmp_path / "fixed.zarr"
    assert cli._as_zarr(store, tmp_path, False) == store
    with pytest.raises(ConfigError, match="comir-hpc ingest"):
        cli._as_zarr(tmp_path / "a.nii.gz", tmp_path, True)


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"comir-hpc \d+\.\d+\.\d+", done.stdout.strip())


def test_a_signal_before_a_verb_listens_means_stopped_on_request() -> None:
    """A job that is told to stop while Python still starts is requeued, not failed."""
    script = (
        "import os, signal, time; from comir_hpc import cli;"
        "cli.app = lambda **options: (os.kill(os.getpid(), signal.SIGUSR2), time.sleep(20));"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == cli.EXIT_STOPPED
