from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import page_source
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from registration_record import write as write_registration

from comir_hpc.config import TrackingSettings
from comir_hpc.errors import CheckpointError, ComirError
from comir_hpc.runs import tracking
from comir_hpc.runs.tracking import (
    NullTracker,
    Tracker,
    flatten,
    mirror,
    open_tracker,
    read_metrics,
    read_system,
    remote,
    send_diagnostics,
    sync,
)
from comir_hpc.runs.tracking.registration import log_registration
from comir_hpc.runs.tracking.system import SystemLoad

FILE_ONLY = TrackingSettings(mlflow=None)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine making a database takes longer than the mirror is waited for."""
    monkeypatch.setattr(mirror, "_CLOSING_S", 120.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs, and so one MLflow database: making one takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """Address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://user:secret@127.0.0.1:{server.getsockname()[1]}"


def in_mlflow(runs: Path, name: str) -> tuple[MlflowClient, Run]:
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    return client, client.get_run((runs / name / tracking.RUN_ID_FILE).read_text(encoding="utf-8").strip())


def steps_of(client: MlflowClient, run: Run, metric: str) -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, metric))


# ---------------------------------------------------------------------- metrics.jsonl


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    tracker = open_tracker(FILE_ONLY, tmp_path / "run", {})
    tracker.log(1, {"loss": 0.5, "grad_norm": float("nan")})
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8"))
    assert (row["step"], row["loss"], row["grad_norm"]) == (1, 0.5, None)
    assert abs(row["time"] - time.time()) < 60
    tracker.finish()


def test_without_mlflow_there_is_nothing_but_the_metrics(tmp_path):
    tracker = open_tracker(FILE_ONLY, tmp_path / "run", {"a": 1})
    tracker.log(1, {"loss": 0.5})
    tracker.finish()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("resume_step", "kept"), [(3, [1, 2, 3]), (4, [1, 2, 3, 4]), (0, [])])
def test_resuming_drops_what_the_loop_will_write_again(tmp_path, resume_step, kept):
    tracker = open_tracker(FILE_ONLY, tmp_path, {})
    for step in range(1, 6):
        tracker.log(step, {"loss": step})
    tracker.finish("failed")
    tracker = open_tracker(FILE_ONLY, tmp_path, {}, resume_step=resume_step)
    assert [row["step"] for row in read_metrics(tmp_path)] == kept
    tracker.log(resume_step + 1, {"loss": 9})
    tracker.finish()
    assert [row["step"] for row in read_metrics(tmp_path)] == [*kept, resume_step + 1]


def test_a_line_torn_by_a_crash_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo', encoding="utf-8")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    tracker = open_tracker(FILE_ONLY, tmp_path, {}, resume_step=5)
    tracker.log(6, {"loss": 1})
    tracker.finish()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 6]


def test_a_full_disk_is_a_clear_line(tmp_path, monkeypatch):
    tracker = open_tracker(FILE_ONLY, tmp_path, {})
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(tracker, "_file", full)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl.*No space left.*resumes"):
            tracker.log(1, {"loss": 1})
        monkeypatch.undo()
        tracker.finish()
        with pytest.raises(OSError, match="No space"):
            full.close()


def test_a_metric_name_that_mlflow_would_refuse_is_refused_at_once(tmp_path):
    tracker = open_tracker(FILE_ONLY, tmp_path, {})
    with pytest.raises(ValueError, match="lo\\$\\$"):
        tracker.log(1, {"lo$$": 1})
    tracker.finish()


def test_the_null_twin_takes_everything_and_writes_nothing(tmp_path):
    methods = {n: f for n, f in inspect.getmembers(Tracker, inspect.isfunction) if not n.startswith("_")}
    for name, method in methods.items():
        assert inspect.signature(method) == inspect.signature(getattr(NullTracker, name))
    twin = NullTracker()
    twin.log(1, {"loss": 1})
    twin.picture(1, tmp_path / "none.png")
    twin.artifact(tmp_path)
    twin.checkpoint(tmp_path)
    twin.finish()
    assert not list(tmp_path.iterdir())


def test_flatten_numbers_the_pairs_and_keeps_plain_sequences():
    record = {"optimiser": {"steps": 5}, "pairs": [{"t1": Path("a")}, {"t1": Path("b")}], "widths": (1, 2)}
    assert flatten(record) == {
        "optimiser.steps": "5",
        "pairs.0.t1": "a",
        "pairs.1.t1": "b",
        "widths": "(1, 2)",
    }


def test_import_loads_no_mlflow():
    code = "import sys, comir_hpc.runs.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------- the machine's load


def test_the_load_of_this_machine_has_the_names_that_mlflow_shows(tmp_path):
    load = SystemLoad(tmp_path)
    held = bytearray(50_000_000)
    values = load.read()
    assert len(held) == 50_000_000
    assert all(name.startswith("system/") for name in values)
    assert 0 <= values["system/cpu_utilization_percentage"] <= 100
    assert 0 < values["system/system_memory_usage_percentage"] <= 100
    assert (
        50 < values["system/process_memory_megabytes"] <= values["system/system_memory_usage_megabytes"] * 1.5
    )
    assert values["system/disk_available_megabytes"] > 0
    assert values["system/network_receive_megabytes"] >= 0


def test_an_interface_that_goes_away_takes_nothing_back(tmp_path, monkeypatch):
    counts = iter([5_000_000, 7_000_000, 1_000_000, 2_000_000])

    def count() -> SimpleNamespace:
        number = next(counts)
        return SimpleNamespace(bytes_recv=number, bytes_sent=2 * number)

    monkeypatch.setattr("psutil.net_io_counters", count)
    load = SystemLoad(tmp_path)
    seen = [load.read() for _ in range(3)]
    assert [values["system/network_receive_megabytes"] for values in seen] == [2, 2, 3]
    assert [values["system/network_transmit_megabytes"] for values in seen] == [4, 4, 6]


def test_gpus_are_read_as_far_as_they_tell(tmp_path, monkeypatch):
    class FakeError(Exception):
        pass

    def refuse(handle):
        raise FakeError

    fake = SimpleNamespace(
        NVMLError=FakeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 4,
        nvmlDeviceGetHandleByIndex=lambda number: f"gpu {number}",
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=40e9, total=80e9),
        nvmlDeviceGetPowerUsage=refuse,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8f6a")
    values = SystemLoad(tmp_path).read()
    assert {name: value for name, value in values.items() if "gpu" in name} == {
        f"system/gpu_{number}_{what}": value
        for number in (0, 1)
        for what, value in {
            "utilization_percentage": 87,
            "memory_usage_megabytes": 40000,
            "memory_usage_percentage": 50,
        }.items()
    }


def test_a_machine_without_a_driver_has_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert not [name for name in SystemLoad(tmp_path).read() if "gpu" in name]


def wait_for_load(folder: Path, count: int) -> list[dict]:
    for _ in range(600):
        if len(rows := read_system(folder)) >= count:
            return rows
        time.sleep(0.05)
    raise AssertionError(f"{len(read_system(folder))} lines of load after 30 s")


def test_the_load_is_noted_while_a_run_lasts_and_a_resumed_run_goes_on_counting(tmp_path):
    settings = TrackingSettings(mlflow=None, system_every=0.1)
    tracker = open_tracker(settings, tmp_path, {})
    wait_for_load(tmp_path, 2)
    tracker.finish()
    first = read_system(tmp_path)
    assert not [t for t in threading.enumerate() if t.name == "system-monitor"]
    # As if it had been started an hour ago.
    spare = [{**row, "time": row["time"] - 3600, "step": row["step"]} for row in first]
    (tmp_path / "system.jsonl").write_text("".join(json.dumps(r) + "\n" for r in spare), encoding="utf-8")
    tracker = open_tracker(settings, tmp_path, {})
    rows = wait_for_load(tmp_path, len(first) + 1)
    tracker.finish()
    assert 3590 < rows[-1]["step"] < 3700
    assert "system/cpu_utilization_percentage" in rows[-1]


def test_the_load_can_be_left_alone(tmp_path):
    tracker = open_tracker(TrackingSettings(mlflow=None, system_every=None), tmp_path, {})
    assert not [t for t in threading.enumerate() if t.name == "system-monitor"]
    tracker.finish()


# ---------------------------------------------------------------------- MLflow in a database


def test_mlflow_mirrors_the_run_and_a_resume_continues_it(runs):
    settings, folder = TrackingSettings(), runs / "resumed"
    tracker = open_tracker(settings, folder, {"optimiser": {"steps": 4, "rate": 0.1}})
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1 / step, "agreement": float("inf")})
    picture = folder / "pictures" / "step-00000003.png"
    picture.parent.mkdir()
    picture.write_bytes(b"png")
    tracker.picture(3, picture)
    tracker.finish("stopped")
    client, first = in_mlflow(runs, "resumed")
    assert first.info.status == "KILLED"

    tracker = open_tracker(settings, folder, {"optimiser": {"steps": 5, "rate": 0.1}}, resume_step=2)
    for step in (3, 4, 5):
        tracker.log(step, {"loss": 1 / step})
    (folder / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    tracker.artifact(folder / "config.yaml")
    tracker.artifact(folder / "pictures", folder="more")
    tracker.finish()

    client, run = in_mlflow(runs, "resumed")
    assert run.info.run_id == first.info.run_id
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "resumed"
    assert run.data.params == {"optimiser.steps": "4", "optimiser.rate": "0.1"}
    assert run.data.tags["changed/optimiser.steps"] == "5"
    assert steps_of(client, run, "loss") == [1, 2, 3, 4, 5]
    assert "agreement" not in run.data.metrics
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"pictures", "config.yaml", "more"}
    assert str(runs) in run.info.artifact_uri


def test_long_records_go_in_batches(runs):
    folder = runs / "long"
    params = {f"p{i}": "x" * 7000 for i in range(150)}
    tracker = open_tracker(TrackingSettings(), folder, params)
    for step in range(1, 402):
        tracker.log(step, {"a": step, "b": step, "c": step})
    tracker.finish()
    client, run = in_mlflow(runs, "long")
    assert len(run.data.params) == 150
    assert steps_of(client, run, "c") == list(range(1, 402))


def write_diagnostics(folder: Path, step: int, when: float, worst: float) -> None:
    place = folder / "diagnostics" / f"step-{step:08d}"
    place.mkdir(parents=True, exist_ok=True)
    record = {"step": step, "time": when, "metrics": {"diagnostics/t1w/equivariance_worst": worst}}
    (place / "diagnostics.json").write_text(json.dumps(record), encoding="utf-8")
    (place / "diagnostics.png").write_bytes(b"png")


def test_load_model_checkpoint_and_diagnostics_reach_the_same_run(runs):
    folder = runs / "measured"
    tracker = open_tracker(TrackingSettings(system_every=0.1, checkpoint_mib=1), folder, {})
    tracker.log(5, {"loss": 1})
    wait_for_load(folder, 1)
    for step, size in ((4, 2), (5, 2**20)):
        (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        (folder / f"checkpoints/step-{step:08d}/state.pt").write_bytes(bytes(size))
        tracker.checkpoint(folder / f"checkpoints/step-{step:08d}")
    (folder / "checkpoints/step-00000005/more").write_bytes(b"1")  # a byte over 1 MiB
    tracker.checkpoint(folder / "checkpoints/step-00000005")
    (folder / "model").mkdir()
    (folder / "model/t1w.pt").write_bytes(b"weights")
    tracker.artifact(folder / "model")
    tracker.finish()
    client, run = in_mlflow(runs, "measured")
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0
    listed = {item.path for item in client.list_artifacts(run.info.run_id, "checkpoints")}
    assert listed == {"checkpoints/step-00000004", "checkpoints/step-00000005"}

    write_diagnostics(folder, 4, 1000.0, 0.3)
    write_diagnostics(folder, 5, 2000.0, 0.2)
    assert send_diagnostics(folder) is None
    assert send_diagnostics(folder) is None  # nothing twice
    write_diagnostics(folder, 5, 3000.0, 0.1)  # measured again: on more cubes, say
    assert send_diagnostics(folder) is None
    client, after = in_mlflow(runs, "measured")
    assert (after.info.run_id, after.info.status) == (run.info.run_id, "FINISHED")
    points = client.get_metric_history(run.info.run_id, "diagnostics/t1w/equivariance_worst")
    assert sorted((p.step, p.value) for p in points) == [(4, 0.3), (5, 0.1), (5, 0.2)]
    assert after.data.metrics["diagnostics/t1w/equivariance_worst"] == 0.1
    files = client.list_artifacts(run.info.run_id, "diagnostics/step-00000005")
    assert [Path(item.path).name for item in files] == ["diagnostics.json", "diagnostics.png"]
    assert sync(folder).points == 0


def test_diagnostics_of_a_run_that_is_not_tracked_or_not_known_yet(tmp_path, monkeypatch, hanging_server):
    write_diagnostics(tmp_path, 4, 1000.0, 0.3)
    assert send_diagnostics(tmp_path) is None
    (tmp_path / "tracking.json").write_text(json.dumps({"mlflow": hanging_server}), encoding="utf-8")
    assert "does not know this run yet; `comir-hpc sync" in (send_diagnostics(tmp_path) or "")
    (tmp_path / tracking.RUN_ID_FILE).write_text("0123\n", encoding="utf-8")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    note = send_diagnostics(tmp_path) or ""
    assert "cannot be reached" in note
    assert "secret" not in note


def test_a_deleted_database_gets_the_run_anew(runs, tmp_path):
    folder = runs / "orphan"
    folder.mkdir()
    (folder / tracking.RUN_ID_FILE).write_text("0123456789abcdef0123456789abcdef\n", encoding="utf-8")
    tracker = open_tracker(TrackingSettings(), folder, {})
    tracker.log(1, {"loss": 1})
    tracker.finish()
    _, run = in_mlflow(runs, "orphan")
    assert run.data.metrics == {"loss": 1.0}


# ---------------------------------------------------------------------- a server that is not there


def test_a_hanging_server_holds_nothing_up_and_sync_sends_it_later(runs, hanging_server, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    folder = runs / "spooled"
    tracker = open_tracker(TrackingSettings(mlflow=hanging_server), folder, {"seed": 7})
    for step in range(1, 51):
        tracker.log(step, {"loss": 1 / step})
    assert len(read_metrics(folder)) == 50
    tracker.finish()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    ours = [line for line in warnings if "comir-hpc sync" in line]
    assert len(ours) == 1
    assert "cannot be reached" in ours[0]
    assert "secret" not in ours[0]
    assert not (folder / tracking.RUN_ID_FILE).exists()

    (folder / "model.json").write_text("{}", encoding="utf-8")
    write_diagnostics(folder, 50, 1.0, 0.3)
    sent = sync(folder, f"sqlite:///{runs}/mlflow.db")
    assert (sent.points, sent.files) == (51, 3)
    client, run = in_mlflow(runs, "spooled")
    assert run.data.params == {"seed": "7"}
    assert run.info.status == "FINISHED"
    assert steps_of(client, run, "loss") == list(range(1, 51))
    assert sync(folder, f"sqlite:///{runs}/mlflow.db").points == 0


def test_a_run_that_left_mlflow_alone_is_sent_with_its_settings(runs):
    folder = runs / "offline"
    tracker = open_tracker(FILE_ONLY, folder, {"seed": 7})
    tracker.log(1, {"loss": 1})
    tracker.finish()
    (folder / "config.yaml").write_text("seed: 7\ntracking: {experiment: far away}\n", encoding="utf-8")
    (folder / "model.json").write_text("{}", encoding="utf-8")
    assert sync(folder).files == 2
    client, run = in_mlflow(runs, "offline")
    assert run.data.params == {"seed": "7", "tracking.experiment": "far away"}
    assert client.get_experiment(run.info.experiment_id).name == "far away"
    assert run.info.status == "FINISHED"


def test_a_mirror_that_never_returns_is_left_behind(tmp_path, monkeypatch, caplog):
    release = threading.Event()

    class StuckRun:
        def __init__(self, target):
            release.wait()

        def send_rows(self, rows):
            pass

        def end(self, status, when):
            pass

    monkeypatch.setattr(mirror, "MlflowRun", StuckRun)
    monkeypatch.setattr(mirror, "_CLOSING_S", 0.05)
    tracker = open_tracker(TrackingSettings(), tmp_path / "run", {})
    tracker.log(1, {"loss": 1})
    tracker.finish()
    release.set()
    assert "not answered in time" in caplog.text
    assert len(read_metrics(tmp_path / "run")) == 1


def test_a_server_that_comes_back_gets_what_it_missed(tmp_path, monkeypatch, caplog):
    sent: list[int] = []
    arrived = threading.Event()

    class LateRun:
        failures = 3

        def __init__(self, target):
            if LateRun.failures:
                LateRun.failures -= 1
                raise MlflowException("503")

        def send_rows(self, rows):
            sent.extend(row["step"] for row in rows)
            arrived.set()

        def end(self, status, when):
            sent.append(-1)

    monkeypatch.setattr(mirror, "MlflowRun", LateRun)
    monkeypatch.setattr(mirror, "_RETRY_S", 0.01)
    tracker = open_tracker(TrackingSettings(), tmp_path / "run", {})
    tracker.log(1, {"loss": 1})
    tracker.log(2, {"loss": 1})
    assert arrived.wait(30)
    tracker.log(3, {"loss": 1})
    tracker.finish()
    assert sent == [1, 2, 3, -1]
    assert caplog.text.count("cannot be reached") == 1


def test_sync_says_what_is_missing(tmp_path, hanging_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with pytest.raises(ComirError, match=r"metrics\.jsonl is missing or empty"):
        sync(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1, "loss": 2}\n', encoding="utf-8")
    with pytest.raises(ComirError, match="cannot be reached") as error:
        sync(tmp_path, hanging_server)
    assert "secret" not in str(error.value)


# ---------------------------------------------------------------------- MLflow's own pages


@pytest.fixture
def mlflow_pages(runs: Path) -> Iterator[str]:
    """Address of `mlflow server` on the database of `runs`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{runs}/mlflow.db"]
    command += ["--artifacts-destination", str(runs / "mlflow-artifacts")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (runs / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=os.environ | quiet, stdout=log, stderr=log, cwd=runs, start_new_session=True
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", server)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):  # 4 minutes: on a busy machine the server imports for one of them
        assert server.poll() is None, "mlflow server ended; see server.log"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")


@pytest.mark.browser
@pytest.mark.slow
def test_two_runs_stand_side_by_side_on_the_mlflow_page(runs, mlflow_pages):
    for name, rate in (("slow-rate", 1e-3), ("fast-rate", 2e-2)):
        tracker = open_tracker(
            TrackingSettings(mlflow=mlflow_pages, experiment="page"),
            runs / name,
            {"optimiser": {"learning_rate": rate}},
        )
        for step in range(1, 21):
            tracker.log(step, {"loss": rate**0.1 / step, "agreement": step / 20})
        tracker.finish()
    client = MlflowClient(mlflow_pages)
    experiment = client.get_experiment_by_name("page").experiment_id
    url = f"{mlflow_pages}/#/experiments/{experiment}/runs"
    source, _ = page_source(url, "--window-size=1400,900", budget_ms=20000)
    assert "slow-rate" in source
    assert "fast-rate" in source
    run = client.search_runs([experiment])[0].info.run_id
    source, _ = page_source(f"{url}/{run}", budget_ms=20000)
    assert "optimiser.learning_rate" in source
    assert "agreement" in source


def test_a_database_appears_whole_and_never_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is killed while its first seconds make the database must not leave a half."""
    path, link, tables = tmp_path / "mlflow.db", os.link, []

    def watched(spare: Path, target: Path) -> None:
        assert not path.exists()
        with closing(sqlite3.connect(spare)) as database:
            tables.extend(row[0] for row in database.execute("select name from sqlite_master"))
        path.write_bytes(b"another run was first")
        link(spare, target)

    monkeypatch.setattr(os, "link", watched)
    remote._make_database(f"sqlite:///{path}")
    assert {"runs", "metrics", "params"} <= set(tables)
    assert path.read_bytes() == b"another run was first"
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------- a disk that is full


def test_what_fails_at_the_end_is_a_warning_and_only_one(tmp_path, monkeypatch, caplog):
    """The training has ended, perhaps with an error of its own: that is what the user has to see."""
    tracker = open_tracker(TrackingSettings(), tmp_path / "run", {})
    tracker.log(1, {"loss": 1})

    class Full:
        def close(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tracker, "_file", Full())
    monkeypatch.setattr(mirror.MlflowRun, "end", lambda *a: Full().close())
    tracker.finish("failed")
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "the record of" in warnings[0]
    assert "No space left on device" in warnings[0]


def test_a_folder_that_cannot_be_written_to_is_a_clear_line():
    with pytest.raises(CheckpointError, match=r"/proc/comir-hpc cannot be written .*same command again"):
        open_tracker(FILE_ONLY, Path("/proc/comir-hpc"), {})


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3"])
def test_a_damaged_state_is_as_none(tmp_path, text):
    (tmp_path / "tracking.json").write_text(text, encoding="utf-8")
    assert send_diagnostics(tmp_path) is None


@pytest.mark.parametrize("step", ['"one"', "null", "[1]", "true", "1.5"])
def test_a_line_whose_step_is_no_number_ends_the_list(tmp_path, step):
    lines = f'{{"step": 1, "loss": 2}}\n{{"step": {step}, "loss": 2}}\n'
    (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


# ---------------------------------------------------------------------- registrations


def test_a_registration_is_a_run_of_the_experiment_with_its_page(runs: Path) -> None:
    folder = write_registration(runs / "registration")
    assert log_registration(folder, "auto", "brains")
    client, run = in_mlflow(runs, "registration")
    number = run.info.run_id
    assert (run.info.status, run.info.run_name) == ("FINISHED", "registration")
    assert run.data.metrics["probability"] == pytest.approx(0.71)
    assert run.data.params["representation"] == "mind"
    assert run.data.tags["verdict"] == "WARN"
    assert {file.path for file in client.list_artifacts(number)} == {"result.json", "report.html"}
    experiment = client.get_experiment_by_name("brains")
    assert experiment is not None
    # The same result again, with an error that `evaluate` has added since: the run is continued.
    write_registration(folder, truth={"tre_mm": 1.25, "tre_p95_mm": 3.0})
    assert log_registration(folder, "auto", "brains", again=True)
    assert in_mlflow(runs, "registration")[1].info.run_id == number
    assert client.get_run(number).data.metrics["tre_p95_mm"] == pytest.approx(3.0)
    # Another result in the same folder is another run.
    write_registration(folder, verdict="PASS", fingerprint="34cd")
    assert log_registration(folder, "auto", "brains")
    assert in_mlflow(runs, "registration")[1].info.run_id != number
    passed = client.search_runs([experiment.experiment_id], "tags.verdict = 'PASS'")
    assert [found.info.run_id for found in passed] == [in_mlflow(runs, "registration")[1].info.run_id]
