"""What the machine does while it trains: processor, memory, disk, network and GPUs, every few seconds.

MLflow has a monitor of its own, but it writes to the server only: what happens while that is away would be lost. Here
a line goes into system.jsonl, and from there to MLflow, under the names that MLflow's page for system metrics shows.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from comir_hpc.runs.tracking.record import FirstFailure, append_row

Row = Mapping[str, Any]
_MB = 1e6  # MLflow's unit: megabytes, not mebibytes


class SystemMonitor(threading.Thread):
    """Writes a line every `every_s` seconds, the first after that time, until `stop`.

    Parameters
    ----------
    path : Path
        Path of the file system.jsonl that is written.
    started : float
        When the run was started, seconds since 1970: lines count whole seconds from there as their ``step``, so that a
        resumed run goes on counting.
    sink : callable
        Function that is called with every line as well.
    failure : FirstFailure, optional
        Object that is told the first time the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        started: float,
        every_s: float,
        sink: Callable[[Row], None],
        failure: FirstFailure | None = None,
    ) -> None:
        super().__init__(name="system-monitor", daemon=True)
        self._failure = failure or FirstFailure()
        self._path, self._zero, self._every_s, self._sink = path, started, every_s, sink
        self._ending = threading.Event()

    def run(self) -> None:
        """Look and write, again and again."""
        load = SystemLoad(self._path.parent)
        while not self._ending.wait(self._every_s):
            now = time.time()
            row = {"step": int(now - self._zero), "time": round(now, 3), **load.read()}
            try:
                append_row(self._path, row)
            except OSError as error:
                self._failure.warn(
                    f"{self._path} cannot be written ({error}); the machine's load is no longer noted"
                )
                return
            self._sink(row)

    def stop(self) -> None:
        """End; a line that is being written is finished first."""
        self._ending.set()
        self.join()


class SystemLoad:
    """Reads the load of this machine, and of this process and its children.

    Parameters
    ----------
    folder : Path
        Folder whose file system is measured.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._process = psutil.Process()
        self._network, self._received, self._sent = psutil.net_io_counters(), 0, 0
        self._gpus = _Gpus()
        # The first reading has nothing to compare with and is always 0.
        psutil.cpu_percent()
        self._process.cpu_percent()

    def read(self) -> dict[str, float]:
        """Read values under MLflow's names; percentages of a processor count since the last call."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(self._folder)
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "process_cpu_percentage": self._process.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_megabytes": self._resident_bytes() / _MB,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MB,
            **self._network_megabytes(),
            **self._gpus.read(),
        }
        return {f"system/{name}": round(float(value), 1) for name, value in values.items()}

    def _resident_bytes(self) -> int:
        total = self._process.memory_info().rss
        for child in self._process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.Error:
                continue  # it has ended meanwhile
        return int(total)

    def _network_megabytes(self) -> dict[str, float]:
        """Return the megabytes sent and received since this object was made; nothing where the system counts none."""
        now, before = psutil.net_io_counters(), self._network
        if now is None or before is None:
            return {}
        # An interface that goes away takes its counts with it: a sum that falls is a new start.
        self._received += max(0, now.bytes_recv - before.bytes_recv)
        self._sent += max(0, now.bytes_sent - before.bytes_sent)
        self._network = now
        return {
            "network_receive_megabytes": self._received / _MB,
            "network_transmit_megabytes": self._sent / _MB,
        }


class _Gpus:
    """The NVIDIA GPUs that this process may use; none where there is no driver."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        try:
            import pynvml

            pynvml.nvmlInit()
        except (ImportError, OSError):
            return
        except pynvml.NVMLError:
            return
        self._nvml = pynvml
        for name in _visible(pynvml.nvmlDeviceGetCount()):
            by_uuid = pynvml.nvmlDeviceGetHandleByUUID
            try:
                find = pynvml.nvmlDeviceGetHandleByIndex if name.isdigit() else by_uuid
                handle = find(int(name) if name.isdigit() else name)
            except pynvml.NVMLError:
                continue
            self._handles[str(len(self._handles))] = handle

    def read(self) -> dict[str, float]:
        """Read use, memory and power of each GPU, as far as it tells them."""
        values: dict[str, float] = {}
        for name, handle in self._handles.items():
            for read in (self._utilisation, self._memory, self._power):
                try:
                    found = read(handle)
                except self._nvml.NVMLError:
                    continue  # e.g. a MIG slice has no utilisation of its own
                values |= {f"gpu_{name}_{what}": value for what, value in found.items()}
        return values

    def _utilisation(self, handle: Any) -> dict[str, float]:
        return {"utilization_percentage": self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu}

    def _memory(self, handle: Any) -> dict[str, float]:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        share = 100 * memory.used / memory.total
        return {"memory_usage_megabytes": memory.used / _MB, "memory_usage_percentage": share}

    def _power(self, handle: Any) -> dict[str, float]:
        return {"power_usage_watts": self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000}


def _visible(count: int) -> list[str]:
    """Return the numbers or UUIDs of the GPUs that the environment leaves to this process."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in named.split(",") if name.strip()]
