"""Headless Chromium for the tests marked `browser`: a page's DOM after its scripts ran, and pictures of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
_CONSOLE = re.compile(r":(?:INFO|WARNING|ERROR):CONSOLE[^\]]*\] (.*)")


def page_source(url: str, *flags: str, budget_ms: int = 5000) -> tuple[str, list[str]]:
    """The DOM of a page as HTML once its scripts ran, and the lines that its console got."""
    done = _run(url, "--dump-dom", *flags, budget_ms=budget_ms)
    return done.stdout, _CONSOLE.findall(done.stderr)


def picture(url: str, path: Path, width: int, height: int, *flags: str, budget_ms: int = 5000) -> Path:
    """A PNG of the top `width` x `height` pixels of a page."""
    _run(url, f"--screenshot={path}", f"--window-size={width},{height}", *flags, budget_ms=budget_ms)
    return path


def _run(url: str, *flags: str, budget_ms: int) -> subprocess.CompletedProcess[str]:
    # A profile of its own each time: a second Chromium on one profile hands its page to the first and exits.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["chromium", *_FLAGS, f"--user-data-dir={profile}", f"--virtual-time-budget={budget_ms}"]
        return subprocess.run(
            [*command, *flags, url], capture_output=True, text=True, encoding="utf-8", timeout=90, check=True
        )
