"""How a stage says how far it is: one callable, whatever shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: what is being done, how much of it is done, how much there is."""
PartProgress = Callable[[int, int], None]
"""``progress(done, total)`` of one part of a stage."""


def part_of(progress: Progress | None, what: str) -> PartProgress | None:
    """Give a part of a stage its own ``progress(done, total)``; None where nobody listens."""
    return None if progress is None else lambda done, total: progress(what, done, total)


@dataclass
class Clock:
    """Measure the seconds of each part, in the order in which the parts run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the seconds that the block takes to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
