"""How a stage says how far it is: one callable, whatever shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: what is being done, how much of it is done, how much there is."""
PartProgress = Callable[[int, int], None]
"""``progress(done, total)`` of one part of a stage."""


def part_of(progress: Progress | None, what: str) -> PartProgress | None:
    """Give a part of a stage its own ``progress(done, total)``; None where nobody listens."""
    return None if progress is None else lambda done, total: progress(what, done, total)
