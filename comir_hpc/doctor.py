"""`comir-hpc doctor`: what works on this node, tried out rather than looked up, with the numbers.

Each check is a function that returns lines; one that raises is a FAIL with what it said. Nothing is left behind
in the folder that is tested, and nothing is changed anywhere.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from comir_hpc.geometry import Grid, plan_blocks
from comir_hpc.memory import available_bytes, in_words

Status = Literal["PASS", "WARN", "FAIL"]

_PACKAGES = ("comir-hpc", "torch", "deepspeed", "zarr", "SimpleITK", "numpy", "mlflow-skinny")
_GIB = 1024**3
_FILE_BYTES = 128 * 1024**2
_SLOW_DISK = 50  # MiB/s, under which reading patches holds up even a CPU
_GROUP_SECONDS = 120  # longest wait for processes that should find each other at once
# bf16 keeps 8 bits: products of rounded numbers are off by 0.3 % in the mean. A broken kernel is off by 10 % or more.
_TOLERANCE = {"fp32": 5e-3, "bf16": 2e-2}


@dataclass(frozen=True)
class Check:
    """One line: what was tried, how it went, the numbers, and what to do if it did not go well."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Checks:
    """All lines of one examination."""

    rows: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        """Whether any line is a FAIL."""
        return any(row.status == "FAIL" for row in self.rows)

    def text(self) -> str:
        """A table for a person; a remedy stands under its line."""
        width = max(len(row.name) for row in self.rows)
        lines = []
        for row in self.rows:
            lines.append(f"{row.status}  {row.name:<{width}}  {row.detail}")
            if row.remedy:
                lines.append(" " * (width + 8) + f"-> {row.remedy}")
        counts = [(s, sum(row.status == s for row in self.rows)) for s in ("PASS", "WARN", "FAIL")]
        return "\n".join([*lines, ", ".join(f"{n} {s}" for s, n in counts if n)])

    def json(self) -> str:
        """The same for a program: a list of objects."""
        return json.dumps([asdict(row) for row in self.rows], indent=2)


def doctor(folder: Path = Path()) -> Checks:
    """Examine this node; takes about half a minute.

    Parameters
    ----------
    folder : Path
        Whose file system is tried; the current folder when not given.
    """
    examinations: dict[str, Callable[[], list[Check]]] = {
        "versions": _versions,
        "processor": _processor,
        "memory": _memory,
        "open files": _open_files,
        "GPU": _gpu,
        "conv3d": _conv3d,
        "all-reduce": _all_reduce,
        "disk space": lambda: _disk_space(folder),
        "disk speed": lambda: _disk_speed(folder),
        "zarr": lambda: _zarr(folder),
        "SLURM": _slurm,
        "Apptainer": _apptainer,
    }
    return Checks(tuple(row for name, examine in examinations.items() for row in _safely(name, examine)))


def _safely(name: str, examine: Callable[[], list[Check]]) -> list[Check]:
    # What a broken node raises is not known beforehand; ValueError and RuntimeError include ours and torch's.
    try:
        return examine()
    except (OSError, RuntimeError, ValueError, ImportError, EOFError, subprocess.SubprocessError) as error:
        first = (str(error).splitlines() or [""])[0]
        return [Check(name, "FAIL", f"{type(error).__name__}: {first}"[:200])]


# ---------------------------------------------------------------------- the machine


def _versions() -> list[Check]:
    found, missing = [f"Python {platform.python_version()}"], []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    if not missing:
        return [Check("versions", "PASS", ", ".join(found))]
    detail = f"{', '.join(found)}; missing: {', '.join(missing)}"
    # DeepSpeed is for Linux, and plain torch does without it.
    status: Status = "WARN" if missing == ["deepspeed"] else "FAIL"
    return [Check("versions", status, detail, f"pip install {' '.join(missing)}")]


def _processor() -> list[Check]:
    import torch

    from comir_hpc.launch import choose_precision

    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    bf16 = choose_precision("auto", torch.device("cpu")) == "bf16"
    detail = f"{cores} cores for this process, {threads} torch threads, bf16 instructions: {'yes' if bf16 else 'no'}"
    if threads > cores:
        remedy = f"export OMP_NUM_THREADS={cores}: more threads than cores wait for each other"
        return [Check("processor", "WARN", detail, remedy)]
    return [Check("processor", "PASS", detail)]


def _memory() -> list[Check]:
    free = available_bytes()
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    detail = f"{in_words(free)} available"
    if shared is not None:
        detail += f", {in_words(shared)} of shared memory"
    if free < 2 * _GIB:
        return [Check("memory", "FAIL", detail, "ask for 4 GiB or more (--mem of sbatch)")]
    if free < 4 * _GIB:
        return [Check("memory", "WARN", detail, "the demo needs about 4 GiB (--mem of sbatch)")]
    if shared is not None and shared < 256 * 1024**2:
        return [
            Check("memory", "WARN", detail, "several ranks on one node exchange data there: enlarge /dev/shm")
        ]
    return [Check("memory", "PASS", detail)]


def _open_files() -> list[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return [Check("open files", "WARN", f"{soft} at most", f"ulimit -n {min(hard, 4096)}")]
    return [Check("open files", "PASS", f"{soft} at most")]


def _gpu() -> list[Check]:
    import torch

    if torch.cuda.is_available():
        rows = []
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            capability = f"{properties.major}.{properties.minor}"
            free, total = torch.cuda.mem_get_info(number)
            detail = (
                f"{properties.name}, {in_words(free)} of {in_words(total)} free, capability {capability}, "
            )
            detail += f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
            rows.append(Check(f"GPU {number}", "PASS", detail))
        return rows
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        detail = f"the NVIDIA driver is here, but torch {torch.__version__} sees no GPU"
        remedy = "install the CUDA build of torch, or give the job or container its GPU (--gres, --nv)"
        return [Check("GPU", "FAIL", detail, remedy)]
    return [Check("GPU", "PASS", "none; networks run on the CPU")]


# ---------------------------------------------------------------------- arithmetic and processes


def _conv3d() -> list[Check]:
    """Values of a 3D convolution and its gradients against double precision, and what bf16 gains.

    Some releases of cuDNN compute 3D convolutions in bf16 wrongly without a word (pytorch issue 163539), and
    torch 2.9 computes them four times slower than in fp32 (166122).
    """
    import torch

    from comir_hpc.launch import DTYPES, choose_device, choose_precision

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


def _all_reduce() -> list[Check]:
    """Several processes join and add up a number, as in training: gloo on CPUs, NCCL with several GPUs."""
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
        mean = receiver.recv() if answered else None
    finally:
        for worker in workers:
            worker.join(10 if answered else 0)
            worker.kill()
    backend = "NCCL" if device == "cuda" else "gloo"
    detail = f"{count} processes over {backend} in {time.perf_counter() - start:.1f} s"
    if mean != (count - 1) / 2:
        remedy = "check that the host name resolves, and set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        problem = "wrong sum" if answered else f"no answer within {_GROUP_SECONDS} s"
        return [Check("all-reduce", "FAIL", f"{count} processes over {backend}: {problem}", remedy)]
    return [Check("all-reduce", "PASS", detail)]


def _join(rank: int, count: int, port: int, device: Literal["cpu", "cuda"], sender: Connection) -> None:
    """One of the processes of `_all_reduce`; rank 0 sends the mean of all ranks' numbers."""
    import torch

    from comir_hpc.config import EngineSettings, OptimiserSettings
    from comir_hpc.engine import make_engine
    from comir_hpc.launch import Launch

    os.environ.update(Launch(rank, count, rank, "127.0.0.1", port).environment())
    torch.set_num_threads(1)
    networks = torch.nn.ModuleDict({"one": torch.nn.Conv3d(1, 1, 1)})
    engine = make_engine(EngineSettings(device=device, precision="fp32"), networks, OptimiserSettings())
    mean = float(engine.mean(torch.tensor(float(rank), device=engine.device)))
    if rank == 0:
        sender.send(mean)
    engine.close()


# ---------------------------------------------------------------------- the file system


def _disk_space(folder: Path) -> list[Check]:
    free = shutil.disk_usage(folder).free
    detail = f"{in_words(free)} free in {folder.absolute()}"
    if free < _GIB:
        return [Check("disk space", "FAIL", detail, "make room, or use another folder")]
    if free < 10 * _GIB:
        return [
            Check(
                "disk space",
                "WARN",
                detail,
                "a volume, its representation and its warp need three times its size",
            )
        ]
    return [Check("disk space", "PASS", detail)]


def _disk_speed(folder: Path) -> list[Check]:
    block = np.random.default_rng(0).bytes(8 * 1024**2)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".comir-doctor-") as file:
        start = time.perf_counter()
        for _ in range(_FILE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        write = time.perf_counter() - start
        # Otherwise the page cache answers, not the disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        file.seek(0)
        while file.read(len(block)):
            pass
        read = time.perf_counter() - start
    speeds = [_FILE_BYTES / 1024**2 / t for t in (write, read)]
    detail = f"write {speeds[0]:.0f} MiB/s, read {speeds[1]:.0f} MiB/s"
    if min(speeds) < _SLOW_DISK:
        return [Check("disk speed", "WARN", detail, "keep volumes on a faster file system while training")]
    return [Check("disk speed", "PASS", detail)]


def _zarr(folder: Path) -> list[Check]:
    """Write a sharded volume whose last shards are partial, open it again, and compare every voxel."""
    from comir_hpc.volume import Volume

    grid = Grid((96, 130, 110), (2.0, 1.0, 1.0))
    values = np.random.default_rng(0).integers(0, 1000, (1, *grid.shape_zyx), dtype=np.uint16)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".comir-doctor-") as place:
        start = time.perf_counter()
        volume = Volume.create(Path(place) / "v.zarr", grid, np.uint16, chunk=32, shard=64)
        for block in plan_blocks(grid.shape_zyx, volume.shard_zyx):
            volume.write(block.write, values[(slice(None), *block.write.slices)])
        volume.finish()
        same = bool(np.array_equal(Volume.open(volume.path).read(), values))
        taken = time.perf_counter() - start
    if not same:
        remedy = "this file system or this zarr release loses data: use another"
        return [Check("zarr", "FAIL", "a volume that was written came back different", remedy)]
    return [Check("zarr", "PASS", f"a sharded volume of {grid} came back equal in {taken:.1f} s")]


# ---------------------------------------------------------------------- the site


def _slurm() -> list[Check]:
    job = os.environ.get("SLURM_JOB_ID")
    inside = f"; this is job {job}" if job else ""
    if shutil.which("sbatch") is None:
        return [Check("SLURM", "PASS", "no sbatch here; only submitting jobs needs it" + inside)]
    try:
        return [Check("SLURM", "PASS", _first_line("sbatch", "--version") + inside)]
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines() or [f"it ended with {error.returncode}"]
        detail = f"sbatch is installed and finds no cluster ({reason[-1]}){inside}"
        return [Check("SLURM", "WARN", detail, "only submitting jobs needs it; if you do, set SLURM_CONF")]


def _apptainer() -> list[Check]:
    image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
    if image:
        return [Check("Apptainer", "PASS", f"inside {image}")]
    program = next((name for name in ("apptainer", "singularity") if shutil.which(name)), None)
    if program is None:
        return [Check("Apptainer", "PASS", "not here; only running the image needs it")]
    return [Check("Apptainer", "PASS", _first_line(program, "--version"))]


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=20, check=True)
    return done.stdout.strip().splitlines()[0]
