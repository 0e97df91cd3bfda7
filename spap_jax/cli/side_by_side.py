"""The table at the end of ``spap prune`` with several sparsities."""

import json
from collections.abc import Sequence

from spap_jax.checkpoint.publish import read_made
from spap_jax.cli.prune_many import PruneRun
from spap_jax.quantities import bytes_text, count_text, duration_text, percent_text


def side_by_side(runs: Sequence[PruneRun]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Compares the results of a command's runs: a row for the dense model and one for each sparsity.

    Args:
        runs: The runs, all of them finished; the reports in their outputs are read.

    Returns:
        A table: its title, the names of its columns, and its rows.
    """
    reports = [json.loads(read_made(run.output, "spap_report.json") or b"") for run in runs]
    dense, pruned = reports[0], [(report["model"], report["extras"]) for report in reports]
    model, extras = dense["model"], dense["extras"]
    widths = [each["widths"] for each, _ in pruned]
    columns = {
        "sparsity": ["dense", *(str(run.settings.sparsity) for run in runs)],
        "channels removed": ["", *(percent_text(1 - sum(each["after"]) / sum(each["before"])) for each in widths)],
        "parameters": [
            count_text(model["parameters"]["before"]),
            *(count_text(each["parameters"]["after"]) for each, _ in pruned),
        ],
        "weights on disk": [
            bytes_text(extras["bytes"]["before"]),
            *(bytes_text(each["bytes"]["after"]) for _, each in pruned),
        ],
    }
    if measured := extras.get("perplexity"):
        after = [each["perplexity"]["after"] for _, each in pruned]
        columns["perplexity"] = [f"{value:.4f}" for value in (measured["before"], *after)]
    columns["time"] = ["", *(duration_text(sum(report["seconds"].values()), digits=2) for report in reports)]
    return f"{model['name']} at {len(runs)} sparsities", tuple(columns), list(zip(*columns.values(), strict=True))
