"""What the machine and its site have: versions, processor, memory, GPUs, file system, SLURM, Apptainer."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from comir_hpc.commands.doctor.check import Check, Status
from comir_hpc.host.memory import available_bytes, in_words
from comir_hpc.space.grid import Grid
from comir_hpc.space.plan import plan_blocks

PACKAGES = ("comir-hpc", "torch", "deepspeed", "zarr", "SimpleITK", "numpy", "mlflow-skinny")
_GIB = 1024**3
_FILE_BYTES = 128 * 1024**2  # written and read to measure the disk: some seconds on a slow one
_SLOW_DISK = 50  # MiB/s, under which reading patches holds up even a CPU

# ---------------------------------------------------------------------- the machine


def versions() -> list[Check]:
    """Name the versions of what the numbers depend on."""
    found, missing = [f"Python {platform.python_version()}"], []
    for package in PACKAGES:
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


def processor() -> list[Check]:
    """Count cores and threads, and look for bf16 instructions."""
    import torch

    from comir_hpc.host.launch import choose_precision

    # Those of this job, and not all that the node has.
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    bf16 = choose_precision("auto", torch.device("cpu")) == "bf16"
    detail = f"{cores} cores for this process, {threads} torch threads, bf16 instructions: {'yes' if bf16 else 'no'}"
    if threads > cores:
        remedy = f"export OMP_NUM_THREADS={cores}: more threads than cores wait for each other"
        return [Check("processor", "WARN", detail, remedy)]
    return [Check("processor", "PASS", detail)]


def memory() -> list[Check]:
    """Look at how much memory is free."""
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


def open_files() -> list[Check]:
    """Look at how many files a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return [Check("open files", "WARN", f"{soft} at most", f"ulimit -n {min(hard, 4096)}")]
    return [Check("open files", "PASS", f"{soft} at most")]


def gpu() -> list[Check]:
    """Look for GPUs that torch can use."""
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


# ---------------------------------------------------------------------- the file system


def disk_space(folder: Path) -> list[Check]:
    """Look at how much room a folder has."""
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


def disk_speed(folder: Path) -> list[Check]:
    """Write and read a file in a folder."""
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


def sharded_volume(folder: Path) -> list[Check]:
    """Write a sharded volume whose last shards are partial, open it again, and compare every voxel."""
    from comir_hpc.volumes.volume import Volume

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


def slurm() -> list[Check]:
    """Look for a SLURM cluster."""
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


def apptainer() -> list[Check]:
    """Look for Apptainer, around us or beside us."""
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
