"""What a run was expected to need, beside what it needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comir_hpc.ledger import Ledger
from comir_hpc.memory import in_words


@dataclass(frozen=True)
class Figures:
    """Predicted or measured needs of one call.

    Parameters
    ----------
    blocks : int
        Computed by the call.
    seconds : float or None
        Wall clock; None where a calibration would take longer than the work.
    peak_bytes : int
        Memory of the largest process.
    num_bytes, files : int or None
        Of the whole store, at most; None while other parts are missing.
    """

    blocks: int
    seconds: float | None
    peak_bytes: int
    num_bytes: int | None
    files: int | None

    def record(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(self).items()}


def measured(store: Path, ledger: Ledger, *, blocks: int, seconds: float, complete: bool) -> Figures:
    """What one call needed: memory from the blocks' notes, size from the store."""
    found = [note.get("peak_mib") for note in ledger.notes().values()]
    peaks = [mib << 20 for mib in found if type(mib) is int and mib >= 0]
    sizes = [f.stat().st_size for f in store.rglob("*") if f.is_file()] if complete else None
    num_bytes, files = (None, None) if sizes is None else (sum(sizes), len(sizes))
    return Figures(blocks, seconds, max(peaks, default=0), num_bytes, files)


def side_by_side(predicted: Figures, actual: Figures) -> str:
    """One line for the end of a run."""
    expected = "" if predicted.seconds is None else f" ({predicted.seconds:.1f} s expected)"
    text = f"{actual.blocks} blocks ({predicted.blocks} expected) in {actual.seconds:.1f} s{expected}"
    if actual.peak_bytes:
        text += (
            f", peak memory {in_words(actual.peak_bytes)} (at most {in_words(predicted.peak_bytes)} expected)"
        )
    if actual.num_bytes is not None and predicted.num_bytes is not None:
        text += (
            f", {in_words(actual.num_bytes)} in {actual.files} files (at most {in_words(predicted.num_bytes)} in "
            f"{predicted.files} expected)"
        )
    return text
