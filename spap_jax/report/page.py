"""The self-contained HTML page."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from spap_jax.quantities import count_text, peak_text, share_text
from spap_jax.report import draw, tables
from spap_jax.report.comparison import comparisons
from spap_jax.report.figures import Plot, plots
from spap_jax.report.schema import FinetuneReport, PruneReport, RunReports
from spap_jax.report.style import DARK, LIGHT
from spap_jax.report.write import COMMAND

_SLUG = 60
"""Most bytes of a run's label in the names of its plots; file names have room for 255."""


@dataclass(frozen=True)
class Drawn:
    """A plot, and how the page shows it; ``name`` is unique on the page."""

    name: str
    plot: Plot
    svg: Markup


def render(runs: Sequence[RunReports]) -> tuple[str, dict[str, Figure]]:
    """Renders the page.

    Args:
        runs: At least one run.

    Returns:
        The page, and its plots under the names that they have as PNGs; see ``draw.png``.
    """
    with draw.drawing():
        compared = [_drawn(plot) for plot in comparisons(runs)] if len(runs) > 1 else []
        own = [[_drawn(plot, _prefix(runs, place)) for plot in plots(run.pruned)] for place, run in enumerate(runs)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spap_jax.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html").render(
        title=_title(runs),
        side_by_side=tables.side_by_side(runs) if compared else None,
        compared=compared,
        sections=[_section(run, drawn) for run, drawn in zip(runs, own, strict=True)],
        command=COMMAND,
        light=LIGHT,
        dark=DARK,
    )
    return page, {f"{drawn.name}.png": drawn.plot.figure for drawn in itertools.chain(compared, *own)}


def _drawn(plot: Plot, prefix: str = "") -> Drawn:
    name = f"{prefix}{plot.name}"
    return Drawn(name, plot, Markup(draw.svg(plot.figure, name)))


def _prefix(runs: Sequence[RunReports], place: int) -> str:
    """Returns the prefix of a run's plot names if there are several runs; its number makes it unique."""
    slug = re.sub(r"[^\w.]+", "-", runs[place].label).strip("-.").encode()[:_SLUG].decode(errors="ignore")
    return f"{place + 1}-{slug}-" if len(runs) > 1 else ""


def _title(runs: Sequence[RunReports]) -> str:
    """Returns the title of the page: the model and what was removed, or the number of runs."""
    models = {_short(run.pruned.model.name) for run in runs}
    if len(runs) > 1:
        many = f"{len(runs)} pruning runs"
        return f"{models.pop()}, {many}" if len(models) == 1 else f"{many} of {len(models)} models"
    return f"{models.pop()}, {_removed(runs[0])}"


def _short(model: str) -> str:
    """Returns the name of a model without its owner."""
    return model.rstrip("/").rpartition("/")[2]


def _removed(run: RunReports) -> str:
    """Returns text on what was removed, and whether training followed."""
    heads = run.pruned.fewer_heads
    words = f"{share_text(run.pruned.removed)} of the MLP channels"
    words += f" and {share_text(heads.removed)} of the attention heads" if heads else ""
    return f"{words} removed{', then trained' if run.trained else ''}"


def _kept(report: PruneReport) -> str:
    """Returns a sentence on what the layers of the pruned model keep."""
    counts = [len(layer.kept) for layer in report.layers]
    least, most = count_text(min(counts)), count_text(max(counts))
    layers, kept = ("Every layer keeps", least) if least == most else ("The layers keep", f"{least} to {most}")
    words = f"{layers} {kept} of {count_text(report.model.intermediate.before)} MLP channels"
    words += report.sparsity.channels.if_missed
    if heads := report.fewer_heads:
        groups = report.model.kv_heads
        words += f", {heads.after} of {heads.before} attention heads{report.sparsity.heads.if_missed}"
        words += f" and {groups.after} of {groups.before} key/value heads"
    return f"{words}."


def _section(run: RunReports, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """Returns the values that the template shows for a run."""
    report = run.pruned
    numbers = tables.before_and_after(run)
    return {
        "label": run.label,
        "removed": _removed(run),
        "kept": _kept(report),
        "headlines": tables.headlines(numbers),
        "quality": _quality(run),
        "numbers": numbers,
        "facts": _facts(run),
        "drawn": drawn,
        "tables": [tables.layers(report), *([tables.joint(report)] if report.joint else [])],
        "settings": [(name, tables.value_text(value)) for name, value in report.settings.items()],
        "versions": list(report.versions.items()),
    }


def _quality(run: RunReports) -> list[str]:
    """Returns sentences on how the quality was measured."""
    measured = run.pruned.extras.perplexity
    said = [
        f"Perplexity, which tells how well a model predicts text (lower is better), was measured on {measured.data}."
        if measured
        else "Perplexity was not measured; pruning with text to evaluate on measures it before and after."
    ]
    if run.trained:
        said.append(_trained(run.trained))
    return said


def _trained(trained: FinetuneReport) -> str:
    """Returns a sentence on the training, which the run's other numbers do not include."""
    words = f"Trained since, for {count_text(trained.steps)} steps ({trained.objective})"
    if measured := trained.extras.perplexity:
        words += f"; perplexity on {measured.data}: {tables.decimals(measured.before)} before them, "
        words += f"{tables.decimals(measured.after)} after"
    return f"{words}. All other numbers are from before the training."


def _facts(run: RunReports) -> list[tuple[str, str]]:
    report = run.pruned
    calibration, extras = report.calibration, report.extras
    facts = [
        ("Model", report.model.name),
        ("Architecture", report.model.architecture),
        ("Method", f"channels chosen by {report.method.selection}; update of the weights kept: {report.method.update}"),
        (
            "Calibration",
            f"{calibration.description} ({count_text(calibration.sequences)} sequences of "
            f"{count_text(calibration.sequence_length)} tokens)",
        ),
    ]
    if calibration.sha256:
        facts.append(("SHA-256 of its tokens", calibration.sha256))
    if run.speed:
        work = run.speed.workload
        facts.append(
            ("Speed", f"batch {work.batch}, prompt {work.prompt}, {work.new} new tokens, median of {work.repeats} runs")
        )
    if report.seconds:
        facts.append(("Time", f"{sum(report.seconds.values()):.1f} seconds"))
    if extras.peak_memory_bytes:
        facts.append(("Peak memory", peak_text(extras.peak_memory_bytes, extras.peak_device_bytes)))
    facts += [("Advice", line) for line in report.advice]
    return facts
