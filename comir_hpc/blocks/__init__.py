"""Where the work on blocks runs: in this process, on several, on Dask's, or as one part of an array job.

What is sent around is the number of a block, never voxels: whoever computes a block reads what it needs and writes its
own shards. Every path makes the same calls in the same order within a block, so a result cannot depend on which of them
ran. What is done is in the ledger, so a result cannot depend on how often they were stopped.
"""

from __future__ import annotations

from comir_hpc.blocks.block import BlockResult, Work
from comir_hpc.blocks.coarse import build_pyramid
from comir_hpc.blocks.cost import Figures, recording_seconds, side_by_side, together, writing_bytes
from comir_hpc.blocks.job import Execution, Filled, Job, carry_out
from comir_hpc.blocks.output import Output, metadata_at, open_output
from comir_hpc.blocks.run import BlockRun, run_blocks

__all__ = [
    "BlockResult",
    "BlockRun",
    "Execution",
    "Figures",
    "Filled",
    "Job",
    "Output",
    "Work",
    "build_pyramid",
    "carry_out",
    "metadata_at",
    "open_output",
    "recording_seconds",
    "run_blocks",
    "side_by_side",
    "together",
    "writing_bytes",
]
