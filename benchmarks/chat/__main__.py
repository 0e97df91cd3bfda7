"""``python -m benchmarks.chat MODEL``."""

import json
from pathlib import Path
from typing import Any

from cyclopts import App
from rich.console import Console
from rich.table import Table

import spap_jax as spap
from benchmarks import chat
from spap_jax.evaluation.divergence import Comparison, compare

FOLDER = Path(__file__).parent

app = App(name="chat", help=chat.__doc__)


def rows(name: str) -> list[dict[str, Any]]:
    """Returns the conversations of a file."""
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


def plain(conversations: list[dict[str, Any]]) -> list[str]:
    """Returns the contents of all messages, without their roles."""
    return [message["content"] for each in conversations for message in each["messages"]]


def measured(
    model: str, sequences: int, sequence_length: int, settings: spap.PruneSettings
) -> dict[str, tuple[str, Comparison]]:
    """Returns for each way of calibration what was read, and the comparison with the dense model."""
    dense = spap.load(model)
    common = {"tokenizer": model, "sequence_length": sequence_length, "vocabulary": dense.config.vocabulary}
    judged = spap.load_tokens(rows("held_out"), sequences=None, role="evaluation", **common)
    found = {}
    for way, data in (("plain text", plain(rows("calibration"))), ("conversations", rows("calibration"))):
        tokens = spap.load_tokens(data, sequences=sequences, seed=settings.seed, role="calibration", **common)
        pruned = spap.prune(dense, tokens, settings=settings).model
        found[way] = tokens.description, compare(dense, pruned, judged.tokens, mask=judged.mask)
    return found


@app.default
def main(
    model: str, /, *, sparsity: float = 0.2, effort: str = "default", sequences: int = 20, sequence_length: int = 256,
    seed: int = 0,
) -> None:  # fmt: skip
    """Prints the table.

    Args:
        model: Folder or hub id of a chat model.
        sparsity: Fraction of the MLP channels to remove.
        effort: As in ``spap prune``.
        sequences: Number of calibration sequences.
        sequence_length: Tokens in each sequence, of calibration and of evaluation.
        seed: Random seed.
    """
    settings = spap.PruneSettings().replace(sparsity=sparsity, effort=effort, seed=seed)
    found = measured(model, sequences, sequence_length, settings)
    table = Table("calibrated on", "perplexity", "divergence", "agreement", title=f"{Path(model).name}, held out")
    for number, (way, (_, judged)) in enumerate(found.items()):
        if not number:
            table.add_row("(dense)", f"{judged.dense:.4f}", "0", "100 %")
        table.add_row(way, f"{judged.pruned:.4f}", f"{judged.divergence:.4f}", f"{judged.agreement:.1%}")
    console = Console(width=120)
    console.print(table)
    for way, (words, _) in found.items():
        console.print(f"{way}: {words}")


if __name__ == "__main__":
    app()
