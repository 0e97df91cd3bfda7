"""What pruning loses: perplexity of pruned models, this library's selection and refit beside Wanda's criterion.

``python -m benchmarks.quality --quick`` prunes the bundled model. With ``--zoo DIR`` it prunes every folder under
``DIR/models`` and finds its texts in ``DIR/text`` by the model's name: ``llama-stories`` reads the stories.
"""

import csv
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App
from rich.console import Console
from rich.table import Table

import spap_jax as spap

EXAMPLES = Path(__file__).parents[1] / "examples"

TARGET_RATIO = 0.70
"""Rise in log-perplexity, ours over Wanda's."""

ZOO_TEXTS = {
    "stories": ("stories_calibration.txt", "stories_evaluation.txt"),
    "english": ("english_calibration.txt", "english_wikitext2_test.txt"),
}
"""Calibration and evaluation texts, by the last word of a model's name."""

METHODS: dict[str, dict[str, Any]] = {
    "wanda + refit": {"method": "wanda", "update": "refit", "held_out": 0.0},
    "spap, refit only": {"update": "refit", "held_out": 0.0},
    "spap": {},
}
"""Settings by the name of a method; the first is what the others are compared with."""

out = Console(highlight=False, width=110)
err = Console(stderr=True, highlight=False)
app = App(name="quality", help=__doc__)


@dataclass(frozen=True)
class Case:
    """A model's folder and its two texts."""

    model: Path
    calibration: Path
    evaluation: Path


@dataclass(frozen=True)
class Row:
    """One pruned model; ``rise`` is in log-perplexity over the dense one, ``ratio`` is to the first method's rise."""

    model: str
    sparsity: float
    method: str
    dense: float
    perplexity: float
    rise: float
    ratio: float
    seconds: float


def cases_of(zoo: Path | None) -> list[Case]:
    """The zoo's models, or the bundled one.

    Raises:
        UserError: the zoo holds no model, or one whose name tells no text.
    """
    if zoo is None:
        texts = (EXAMPLES / name for name in ZOO_TEXTS["stories"])
        return [Case(EXAMPLES / "llama-stories", *texts)]
    folders = sorted(path.parent for path in (zoo / "models").glob("*/config.json"))
    unknown = [folder.name for folder in folders if folder.name.rsplit("-")[-1] not in ZOO_TEXTS]
    if unknown or not folders:
        raise spap.UserError(f"no models under {zoo / 'models'}, or names that tell no text: {', '.join(unknown)}.")
    return [Case(f, *(zoo / "text" / name for name in ZOO_TEXTS[f.name.rsplit("-")[-1]])) for f in folders]


def measure(case: Case, sparsities: tuple[float, ...], sequences: int, windows: int | None) -> Iterator[Row]:
    """Prunes one model in every way; the same tokens for all.

    Args:
        case: The model and its texts.
        sparsities: Fractions of channels to remove.
        sequences: Calibration sequences of 256 tokens.
        windows: Evaluation windows of 256 tokens; all where absent.
    """
    model = spap.load(case.model)
    common: dict[str, Any] = {"tokenizer": case.model, "sequence_length": 256, "vocabulary": model.config.vocabulary}
    calibration = spap.load_tokens(case.calibration, sequences=sequences, seed=0, role="calibration", **common)
    judged = spap.load_tokens(case.evaluation, sequences=windows, role="evaluation", **common).tokens
    dense = spap.perplexity(model, judged)
    for sparsity in sparsities:
        yield from compare(model, case.model.name, sparsity, dense, calibration, judged)


def compare(
    model: spap.Model, name: str, sparsity: float, dense: float, calibration: Any, judged: np.ndarray
) -> Iterator[Row]:
    """Every method at one sparsity."""
    reference = None
    for method, settings in METHODS.items():
        start = time.perf_counter()
        smaller = spap.prune(model, calibration, sparsity=sparsity, **settings).model
        seconds = time.perf_counter() - start
        perplexity = spap.perplexity(smaller, judged)
        rise = math.log(perplexity / dense)
        reference = rise if reference is None else reference
        yield Row(name, sparsity, method, dense, perplexity, rise, rise / reference, seconds)


def show(rows: list[Row]) -> None:
    """Prints the table, and how often the target is met."""
    table = Table(title="perplexity after pruning", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("model", "removed", "method", "dense", "pruned", "rise in log", "of the first", "seconds"):
        table.add_column(name, justify="left" if name in ("model", "method") else "right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.sparsity:.0%}",
            row.method,
            f"{row.dense:.4f}",
            f"{row.perplexity:.4f}",
            f"{row.rise:.4f}",
            f"{row.ratio:.2f}",
            f"{row.seconds:.1f}",
        )
    out.print(table)
    first, *others = METHODS
    for method in others:
        ratios = [row.ratio for row in rows if row.method == method]
        met = sum(ratio <= TARGET_RATIO for ratio in ratios)
        words = f"median {np.median(ratios):.2f}, target <= {TARGET_RATIO:.2f} met in {met} of {len(ratios)}"
        out.print(f"{method}, rise over that of {first}: {words}")


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a row, under the names of its fields."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


@app.default
def main(
    *,
    zoo: Path | None = None,
    model: Path | None = None,
    calibration: Path | None = None,
    evaluation: Path | None = None,
    sparsity: tuple[float, ...] = (0.1, 0.2, 0.3),
    sequences: int = 256,
    windows: int | None = None,
    quick: bool = False,
    csv: Path | None = None,
) -> None:
    """Measures perplexity after pruning, for every model, sparsity and method.

    Args:
        zoo: Folder with ``models/NAME`` and ``text/``; the bundled model where absent.
        model: Folder of one model instead.
        calibration: Text to calibrate on instead.
        evaluation: Text to judge on instead.
        sparsity: Fractions of channels to remove.
        sequences: Calibration sequences of 256 tokens.
        windows: Evaluation windows of 256 tokens; all where absent.
        quick: Judge on the first 200 windows only, unless --windows says otherwise.
        csv: Write the rows to this file too.
    """
    start = time.perf_counter()
    windows = windows or (200 if quick else None)
    cases = cases_of(zoo)
    if model is not None:
        cases = [Case(model, cases[0].calibration, cases[0].evaluation)]
    cases = [Case(c.model, calibration or c.calibration, evaluation or c.evaluation) for c in cases]
    rows: list[Row] = []
    for case in cases:
        for row in measure(case, sparsity, sequences, windows):
            rows.append(row)
            err.print(f"{row.model} {row.sparsity:.0%} {row.method}: {row.perplexity:.4f} ({row.seconds:.1f} s)")
    show(rows)
    if csv is not None:
        write_csv(csv, rows)
    out.print(f"{len(rows)} pruned models in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    app()
