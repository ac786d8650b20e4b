"""How a command ends: exit codes, one line, tracebacks that are kept, Ctrl-C, readers that leave."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import comir_hpc.ingest
from comir_hpc.commands.app import app
from comir_hpc.commands.failure import carry_out
from comir_hpc.commands.interrupt import Interrupt
from comir_hpc.commands.progress import progress_on
from comir_hpc.commands.terminal import LONGEST_MESSAGE, Terminal, shortened
from comir_hpc.data.embedded import embedded_volume, write_nifti
from comir_hpc.errors import ComirError, StopRequested, printable
from comir_hpc.space.grid import Grid
from comir_hpc.volumes.volume import Volume

COMMAND = [sys.executable, "-m", "comir_hpc"]


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    values = np.zeros((12, 12, 12), np.uint8)
    values[3:9, 3:9, 3:9] = np.arange(216).reshape(6, 6, 6)
    write_nifti(tmp_path / "a.nii.gz", values, Grid((12, 12, 12), (1, 1, 1)))
    return tmp_path / "a.nii.gz"


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "check": False, "text": True, "encoding": "utf-8"} | options
    return subprocess.run([*COMMAND, *map(str, arguments)], **options)


@dataclass(frozen=True)
class Ended:
    """How a command ended that ran in this process, which spares the loading of libraries."""

    code: int
    out: str
    err: str


Here = Callable[..., Ended]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    def run_here(*words: object) -> Ended:
        terminal = Terminal()
        arguments = list(map(str, words))
        code = carry_out(lambda: app(arguments, obj=terminal, standalone_mode=False), terminal, Interrupt())
        said = capsys.readouterr()
        return Ended(code, said.out, said.err)

    return run_here


@pytest.fixture
def refused(here: Here) -> Callable[..., str]:
    """Run a command that must be refused: exit code 1, one line, no traceback; return the line."""

    def run_refused(*words: object) -> str:
        done = here(*words)
        assert done.code == 1, done
        assert "Traceback" not in done.err
        assert done.err.count("\n") == 1, done.err
        return done.err.strip()

    return run_refused


# ---------------------------------------------------------------------- refusals


def test_missing_files_are_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "none.nii" in refused("ingest", tmp_path / "none.nii", tmp_path / "o.zarr")
    assert not (tmp_path / "o.zarr").exists()
    assert "none.yaml" in refused("train", tmp_path / "none.yaml", "--run", tmp_path / "run")
    assert str(tmp_path) in refused("report", tmp_path)


def test_settings_that_cannot_work_are_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("modalities: [a, b]\npairs: [{a: a.zarr, b: b.zarr}]\noptimizer: {}\n", encoding="utf-8")
    assert "did you mean optimiser?" in refused("train", path, "--run", tmp_path / "run")
    line = refused("train", path, "--run", tmp_path / "run", "--set", "sampling.patch=[1,64")
    assert "--set sampling.patch=[1,64: the value is not YAML" in line
    line = refused("register", "f.zarr", "m.zarr", "--out", tmp_path / "o")
    assert "f.zarr does not exist" in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ComirError("found\nthis"), 1),
        (StopRequested("saved"), 85),
        (KeyboardInterrupt(), 130),
        (typer.BadParameter("what"), 2),
        (ValueError("a bug"), 1),
        (MemoryError(), 1),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
    code: int,
) -> None:
    def raise_it() -> None:
        raise error

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert carry_out(raise_it, Terminal(), Interrupt()) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert carry_out(lambda: None, Terminal(), Interrupt()) == 0
    assert carry_out(lambda: 3, Terminal(), Interrupt()) == 3  # what typer returns of an Exit


def test_a_signal_before_a_verb_listens_means_stopped_on_request() -> None:
    """A job that is told to stop while Python still starts is requeued, not failed."""
    script = (
        "import os, signal, time; from comir_hpc import commands; from comir_hpc.commands import app as module\n"
        "module.app = lambda **options: (os.kill(os.getpid(), signal.SIGUSR2), time.sleep(20))\n"
        "commands.main()"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 85


# ---------------------------------------------------------------------- mistakes of ours

ERRORS = [
    KeyError("x" * 3000),
    OSError(28, "No space left"),
    BrokenPipeError(),
    EOFError(),
    RecursionError("deep"),
    UnicodeDecodeError("utf-8", b"", 0, 1, "bad"),
]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, here: Here) -> Here:
    """Run an ingest in which something unexpected happens."""

    def run_broken(error: Exception, *words: object) -> Ended:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(comir_hpc.ingest, "ingest", fail)
        return here("ingest", "a.nii", *words)

    return run_broken


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_is_unexpected_is_one_line_and_its_traceback_is_kept(
    tmp_path: Path, broken: Here, error: Exception
) -> None:
    done = broken(error, tmp_path / "out.zarr")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert len(done.err) <= LONGEST_MESSAGE + 1
    found = re.search(r"the traceback is in (\S+\.log)", done.err)
    assert found, done.err
    assert Path(found[1]).parent == tmp_path
    text = Path(found[1]).read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in text
    assert type(error).__name__ in text
    assert "command: " in text


def test_the_traceback_goes_to_the_cache_where_the_output_cannot_be_written(
    tmp_path: Path, broken: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = broken(KeyError(1), tmp_path / "none" / "out.zarr")
    assert str(tmp_path / "cache" / "comir-hpc" / "comir-hpc-error-") in done.err
    assert not (tmp_path / "none").exists()
    # A file where folders should be: the traceback is printed rather than lost.
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file / "cache"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(file))
    done = broken(KeyError(1), file / "out.zarr")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "written nowhere" in done.err.splitlines()[-1]


def test_the_traceback_is_shown_when_asked_for_and_stands_in_the_log(
    tmp_path: Path, broken: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMIR_TRACEBACK", "1")
    done = broken(KeyError(1), tmp_path / "o.zarr", "--log", tmp_path / "l.txt")
    assert "Traceback" in done.err
    text = (tmp_path / "l.txt").read_text(encoding="utf-8")
    assert "traceback: Traceback" in text
    assert "error: unexpected KeyError" in text
    assert "command: " in text


# ---------------------------------------------------------------------- what is said


def test_messages_are_cut_to_their_beginning_and_their_end() -> None:
    assert shortened("a\n  b\tc") == "a b c"
    long = "found " + "column, " * 1_000_000 + "expected x, y, z"
    said = shortened(long)
    assert len(said) <= LONGEST_MESSAGE
    assert said.startswith("found column")
    assert said.endswith("expected x, y, z")
    assert str(len(long)) in said
    assert shortened("x" * LONGEST_MESSAGE) == "x" * LONGEST_MESSAGE
    assert len(shortened("\x1b" * 5000)) <= LONGEST_MESSAGE


def test_control_characters_are_not_printed(here: Here) -> None:
    assert printable("a\x1b[31mb\x07\u202ec\udcff\x9b") == "a\\x1b[31mb\\x07\\u202ec\\udcff\\x9b"
    assert printable("Schnitt µm 断面 — ok") == "Schnitt µm 断面 — ok"
    for words in (["ingest", "/none/\x1b[31mred\r\x08.nii", "o.zarr"], ["\x1b[31mred"]):
        done = here(*words)
        assert done.code in (1, 2)
        assert "\\x1b[31mred" in done.err
        assert not set(done.err) & set("\x1b\r\x08")


def test_quiet_leaves_results_and_errors(volume: Path, tmp_path: Path, here: Here) -> None:
    loud = here("ingest", volume, tmp_path / "loud.zarr")
    quiet = here("ingest", "-q", volume, tmp_path / "quiet.zarr")
    assert "1/1" in loud.err
    assert quiet.err == ""
    assert quiet.out.startswith(f"{tmp_path}/quiet.zarr: 12 x 12 x 12 voxels")
    assert "none.nii" in here("ingest", "none.nii", tmp_path / "o.zarr", "--quiet").err


def test_the_log_keeps_everything(
    volume: Path, tmp_path: Path, here: Here, refused: Callable[..., str]
) -> None:
    log = tmp_path / "log.txt"
    here("ingest", volume, tmp_path / "o.zarr", "--log", log, "-q")
    here("ingest", tmp_path / ("x" * 200) / ("y" * 200) / ("z" * 200), tmp_path / "p.zarr", "--log", log)
    text = log.read_text(encoding="utf-8")
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d progress: ingest o\.zarr: 1/1\n", text)
    assert f"result: {tmp_path}/o.zarr" in text
    assert "z" * 200 + " does not exist; expected" in text
    assert "--log" in refused("ingest", volume, tmp_path / "o.zarr", "--log", tmp_path / "none" / "log.txt")
    assert "--log" in refused("ingest", volume, tmp_path / "o.zarr", "--log", tmp_path)


def test_a_log_that_fails_does_not_stop_the_work(volume: Path, tmp_path: Path, here: Here) -> None:
    done = here("ingest", volume, tmp_path / "o.zarr", "--log", "/dev/full")
    assert done.code == 0
    assert "the log file cannot be written any more" in done.err


def test_progress_is_a_line_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on(Terminal()) as progress:
        for done in range(101):
            progress("work", done, 100)
        progress("empty", 0, 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"work: {n}/100" for n in range(0, 101, 10)] + ["empty: 0/0"]


def test_a_bar_shows_any_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_on(Terminal()) as progress:
        progress("ingest a[/b]\x07.zarr", 1, 2)
    said = capsys.readouterr().err
    assert "a[/b]\\x07.zarr" in said
    assert "\x07" not in said


# ---------------------------------------------------------------------- readers that leave


def test_a_reader_that_leaves_is_no_error(volume: Path, tmp_path: Path) -> None:
    for words in (["ingest", "--help"], ["ingest", str(volume), str(tmp_path / "o.zarr")]):
        reading, writing = os.pipe()
        os.close(reading)
        done = run(*words, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        assert "Error" not in done.stderr
        assert "Traceback" not in done.stderr
        assert "Broken" not in done.stderr
    assert done.returncode == 0  # the work is done
    assert (tmp_path / "o.zarr" / "zarr.json").is_file()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(volume: Path, tmp_path: Path, closed: str) -> None:
    for words, code in ((f"ingest {volume} {tmp_path}/o.zarr", 0), ("evaluate", 1)):
        command = f"{shlex.join(COMMAND)} {words} {closed}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    assert Volume.open(tmp_path / "o.zarr").complete


def test_a_result_that_cannot_be_printed_is_said(volume: Path, tmp_path: Path) -> None:
    command = f"{shlex.join(COMMAND)} ingest {volume} {tmp_path}/o.zarr >/dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("the result cannot be printed (No space left on device)")


# ---------------------------------------------------------------------- Ctrl-C


def interrupted(words: list[str], *, after: str, group: bool = False) -> tuple[int, str]:
    """Start a command, press Ctrl-C once its stderr has said `after`, and return its code and what it said."""
    process = subprocess.Popen(
        [*COMMAND, *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = ""
    while after and after not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    if not after:
        time.sleep(0.3)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    return process.returncode, said + rest


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.npy"
    np.save(path, np.random.default_rng(0).integers(0, 1000, (160, 160, 160), dtype=np.uint16))
    return path


@pytest.mark.parametrize(("workers", "group"), [(1, False), (2, True)])
def test_ctrl_c_during_ingest_is_a_word_and_the_same_command_continues(
    large: Path, tmp_path: Path, workers: int, group: bool
) -> None:
    words = f"ingest {large} {tmp_path}/o.zarr --spacing 1 1 1 --unit um --chunk 20 --shard 20 --workers {workers}"
    code, said = interrupted(words.split(), after="/512", group=group)
    assert code == 130
    assert said.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in said
    assert run(*words.split()).returncode == 0


def test_ctrl_c_during_register_is_a_word(tmp_path: Path) -> None:
    fixed, moving = embedded_volume("t1w"), embedded_volume("t2w")
    words = (
        f"register {fixed} {moving} --representation intensity --out {tmp_path}/o --rotations 100000".split()
    )
    code, said = interrupted(words, after="search: ")
    assert (code, said.splitlines()[-1]) == (130, "interrupted; the same command continues")
    assert "Traceback" not in said


def test_ctrl_c_while_libraries_load_is_a_word(volume: Path, tmp_path: Path) -> None:
    code, said = interrupted(["ingest", str(volume), str(tmp_path / "o.zarr")], after="")
    assert code == 130
    assert said == "interrupted; the same command continues\n"


def test_what_a_library_makes_of_ctrl_c_counts_as_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    interrupt = Interrupt()
    interrupt.requested = True

    def load() -> None:
        raise ImportError("initialization failed")

    assert carry_out(load, Terminal(), interrupt) == 130
    assert capsys.readouterr().err == "interrupted; the same command continues\n"


def test_ctrl_c_is_left_alone_where_it_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Interrupt().listen()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_messages_are_whole_in_the_log(tmp_path: Path) -> None:
    terminal = Terminal()
    terminal.listen(quiet=False, log=tmp_path / "l.txt")
    terminal.refused("y" * 5000)
    assert "y" * 5000 in (tmp_path / "l.txt").read_text(encoding="utf-8")
