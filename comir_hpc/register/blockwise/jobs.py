"""The two passes over the blocks as jobs of the block engine: solutions into a scratch store, then the field.

The second pass needs the solutions of neighbours. So it begins when the first is complete, and whoever ends last
carries it out: it reads no voxels and takes little time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from comir_hpc.blocks.block import BlockResult
from comir_hpc.blocks.cost import Figures, writing_bytes
from comir_hpc.blocks.job import Execution
from comir_hpc.blocks.ledger import Ledger, Note, fingerprint
from comir_hpc.blocks.output import Output, metadata_at
from comir_hpc.config.refine import FIELD_ARRAY, RefineSettings
from comir_hpc.errors import VolumeError
from comir_hpc.host.files import write_json
from comir_hpc.host.memory import expected_in_worker, expected_peak
from comir_hpc.register.blockwise.blend import Blend
from comir_hpc.register.blockwise.evidence import Evidence, write_evidence
from comir_hpc.register.blockwise.memory import blend_bytes, block_bytes
from comir_hpc.register.blockwise.opened import Opened
from comir_hpc.runs.refinement import EVIDENCE
from comir_hpc.space.grid import Grid, as_triple
from comir_hpc.space.plan import Block, BlockPlan, plan_blocks
from comir_hpc.transforms.conventions.ngff import field_scene
from comir_hpc.transforms.conventions.ngff_fields import displacements_entry, frame_of
from comir_hpc.transforms.stored import FIELD_KEY, is_field
from comir_hpc.volumes.volume import Volume

_SOLVED = ("state", "content", "cubes", "own_folds", "smoothings", "before", "after", "standard_error")
_BLENDED = ("folds", "least_determinant", "displacement_mm", "largest_mm", "inverse_residual_mm")
_WORKER_HEAP = 200 << 20  # of a worker with torch loaded, as `infer` measured it


class _Pass:
    """What both passes have in common."""

    verb = "refine"

    def __init__(self, opened: Opened) -> None:
        self.opened, self.settings = opened, opened.settings

    @property
    def scratch(self) -> Path:
        """Folder of the solutions, which is there until the field is complete."""
        out = self.settings.out
        return out.with_name(out.name + ".blocks")

    @property
    def command(self) -> tuple[str, ...]:
        """Words of the command line that make the output again."""
        return (str(self.settings.result.resolve()), "--out")

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """Settings and inputs that the result depends on."""
        return self.opened.record

    def require_unchanged(self) -> None:
        """Refuse volumes that are not what they were when the job began.

        Raises
        ------
        VolumeError
            If one has changed.
        """
        for side, before in zip(
            (self.opened.fixed, self.opened.moving), self.opened.fingerprints, strict=True
        ):
            if side.volume.fingerprint() != before:
                raise VolumeError(
                    f"{side.volume.path} changed while it was read; register again when it is at rest, and refine that"
                )

    def _process(self, more: float) -> int:
        workers = self.settings.workers
        return expected_in_worker(more, _WORKER_HEAP) if workers > 1 else expected_peak(more)


class SolveJob(_Pass):
    """The solutions of all blocks, tile beside tile."""

    @property
    def out(self) -> Path:
        """Folder of the store that is written."""
        return self.scratch / "blocks.zarr"

    @property
    def execution(self) -> Execution:
        """How the job is carried out."""
        return Execution.from_settings(self.settings)

    def ledger(self) -> Ledger:
        """Return the ledger of the solutions."""
        return Ledger(self.out, fingerprint(**self.record), _is_solved)

    def create(self, path: Path) -> Volume:
        """Make the empty store of the tiles."""
        tile, counts = self.opened.layout.tile_zyx, self.opened.layout.plan.counts_zyx
        shape = as_triple([n * c for n, c in zip(tile, counts, strict=True)], int)
        return Volume.create(
            path,
            Grid(shape, (1.0, 1.0, 1.0)),
            np.float32,
            channels=3,
            kind="displacements",
            chunk=tile,
            shard=tile,
        )

    def plan(self, out: Volume) -> BlockPlan:
        """Return a block for every tile; its number is that of the block of the layout."""
        return plan_blocks(out.grid.shape_zyx, self.opened.layout.tile_zyx)

    def work(self, out: Volume) -> SolveWork:
        """Return what finds the solution of a block."""
        del out
        return SolveWork(self)

    def needs(self, plan: BlockPlan, blocks: int) -> Figures:
        """Predict what so many blocks need; time is not known before a block is done."""
        more = block_bytes(self.opened) + writing_bytes(
            12 * math.prod(self.opened.layout.tile_zyx), len(plan)
        )
        size = 12 * math.prod(self.opened.layout.tile_zyx) * len(plan)
        return Figures(blocks, None, self._process(more), size, 2 + 3 * len(plan))

    def finish(self, output: Output) -> Mapping[str, Any]:
        """Leave the tiles as they are: nobody looks at them but the second pass."""
        del output
        return {}


class BlendJob(_Pass):
    """The field."""

    @property
    def out(self) -> Path:
        """Folder of the store of the vectors, inside that of the field."""
        return self.settings.out / FIELD_ARRAY

    @property
    def execution(self) -> Execution:
        """How the job is carried out: as a whole, by whoever ended the first pass."""
        settings = self.settings
        return Execution((1, 1), settings.workers, settings.cluster, settings.verify, settings.overwrite)

    def ledger(self) -> Ledger:
        """Return the ledger of the field."""
        return FieldLedger(self.out, fingerprint(**self.record), _is_blended)

    @property
    def finished(self) -> bool:
        """Whether the field is there, complete and undamaged, made from the same."""
        found, ledger = metadata_at(self.out), self.ledger()
        if not found or not found.get("complete") or found.get("fingerprint") != ledger.fingerprint:
            return False
        try:
            damage = Volume.open(self.out, allow_incomplete=True).damage()
        except VolumeError:
            return False
        return not damage and not (self.settings.verify and ledger.verify())

    def require_place(self) -> None:
        """Refuse what lies at the place of the field, and take the place.

        Raises
        ------
        VolumeError
            If something is there that is no field of ours, or a field that was made from something else and is not to
            be replaced.
        """
        out = self.settings.out
        root, found = out / "zarr.json", metadata_at(self.out)
        if out.exists() and not is_field(out):
            raise VolumeError(
                f"{out} exists and is no field of ours, so it is never replaced; choose another --out"
            )
        if (
            found is not None
            and found.get("fingerprint") != self.ledger().fingerprint
            and not self.settings.overwrite
        ):
            before, now = found.get("made_from") or {}, json.loads(json.dumps(dict(self.record), default=str))
            changed = [key for key in now if before.get(key) != now[key]] or ["another version"]
            raise VolumeError(
                f"{out} exists and was made from something else ({', '.join(changed)} differ); choose another --out, "
                "or pass --overwrite"
            )
        if not is_field(out):
            out.mkdir(parents=True, exist_ok=True)
            write_json(root, _root({}))

    def create(self, path: Path) -> Volume:
        """Make the empty store of the vectors."""
        layout = self.opened.layout
        core = layout.plan.core_zyx
        return Volume.create(
            path, layout.lattice, np.float32, channels=3, kind="displacements", chunk=core, shard=core,
            metadata={"smoothness_mm": layout.smoothness_mm, "result": str(self.settings.result.resolve())},
        )  # fmt: skip

    def plan(self, out: Volume) -> BlockPlan:
        """Return the cores of the layout."""
        del out
        return self.opened.layout.plan

    def work(self, out: Volume) -> BlendWork:
        """Return what blends one block."""
        del out
        return BlendWork(self)

    def needs(self, plan: BlockPlan, blocks: int) -> Figures:
        """Predict what so many blocks need."""
        size = 12 * math.prod(self.opened.layout.lattice.shape_zyx) + 40 * len(plan)
        return Figures(blocks, None, self._process(blend_bytes(self.opened.layout)), size, 4 + 3 * len(plan))

    def finish(self, output: Output) -> Mapping[str, Any]:
        """Write the evidence of every block and the scene, which says how the vectors are used."""
        layout = self.opened.layout
        evidence = Evidence.gathered(layout, (SolveJob(self.opened).ledger(), output.ledger))
        write_evidence(self.settings.out / EVIDENCE, layout, evidence)
        output.volume.withdraw(displacements_entry("0", layout.lattice))
        scene = field_scene(FIELD_ARRAY, frame_of(layout.lattice), self.opened.coarse.affine)
        summary = evidence.summary()
        write_json(self.settings.out / "zarr.json", _root({"ome": scene}, summary))
        return {"blocks": summary}


class FieldLedger(Ledger):
    """The ledger of a field: it lies beside the whole store, and not inside, where readers of zarr would find it."""

    @property
    def folder(self) -> Path:
        """Folder of the lines."""
        field = self.store.parent
        return field.with_name(field.name + ".ledger")


class SolveWork:
    """Finds the solution of one block; a worker process opens volumes and models itself."""

    def __init__(self, job: SolveJob) -> None:
        self.settings: RefineSettings = job.settings
        self._opened: Opened | None = job.opened

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_opened": None}

    @cached_property
    def solver(self) -> Any:
        """What finds solutions, in this process."""
        return (self._opened or Opened.from_settings(self.settings)).solver

    def __call__(self, block: Block) -> BlockResult:
        """Find the solution of the block of this number."""
        found = self.solver(block.index)
        return BlockResult(found.displacement_mm.astype(np.float32, copy=False), found.note)


class BlendWork:
    """Blends one block; a worker process opens what it needs itself."""

    def __init__(self, job: BlendJob) -> None:
        self.settings: RefineSettings = job.settings
        self._opened: Opened | None = job.opened

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_opened": None}

    @cached_property
    def blend(self) -> Blend:
        """What blends, in this process."""
        opened = self._opened or Opened.from_settings(self.settings)
        return Blend(opened.layout, Volume.open(SolveJob(opened).out))

    def __call__(self, block: Block) -> BlockResult:
        """Blend the block, and measure it."""
        return BlockResult(*self.blend.measured(block.index))


def remove_scratch(job: _Pass) -> None:
    """Remove the solutions, when the field is complete."""
    shutil.rmtree(job.scratch, ignore_errors=True)


def _root(entries: dict[str, Any], summary: dict[str, Any] | None = None) -> dict[str, Any]:
    attributes = {**entries, FIELD_KEY: {"complete": summary is not None, **(summary or {})}}
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _is_solved(note: Note) -> bool:
    """Return whether a block's note in the ledger is what the first pass leaves there."""
    return _has_numbers(note, _SOLVED[:5]) and all(
        note[key] is None or _is_number(note[key]) for key in _SOLVED[5:] if note is not None
    )


def _is_blended(note: Note) -> bool:
    """Return whether a block's note in the ledger is what the second pass leaves there."""
    return _has_numbers(note, _BLENDED)


def _has_numbers(note: Note, keys: tuple[str, ...]) -> bool:
    return note is not None and all(key in note and _is_number(note[key]) for key in keys)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
