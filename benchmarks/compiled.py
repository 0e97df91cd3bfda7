"""Whole runs compiled for TPU slices that are not there: ``python -m benchmarks.compiled`` writes ``docs/compiled``.

For every run of the list, what ``spap plan --compile`` does: each program is compiled for the slice. It needs the extra
``tpu``, but no TPU. Runs that the table has are not compiled again, so that a stopped command goes on where it was.
"""

import functools
import importlib.metadata
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import msgspec
from cyclopts import App, Parameter
from rich.console import Console

from benchmarks.markdown import table
from benchmarks.plans import LENGTH, ROOT, SEQUENCES, request_of
from benchmarks.quality import provenance
from benchmarks.rows import rows_in, store
from spap_jax.planning.accelerators import mesh_named
from spap_jax.planning.compiled import compiled, needs
from spap_jax.planning.plan import Plan, plan
from spap_jax.settings import PruneSettings


class Wanted(msgspec.Struct, frozen=True):
    """A run to compile.

    Attributes:
        model: Name of a config in ``tests/configs``.
        mesh: Name of the slice.
        effort: As in ``spap prune``.
        schedule: As in ``spap prune``.
        sharers: Number of devices that share the weights.
    """

    model: str
    mesh: str
    effort: str
    schedule: str
    sharers: int

    @property
    def settings(self) -> PruneSettings:
        """The settings of the run."""
        return PruneSettings().replace(effort=self.effort, schedule=self.schedule)

    @property
    def options(self) -> str:
        """The options that differ from the defaults."""
        words = [f"--schedule {self.schedule}"] if self.schedule != "sequential" else []
        words += [f"--model-devices {self.sharers}"] if self.sharers > 1 else []
        return " ".join(words)


class Row(msgspec.Struct, frozen=True):
    """What the compiler says of a run.

    Attributes:
        run: The run.
        together: Number of blocks that joint steps adjust together; 0 without such steps.
        room: Usable bytes of a device's memory.
        needs: For each phase, the bytes of memory of a device, by the compiler.
        refused: Programs that do not fit the device at all.
        programs: Number of programs.
        slowest: The program that compiled longest.
        longest: Its seconds.
        seconds: The seconds of all.
        commit: Commit of the code.
        compiler: Version of libtpu.
    """

    run: Wanted
    together: int
    room: float
    needs: dict[str, float]
    refused: list[str]
    programs: int
    slowest: str
    longest: float
    seconds: float
    commit: str
    compiler: str

    @property
    def largest(self) -> str:
        """The phase that needs most memory."""
        return max(self.needs, key=self.needs.__getitem__)


def _runs(models: Sequence[str], meshes: Sequence[str], sharers: int) -> list[Wanted]:
    order = itertools.product(("sequential", "parallel"), ("default", "low"), meshes, models)
    return [Wanted(model, mesh, effort, schedule, sharers) for schedule, effort, mesh, model in order]


RUNS = (
    *_runs(("llama-3.1-8b", "qwen2.5-7b", "llama-3.2-1b"), ("v5e-8", "v6e-8"), 1),
    *_runs(("llama-3.1-70b", "qwen2.5-72b", "opt-66b"), ("v5e-64", "v5p-64"), 8),
    *_runs(("llama-3.1-405b",), ("v5p-256",), 8),
)
"""The runs, each group in the order of its widest interest."""

HEAD = f"""# Compiled for TPU slices

This page is written by `python -m benchmarks.compiled`. Every program of a run was compiled by the TPU compiler for a
slice that was not there, as `spap plan MODEL --mesh SLICE --compile` does, for 30 % of the MLP channels and {SEQUENCES}
sequences of {LENGTH} tokens; nothing was run. *Together* is the number of blocks that joint steps adjust at a time.
*Needs* is the memory of a device by the compiler in the phase that needs most, with all that the run holds, and
*planned* is what `spap plan` says of this phase without the compiler. *Furthest* is the phase in which the two differ
most. *Longest* is the time of the program that took longest to compile, on two CPU cores. `results.jsonl` has the
compiler's numbers, with the commit of the code; the plan's are made with the page.
"""


@functools.cache
def planned_of(wanted: Wanted) -> Plan:
    """Plans a run."""
    return plan(request_of(wanted.model, wanted.settings), mesh_named(wanted.mesh).shared_among(wanted.sharers))


def measured(wanted: Wanted, console: Console) -> Row:
    """Compiles the programs of a run."""
    planned = planned_of(wanted)
    load = planned.request.on(planned.mesh)
    with console.status(wanted.model) as status:

        def watch(what: str, done: int, total: int) -> None:
            status.update(f"{wanted.model}: {what}, {done} of {total}")

        found = list(compiled(load, planned.mesh, watch))
    slowest = max(found, key=lambda each: each.compiling)
    return Row(
        run=wanted,
        together=load.together if load.groups else 0,
        room=planned.room,
        needs=needs(found),
        refused=[f"{each.name} ({each.phase})" for each in found if each.refused],
        programs=len(found),
        slowest=slowest.name,
        longest=slowest.compiling,
        seconds=sum(each.compiling for each in found),
        commit=provenance.commit(),
        compiler=importlib.metadata.version("libtpu"),
    )


def page(rows: Sequence[Row]) -> str:
    """Returns the page."""
    columns = ("model", "slice", "effort", "options", "together", "largest phase", "needs", "planned", "of", "fits",
               "furthest", "longest")  # fmt: skip
    compilers = ", ".join(sorted({row.compiler for row in rows}))
    return f"{HEAD}\n{table(columns, map(_cells, rows))}\n\nCompiled by libtpu {compilers}; memory in GB.\n"


def _cells(row: Row) -> tuple[str, ...]:
    run, needed = row.run, row.needs[row.largest]
    fits = not row.refused and needed <= row.room
    planned = {name: sum(parts.values()) for name, parts in planned_of(run).memory.items()}
    beyond = {name: each / planned[name] - 1 for name, each in row.needs.items() if name in planned}
    furthest = max(beyond, key=lambda name: abs(beyond[name]))
    return (
        run.model, run.mesh, run.effort, f"`{run.options}`" if run.options else "", str(row.together or ""),
        row.largest, f"{needed / 1e9:.3g}", f"{planned[row.largest] / 1e9:.3g}", f"{row.room / 1e9:.3g}",
        "yes" if fits else "no", f"{furthest} {beyond[furthest]:+.0%}", f"{row.longest:.0f} s, {row.slowest}",
    )  # fmt: skip


app = App(name="compiled", help=__doc__)


@app.default
def main(
    *,
    model: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    schedule: str | None = None,
    output: Path = ROOT / "docs" / "compiled",
) -> None:
    """Compiles the runs that the table does not have yet, and writes the page.

    Args:
        model: Names of models; by default all.
        schedule: Only runs of this schedule.
        output: Folder of the page and of its numbers.
    """
    console = Console(stderr=True)
    jax.config.update("jax_platforms", "cpu")  # arrays are only described
    file = output / "results.jsonl"
    rows = rows_in(file, Row)
    for wanted in RUNS:
        unwanted = (model and wanted.model not in model) or (schedule and wanted.schedule != schedule)
        if unwanted or wanted in [row.run for row in rows]:
            continue
        rows.append(measured(wanted, console))
        rows.sort(key=lambda row: RUNS.index(row.run))
        store(file, rows)
        console.print(" ".join(_cells(next(row for row in rows if row.run == wanted))))
    (output / "README.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    app()
