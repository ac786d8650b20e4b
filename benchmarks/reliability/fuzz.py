"""Some thousands of files that are nearly right, read by ours and by the reference reader of each format.

    cd benchmarks/reliability; PYTHONPATH=../../tests python fuzz.py --tries 300 --seed 20000 --out fuzz.csv

A row for each format: how many files were refused in one line, read as the reference reader reads them (every voxel
at its place in the world), read with a note, and what failed: an exception that is none of ours, a message that is too
long, more than 5 s or 1 GiB, another volume without a note, or a process that died. A failure is printed with its seed,
which makes the same file again. Ends with 1 if there was one.
"""

import argparse
import csv
import faulthandler
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from file_mutations import MAKERS
from fuzzing import Try, try_one

COLUMNS = ("format", "tries", "refused", "read alike", "read with a note", "failures", "slowest s")


def tried(kind: str, first: int, count: int, folder: Path) -> Iterator[Try]:
    """Try in a process of its own; where that dies, the file has failed, and a new process goes on after it."""
    spawn, done = multiprocessing.get_context("spawn"), 0
    while done < count:
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_serve, args=(theirs, kind, first + done, count - done, folder))
        process.start()
        theirs.close()
        try:
            while done < count:
                yield ours.recv()
                done += 1
        except EOFError:
            process.join()
            yield Try(kind, f"seed {first + done}", "failed", f"the process died: {process.exitcode}", 0.0)
            done += 1
        process.join()


def _serve(pipe: Connection, kind: str, first: int, count: int, folder: Path) -> None:
    faulthandler.enable()
    for seed in range(first, first + count):
        pipe.send(try_one(kind, seed, folder))


def row(kind: str, tries: list[Try]) -> list[object]:
    """One line of the table."""
    counts = Counter(one.verdict for one in tries)
    shown = [counts[verdict] for verdict in ("refused", "alike", "noted", "failed")]
    return [kind, len(tries), *shown, f"{max(one.seconds for one in tries):.2f}"]


def main() -> None:
    """All formats, or those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=500, help="of each format")
    parser.add_argument("--seed", type=int, default=10000, help="of the first try; the others count on")
    parser.add_argument("--format", nargs="*", default=list(MAKERS), choices=list(MAKERS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    failures = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        given.out.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        command = f"python fuzz.py --tries {given.tries} --seed {given.seed} --out OUT"
        file.write(f"# cd benchmarks/reliability; PYTHONPATH=../../tests {command}\n")
        table.writerow(COLUMNS)
        for kind in given.format:
            tries = list(tried(kind, given.seed, given.tries, Path(folder) / "file"))
            table.writerow(row(kind, tries))
            print(*row(kind, tries), flush=True)
            for one in tries:
                if one.verdict == "failed":
                    failures += 1
                    print(f"  {one.what}\n  {one.why}", flush=True)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
