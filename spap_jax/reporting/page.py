"""One page that is complete in itself, and its plots as PNGs."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from spap_jax.quantities import bytes_text, count_text, missed
from spap_jax.reporting import draw, tables
from spap_jax.reporting.comparison import comparisons
from spap_jax.reporting.figures import Plot, plots
from spap_jax.reporting.read import Run, Trained
from spap_jax.reporting.style import DARK, LIGHT


@dataclass(frozen=True)
class Drawn:
    """A plot with its drawing for the page, and as a PNG; ``name`` is no other plot's of the page."""

    name: str
    plot: Plot
    svg: Markup
    png: bytes


def render(runs: Sequence[Run]) -> tuple[str, dict[str, bytes]]:
    """Draws and writes everything.

    Args:
        runs: At least one.

    Returns:
        The page, and the PNGs by name.
    """
    with draw.drawing():
        compared = [_drawn(plot) for plot in comparisons(runs)] if len(runs) > 1 else []
        own = [[_drawn(plot, _prefix(runs, place)) for plot in plots(run.record)] for place, run in enumerate(runs)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spap_jax.reporting"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html").render(
        title=f"{len(runs)} pruning runs" if compared else runs[0].record.model.name,
        models=", ".join(dict.fromkeys(run.record.model.name for run in runs)),
        side_by_side=tables.side_by_side(runs) if compared else None,
        compared=compared,
        sections=[_section(run, drawn) for run, drawn in zip(runs, own, strict=True)],
        light=LIGHT,
        dark=DARK,
    )
    return page, {f"{drawn.name}.png": drawn.png for drawn in itertools.chain(compared, *own)}


def _drawn(plot: Plot, prefix: str = "") -> Drawn:
    name = f"{prefix}{plot.name}"
    return Drawn(name, plot, Markup(draw.svg(plot.figure, name)), draw.png(plot.figure))


def _prefix(runs: Sequence[Run], place: int) -> str:
    """What begins the names of a run's plots where there are several runs; the number keeps them apart."""
    slug = re.sub(r"[^\w.]+", "-", runs[place].label).strip("-.")
    return f"{place + 1}-{slug}-" if len(runs) > 1 else ""


def _section(run: Run, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """What the template shows of a run."""
    record = run.record
    asked = record.sparsity.get("channels", {}).get("asked", record.removed)  # older reports do not tell
    beside = f" ({100 * asked:.1f} % asked for)" if missed(record.removed, asked) else ""
    return {
        "label": run.label,
        "lede": f"{100 * record.removed:.1f} % of the MLP channels removed{beside}: "
        f"{count_text(record.channels.after)} of {count_text(record.channels.before)} stay.",
        "before_and_after": tables.before_and_after(run),
        "facts": _facts(run),
        "drawn": drawn,
        "tables": [tables.layers(record), *([tables.sweeps(record)] if record.sweeps else [])],
        "settings": [(name, tables.value_text(value)) for name, value in record.settings.items()],
        "versions": list(record.versions.items()),
    }


def _trained(trained: Trained) -> str:
    """What training did; the run's other numbers do not know of it."""
    words = f"{count_text(trained.settings.steps)} steps ({trained.objective})"
    if measured := trained.extras.perplexity:
        words += f"; perplexity on {measured.data}: {tables.decimals(measured.before)} before them, "
        words += f"{tables.decimals(measured.after)} after"
    return f"{words}. The rest of this section is from before."


def _facts(run: Run) -> list[tuple[str, str]]:
    record = run.record
    calibration, extras = record.calibration, record.extras
    facts = [
        ("Model", record.model.name),
        ("Architecture", record.model.architecture),
        ("Method", f"channels chosen by {record.method.selection}; update of the weights kept: {record.method.update}"),
        (
            "Calibration",
            f"{calibration.description} ({count_text(calibration.sequences)} sequences of "
            f"{count_text(calibration.sequence_length)} tokens)",
        ),
    ]
    if calibration.sha256:
        facts.append(("Its SHA-256", calibration.sha256))
    if extras.perplexity:
        facts.append(("Perplexity on", extras.perplexity.data))
    if run.trained:
        facts.append(("Trained since", _trained(run.trained)))
    if run.speed:
        work = run.speed.workload
        facts.append(
            ("Speed", f"batch {work.batch}, prompt {work.prompt}, {work.new} new tokens, median of {work.repeats} runs")
        )
    if record.seconds:
        facts.append(("Time", f"{sum(record.seconds.values()):.1f} seconds"))
    if extras.peak_memory_bytes:
        facts.append(("Peak memory", bytes_text(extras.peak_memory_bytes)))
    return facts
