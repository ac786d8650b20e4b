"""What the processors compute, and whether processes find each other."""

from __future__ import annotations

import os
import socket
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Literal

from comir_hpc.commands.doctor.check import Check

_GROUP_SECONDS = 120  # longest wait for processes that should find each other at once
# bf16 keeps 8 bits: products of rounded numbers are off by 0.3 % in the mean. A broken kernel is off by 10 % or more.
_TOLERANCE = {"fp32": 5e-3, "bf16": 2e-2}


def conv3d() -> list[Check]:
    """Compare the values of a 3D convolution and its gradients with double precision, and tell what bf16 gains.

    Some releases of cuDNN compute 3D convolutions in bf16 wrongly without a word (pytorch issue 163539), and
    torch 2.9 computes them four times slower than in fp32 (166122).
    """
    import torch

    from comir_hpc.host.launch import DTYPES, choose_device, choose_precision

    device = choose_device("auto")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 32, 36, 36, 36, generator=generator)
    kernel = torch.randn(32, 32, 3, 3, 3, generator=generator) / 30

    def pass_through(precision: str, where: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        x, w = (t.to(where, dtype, copy=True).requires_grad_() for t in (image, kernel))
        low = DTYPES.get(precision, torch.float32)
        with torch.autocast(where.type, dtype=low, enabled=low is not torch.float32):
            y = torch.nn.functional.conv3d(x, w, padding=1)
        gradients = torch.autograd.grad(y.float().square().sum(), (x, w))
        return [t.detach().cpu().double() for t in (y, *gradients)]

    def seconds(precision: str) -> float:
        best = float("inf")
        # The first call chooses kernels, and other programs may be at work: the best of several counts.
        for _ in range(4):
            start = time.perf_counter()
            pass_through(precision, device, torch.float32)
            best = min(best, time.perf_counter() - start)
        return best

    exact = pass_through("exact", torch.device("cpu"), torch.float64)
    rows = []
    for precision, tolerance in _TOLERANCE.items():
        found = pass_through(precision, device, torch.float32)
        off = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
        detail = f"{device}: off by {off:.1e} of the norm (allowed {tolerance:.0e})"
        if not off <= tolerance:
            remedy = "values are wrong: use another torch or cuDNN, or set engine.precision=fp32"
            rows.append(Check(f"conv3d {precision}", "FAIL", detail, remedy))
        else:
            rows.append(Check(f"conv3d {precision}", "PASS", detail))
    gain = seconds("fp32") / seconds("bf16")
    fast = choose_precision("auto", device) == "bf16"
    detail = f"bf16 is {gain:.1f} times as fast as fp32"
    if fast and gain < 0.8:
        remedy = "set engine.precision=fp32, or use another torch (2.9 is known for this)"
        return [*rows, Check("conv3d speed", "WARN", detail, remedy)]
    return [*rows, Check("conv3d speed", "PASS", detail + ("" if fast else "; fp32 is used here"))]


def all_reduce() -> list[Check]:
    """Let several processes join and add up a number, as in training: gloo on CPUs, NCCL with several GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    device, count = ("cuda", gpus) if gpus > 1 else ("cpu", 2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = get_context("spawn")  # a forked process would inherit threads that hold locks
    receiver, sender = context.Pipe(duplex=False)
    workers = [context.Process(target=_join, args=(r, count, port, device, sender)) for r in range(count)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    sender.close()
    try:
        answered = receiver.poll(_GROUP_SECONDS)
        try:
            mean = receiver.recv() if answered else None
        except EOFError:  # the pipe is readable, too, when every process has ended without a word
            answered, mean = False, None
    finally:
        for worker in workers:
            worker.join(10 if answered else 0)
            worker.kill()
    backend = "NCCL" if device == "cuda" else "gloo"
    detail = f"{count} processes over {backend} in {time.perf_counter() - start:.1f} s"
    if mean != (count - 1) / 2:
        remedy = "check that the host name resolves, and set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        problem = "wrong sum" if answered else f"no answer within {_GROUP_SECONDS} s, or all of them died"
        return [Check("all-reduce", "FAIL", f"{count} processes over {backend}: {problem}", remedy)]
    return [Check("all-reduce", "PASS", detail)]


def _join(rank: int, count: int, port: int, device: Literal["cpu", "cuda"], sender: Connection) -> None:
    """Run one of the processes of `all_reduce`; rank 0 sends the mean of all ranks' numbers."""
    import torch

    from comir_hpc.config.train import EngineSettings, OptimiserSettings
    from comir_hpc.host.launch import Launch
    from comir_hpc.learning.engine import make_engine

    os.environ.update(Launch(rank, count, rank, "127.0.0.1", port).environment())
    torch.set_num_threads(1)
    networks = torch.nn.ModuleDict({"one": torch.nn.Conv3d(1, 1, 1)})
    engine = make_engine(EngineSettings(device=device, precision="fp32"), networks, OptimiserSettings())
    mean = float(engine.mean(torch.tensor(float(rank), device=engine.device)))
    if rank == 0:
        sender.send(mean)
    engine.close()
