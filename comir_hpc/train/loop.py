"""Run the training loop: sample, turn, encode, turn back, contrast, step; log, draw, save; stop when asked.

It knows no ranks: the engine gathers, averages, and lets all ranks decide alike. It keeps no random state: a sample
depends only on the seed, the step and its number. So a resumed run gives the same weights as an uninterrupted one.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from comir_hpc.config.train import TrainSettings
from comir_hpc.errors import ConfigError, StopRequested
from comir_hpc.host.launch import DTYPES
from comir_hpc.host.progress import Progress
from comir_hpc.host.signals import stop_signals
from comir_hpc.learning.engine import Engine
from comir_hpc.learning.feed import feed
from comir_hpc.learning.loss import LossParts, contrastive_loss, draw_shifts
from comir_hpc.learning.sampler import Draw, Sampler
from comir_hpc.representations.quality import agreement
from comir_hpc.representations.reference import Watch
from comir_hpc.runs.checkpoints import checkpoint_path, prune_checkpoints
from comir_hpc.runs.tracking import NullTracker, Tracker
from comir_hpc.space.groups import act_each
from comir_hpc.train.figures import draw_picture
from comir_hpc.train.plan import Prediction, peak_tflops
from comir_hpc.train.watch import Clock, peak_memory_mib

_SHIFTS = 2  # number of a stream of random numbers; patches.py uses 0 and 1


@dataclass
class Loop:
    """Everything that a step needs. All of its state is in the settings or in a checkpoint.

    Attributes
    ----------
    average : ModuleDict
        Encoders with the running average of the weights. They are the model that the training gives.
    """

    settings: TrainSettings
    run: Path
    engine: Engine
    sampler: Sampler
    tracker: Tracker | NullTracker
    record: dict[str, Any]
    prediction: Prediction
    progress: Progress | None = None
    average: nn.ModuleDict = field(init=False)
    last_loss: float = float("nan")

    def __post_init__(self) -> None:
        self.average = copy.deepcopy(self.engine.networks).requires_grad_(False).eval()
        self._pending: list[Tensor] = []
        self._clock = Clock()

    # ------------------------------------------------------------------ the story

    def train(self) -> None:
        """Do the steps that are left, and leave a checkpoint of the last one.

        Raises
        ------
        StopRequested
            After every rank has saved the same step, if SIGTERM or SIGUSR2 came.
        ConfigError
            If the loss is no longer finite, or a GPU is out of memory.
        """
        settings, engine = self.settings, self.engine
        steps = range(engine.steps_done, settings.optimiser.steps)
        indices = share_of(settings, engine)
        batches = feed(self.sampler, steps, indices, workers=settings.sampling.workers)
        with stop_signals() as stop, _explain_memory(settings, engine):
            for step in steps:
                with self._clock.waiting():
                    draws, sources = next(batches)
                with self._clock.working():
                    sample = self._sample(step, draws, sources)
                    parts, maps = self._step(sample)
                    self._average_weights()
                done = step + 1
                last = done == settings.optimiser.steps
                full = last or done % settings.tracking.picture_every == 0
                if full or done % settings.tracking.log_every == 0:
                    self._log(done, parts, maps, sample, full)
                if full:
                    self._picture(done, sample, maps)
                self._save_if_due(done, stop)
                if self.progress and not engine.rank:
                    self.progress("train", done, settings.optimiser.steps)

    def _sample(self, step: int, draws: Sequence[Draw], sources: Sequence[Sequence[Tensor]]) -> _Sample:
        """Make this rank's patches on the device, turned by their group elements, and what all ranks must know."""
        settings, engine, sampler = self.settings, self.engine, self.sampler
        batch = sampler.resample(draws, sources, engine.device)
        matrices = [sampler.group.matrices[row] for row in batch.elements]
        images = [act_each(one, turns) for one, turns in zip(batch.images, matrices, strict=True)]
        # A draw costs nothing, so every rank works out the draws of all ranks, and none has to be asked.
        everyone = [
            sampler.draw(step, i)
            for rank in range(engine.world_size)
            for i in share_of(settings, engine, rank)
        ]
        rng = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([settings.seed % 2**64, _SHIFTS, step]))
        )
        return _Sample(
            images=images,
            undo=[turns.transpose(0, 2, 1) for turns in matrices],
            valid=None if all(map(sampler.inside, everyone)) else batch.valid,
            ignore=torch.from_numpy(sampler.ignore(everyone)).to(engine.device),
            shifts_zyx=draw_shifts(rng, settings.loss, settings.sampling.patch),
        )

    def _step(self, sample: _Sample) -> tuple[LossParts, list[Tensor]]:
        """Take one optimiser step; return the loss and this rank's maps."""
        if self.settings.engine.accumulation > 1:
            return self._step_in_parts(sample)
        maps = self._represent(sample, slice(None))
        parts = self._contrast(sample, maps)
        norm = self.engine.step(parts.loss)
        self._pending.append(torch.stack([parts.loss.detach(), norm]))
        return parts, maps

    def _step_in_parts(self, sample: _Sample) -> tuple[LossParts, list[Tensor]]:
        """Take one optimiser step with the activations of one micro-batch at a time, but the negatives of all.

        First, all representations are computed without gradient. Then the gradient of the loss with respect to them.
        Then each micro-batch is encoded again, to carry its part of that gradient into the weights (GradCache, Gao et
        al. 2021, arXiv 2101.06983).
        """
        count, whole = self.settings.engine.accumulation, len(sample.images[0])
        cuts = [slice(i * whole // count, (i + 1) * whole // count) for i in range(count)]
        with torch.no_grad(), _kept_buffers(self.engine.networks):
            pieces = [self._represent(sample, cut) for cut in cuts]
        # The maps of all micro-batches are small beside the activations that made them, so they can be held at once.
        maps = [torch.cat(one).requires_grad_() for one in zip(*pieces, strict=True)]
        parts = self._contrast(sample, maps)
        gradients = torch.autograd.grad(parts.loss, maps)
        for number, cut in enumerate(cuts):
            with self.engine.micro_batch(last=number == count - 1):
                again = self._represent(sample, cut)
                # The derivative of this product by the weights is the chain rule's part of this micro-batch.
                products = [(u * g[cut]).sum() for u, g in zip(again, gradients, strict=True)]
                self.engine.backward(torch.stack(products).sum())
        norm = self.engine.update()
        self._pending.append(torch.stack([parts.loss.detach(), norm]))
        return parts, maps

    def _represent(self, sample: _Sample, cut: slice) -> list[Tensor]:
        """Encode some of this rank's patches, and undo their group elements."""
        maps = self.engine.encode([one[cut] for one in sample.images])
        return [act_each(one, turns[cut]) for one, turns in zip(maps, sample.undo, strict=True)]

    def _contrast(self, sample: _Sample, maps: Sequence[Tensor]) -> LossParts:
        """Compute the loss of this rank's anchors against the samples of all ranks."""
        engine, count = self.engine, len(maps[0])
        masks = None
        if sample.valid is not None:
            masks = [engine.gather(sample.valid.to(torch.uint8)).bool()] * len(maps)
        return contrastive_loss(
            [engine.gather(one) for one in maps],
            self.settings.loss,
            masks=masks,
            ignore=sample.ignore,
            shifts_zyx=sample.shifts_zyx,
            rows=(engine.rank * count, (engine.rank + 1) * count),
        )

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Move the running average towards the weights; faster at first, when early weights are of no use yet."""
        steps = self.engine.steps_done
        decay = min(self.settings.optimiser.average, steps / (steps + 9))
        kept, new = self.average.state_dict(), self.engine.networks.state_dict()
        for name, value in kept.items():
            # Counters, as those of batch norm, have no average.
            if value.is_floating_point():
                value.lerp_(new[name], 1 - decay)
            else:
                value.copy_(new[name])

    # ------------------------------------------------------------------ what is written

    @cached_property
    def _watch(self) -> Watch:
        return Watch(self.sampler, self.engine.device)

    def _log(self, done: int, parts: LossParts, maps: Sequence[Tensor], sample: _Sample, full: bool) -> None:
        """Log metrics, the same on any number of ranks but for timings; with `full` also of the averaged weights."""
        engine, settings = self.engine, self.settings
        norm = self._require_finite(done)
        aligned = agreement(maps[0].detach(), maps[1].detach(), sample.valid).diagonal().mean()
        numbers = parts.numbers() | {"agreement": float(aligned)}
        means = engine.mean(
            torch.tensor(list(numbers.values()), dtype=torch.float64, device=engine.device).float()
        )
        elapsed, waited = self._clock.read()
        pairs = settings.sampling.pairs_per_step * elapsed.steps
        patches = pairs * len(settings.modalities) / elapsed.seconds
        metrics = dict(zip(numbers, means.tolist(), strict=True)) | {
            "gradient_norm": norm,
            "learning_rate": engine.learning_rate,
            "patches_per_s": patches,
            "voxels_per_s": patches * float(np.prod(settings.sampling.patch)),
            "data_wait": waited / elapsed.seconds,
            "peak_memory_mib": peak_memory_mib(engine.device),
            "predicted_memory_mib": self.prediction.total_bytes / 2**20,
            "tflops": self.prediction.flops * elapsed.steps / elapsed.seconds / 1e12,
        }
        peak = peak_tflops(engine.device)
        if peak:
            metrics["share_of_peak"] = metrics["tflops"] / peak
        if full and not engine.rank:
            metrics |= self._watch.metrics(self.encode)
        self.last_loss = metrics["loss"]
        self.tracker.log(done, metrics)

    def _require_finite(self, done: int) -> float:
        """Check every loss and gradient norm since the last time, and return the newest norm.

        This is not done in every step, since reading a value makes a GPU wait. Every rank sees the same means.
        """
        values = self.engine.mean(torch.stack(self._pending)).cpu()
        first = done - len(self._pending) + 1
        self._pending.clear()
        bad = (~torch.isfinite(values)).any(dim=1).nonzero()
        if len(bad):
            step = first + int(bad[0])
            loss, norm = values[int(bad[0])].tolist()
            raise ConfigError(
                f"training diverged: loss {loss:g}, gradient norm {norm:g} at step {step} of "
                f"{self.settings.optimiser.steps}; the last good checkpoint in {self.run / 'checkpoints'} is kept. "
                "Lower optimiser.learning_rate, or raise optimiser.warmup or loss.temperature, and use a new --run"
            )
        return float(values[-1, 1])

    def _picture(self, done: int, sample: _Sample, maps: Sequence[Tensor]) -> None:
        if self.engine.rank:
            return
        path = self.run / "pictures" / f"step-{done:08d}.png"
        images = [act_each(one, turns) for one, turns in zip(sample.images, sample.undo, strict=True)]
        draw_picture(path, images, maps, self.settings.modalities, done)
        self.tracker.picture(done, path)

    def _save_if_due(self, done: int, stop: threading.Event) -> None:
        """Save by step, by time, at the end, or because the scheduler wants the machine back."""
        settings = self.settings
        late = self._clock.since_save() > 60 * settings.checkpoint.every_minutes
        # The clocks of two nodes differ, and only one may have got the signal. So all ranks ask whether any of them
        # has.
        stopped, due = self.engine.any(stop.is_set(), late)
        by_step = done % settings.checkpoint.every_steps == 0 or done == settings.optimiser.steps
        if stopped or due or by_step:
            self.save(done)
        if stopped and done < settings.optimiser.steps:
            raise StopRequested(
                f"stopped on request at step {done} of {settings.optimiser.steps}; everything is saved in "
                f"{self.run}, and the same command continues"
            )

    def save(self, done: int) -> None:
        """Write a checkpoint of everything, unless the run has diverged (collective)."""
        # A checkpoint of a run that has diverged would take the place of the last good one.
        if self._pending:
            self._require_finite(done)
        average = {name: value.detach().cpu().clone() for name, value in self.average.state_dict().items()}
        folder = self.run / "checkpoints"
        loop = {"step": done, "loss": self.last_loss, "average": average, **self.record}
        self.engine.save(checkpoint_path(folder, done), loop)
        if self.engine.rank == 0:
            prune_checkpoints(folder, self.settings.checkpoint.keep)
        self._clock.saved()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the loop's part of a checkpoint."""
        self.average.load_state_dict(state["average"])
        self.last_loss = float(state["loss"])

    @torch.no_grad()
    def encode(self, modality: int, images: Tensor) -> Tensor:
        """Encode images of one modality with the averaged weights, as inference will do it."""
        dtype = DTYPES[self.engine.precision]
        names = self.settings.encoder_names
        network = self.average[names[modality % len(names)]]
        with torch.autocast(self.engine.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            maps: Tensor = network(images).float()
        return maps


@dataclass(frozen=True)
class _Sample:
    """Patches of this rank for one step, turned, and what the loss needs to know of all ranks' patches."""

    images: list[Tensor]  # M of (n, c, z, y, x)
    undo: list[np.ndarray[Any, Any]]  # M of (n, 3, 3)
    valid: Tensor | None  # bool (n, 1, z, y, x); None when all patches of all ranks are inside their volumes
    ignore: Tensor  # bool (N, N)
    shifts_zyx: Sequence[tuple[int, int, int]]


def share_of(settings: TrainSettings, engine: Engine, rank: int | None = None) -> list[int]:
    """List the sample numbers of one rank, micro-batch by micro-batch.

    Micro-batch j of all ranks together holds the samples that micro-batch j of a single rank would hold. So batch
    statistics do not depend on the number of ranks.
    """
    count, ranks = settings.engine.accumulation, engine.world_size
    size = settings.sampling.pairs_per_step // (count * ranks)
    own = engine.rank if rank is None else rank
    return [(part * ranks + own) * size + i for part in range(count) for i in range(size)]


@contextmanager
def _kept_buffers(networks: nn.Module) -> Iterator[None]:
    """Restore running statistics at the end: a batch that is encoded twice must not count twice."""
    kept = [(buffer, buffer.clone()) for buffer in networks.buffers()]
    yield
    for buffer, value in kept:
        buffer.copy_(value)


@contextmanager
def _explain_memory(settings: TrainSettings, engine: Engine) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(engine.device).total_memory / 2**30
        local = settings.sampling.pairs_per_step // (engine.world_size * settings.engine.accumulation)
        raise ConfigError(
            f"the GPU is out of memory ({total:.0f} GiB) with {local} pairs of {settings.sampling.patch} voxels at a "
            f"time and network.checkpoint_levels {settings.network.checkpoint_levels}; set that to "
            f"{len(settings.network.widths)}, engine.accumulation to {settings.engine.accumulation * 2}, or use a "
            "smaller sampling.patch (`comir-hpc train --dry-run` predicts the memory)"
        ) from error
