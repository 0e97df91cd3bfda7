"""The tables of a page: words and numbers as they are shown, all taken from reports."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Any

from spap_jax.quantities import bytes_text, change_text, count_text, share_text, signed
from spap_jax.report.schema import Change, Errors, LayerReport, Perplexities, PruneReport, RunReports
from spap_jax.report.style import STAGES

NOTHING = "\N{EN DASH}"
"""Shown where a run does not have a number."""

NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: Description of the table for screen readers.
        columns: Names of the columns; the first column names the row.
        rows: Cells by row.
        words: Columns after the first that contain words, which are left-aligned.
        note: Sentence below the table; empty if there is none.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()
    note: str = ""


HEADLINES = {
    "perplexity": "Perplexity",
    "perplexity by training": "Perplexity by training",
    "weights on disk": "Size on disk",
    "parameters": "Parameters",
    "prefill speed": "Speed of reading a prompt",
    "decode speed": "Speed of writing text",
}
"""Rows of the table of before and after that are shown in large type, and their names there."""


def headlines(table: Table) -> list[tuple[str, str, str]]:
    """Returns the most important rows of a table of before and after, in order: name, change, and both values."""
    rows = {row[0].partition(",")[0]: row[1:] for row in table.rows}
    found = {name: rows[name] for name in HEADLINES if name in rows}
    return [
        (HEADLINES[name], after if change == NOTHING else change, f"{before} → {after}")
        for name, (before, after, change) in found.items()
    ]


def before_and_after(run: RunReports) -> Table:
    """Returns a table of parameters, channels, heads, bytes, perplexity and speed, dense and pruned."""
    report = run.pruned
    counts = {
        "parameters": report.model.parameters,
        "MLP parameters": report.model.mlp_parameters,
        "MLP channels, all layers": report.model.widths.total,
    }
    if report.fewer_heads:
        counts["attention heads of a layer"] = report.fewer_heads
        counts["key/value heads of a layer"] = report.model.kv_heads
    rows = [
        (name, count_text(change.before), count_text(change.after), _change(change)) for name, change in counts.items()
    ]
    if size := report.extras.bytes:
        rows.append(("weights on disk", bytes_text(size.before), bytes_text(size.after), _change(size)))
    if measured := report.extras.perplexity:
        rows.append(("perplexity", decimals(measured.before), decimals(measured.after), _change(measured)))
    if run.trained and (measured := run.trained.extras.perplexity):
        rows.append(("perplexity by training", decimals(measured.before), decimals(measured.after), _change(measured)))
    if run.speed:
        measured, bound = run.speed.speed_up, run.speed.by_arithmetic
        rows += [
            (f"{name}, by arithmetic {allowed:.3f}x", "1x", f"{found:.3f}x", signed(change_text(1, found)))
            for name, found, allowed in (
                ("prefill speed", measured.prefill, bound.prefill),
                ("decode speed", measured.decode, bound.decode),
            )
        ]
    return Table("Before and after pruning", ("", "before", "after", "change"), tuple(rows))


def side_by_side(runs: Sequence[RunReports]) -> Table:
    """Returns a table with a row per run: its results, and the settings in which the runs differ."""
    settings = differing([run.pruned.settings for run in runs])
    measured = [run.pruned.extras.perplexity for run in runs]
    trained = [run.trained.extras.perplexity if run.trained else None for run in runs]
    speeds, sizes = [run.speed for run in runs], [run.pruned.extras.bytes for run in runs]
    columns = {
        "run": [run.label for run in runs],
        "model": [run.pruned.model.name for run in runs],
        "channels removed": [share_text(run.pruned.removed) for run in runs],
        "heads removed": [share_text(heads.removed) if (heads := run.pruned.fewer_heads) else NOTHING for run in runs],
        "dense perplexity": [decimals(found.before) if found else NOTHING for found in measured],
        "pruned": [decimals(found.after) if found else NOTHING for found in measured],
        "change": [_change(found) if found else NOTHING for found in measured],
        "trained": [decimals(found.after) if found else NOTHING for found in trained],
        "measured on": [_data(*each) for each in zip(measured, trained, strict=True)],
        "parameters": [count_text(run.pruned.model.parameters.after) for run in runs],
        "weights on disk": [bytes_text(size.after) if size else NOTHING for size in sizes],
        "prefill speed": [f"{found.speed_up.prefill:.3f}x" if found else NOTHING for found in speeds],
        "decode speed": [f"{found.speed_up.decode:.3f}x" if found else NOTHING for found in speeds],
        "seconds": [f"{sum(run.pruned.seconds.values()):.1f}" for run in runs],
        **{name: [value_text(run.pruned.settings.get(name)) for run in runs] for name in settings},
    }
    for name in ("model", "measured on"):
        if len({*columns[name]} - {NOTHING}) < 2:
            del columns[name]
    shown = {name: cells for name, cells in columns.items() if set(cells) != {NOTHING}}
    words = ("model", "measured on", "method", "update")
    return Table("The runs side by side", tuple(shown), tuple(zip(*shown.values(), strict=True)), words)


def _data(*measured: Perplexities | None) -> str:
    """Names the data of perplexities, which are compared with none on other data."""
    return "; ".join(dict.fromkeys(found.data for found in measured if found)) or NOTHING


def layers(report: PruneReport) -> Table:
    """Returns a table with a row per layer: the numbers that the plots show."""
    rows = [_layer(layer) for layer in report.layers]
    columns = {name: [row.get(name, NOTHING) for row in rows] for name in dict.fromkeys(itertools.chain(*rows))}
    return Table("Every layer in numbers", tuple(columns), tuple(zip(*columns.values(), strict=True)), note=LAYERS_NOTE)


LAYERS_NOTE = (
    "Errors are in per cent of the layer's output, as in the plots. Swaps: exchanges of a kept channel for a removed "
    "one that lowered the error. Swaps left: exchanges that still would; 0 proves that there is none. Rounds: of "
    "adjusting the weights, as far as they lowered the error."
)


def _layer(layer: LayerReport) -> dict[str, str]:
    """Returns the cells of a layer, keyed by column."""
    cells = {"layer": str(layer.layer), "channels kept": count_text(len(layer.kept))}
    cells |= _errors(layer.calibration) | (_errors(layer.held_out, "held-out ") if layer.held_out else {})
    cells |= {"swaps": count_text(layer.swaps), "swaps left": count_text(layer.improving_swaps)}
    cells |= {"rounds": count_text(layer.rounds)}
    if attention := layer.attention:
        cells["key/value heads kept"] = count_text(len(attention.kept))
        cells |= _errors(attention.calibration, "attention ", ("selection", "refit"))
        if attention.held_out:
            cells |= _errors(attention.held_out, "attention held-out ", ("selection", "refit"))
    return cells | {"seconds": f"{sum(layer.seconds.values()):.1f}"}


def joint(report: PruneReport) -> Table:
    """Returns a table with a row per measurement in the joint steps."""
    rows = tuple(
        (
            count_text(check.step),
            count_text(check.tokens),
            decimals(fmean(check.losses)) if check.losses else NOTHING,
            decimals(check.held_out),
            "yes" if check.taken else "no",
        )
        for check in report.joint
    )
    columns = ("steps", "tokens", "in the steps", report.judged, "kept")
    note = (
        "What is lost against the original's predictions, in nats per token: of the steps since the row above, and "
        f"on {report.judged} tokens. It is the mean of their KL divergence and of the rise in log-perplexity, the "
        "latter with the weight `joint_text_weight`."
    )
    return Table("The joint steps in numbers", columns, rows, ("kept",), note)


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for chosen in settings for name in chosen)
    return [name for name in names if len({value_text(chosen.get(name)) for chosen in settings}) > 1]


def value_text(value: Any) -> str:
    """Formats a setting as the user types it."""
    if value is None:
        return NOTHING
    return value if isinstance(value, str) else json.dumps(value)


def _errors(errors: Errors, prefix: str = "", stages: Sequence[str] = tuple(STAGES)) -> dict[str, str]:
    """Returns the errors after some stages in per cent, keyed by column."""
    found = {f"{prefix}{STAGES[stage].label}": getattr(errors, stage) for stage in stages}
    return {name: f"{100 * error:.2f}" if isfinite(error) else NOT_FINITE for name, error in found.items()}


def decimals(value: float) -> str:
    """Formats a number as the tables show it."""
    return f"{value:.4f}" if isfinite(value) else NOT_FINITE


def _change(change: Change | Perplexities) -> str:
    return signed(change_text(change.before, change.after)) if isfinite(change.after) else NOTHING
