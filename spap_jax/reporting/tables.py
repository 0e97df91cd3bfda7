"""The tables of a page: words and numbers as they are shown, every one made of a report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spap_jax.quantities import bytes_text, change_text, count_text, signed
from spap_jax.reporting.read import Change, Errors, Perplexity, Record, Run

NOTHING = "\N{EN DASH}"
"""Stands where a run has no such number."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: What it holds, for people who do not see it.
        columns: Their names; the first column names its row.
        rows: Its cells.
        words: Columns after the first that hold words, which stand to the left.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()


def before_and_after(run: Run) -> Table:
    """Parameters, channels, bytes, perplexity and speed, dense and pruned."""
    record = run.record
    counts = {
        "parameters": record.model.parameters,
        "MLP parameters": record.model.mlp_parameters,
        "MLP channels, all layers": record.channels,
    }
    rows = [
        (name, count_text(change.before), count_text(change.after), _change(change)) for name, change in counts.items()
    ]
    if size := record.extras.bytes:
        rows.append(("weights on disk", bytes_text(size.before), bytes_text(size.after), _change(size)))
    if measured := record.extras.perplexity:
        numbers = (decimals(measured.before), decimals(measured.after), _perplexity_change(measured))
        rows.append(("perplexity", *numbers))
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


def side_by_side(runs: Sequence[Run]) -> Table:
    """A row a run: the settings in which they differ, and what came of them."""
    settings = differing([run.record.settings for run in runs])
    columns = {
        "run": [run.label for run in runs],
        "model": [run.record.model.name for run in runs],
        **{name: [value_text(run.record.settings.get(name)) for run in runs] for name in settings},
        "channels removed": [f"{100 * run.record.removed:.1f} %" for run in runs],
        "parameters": [count_text(run.record.model.parameters.after) for run in runs],
        "weights on disk": [_size(run.record.extras.bytes) for run in runs],
        **_perplexities(runs),
        **_speeds(runs),
        "seconds": [f"{sum(run.record.seconds.values()):.1f}" for run in runs],
    }
    if len(set(columns["model"])) == 1:
        del columns["model"]
    shown = {name: cells for name, cells in columns.items() if set(cells) != {NOTHING}}
    return Table(
        "The runs side by side", tuple(shown), tuple(zip(*shown.values(), strict=True)), ("model", "method", "update")
    )


def layers(record: Record) -> Table:
    """A row a layer: what the plots show, in numbers."""
    held_out = [layer.held_out for layer in record.layers]
    columns = ("layer", "kept", "selection", "refit", "alternating")
    columns += ("held-out selection", "held-out refit", "held-out alternating") if any(held_out) else ()
    columns += ("swaps", "swaps left", "rounds", "seconds")
    rows = []
    for layer in record.layers:
        errors = _errors(layer.calibration) + (_errors(layer.held_out) if any(held_out) else ())
        counts = (layer.swaps, layer.improving_swaps, layer.rounds)
        rows.append(
            (
                str(layer.layer),
                count_text(len(layer.kept)),
                *errors,
                *map(count_text, counts),
                f"{sum(layer.seconds.values()):.1f}",
            )
        )
    return Table("Errors, swaps, rounds and seconds by layer", columns, tuple(rows))


def sweeps(record: Record) -> Table:
    """A row a step of a sweep."""
    rows = tuple(
        (
            str(step.sweep + 1),
            str(step.layer),
            decimals(step.before),
            decimals(step.after),
            "yes" if step.taken else "no",
        )
        for step in record.sweeps
    )
    return Table(
        "Divergence in the sweeps", ("sweep", "layer", "before", "with new weights", "taken"), rows, ("taken",)
    )


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for chosen in settings for name in chosen)
    return [name for name in names if len({value_text(chosen.get(name)) for chosen in settings}) > 1]


def value_text(value: Any) -> str:
    """A setting as it is typed."""
    if value is None:
        return NOTHING
    return value if isinstance(value, str) else json.dumps(value)


def _errors(errors: Errors | None) -> tuple[str, ...]:
    if errors is None:
        return (NOTHING,) * 3
    return tuple(decimals(value) for value in (errors.selection, errors.refit, errors.alternating))


def decimals(value: float | None) -> str:
    """A number as the tables show it."""
    return "not finite" if value is None else f"{value:.4f}"


def _size(size: Change | None) -> str:
    return bytes_text(size.after) if size else NOTHING


def _perplexities(runs: Sequence[Run]) -> dict[str, list[str]]:
    measured = [run.record.extras.perplexity for run in runs]
    trained = [run.trained.extras.perplexity if run.trained else None for run in runs]
    return {
        "dense perplexity": [decimals(found.before) if found else NOTHING for found in measured],
        "pruned": [decimals(found.after) if found else NOTHING for found in measured],
        "change": [_perplexity_change(found) if found else NOTHING for found in measured],
        "trained": [decimals(found.after) if found else NOTHING for found in trained],
    }


def _perplexity_change(measured: Perplexity) -> str:
    return NOTHING if measured.after is None else signed(change_text(measured.before, measured.after))


def _speeds(runs: Sequence[Run]) -> dict[str, list[str]]:
    measured = [run.speed for run in runs]
    return {
        "prefill speed": [f"{found.speed_up.prefill:.3f}x" if found else NOTHING for found in measured],
        "decode speed": [f"{found.speed_up.decode:.3f}x" if found else NOTHING for found in measured],
    }


def _change(change: Change) -> str:
    return signed(change_text(change.before, change.after))
