"""`comir-hpc register`: find the transform between two volumes, and say whether it can be trusted.

Representations of both volumes are compared at one level of their pyramids. First come all rotations and shifts, then
the best distinct answers are refined, and then the verdict is made. What is compared, and how, is said by a
`Representation` (`comir_hpc.representations`): nothing here asks which one it is. Each part has a file:

* `inputs` opens what is given and chooses the levels, `slices` flattens slices;
* `initial` chooses where the refinement starts, as the settings ask for;
* `global_search` tries all rotations on `coarse` maps; `starts` improves the best answers by `alignment` and chooses;
* `refine` optimises on samples, `gauss_newton` on all voxels; `ranking` ranks;
* `last_step` refines the best answer once more, on the intensities, where these are more exact;
* `similarity` measures how alike the two are, `checks` judges the answer, `pictures` draws, and `outputs` writes;
* `deform` bends space after an affine answer, if that is asked for;
* `fallback` compares in other ways where the general model's answer is not PASS;
* `unfinished` keeps what a registration that is stopped has found.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comir_hpc.config.register import RegisterSettings
from comir_hpc.config.words import BENDING
from comir_hpc.errors import RegistrationError
from comir_hpc.host.memory import in_words
from comir_hpc.host.progress import Clock, Progress, part_of
from comir_hpc.register.checks.account import account_of, without_answer
from comir_hpc.register.checks.calibration import own_calibration
from comir_hpc.register.checks.evidence import gather
from comir_hpc.register.deform import bend, require_deformable
from comir_hpc.register.fallback import Answer, or_otherwise
from comir_hpc.register.global_search import rotations_to_try
from comir_hpc.register.initial import as_before, find_starts, search_voxels
from comir_hpc.register.inputs import Inputs, open_inputs
from comir_hpc.register.last_step import refined_on_intensities
from comir_hpc.register.outputs import (
    RegisterResult,
    finished,
    input_record,
    landscape,
    output_bytes,
    versions,
    write_result,
)
from comir_hpc.register.pair import Pair
from comir_hpc.register.pictures import make_panels
from comir_hpc.register.ranking import COARSE, FINE, rank
from comir_hpc.register.slices import SlicePlane
from comir_hpc.register.starts import Initial
from comir_hpc.register.unfinished import forget, keep, kept, kept_file, stoppable
from comir_hpc.runs.folder import require_room
from comir_hpc.runs.result_parts import LastStepRecord
from comir_hpc.transforms.protocol import PointMap

__all__ = ["RegisterResult", "plan_register", "register"]

_TILTED_DEG = 0.5  # angle between two planes from which the report has a note


def register(settings: RegisterSettings, *, progress: Progress | None = None) -> RegisterResult:
    """Find the transform from fixed to moving, and say whether it can be trusted.

    When it is called again with the same inputs and settings, it returns the result that is there.

    Parameters
    ----------
    settings : RegisterSettings
        The volumes, how they are compared, and the folder to write to.
    progress : callable, optional
        Function that is called with what is being done, how much of it is done, and how much there is.

    Raises
    ------
    VolumeError, CheckpointError
        If a volume or the model cannot be used.
    RegistrationError
        If the volumes cannot be compared, the folder holds another result, or it cannot be written to. A poor answer
        is no error, and no answer is no error: both get the verdict FAIL.
    UnsavedResult
        If the result cannot be written at the end; the error holds it.
    StopRequested
        After SIGTERM or SIGUSR2. What the search has found is kept, and the same call goes on from there.
    """
    clock = Clock()
    own_calibration()  # a damaged one is refused before the work, not after it
    with clock.time("open"):
        inputs = open_inputs(settings)
        require_deformable(settings, inputs)
    # Before there is any need of room or of the folder: a finished result may lie where nothing can be written.
    before = finished(settings.out, inputs.fingerprint, settings.overwrite)
    if before is not None:
        return before
    # A full disk after an hour of search would be a poor time to say so.
    require_room(settings.out, output_bytes(inputs, settings), RegistrationError)
    with stoppable(settings.out, progress) as told:

        def otherwise(other: RegisterSettings) -> Answer:
            word = other.representation
            return _answered(other, open_inputs(other), clock, told, kept_file(settings.out, word))

        answer = _answered(settings, inputs, clock, told, kept_file(settings.out))
        answer = or_otherwise(answer, settings, otherwise)
    # What was asked for, also where another way gave the answer: the same call has to find this result again.
    record = answer.record | {
        "settings": settings.model_dump(mode="json"),
        "fingerprint": inputs.fingerprint,
        "timings_s": {part: round(seconds, 3) for part, seconds in clock.seconds.items()},
    }
    result = write_result(
        settings.out, answer.transform, record, answer.panels, answer.landscape, answer.deformation
    )
    forget(settings.out)
    return result


def _answered(
    settings: RegisterSettings, inputs: Inputs, clock: Clock, progress: Progress, search_file: Path
) -> Answer:
    """Search, refine and check; the search is kept in a file."""
    with clock.time("features"):
        fixed, fixed_image = inputs.fixed.features()
        moving, moving_image = inputs.moving.features()
    frame = SlicePlane.from_grids(fixed.grid, moving.grid)
    carried = bool(inputs.searched_levels[0])
    pair = Pair(*frame.flattened(fixed, moving), inputs.measure, settings, by_steps=carried)
    with clock.time("search"):
        begun = _searched(pair, settings, inputs, frame, progress, search_file)
    if begun.left is not None:
        inputs = inputs.at(begun.left)
        fixed, fixed_image = inputs.fixed.features()
        moving, moving_image = inputs.moving.features()
        pair = Pair(*frame.flattened(fixed, moving), inputs.measure, settings, by_steps=carried)
    try:
        # Within the `try`: a search without a start ends as the verdict FAIL, with a report, and not as an error.
        begun.require_any()
        with clock.time("refine"):
            ranking = rank(
                pair.refiner,
                pair.similarity,
                begun.starts,
                measure=pair.measure,
                kind=settings.linear_transform,
                coarse=() if carried else COARSE,
                fine=FINE[-1:] if carried else FINE,
                progress=part_of(progress, "refine"),
            )
        with clock.time("last step"):
            ranking, last = refined_on_intensities(pair, ranking, inputs, frame, settings)
        with clock.time("check"):
            evidence = gather(pair, ranking, inputs, frame, settings, (fixed_image, moving_image), progress)
    except RegistrationError as error:
        # No answer is a result too. It is written with all that was found on the way.
        answer, account, bent, last = None, without_answer(pair, begun.starts, frame, error), None, None
    else:
        answer, account = ranking.best.transform, account_of(pair, ranking, evidence, frame)
        with clock.time("deform"):
            shown = (fixed_image, moving_image)
            bent = bend(
                pair, shown, inputs, answer, account["verdict"], settings, part_of(progress, "deform")
            )
        if bent is not None:
            account |= bent.judged(account["verdict"], account["reasons"])
    with clock.time("panels"):
        whole = answer if bent is None or bent.transform is None else bent.transform
        panels = _panels(pair, whole, (fixed_image, moving_image), inputs.fixed.representation.pictured)
    model = inputs.fixed.representation.provenance()
    record = account | {
        "representation": settings.representation,
        "versions": versions(),
        "inputs": {side.role: input_record(side) for side in (inputs.fixed, inputs.moving)},
        "model": model,
        "run": None if model is None else model["run"],
        "last_step": None if last is None else last.model_dump(),
        **_notes(frame, inputs, begun, last),
    }
    transform = None if answer is None else frame.world(answer)
    points_mm = frame.world_points_mm(pair.points_mm)
    return Answer(transform, record, panels, landscape(begun.search, frame), bent, points_mm)


def _searched(
    pair: Pair,
    settings: RegisterSettings,
    inputs: Inputs,
    frame: SlicePlane,
    progress: Progress,
    file: Path,
) -> Initial:
    """Find where the refinement starts, or find it again if an earlier call was stopped after its search."""
    found = kept(file, inputs.fingerprint)
    if found is None:
        found = find_starts(pair, settings, inputs, frame, progress)
        with contextlib.suppress(OSError):  # a full disk is said when the result is written
            keep(file, inputs.fingerprint, found)
    # Under a stiff motion fine maps of what is bent agree less. A bend is there to mend that, and needs them.
    return replace(found, left=None) if settings.transform in BENDING else found


def _panels(
    pair: Pair,
    answer: PointMap | None,
    images: tuple[NDArray[np.float32], NDArray[np.float32]],
    pictured: bool,
) -> dict[str, NDArray[np.float32]]:
    """Make slices before and after the registration; without an answer there is no after."""
    before: PointMap = as_before(pair)
    panels = make_panels(
        pair.fixed,
        pair.moving,
        before,
        before if answer is None else answer,
        images,
        representation=pictured,
    )
    return {name: plane for name, plane in panels.items() if answer is not None or "_after" not in name}


def plan_register(settings: RegisterSettings) -> dict[str, Any]:
    """Say what `register` would do and need.

    Raises
    ------
    ComirError
        If `register` would raise it before it reads voxels.
    """
    inputs = open_inputs(settings)
    require_deformable(settings, inputs)
    plan: dict[str, Any] = {"fingerprint": inputs.fingerprint, "out": str(settings.out)}
    for side in (inputs.fixed, inputs.moving):
        plan[side.role] = (
            f"{side.compared.path}, level {side.level}: {side.representation.grid(side.level)}, "
            f"{side.representation.origin}"
        )
        if side.notes:
            plan[f"{side.role}_notes"] = side.notes
    if settings.initial == "global":
        planar = inputs.fixed.volume.grid.planar
        voxels = search_voxels(settings, inputs.measure, planar)
        plan["search"] = (
            f"{len(rotations_to_try(settings.rotations, planar))} rotations, all shifts, {voxels} voxels a side"
        )
        if searched := inputs.searched_levels[0]:
            spacings = [inputs.fixed.representation.spacings_mm[level] for level in searched]
            plan["search"] += ", at most; on maps of " + " and ".join(f"{s:.3g} mm" for s in spacings)
    if settings.initial == "features":
        plan["search"] = f"up to {settings.keypoints} keypoints a side, matched"
    starts = f"{settings.candidates} starts" if settings.finds_starts else "the start that is given"
    plan["refine"] = f"{starts}, {settings.transform}"
    if settings.refines_on_intensities:
        plan["last step"] = "on the intensities, where they place the answer more exactly"
    if settings.fallbacks:
        plan["fallback"] = (
            f"{', then '.join(settings.fallbacks)}, where the verdict is not PASS; what is PASS is taken, or what "
            "two agree on"
        )
    plan["memory"] = in_words(max(inputs.predicted_bytes, *_fallbacks_bytes(settings)))
    plan["disk"] = in_words(output_bytes(inputs, settings))
    files = ["transform.tfm", "transform.json", "result.json", "panels.npz"]
    if settings.transform in BENDING:
        files = ["transform.h5", "inverse.h5", "affine.tfm", "result.json", "panels.npz", "deformation.npz"]
    plan["files"] = ", ".join(files + ["search.npz"] * (settings.initial == "global"))
    return plan


def _fallbacks_bytes(settings: RegisterSettings) -> list[int]:
    """Predict the memory of each fallback; one that does not fit is left out of the registration, too."""
    found = [0]
    for word in settings.fallbacks:
        with contextlib.suppress(RegistrationError):
            found.append(
                math.ceil(open_inputs(settings.model_copy(update={"representation": word})).predicted_bytes)
            )
    return found


def _notes(
    frame: SlicePlane, inputs: Inputs, begun: Initial, last: LastStepRecord | None
) -> dict[str, list[str]]:
    notes = list(dict.fromkeys(inputs.fixed.notes + inputs.moving.notes))  # some are said of the pair
    if inputs.start is not None:
        notes += inputs.start.notes
    if frame.tilt_deg >= _TILTED_DEG:
        notes.append(
            f"the planes of the two slices are tilted by {frame.tilt_deg:.1f} degrees against each other: the "
            "transform turns one into the other, and only motion inside the plane was searched"
        )
    notes.extend((*begun.notes, *(() if last is None else last.notes)))
    if begun.left is not None:
        spacing = inputs.fixed.representation.spacings_mm[begun.left]
        notes.append(
            f"the volumes are compared on a grid of {spacing:.3g} mm: on finer ones less of what both show agrees"
        )
    return {"notes": notes} if notes else {}
