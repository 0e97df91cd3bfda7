"""Costs of pruning LLaMA-3.1 on three meshes: ``python -m benchmarks.plans`` writes ``docs/plans.md``.

Nothing is measured: the page shows the counts of ``spap plan`` for the configs in ``tests/configs``.
"""

from pathlib import Path

from cyclopts import App

from benchmarks.markdown import table
from spap_jax import checkpoint
from spap_jax.cli.plan import MESHES
from spap_jax.planning import tables
from spap_jax.planning.accelerators import mesh_named
from spap_jax.planning.plan import Request, notes, plan, verdict
from spap_jax.settings import PruneSettings

ROOT = Path(__file__).parents[1]
MODELS = ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b")
RUNS = {
    "effort low": (PruneSettings(effort="low"), 1),
    "effort low, schedule parallel": (PruneSettings(effort="low", schedule="parallel"), 1),
    "effort default": (PruneSettings(effort="default"), 1),
    "effort default, weights divided among 8": (PruneSettings(effort="default"), 8),
}
"""Settings of each run, and the number of devices along which the weights are sharded."""

SEQUENCES, LENGTH = 128, 2048

HEAD = f"""# What full-size models need

This page is written by `python -m benchmarks.plans` from the configs in `tests/configs`. Nothing here is measured:
these are the counts of `spap plan` (which works for any model, mesh and settings). The work is counted in the traces of
the programs that a run compiles, the memory by formulas, and tests compare both with XLA's analysis of the compiled
programs. Times are lower bounds (rooflines) at the peak rates of the data sheets.

{{sparsity}} of the MLP channels are removed, with {SEQUENCES} calibration sequences of {LENGTH} tokens. Effort `low`
holds one block at a time until the last three, and `default` all pruned blocks for its joint steps, or as many as fit.
The calibration sequences and what joint steps need are spread over the devices, and so are the rows of the second
moments and of the solver; every device holds the block that is pruned. With `--model-devices 8` the
weights are divided among eight devices, and so are the second moments while they are summed. With the schedule
`parallel` each device, or each group of devices that share the weights, solves different layers
([docs/method.md](method.md)).
"""

app = App(name="plans", help=__doc__)


def request_of(model: str, settings: PruneSettings) -> Request:
    """Returns the request to prune a model that has a config in ``tests/configs``."""
    config, weight_bytes = checkpoint.read_config(ROOT / "tests" / "configs" / f"{model}.json", model)
    return Request(config, settings, SEQUENCES, LENGTH, weight_bytes)


def section(model: str) -> str:
    """Returns one model's section of the page."""
    return "\n\n".join([f"## {model}", *(part(model, title) for title in RUNS)])


def part(model: str, title: str) -> str:
    """Returns the part of a model's section that is about one run."""
    settings, sharers = RUNS[title]
    request = request_of(model, settings)
    plans = [plan(request, mesh_named(name).shared_among(sharers)) for name in MESHES]
    summary = tables.summary_words(plans)
    parts = [f"### {title}", table(summary.columns, summary.rows)]
    said = [f"- {planned.mesh.name}: {verdict(planned)}" for planned in plans if not planned.fits]
    said += [f"- {planned.mesh.name}: {note}" for planned in plans if planned.fits for note in notes(planned)]
    parts += ["\n".join(said)] if said else []
    shown = next((planned for planned in plans if planned.fits), plans[-1])
    for words in (tables.memory_words(shown), tables.phase_words(shown)):
        parts += [f"{shown.mesh.name}, {words.title}:", table(words.columns, words.rows)]
    return "\n\n".join(parts)


@app.default
def main(output: Path = ROOT / "docs" / "plans.md") -> None:
    """Writes the page.

    Args:
        output: File to write.
    """
    head = HEAD.format(sparsity=f"{PruneSettings.sparsity:.0%}")
    output.write_text("\n\n".join([head.rstrip(), *map(section, MODELS), tables.LEGEND]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
