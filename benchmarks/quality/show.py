"""Terminal output: a progress bar on standard error, tables on standard output."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.quality.judge import Judge, ratio_of
from benchmarks.quality.methods import QUICK_TARGET
from benchmarks.quality.report import VERDICT_HEAD, VERDICT_WORDS, summaries, verdict_lines
from benchmarks.quality.results import Row
from benchmarks.quality.runs import MeasuredRun
from benchmarks.quality.scope import Scope

out = Console(highlight=False, markup=False, width=140)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

ONE_DAY = 86_400.0


@contextmanager
def run_progress(runs: int) -> Iterator[tuple[Callable[[MeasuredRun], None], Callable[[Row], None]]]:
    """Shows a bar over the runs with the current one and the time left, or prints a line per run without a terminal.

    Yields two functions: one to call with each run that starts, and one with the row of each that is finished.
    """
    columns = (TextColumn("run"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    # Runs take from seconds to minutes, so only their mean since the start predicts the remaining time.
    with Progress(*columns, console=err, disable=not err.is_terminal, speed_estimate_period=ONE_DAY) as progress:
        task, done = progress.add_task("reading", total=runs), itertools.count(1)

        def start(run: MeasuredRun) -> None:
            progress.update(task, description=run.name)

        def finish(row: Row) -> None:
            progress.update(task, advance=1)
            if progress.disable:
                err.print(
                    f"{next(done)}/{runs}  {row.model}, {row.sparsity:.0%}, {row.method}, seed {row.seed}: "
                    f"perplexity {row.perplexity:.4f}, KL {row.divergence:.4f} ({row.seconds:.1f} s)"
                )

        yield start, finish


def show_judgement(rows: Sequence[Row], scope: Scope) -> None:
    """Prints the targets for our methods, and whether they are met."""
    judge = Judge(rows)
    table = _table("rise in log-perplexity, over the best peer's", VERDICT_HEAD, VERDICT_WORDS)
    for line in verdict_lines(judge, scope):
        table.add_row(*line)
    if table.row_count:
        out.print(table)
    for words in summaries(judge, scope):
        out.print(words)


def show_quick(rows: Sequence[Row], methods: Sequence[str]) -> None:
    """Prints every row beside the first method's, and how often the target is met."""
    head = ("model", "removed", "method", "dense", "pruned", "rise in log", "of the first", "KL", "seconds")
    table = _table("perplexity after pruning", head, ("model", "method"))
    first, *others = methods
    rises = {(row.model, row.sparsity, row.seed): row.rise for row in rows if row.method == first}
    ratios: dict[str, list[float]] = {method: [] for method in others}
    for row in rows:
        ratio = ratio_of(row.rise, rises[row.model, row.sparsity, row.seed])
        if row.method in ratios:
            ratios[row.method].append(ratio)
        numbers = (f"{row.dense:.4f}", f"{row.perplexity:.4f}", f"{row.rise:.4f}", f"{ratio:.2f}")
        numbers += (f"{row.divergence:.4f}", f"{row.seconds:.1f}")
        table.add_row(row.model, f"{row.sparsity:.0%}", row.method, *numbers)
    out.print(table)
    for method, found in ratios.items():
        met = sum(ratio <= QUICK_TARGET for ratio in found)
        words = f"median {np.median(found):.2f}, target <= {QUICK_TARGET:.2f} met in {met} of {len(found)}"
        out.print(f"{method}, rise over that of {first}: {words}")


def _table(title: str, head: Sequence[str], words: Collection[str]) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name in head:
        table.add_column(name, justify="left" if name in words else "right")
    return table
