"""The thread that carries a run to MLflow while it trains; nobody waits for it but at the end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comir_hpc.runs.tracking.record import FirstFailure, Status
from comir_hpc.runs.tracking.remote import MlflowRun, Target, failures

_RETRY_S = 60.0  # between attempts to reach a server that failed
_CLOSING_S = 20.0  # longest wait for the mirror at the end; creating a sqlite database takes 5


class Mirror(threading.Thread):
    """Carries rows and files to MLflow; nobody ever waits for it, but `close` for a bounded time."""

    def __init__(self, target: Target, failure: FirstFailure | None = None) -> None:
        # A daemon: Python must be able to end while a server keeps a request waiting.
        super().__init__(name="mlflow-mirror", daemon=True)
        self._target = target
        self._failure = failure or FirstFailure()
        self._run: MlflowRun | None = None
        self._rows: deque[Mapping[str, Any]] = deque()
        self._files: deque[tuple[Path, str]] = deque()
        self._status: Status = "running"
        self._wake = threading.Event()
        self._closing = threading.Event()

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Deliver a line of metrics."""
        self._rows.append(row)
        self._wake.set()

    def add_file(self, path: Path, folder: str) -> None:
        """Deliver a file or folder into a folder of the artifacts."""
        self._files.append((path, folder))
        self._wake.set()

    def close(self, status: Status) -> None:
        """Deliver what is left, end the run; no longer than a bounded time."""
        self._status = status
        self._closing.set()
        self._wake.set()
        self.join(_CLOSING_S)
        if self.is_alive():
            self._warn("it has not answered in time")

    def run(self) -> None:
        """Deliver whenever there is something; after a failure wait, then try again."""
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._deliver(closing)
            except failures() as error:
                self._warn(self._target.brief(error))
                if not closing:
                    # Waits on the end and not on new rows, which arrive all the time and would ask a dead server
                    # again and again.
                    self._closing.wait(_RETRY_S)
                    self._wake.set()
            if closing:
                return

    def _deliver(self, closing: bool) -> None:
        if self._run is None:
            self._run = MlflowRun(self._target)
        rows: Sequence[Mapping[str, Any]] = list(self._rows)
        # Taken from the queue only when they are sent: after a failure the same rows are tried again.
        self._run.send_rows(rows)
        for _ in rows:
            self._rows.popleft()
        while self._files:
            self._run.send_file(*self._files[0])
            self._files.popleft()
        if closing:
            self._run.end(self._status, time.time())

    def _warn(self, reason: str) -> None:
        self._failure.warn(
            f"MLflow at {self._target.shown} cannot be reached ({reason}); training goes on, `comir-hpc sync "
            f"{self._target.run_dir}` sends what it missed"
        )
