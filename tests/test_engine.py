from __future__ import annotations

import importlib
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comir_hpc.config import EngineSettings, LossSettings, OptimiserSettings
from comir_hpc.errors import CheckpointError, ConfigError
from comir_hpc.host.launch import Launch, choose_device, choose_precision, first_host, read_launch
from comir_hpc.learning.engine import Engine, check_engine, learning_rate, make_engine
from comir_hpc.learning.engine.zero import deepspeed_config
from comir_hpc.learning.loss import contrastive_loss
from comir_hpc.runs.checkpoints import (
    checkpoint_path,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    read_newest,
    write_checkpoint,
)

OPTIMISER = OptimiserSettings(steps=20, learning_rate=1e-2)


def networks(seed: int = 0, width: int = 4) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {
            name: nn.Sequential(
                nn.Conv3d(1, width, 3, padding=1, bias=False),
                nn.BatchNorm3d(width),
                nn.ReLU(),
                nn.Conv3d(width, 1, 1),
            )
            for name in ("one", "two")
        }
    )


def engine(name: str = "torch", **settings: Any) -> Engine:
    options = EngineSettings(**{"name": name, "precision": "fp32", "device": "cpu", **settings})
    return make_engine(options, networks(), OPTIMISER)


def images(step: int, count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(count, 1, 8, 8, 8, generator=generator) for _ in range(2)]


def run_steps(one: Engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        u, v = one.encode(images(step))
        loss = ((u - v) ** 2).mean() + (u.mean() - 1) ** 2
        norm = one.step(loss)
        assert torch.isfinite(norm)
        losses.append(float(loss.detach()))
    return losses


# ---------------------------------------------------------------------- known answers


def test_learning_rate_rises_over_the_warm_up_and_ends_at_zero() -> None:
    settings = OptimiserSettings(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == pytest.approx(1.0) == max(rates)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert all(b <= a for a, b in itertools.pairwise(rates[10:]))


def test_deepspeed_configuration_is_this_one() -> None:
    plain = deepspeed_config(EngineSettings(name="deepspeed"), OPTIMISER, precision="fp32", world_size=1)
    assert plain == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 1,
        "gradient_clipping": 1.0,
        "torch_autocast": {"enabled": False},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    settings = EngineSettings(name="deepspeed", zero_stage=2, accumulation=3, offload_optimiser=True)
    wide = deepspeed_config(settings, OPTIMISER, precision="bf16", world_size=8)
    assert wide["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert wide["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert (wide["gradient_accumulation_steps"], wide["train_batch_size"]) == (3, 24)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "1234"},
            Launch(3, 8, 1, "n1", 1234),
        ),
        (
            {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77",
             "SLURM_STEP_NODELIST": "gpu[07-08]"},
            Launch(2, 4, 0, "gpu07", 20077),
        ),
        # The batch script itself: SLURM variables, but no step.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu[07-08]"}, Launch()),
    ],
)  # fmt: skip
def test_launch_is_read_from_torchrun_and_srun(environment: dict[str, str], expected: Launch) -> None:
    assert read_launch(environment) == expected
    if environment:
        assert read_launch(expected.environment()) == expected


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[007-009,012],login", "gpu007"),
        ("n[1,3]-ib", "n1-ib"),
        ("", ""),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_gradient_is_clipped_over_all_networks_together() -> None:
    one = make_engine(
        EngineSettings(device="cpu", precision="fp32"), networks(), OptimiserSettings(clip_norm=1e-3)
    )
    u, v = one.encode(images(0))
    loss = 1e3 * ((u - v) ** 2).mean()
    weights = list(one.networks.parameters())
    gradient = torch.autograd.grad(loss, weights, retain_graph=True)
    expected = torch.stack([g.norm() for g in gradient]).norm()
    torch.testing.assert_close(one.step(loss), expected)
    assert expected > 1e-3


# ---------------------------------------------------------------------- twins


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, parts = engine(), engine()
    # Batch statistics differ between a batch and its parts; running ones do not.
    for one in (whole, parts):
        one.networks.eval()
    batch = images(0)
    (whole.encode(batch)[0].square().sum() / 4).backward()
    for index in range(2):
        with parts.micro_batch(last=index == 1):
            part = [image[2 * index : 2 * index + 2] for image in batch]
            parts.backward(parts.encode(part)[0].square().sum() / 4)
    for a, b in zip(whole.networks["one"].parameters(), parts.networks["one"].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_gives_the_losses_of_plain_torch(stage: int) -> None:
    plain = run_steps(engine(), 0, 8)
    importlib.import_module("deepspeed")  # sets a variable of its own when it is first imported
    before = dict(os.environ)
    zero = run_steps(engine("deepspeed", zero_stage=stage), 0, 8)
    # A program that this process starts must not take itself for a rank of this training.
    assert {name for name in os.environ if name not in before} <= {"DS_ACCELERATOR"}
    assert zero == pytest.approx(plain, rel=1e-4)
    assert plain[-1] < plain[0]


@pytest.mark.parametrize("precision", ["bf16"])
def test_deepspeed_autocasts_as_plain_torch_does(precision: str) -> None:
    plain = run_steps(engine(precision=precision), 0, 4)
    zero = run_steps(engine("deepspeed", precision=precision), 0, 4)
    assert zero == pytest.approx(plain, rel=2e-2)
    assert engine(precision=precision).encode(images(0))[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("before", "after"), [("torch", "torch"), ("torch", "deepspeed"), ("deepspeed", "torch")]
)
def test_a_checkpoint_continues_to_the_bit_on_either_engine(tmp_path: Path, before: str, after: str) -> None:
    whole = run_steps(engine(after), 0, 8)
    first = engine(before)
    run_steps(first, 0, 4)
    first.save(checkpoint_path(tmp_path, 4), {"step": 4})
    second = engine(after)
    assert second.load(checkpoint_path(tmp_path, 4)) == {"step": 4}
    assert second.learning_rate == learning_rate(OPTIMISER, 4)
    rest = run_steps(second, 4, 8)
    assert rest == (whole[4:] if before == after else pytest.approx(whole[4:], rel=1e-5))


# ---------------------------------------------------------------------- checkpoints


def test_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        write_checkpoint(checkpoint_path(tmp_path, step), {"step": step, "weight": torch.ones(3)})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000030", "step-00000020", "step-00000010"]
    prune_checkpoints(tmp_path, keep=2)
    assert len(list_checkpoints(tmp_path)) == 2

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left.*Intact: step-00000030 and 1 before it"):
        write_checkpoint(checkpoint_path(tmp_path, 40), {"step": 40})
    newest = read_newest(tmp_path)
    assert newest is not None
    assert newest[0]["step"] == 30
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no manifest"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    for step in (10, 20):
        write_checkpoint(checkpoint_path(tmp_path, step), {"step": step, "weight": torch.ones(300)})
    file = checkpoint_path(tmp_path, 20) / "state.pt"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:100])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.with_name("manifest.json").unlink()
    newest = read_newest(tmp_path)
    assert newest is not None
    record, path, notes = newest
    assert record["step"] == 10
    assert path.name == "step-00000010"
    assert "step-00000020" in notes[0]
    assert "one before" in notes[0]
    (checkpoint_path(tmp_path, 10) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints .* are damaged"):
        read_newest(tmp_path)
    assert read_newest(tmp_path / "none") is None


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    engine().save(checkpoint_path(tmp_path, 1), {})
    other = make_engine(EngineSettings(device="cpu", precision="fp32"), networks(width=6), OPTIMISER)
    with pytest.raises(
        CheckpointError, match=r"another architecture: \d+ weights differ, first one\.0\.weight is \(4, 1"
    ):
        other.load(checkpoint_path(tmp_path, 1))


# ---------------------------------------------------------------------- refusals


def test_settings_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"zero_stage is 3: recomputing activations .*4332"):
        check_engine(EngineSettings(name="deepspeed", zero_stage=3), recomputing=True)
    with pytest.raises(ConfigError, match="fp16 on a CPU"):
        choose_precision("fp16", torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU"):
            choose_device("cuda")
    with pytest.raises(ConfigError, match="RANK is 4, but WORLD_SIZE is 2"):
        read_launch({"RANK": "4", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        read_launch({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="WORLD_SIZE is 1, but srun started 2 tasks"):
        read_launch({"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"})
    check_engine(EngineSettings(name="deepspeed", zero_stage=2), recomputing=True)


# ---------------------------------------------------------------------- two processes


def contrast(name: str, out: Path) -> None:
    """Three steps of the loop's core on however many ranks there are; what they gave is left in `out`."""
    one = engine(name, zero_stage=2)
    n = 4 // one.world_size
    rows = (one.rank * n, (one.rank + 1) * n)
    losses = []
    for step in range(3):
        maps = [one.gather(m) for m in one.encode([i[slice(*rows)] for i in images(step)])]
        loss = contrastive_loss(maps, LossSettings(), rows=rows).loss
        with one.micro_batch(last=True):
            one.backward(loss)
        if step == 0 and name == "torch" and one.rank == 0:
            gradient = torch.cat([p.grad.flatten() for p in one.networks.parameters() if p.grad is not None])
            torch.save(gradient, out / f"gradient{one.world_size}.pt")
        one.update()
        losses.append(float(one.mean(loss)))
    flags = one.any(one.rank == one.world_size - 1, False)
    one.save(checkpoint_path(out, one.world_size), {"flags": list(flags)})
    if one.rank == 0:
        (out / f"losses{one.world_size}.json").write_text(json.dumps(losses), encoding="utf-8")
    one.close()


def launch(call: str, ranks: int) -> None:
    """Run a function of this file in several processes that find each other."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_engine; {call}"
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        _, problem = process.communicate(timeout=300)
        assert process.returncode == 0, problem.decode()[-3000:]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("name", ["torch", "deepspeed"])
def test_two_processes_give_the_gradient_and_losses_of_one(tmp_path: Path, name: str) -> None:
    contrast(name, tmp_path)
    launch(f"test_engine.contrast({name!r}, test_engine.Path({str(tmp_path)!r}))", ranks=2)
    one, two = (
        json.loads((tmp_path / f"losses{ranks}.json").read_text(encoding="utf-8")) for ranks in (1, 2)
    )
    assert two == pytest.approx(one, rel=1e-5)
    if name == "torch":
        single, double = (torch.load(tmp_path / f"gradient{ranks}.pt") for ranks in (1, 2))
        assert float((single - double).norm() / single.norm()) < 1e-5
    # A checkpoint of two ranks is that of one, whatever ZeRO divides.
    records = [read_checkpoint(checkpoint_path(tmp_path, ranks)) for ranks in (1, 2)]
    for key, value in records[0]["engine"]["networks"].items():
        torch.testing.assert_close(records[1]["engine"]["networks"][key], value, rtol=1e-4, atol=1e-5)
    moments = [r["engine"]["optimiser"]["one.0.weight"]["exp_avg"] for r in records]
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=1e-6)
    assert records[1]["loop"] == {"flags": [True, False]}
