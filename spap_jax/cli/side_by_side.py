"""The table at the end of ``spap prune`` with several sparsities."""

from collections.abc import Callable, Sequence
from typing import Any

from spap_jax.checkpoint.publish import read_made
from spap_jax.cli.prune_many import PruneRun
from spap_jax.quantities import bytes_text, count_text, duration_text, percent_text
from spap_jax.reporting.schema import Change, Perplexities, PruneReport, parsed


def side_by_side(runs: Sequence[PruneRun]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Compares the results of a command's runs: a row for the dense model and one for each sparsity.

    Args:
        runs: The runs, all of them finished; the reports in their outputs are read.

    Returns:
        A table: its title, the names of its columns, and its rows.
    """
    reports = [parsed(read_made(run.output, "spap_report.json") or b"", PruneReport) for run in runs]
    sizes = [report.extras.bytes for report in reports if report.extras.bytes]
    measured = [report.extras.perplexity for report in reports if report.extras.perplexity]
    columns = {
        "sparsity": ["dense", *(str(run.settings.sparsity) for run in runs)],
        "channels removed": ["", *(percent_text(report.removed) for report in reports)],
        "parameters": _before_and_after([report.model.parameters for report in reports], count_text),
        "weights on disk": _before_and_after(sizes, bytes_text),
    }
    if measured:
        columns["perplexity"] = _before_and_after(measured, "{:.4f}".format)
    columns["time"] = ["", *(duration_text(sum(report.seconds.values()), digits=2) for report in reports)]
    title = f"{reports[0].model.name} at {len(runs)} sparsities"
    return title, tuple(columns), list(zip(*columns.values(), strict=True))


def _before_and_after(changes: Sequence[Change | Perplexities], text: Callable[[Any], str]) -> list[str]:
    """Returns what there was before, the same in all runs, and what each run left."""
    return [text(changes[0].before), *(text(change.after) for change in changes)]
