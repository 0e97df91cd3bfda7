"""The self-contained HTML page of a run."""

import base64
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import jinja2

from spap_jax.quantities import change_text, count_text, loss_text, peak_text, percent_text
from spap_jax.report.figures import Plot
from spap_jax.report.read import RunReports
from spap_jax.report.schema import Errors, LayerReport, PruneReport

NOTHING = "\N{EN DASH}"
"""Shown where a run does not have a number."""


@dataclass(frozen=True)
class Table:
    """A table, whose first column names the row; the note explains its numbers."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


HEADLINES = (
    "divergence (nats)",
    "perplexity",
    "perplexity by training",
    "weights on disk",
    "parameters",
    "prefill speed",
    "decode speed",
)
"""Rows of the table of before and after that are shown in large type."""


def render(run: RunReports, plots: Sequence[Plot]) -> str:
    """Returns the page of a run with its plots."""
    report, numbers = run.pruned, before_and_after(run)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spap_jax.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(
        title=_title(run),
        shape=report.shape,
        headlines=headlines(numbers),
        notes=_notes(run),
        plots=[(plot, base64.b64encode(plot.svg()).decode()) for plot in plots],
        numbers=numbers,
        tables=[layers(report)],
        facts=_facts(run),
        pairs={
            "Settings": [(name, value_text(value)) for name, value in report.settings.items()],
            "Versions": list(report.versions.items()),
        },
    )


def _title(run: RunReports) -> str:
    name = run.pruned.model.name.rstrip("/").rpartition("/")[2]
    return f"{name}, {run.pruned.sparsity.words} removed{', then trained' if run.trained else ''}"


def _notes(run: RunReports) -> list[str]:
    """Says how the quality was measured, and whether the model was trained since."""
    measured, trained = run.pruned.extras.perplexity, run.trained
    notes = [
        f"Perplexity, which tells how well a model predicts text (lower is better), was measured on {measured.data}."
        if measured
        else "Perplexity was not measured; spap prune --eval DATA measures it before and after pruning."
    ]
    if run.pruned.adapted:
        notes.append("Adapted to the text: the joint steps also learnt the calibration text's next tokens.")
    if trained:
        on = f"; its perplexity is of {trained.extras.perplexity.data}" if trained.extras.perplexity else ""
        notes.append(
            f"Trained since, for {count_text(trained.steps)} steps ({trained.objective}){on}. All other numbers are "
            "from before the training."
        )
    return notes


def _facts(run: RunReports) -> list[tuple[str, str]]:
    report, calibration, extras = run.pruned, run.pruned.calibration, run.pruned.extras
    amount = f"{count_text(calibration.sequences)} sequences of {count_text(calibration.sequence_length)} tokens"
    seconds = report.seconds
    phases = ", ".join(f"{phase} {spent:.1f}" for phase, spent in seconds.items())
    work = run.speed and run.speed.workload
    facts = {
        "Model": report.model.name,
        "Architecture": report.model.architecture,
        "Method": f"channels chosen by {report.method.selection}; update of the weights kept: {report.method.update}",
        "Calibration": f"{calibration.description} ({amount})",
        "SHA-256 of its tokens": calibration.sha256,
        "Speed": work and f"batch {work.batch}, prompt {work.prompt}, {work.new} new tokens, {work.repeats} runs",
        "Seconds": f"{sum(seconds.values()):.1f}: {phases}" if seconds else None,
        "Peak memory": peak_text(extras.peak_memory_bytes, extras.peak_device_bytes)
        if extras.peak_memory_bytes
        else None,
    }
    return [*((name, fact) for name, fact in facts.items() if fact), *(("Advice", line) for line in report.advice)]


def before_and_after(run: RunReports) -> Table:
    """Returns the table of what was counted and measured, and of what came later."""
    rows = [*run.pruned.rows]
    if run.trained:
        rows += [(f"{name} by training", *values) for name, *values in run.trained.rows]
    if run.speed:
        for name in ("prefill", "decode"):
            found, allowed = getattr(run.speed.speed_up, name), getattr(run.speed.by_arithmetic, name)
            rows.append((f"{name} speed, by arithmetic {allowed:.3f}x", "1x", f"{found:.3f}x", change_text(1, found)))
    return Table("Before and after pruning", ("", "before", "after", "change"), rows)


def headlines(table: Table) -> list[tuple[str, str, str]]:
    """Returns the most important rows of a table of before and after, in order: name, change, and both values."""
    rows = {row[0].partition(",")[0]: row[1:] for row in table.rows}
    found = [(name, *rows[name]) for name in HEADLINES if name in rows]
    return [
        (name.capitalize(), after if change in ("", "-") else change, f"{before} → {after}")
        for name, before, after, change in found
    ]


def layers(report: PruneReport) -> Table:
    """Returns the table with a row per layer."""
    rows = [_layer(layer) for layer in report.layers]
    columns = tuple(dict.fromkeys(itertools.chain(*rows)))
    note = (
        "Errors are in per cent of the layer's output, as in the plots. Swaps: exchanges of a kept channel for a "
        "removed one that lowered the error. Swaps left: exchanges that still would; 0 proves that there is none. "
        "Rounds: of adjusting the weights, as far as they lowered the error."
    )
    cells = [[row.get(name, NOTHING) for name in columns] for row in rows]
    return Table("Every layer in numbers", columns, cells, note)


def _layer(layer: LayerReport) -> dict[str, str]:
    """Returns the cells of a layer, keyed by column."""
    cells = {"layer": str(layer.layer), "channels kept": count_text(len(layer.kept))}
    cells |= _errors(layer.calibration, "") | _errors(layer.held_out, "held-out ")
    cells |= {"swaps": count_text(layer.swaps), "swaps left": count_text(layer.improving_swaps)}
    cells |= {"rounds": count_text(layer.rounds)}
    if attention := layer.attention:
        cells["key/value heads kept"] = count_text(len(attention.kept))
        cells |= _errors(attention.calibration, "attention ") | _errors(attention.held_out, "attention held-out ")
    return cells | {"seconds": f"{sum(layer.seconds.values()):.1f}"}


def _errors(errors: Errors | None, prefix: str) -> dict[str, str]:
    """Returns the errors after each stage in per cent, keyed by column; attention has no last stage."""
    return {
        f"{prefix}{stage}": f"{100 * error:.2f}" if isfinite(error) else "not finite"
        for stage, error in (errors.by_stage.items() if errors else ())
        if stage != "adjusted" or "attention" not in prefix
    }


def side_by_side(runs: Sequence[RunReports]) -> Table:
    """Returns a table with a row per run and a column for every setting in which they differ."""
    names = dict.fromkeys(name for run in runs for name in run.pruned.settings)
    values = {name: [value_text(run.pruned.settings.get(name)) for run in runs] for name in names}
    measured = [run.pruned.extras.perplexity for run in runs]
    columns = {
        "run": [run.folder.name for run in runs],
        "model": [run.pruned.model.name for run in runs],
        **{name: cells for name, cells in values.items() if len(set(cells)) > 1},
        "channels removed": [percent_text(run.pruned.sparsity.channels.achieved) for run in runs],
        "dense": [loss_text(found.before) if found else NOTHING for found in measured],
        "pruned": [loss_text(found.after) if found else NOTHING for found in measured],
        "parameters": [count_text(run.pruned.model.parameters.after) for run in runs],
        "seconds": [f"{sum(run.pruned.seconds.values()):.1f}" for run in runs],
    }
    if len({*columns["model"]}) == 1:
        del columns["model"]
    texts = ", ".join(dict.fromkeys(found.data for found in measured if found))
    title = f"perplexity on {texts}" if texts else "perplexity was not measured"
    return Table(title, tuple(columns), tuple(zip(*columns.values(), strict=True)))


def value_text(value: Any) -> str:
    """Formats a setting as the user types it."""
    if value is None:
        return NOTHING
    return value if isinstance(value, str) else json.dumps(value)
