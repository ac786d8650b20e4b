"""Blocks on the workers of a Dask scheduler: one that runs already, or one whose workers are SLURM jobs."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comir_hpc.blocks.block import Carrier, Orders
from comir_hpc.errors import ConfigError

_ANSWER_S = 20  # seconds: a scheduler that runs answers at once, and one that is gone never does


def run_with_dask(orders: Orders, workers: int, cluster: str) -> None:
    """Carry out blocks on Dask workers.

    Parameters
    ----------
    orders : Orders
        Blocks that are to be done, and what a worker needs for them.
    workers : int
        Number of workers that are started on SLURM; of a scheduler that runs already, all are used.
    cluster : str
        Address ``dask://HOST:PORT`` of a scheduler, or ``slurm``.

    Raises
    ------
    ConfigError
        If the cluster is unknown, does not answer, or dask-jobqueue is missing.
    """
    from distributed import as_completed

    waiting = iter(orders.todo)
    with _client(workers, cluster) as client:

        def submit(index: int) -> Any:
            # pure=False: a result that the scheduler remembers from another run is not one of this run.
            return client.submit(
                _carry_out,
                orders.payload,
                index,
                orders.attempts(index),
                key=f"comir-block-{index}",
                pure=False,
            )

        # Two blocks for every slot keep all workers busy; the graph never grows with the volume.
        slots = max(workers, sum(client.nthreads().values()))
        running = as_completed([submit(i) for _, i in zip(range(2 * slots), waiting, strict=False)])
        for future in running:
            orders.settle(int(future.key.rpartition("-")[2]), _failure(future))
            following = None if orders.stop.is_set() else next(waiting, None)
            if following is not None:
                running.add(submit(following))


def _failure(future: Any) -> str | None:
    error = future.exception()
    if error is None:
        reason: str | None = future.result()
        return reason
    # By its name, so that nothing of dask has to be imported for it.
    if type(error).__name__ == "KilledWorker":
        return "the worker died each time it was tried (out of memory?)"
    raise error


_opened = threading.local()


def _carry_out(payload: bytes, index: int, attempts: int) -> str | None:
    """Do one block on a worker; each of its threads keeps what it opened from one block to the next."""
    # A worker outlives a run: what it opened for another one must not serve this one.
    if getattr(_opened, "payload", None) != payload:
        _opened.carrier = Carrier.unpack(payload)
        _opened.payload = payload
    carrier: Carrier = _opened.carrier
    return carrier(index, attempts)


@contextmanager
def _client(workers: int, cluster: str) -> Iterator[Any]:
    from distributed import Client

    if cluster.startswith("dask://"):
        try:
            client = Client("tcp://" + cluster.removeprefix("dask://"), timeout=f"{_ANSWER_S}s")
        except OSError as error:
            raise ConfigError(
                f"no Dask scheduler answers at {cluster}; start one with `dask scheduler`, or leave --cluster out"
            ) from error
        with client:
            yield client
    elif cluster == "slurm":
        with _slurm_cluster() as jobs, Client(jobs) as client:
            _require_accepted(jobs.job_script())
            jobs.scale(jobs=workers)
            yield client
    else:
        raise ConfigError(f"cluster {cluster!r} is unknown; expected dask://HOST:PORT or slurm")


def _slurm_cluster() -> Any:
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError as error:
        raise ConfigError(
            "--cluster slurm needs dask-jobqueue: pip install 'comir-hpc[slurm]'; or use --part in an array job"
        ) from error
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--cluster slurm, but sbatch is not on PATH; run this on a login node, outside the container, or use "
            "--part in an array job (slurm/infer.sh)"
        )
    try:
        return SLURMCluster()
    except ValueError as error:
        raise ConfigError(
            f"--cluster slurm: {error}; describe a worker's job under jobqueue.slurm in ~/.config/dask/jobqueue.yaml "
            "(docs/hpc.md)"
        ) from error


def _require_accepted(script: str) -> None:
    """Ask SLURM about a worker's job first: dask-jobqueue waits for ever for workers whose jobs were refused."""
    asked = subprocess.run(
        ["sbatch", "--test-only"], input=script, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if asked.returncode:
        raise ConfigError(
            f"--cluster slurm: a worker's job is refused: {' '.join(asked.stderr.split())}; edit jobqueue.slurm in "
            "~/.config/dask/jobqueue.yaml (docs/hpc.md)"
        )
