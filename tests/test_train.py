from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from phantoms import store, store_pair
from test_engine import free_port
from torch import Tensor, nn

from comir_hpc.config import TrainSettings, load, validate
from comir_hpc.data.embedded import phantom_pair
from comir_hpc.errors import CheckpointError, ConfigError, HeldError, StopRequested, VolumeError
from comir_hpc.host.locks import writer
from comir_hpc.networks import Network, build_network
from comir_hpc.representations.encoding import load_encoder
from comir_hpc.runs.checkpoints import checkpoint_path, list_checkpoints, read_checkpoint
from comir_hpc.runs.tracking import read_metrics
from comir_hpc.train import plan_training, train
from comir_hpc.train.checks import build_networks, inspect_inputs
from comir_hpc.train.loop import Loop
from comir_hpc.train.plan import choose_recomputed_levels, predict
from comir_hpc.volumes.volume import Volume

STEPS = 6
TIMINGS = {
    "predicted_memory_mib",
    "time",
    "patches_per_s",
    "voxels_per_s",
    "data_wait",
    "peak_memory_mib",
    "tflops",
}


def record(pair: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """Settings of a run of a second: a tiny net, six steps, a checkpoint every two."""
    plain: dict[str, Any] = {
        "modalities": list(pair),
        "pairs": [{name: str(path) for name, path in pair.items()}],
        "network": {"widths": [4, 8], "convs_per_level": 1},
        "loss": {"critic": "correlation", "subcrops": 1, "displacement_negatives": 0},
        "sampling": {"patch": [16, 16, 16], "pairs_per_step": 4},
        "optimiser": {"steps": STEPS},
        "engine": {"precision": "fp32", "device": "cpu"},
        "tracking": {"mlflow": None, "log_every": 1, "picture_every": 100},
        "checkpoint": {"every_steps": 2, "keep": 10},
    }
    for key, value in changes.items():
        plain[key] = {**plain.get(key, {}), **value} if isinstance(value, dict) else value
    return plain


def settings_of(pair: dict[str, Path], **changes: Any) -> TrainSettings:
    return validate(TrainSettings, record(pair, **changes))


def rows(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(run)]


def weights(run: Path) -> dict[str, Tensor]:
    names = json.loads((run / "model.json").read_text(encoding="utf-8"))["modalities"]
    states = {name: torch.load(run / "model" / f"{name}.pt", weights_only=True) for name in names}
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def assert_equal_runs(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return store_pair(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def whole(pair: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, to compare with."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(settings_of(pair), run)
    return run


# ---------------------------------------------------------------------- known answers


def test_encoders_learn_to_agree_on_a_phantom(pair: dict[str, Path], tmp_path: Path) -> None:
    settings = settings_of(
        pair,
        network={"widths": [8, 16]},
        optimiser={"steps": 60, "learning_rate": 5e-3, "average": 0.9},
        sampling={"patch": [16, 16, 16], "pairs_per_step": 6, "rotate": 0.5},
        tracking={"mlflow": None, "log_every": 10, "picture_every": 30},
        checkpoint={"every_steps": 60},
    )
    result = train(settings, tmp_path / "run")
    log = read_metrics(tmp_path / "run")
    assert log[-1]["contrastive"] < 0.6 * log[0]["ceiling"]
    assert result.reference["agreement"] > 0.3 + result.reference["mismatched"]
    shifted = result.reference["shifted"]
    assert result.reference["agreement"] > shifted["4"] > shifted["8"]
    assert all(error["mean"] < 1 for error in result.reference["equivariance"].values())
    assert len(list((tmp_path / "run" / "pictures").glob("*.png"))) == 2
    assert all(
        (tmp_path / "run" / "pictures" / f"step-000000{n}.png").stat().st_size > 5000 for n in (30, 60)
    )
    assert {"loss", "retrieval", "agreement", "learning_rate", "gradient_norm", "data_wait"} <= log[-1].keys()
    assert "agreement" in result.summary


def test_a_run_folder_holds_what_others_need(whole: Path, pair: dict[str, Path]) -> None:
    model = json.loads((whole / "model.json").read_text(encoding="utf-8"))
    assert model["modalities"] == ["one", "two"]
    assert (model["group"], model["step"], model["spacing_mm"]) == ("O", STEPS, [2.0, 2.0, 2.0])
    for name in model["modalities"]:
        network = build_network(
            model["network"]["name"],
            in_channels=model["in_channels"][name],
            latent_channels=model["latent_channels"],
            **model["options"],
        )
        state = torch.load(whole / "model" / f"{name}.pt", weights_only=True)
        network.load_state_dict(state)
        assert all(value.device.type == "cpu" and value.dtype != torch.bfloat16 for value in state.values())
    stored = load(TrainSettings, whole / "config.yaml")
    assert stored.pairs[0]["one"] == pair["one"].absolute()
    assert [row["step"] for row in read_metrics(whole)] == list(range(1, STEPS + 1))
    # The last step is looked at more closely, by the weights that are handed on.
    watched = {"model_agreement", "model_equivariance_error", "model_effective_rank"}
    assert watched <= read_metrics(whole)[-1].keys()
    assert not watched & read_metrics(whole)[0].keys()


def test_the_step_undoes_every_group_element(
    pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With networks that pass the image through, the maps must be the patches as they were drawn."""

    class Identity(Network):
        in_channels = latent_channels = 1
        total_stride_zyx = receptive_halo_zyx = (1, 1, 1)

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x_BCZYX: Tensor) -> Tensor:
            return x_BCZYX * self.scale

    seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def look(loop: Loop, done: int, parts: Any, maps: Any, sample: Any, _: bool) -> None:
        step = done - 1
        batch = loop.sampler.batch(step, range(4), torch.device("cpu"))
        assert (batch.elements != 0).any()
        seen.append((list(maps), [image * 1 for image in batch.images]))

    monkeypatch.setattr("comir_hpc.train.checks.build_network", lambda *_, **__: Identity())
    monkeypatch.setattr(Loop, "_log", look)
    train(
        settings_of(pair, optimiser={"steps": 2, "learning_rate": 1e-9, "weight_decay": 0}), tmp_path / "run"
    )
    assert len(seen) == 2
    for maps, images in seen:
        for one, other in zip(maps, images, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- twins


def test_a_stopped_run_resumes_to_the_bit(
    pair: dict[str, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(loop: Loop, done: int, *rest: Any) -> None:
        original(loop, done, *rest)
        if done == 3:
            os.kill(os.getpid(), signal.SIGUSR2)

    original = Loop._log
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Loop, "_log", interrupt)
    run = tmp_path / "stopped"
    with pytest.raises(StopRequested, match=f"step 3 of {STEPS}.*same command continues"):
        train(settings_of(pair), run)
    assert signal.getsignal(signal.SIGTERM) is before
    assert list_checkpoints(run / "checkpoints")[0].name == "step-00000003"
    assert not (run / "model.json").exists()
    monkeypatch.setattr(Loop, "_log", original)
    train(settings_of(pair), run)
    assert_equal_runs(run, whole)


def test_a_damaged_checkpoint_is_passed_over_and_said(
    pair: dict[str, Path], whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "torn"
    train(settings_of(pair), run)
    (run / "model.json").unlink()
    (checkpoint_path(run / "checkpoints", STEPS) / "state.pt").write_bytes(b"torn")
    result = train(settings_of(pair), run)
    assert "step-00000006 is damaged" in caplog.text
    assert "the one before it is used" in result.summary
    assert_equal_runs(run, whole)


@pytest.mark.parametrize("file", ["model.json", "model/one.pt"])
def test_a_damaged_model_is_made_again_as_the_error_of_its_reader_says(
    pair: dict[str, Path], whole: Path, tmp_path: Path, file: str
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (run / file).write_bytes((run / file).read_bytes()[:90])
    with pytest.raises(CheckpointError, match="run the same `comir-hpc train` again"):
        load_encoder(run, "one")
    result = train(settings_of(pair), run)
    assert "it is made again from the last checkpoint" in result.summary
    assert_equal_runs(run, whole)
    load_encoder(run, "one")
    (run / file).write_bytes(b"")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=re.escape(file)):  # nothing is left to make it from
        train(settings_of(pair), run)


def test_a_run_of_a_newer_version_is_left_alone(pair: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    newer = (run / "model.json").read_text(encoding="utf-8").replace('"format": 1', '"format": 2')
    (run / "model.json").write_text(newer, encoding="utf-8")
    with pytest.raises(CheckpointError, match="written by a newer comir-hpc"):
        train(settings_of(pair), run)
    assert (run / "model.json").read_text(encoding="utf-8") == newer


def test_killed_and_run_again_gives_the_same_weights(
    pair: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    config, run = tmp_path / "config.json", tmp_path / "killed"
    config.write_text(json.dumps(record(pair)), encoding="utf-8")
    code = (
        "import sys, os, signal; from pathlib import Path; from comir_hpc.config import TrainSettings, load;"
        "from comir_hpc.train import train; from comir_hpc.train.loop import Loop; save = Loop.save\n"
        "def die(loop, done):\n"
        "    save(loop, done)\n"
        "    if done == 4 and len(sys.argv) > 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Loop.save = die\n"
        "train(load(TrainSettings, Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(config), str(run)]
    assert subprocess.run([*command, "die"], timeout=300, check=False).returncode == -signal.SIGKILL
    assert not (run / "model.json").exists()
    # What a kill in the middle of writing a checkpoint leaves.
    (run / "checkpoints" / ".step-00000006.part").mkdir()
    train(settings_of(pair), run)
    assert_equal_runs(run, whole)
    assert not list((run / "checkpoints").glob(".*"))


def test_micro_batches_keep_all_negatives(pair: dict[str, Path], tmp_path: Path) -> None:
    """A norm without batch statistics: loss and gradient of four pairs in two parts are those of four pairs."""
    runs = []
    # Adam's first steps follow signs, and turn rounding into differences: a small rate keeps them small.
    gentle = {"steps": 3, "learning_rate": 1e-5}
    for accumulation in (1, 2):
        run = tmp_path / f"parts{accumulation}"
        engine = {"accumulation": accumulation, "precision": "fp32", "device": "cpu"}
        train(settings_of(pair, engine=engine, network={"norm": "channel"}, optimiser=gentle), run)
        runs.append(rows(run))
    for key in ("loss", "gradient_norm", "num_negatives", "retrieval"):
        assert [r[key] for r in runs[1]] == pytest.approx([r[key] for r in runs[0]], rel=1e-4), key


def test_the_engine_makes_no_difference(pair: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "deepspeed"
    engine = {"name": "deepspeed", "precision": "fp32", "device": "cpu"}
    train(settings_of(pair, engine=engine), run)
    assert [r["loss"] for r in rows(run)] == pytest.approx([r["loss"] for r in rows(whole)], rel=1e-4)


def test_two_processes_train_as_one(pair: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    config, run = tmp_path / "config.json", tmp_path / "two"
    config.write_text(json.dumps(record(pair)), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from comir_hpc.config import TrainSettings, load;"
        "from comir_hpc.train import train; train(load(TrainSettings, Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(config), str(run)],
            env={**shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, problem = rank.communicate(timeout=300)
        assert rank.returncode == 0, problem.decode()[-3000:]
    # Sums in another order differ in the last bit, and Adam's steps make more of it: 3e-6 at first, 2e-2 at the sixth.
    one, two = rows(whole)[:4], rows(run)[:4]
    assert len(two) == 4
    for key in ("loss", "retrieval", "agreement", "gradient_norm", "num_negatives"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=5e-3), key
    # A checkpoint of two processes continues on one.
    result = train(settings_of(pair, optimiser={"steps": STEPS + 1}), run)
    assert result.steps == STEPS + 1


def test_a_second_training_in_one_folder_is_refused_and_names_the_first(
    pair: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with writer(run, run, "comir-hpc train"):
        with pytest.raises(
            HeldError, match=rf"run is being written by `comir-hpc train` .*process {os.getpid()}"
        ):
            train(settings_of(pair), run)
        assert sorted(path.name for path in run.iterdir()) == ["writer-1-of-1.json", "writer.lock"]
    # A finished run is only read: whoever extends it does not hinder that.
    with writer(whole, whole, "comir-hpc train"):
        assert train(settings_of(pair), whole).steps == settings_of(pair).optimiser.steps


def test_a_finished_run_returns_at_once(pair: dict[str, Path], whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    result = train(settings_of(pair), whole)
    assert result.steps == STEPS
    assert result.reference["patches"] > 0
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before


def test_volumes_read_by_other_processes_train_the_same(
    pair: dict[str, Path], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "uncached"
    sampling = {"cache_mib": 0, "workers": 1, "patch": [16, 16, 16], "pairs_per_step": 4}
    train(settings_of(pair, sampling=sampling), run)
    assert_equal_runs(run, whole)


# ---------------------------------------------------------------------- the folder is claimed


def test_changed_settings_are_refused_by_name(pair: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.temperature 0\.1 -> 0\.2, seed 0 -> 1.*another --run"):
        train(settings_of(pair, seed=1, loss={"temperature": 0.2}), whole)
    with pytest.raises(ConfigError, match=f"optimiser.steps {STEPS} -> 3"):
        train(settings_of(pair, optimiser={"steps": 3}), whole)
    # What leaves the weights alone may change.
    train(settings_of(pair, checkpoint={"keep": 3}, tracking={"log_every": 2, "mlflow": None}), whole)


def test_a_checkpoint_of_another_architecture_is_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings_of(pair), run)
    (run / "config.yaml").unlink()
    (run / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"another architecture.*network\.widths \[4, 8\] -> \[6, 8\]"):
        train(settings_of(pair, network={"widths": [6, 8]}), run)


def test_old_checkpoints_are_deleted(pair: dict[str, Path], tmp_path: Path) -> None:
    train(settings_of(pair, checkpoint={"every_steps": 1, "keep": 2}), tmp_path / "run")
    names = [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000006", "step-00000005"]
    assert read_checkpoint(checkpoint_path(tmp_path / "run" / "checkpoints", 6))["loop"]["step"] == 6


# ---------------------------------------------------------------------- refusals


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Loop._contrast

    def spoil(loop: Loop, sample: Any, maps: Any) -> Any:
        parts = original(loop, sample, maps)
        if loop.engine.steps_done == 4:
            object.__setattr__(parts, "loss", parts.loss * float("nan"))
        return parts

    monkeypatch.setattr(Loop, "_contrast", spoil)
    settings = settings_of(pair, tracking={"log_every": 6, "mlflow": None})
    with pytest.raises(ConfigError, match=r"diverged: loss nan.*at step 5 of 6.*learning_rate"):
        train(settings, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-00000004"


def test_a_full_disk_keeps_the_last_good_checkpoint(
    pair: dict[str, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, []

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left.*Intact: step-00000002"):
        train(settings_of(pair), tmp_path / "run")
    monkeypatch.undo()
    train(settings_of(pair), tmp_path / "run")
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"pairs_per_step": 1, "patch": [16, 16, 16]}}, "no negatives"),
        ({"sampling": {"patch": [16, 16, 32], "group": "O"}}, r"needs equal values.*use group D2|D4"),
        ({"sampling": {"patch": [16, 16, 32]}}, "group O carries the axes"),
        ({"sampling": {"patch": [15, 15, 15]}}, r"multiples of that; use \(16, 16, 16\)"),
        ({"sampling": {"patch": [48, 48, 48]}}, r"larger than .*one\.zarr with 40 x 44 x 48 voxels"),
        ({"sampling": {"level": 7}}, "sampling.level is 7, but .* has levels 0 to"),
        ({"engine": {"accumulation": 3}}, "pairs_per_step is 4, .* 3 micro-batches .* use 3 or 6"),
        ({"engine": {"name": "deepspeed", "zero_stage": 3}}, "zero_stage is 3"),
        ({"modalities": ["train", "two"]}, "modality 'train' cannot"),
        ({"network": {"widths": [4]}}, "needs 2 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    pair: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    plain = record(pair, **changes)
    if "modalities" in changes:
        plain["pairs"] = [dict(zip(changes["modalities"], pair.values(), strict=True))]
    with pytest.raises(ConfigError, match=message):
        train(validate(TrainSettings, plain), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_volumes_that_do_not_fit_are_refused(pair: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"missing\.zarr does not exist"):
        train(settings_of({"one": pair["one"], "two": tmp_path / "missing.zarr"}), tmp_path / "run")
    bare = store(tmp_path / "bare.zarr", phantom_pair((40, 44, 48))[0], above=20.0)
    Volume.open(bare, writable=True).update_metadata(intensity=None)
    with pytest.raises(VolumeError, match="no intensity statistics"):
        train(settings_of({"one": pair["one"], "two": bare}), tmp_path / "run")
    thick = store_pair(tmp_path, spacing=(6.0, 2.0, 2.0))
    with pytest.raises(
        ConfigError, match=r"sampling\.group is O, .* voxels are 6 x 2 x 2 mm .* use D4 or auto"
    ):
        train(settings_of(thick, sampling={"patch": [16, 16, 16], "group": "O"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_plan_predicts_without_writing(pair: dict[str, Path]) -> None:
    before = sorted(pair["one"].parent.rglob("*"))
    plan = plan_training(settings_of(pair))
    assert plan["group"] == "O (24 rotations)"
    assert "6 steps of 4 pairs" in plan["samples"]
    assert all(isinstance(value, str) for value in plan.values())
    assert sorted(pair["one"].parent.rglob("*")) == before


def test_as_few_levels_are_recomputed_as_fit(pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(pair, network={"checkpoint_levels": "auto"})
    inputs = inspect_inputs(settings)
    assert choose_recomputed_levels(settings, inputs).network.checkpoint_levels == 0
    fixed = settings.network.model_copy(update={"checkpoint_levels": 0})
    plain = settings.model_copy(update={"network": fixed})
    needed = predict(plain, build_networks(plain, inputs), "fp32", 1).total_bytes
    monkeypatch.setattr("comir_hpc.train.plan.available_bytes", lambda: int(needed / 0.81))
    assert choose_recomputed_levels(settings, inputs).network.checkpoint_levels in (1, 2)
    monkeypatch.setattr("comir_hpc.train.plan.available_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"needs .* MiB with all levels recomputed, and 1\.0 MiB are free"):
        train(settings, pair["one"].parent / "run")


def test_recomputing_changes_nothing(pair: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    train(settings_of(pair, network={"checkpoint_levels": 2}), tmp_path / "run")
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
        if not path.stem.startswith("benchmark")  # these are not for train: test_config
    ],
    ids=lambda p: p.stem,
)
def test_example_configurations_are_valid(path: Path) -> None:
    settings = load(TrainSettings, path)
    if path.stem == "brain":
        plain = TrainSettings(modalities=settings.modalities, pairs=settings.pairs)
        assert settings == plain, "brain.yaml writes out the defaults"
