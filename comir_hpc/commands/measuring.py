"""The verbs that measure methods on pairs with a known answer: `benchmark` and `datasets`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import typer

from comir_hpc.commands.call import Call
from comir_hpc.commands.verb import verb


def add_measuring_verbs(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    _add_benchmark(app)
    _add_datasets(app)


def _add_benchmark(app: typer.Typer) -> None:
    @verb(
        app,
        settings=("BenchmarkRunSettings",),
        optional=("BenchmarkSettings",),
        positional=("config",),
        example="Example:  comir-hpc benchmark configs/benchmark.yaml --out table.csv --workers 4",
    )
    def benchmark(call: Call) -> None:
        """Register many displaced pairs with a known answer by many methods, and write one table with the errors.

        Every method gets the same files, in a process of its own with a time limit. What is in the table is not done
        again. The settings stand in a YAML file; options and --set change them.
        """
        from comir_hpc.config.base import validate
        from comir_hpc.config.benchmark import BenchmarkRunSettings, BenchmarkSettings
        from comir_hpc.config.files import load

        places = {
            name: value for name, value in call.given.items() if name in BenchmarkRunSettings.model_fields
        }
        run = validate(BenchmarkRunSettings, places, source="comir-hpc benchmark")
        # Paths in the file are relative to the file, those of the command to the current folder.
        values = {
            name: value.absolute() if isinstance(value, Path) else value
            for name, value in call.given.items()
            if name not in places
        }
        settings = load(BenchmarkSettings, run.config, run.overrides, values)
        from comir_hpc.recipes.benchmark.run import benchmark as run_benchmark
        from comir_hpc.recipes.benchmark.run import plan_benchmark

        done = call.run(partial(run_benchmark, run=run), partial(plan_benchmark, run=run), settings)
        call.say(done.summary)
        if not done.left:
            from comir_hpc.recipes.benchmark.page import summarise

            call.say(*summarise(done.table))


def _add_datasets(app: typer.Typer) -> None:
    @verb(
        app,
        settings=("DatasetsSettings",),
        positional=("action", "name", "folder"),
        example="Example:  comir-hpc datasets fetch t1_epi data",
    )
    def datasets(call: Call) -> None:
        """List the sets of volumes with a known answer, or fetch one of them: comir-hpc datasets fetch NAME DIR.

        Nothing is fetched unasked. A package with another checksum than expected is refused.
        """
        from comir_hpc.config.datasets import DatasetsSettings

        settings = call.settings(DatasetsSettings)
        from comir_hpc.data.fetching import fetch, plan_fetch
        from comir_hpc.data.registry import listing

        if settings.name is None:
            return call.say(listing())
        if call.dry_run:
            return call.plan(plan_fetch(settings.name, settings.folder))
        done = fetch(settings.name, settings.folder, archive=settings.archive)
        call.note(*([done.data.warning] if done.data.warning else []))
        return call.say(done.summary)
