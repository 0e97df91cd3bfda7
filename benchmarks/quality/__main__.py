"""``python -m benchmarks.quality``."""

import itertools
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

import spap_jax as spap
from benchmarks import quality
from benchmarks.quality import ablation, methods, plots, provenance, report, runs, show
from benchmarks.quality.cases import Case, cases_of
from benchmarks.quality.results import Results, Row
from benchmarks.quality.scope import Cell, Scope, once

app = App(name="quality", help=quality.__doc__, suppress_keyboard_interrupt=False)

OUTPUT = Path("docs/quality")

Several = Parameter(consume_multiple=True, negative=())


@app.default
def main(
    *,
    zoo: Path | None = None,
    model: Path | None = None,
    calibration: Path | None = None,
    evaluation: Path | None = None,
    sparsity: Annotated[tuple[float, ...] | None, Several] = None,
    method: Annotated[tuple[str, ...] | None, Several] = None,
    seed: Annotated[tuple[int, ...] | None, Several] = None,
    sequences: int | None = None,
    windows: int | None = None,
    quick: Annotated[bool, Parameter(negative=())] = False,
    output: Path | None = None,
) -> None:
    """Prunes every model at every sparsity with every method, and compares perplexity and divergence.

    Args:
        zoo: Folder with ``models/NAME`` and ``text/``. By default the bundled model.
        model: Folder of a single model instead; its texts are chosen by its name too.
        calibration: Calibration text for every model.
        evaluation: Evaluation text for every model.
        sparsity: Fractions of channels to remove. By default 0.1 0.2 0.3 0.5.
        method: Names of methods, or one with changed settings: "spap with rounds=3 ridge=0.001"; "+" in place of the
            space makes them a single change. By default all: those that take steps for comparison only at 30 %, and
            high effort at 20 and 30 %.
        seed: Seeds of the calibration sample and of the pruning. By default 0 1 2.
        sequences: Calibration sequences of 256 tokens. By default 1024, as many tokens as the 128 sequences of 2048
            that ``spap prune`` uses by default.
        windows: Evaluation windows of 256 tokens. By default all.
        quick: Use three methods, 256 sequences, 200 windows, 10, 20 and 30 %, and one seed, unless other options say
            otherwise; prints a small table, and writes files only with --output.
        output: Folder for results.csv, README.md and the plots. By default docs/quality. Runs whose rows are in its
            results.csv are not repeated.
    """
    start = time.perf_counter()
    cases = cases_of(zoo, model, calibration, evaluation)
    amount = runs.Amount(sequences or (256 if quick else runs.SEQUENCES), windows or (200 if quick else None))
    scope = Scope(
        tuple(case.name for case in cases),
        cells_asked(sparsity or ((0.1, 0.2, 0.3) if quick else (0.1, 0.2, 0.3, 0.5)), method, quick),
        once(seed or ((0,) if quick else (0, 1, 2))),
        provenance.command(sys.argv[1:]),
    )
    todo = runs.plan(cases, scope.cells, scope.seeds, amount)
    folder = output or (None if quick else OUTPUT)
    results = Results(None if folder is None else folder / "results.csv")
    try:
        perform(todo, results)
    finally:
        rows = [results.rows[run.key] for run in todo if run.key in results.rows]
        if folder is not None and rows:
            others = [row for row in results.rows.values() if belongs(row, cases, amount) and row not in rows]
            write_report(folder, others + rows, scope.with_rows(others))
            write_ablation(folder, results)
    if quick:
        show.show_quick(rows, once(method or methods.QUICK))
    else:
        show.show_judgement(rows, scope)
    show.out.print(f"{len(rows)} pruned models in {time.perf_counter() - start:.0f} s")


def cells_asked(sparsities: tuple[float, ...], names: tuple[str, ...] | None, quick: bool) -> tuple[Cell, ...]:
    """Lists the cells by sparsity: the named methods, or by default those that the table has at that sparsity."""
    if names is None and not quick:
        asked = [(cut, name) for cut in sparsities for name in methods.ALL if cut in methods.ASKED_AT.get(name, (cut,))]
    else:
        asked = list(itertools.product(sparsities, names or methods.QUICK))
    return once(asked)


def perform(todo: list[runs.MeasuredRun], results: Results) -> None:
    """Executes the runs that have no row yet."""
    missing = [run for run in todo if run.key not in results.rows]
    if len(missing) < len(todo):
        show.err.print(f"{len(todo) - len(missing)} of {len(todo)} runs are in {results.path} already")
    with show.run_progress(len(missing)) as (start, finish):
        for row in runs.execute(missing, provenance.commit(), start):
            results.add(row)
            finish(row)


def belongs(row: Row, cases: list[Case], amount: runs.Amount) -> bool:
    """Returns whether a row is comparable with the rows of a call that asked for other cells."""
    files = {case.name: case.files_hash for case in cases}
    same = (row.sequences, row.windows, row.files) == (amount.sequences, amount.judged, files.get(row.model, row.files))
    return same and row.method in methods.METHODS and methods.is_current(row)


def write_report(folder: Path, rows: list[Row], scope: Scope) -> None:
    """Writes the plots, if matplotlib is installed, and the Markdown page that shows them."""
    try:
        names = plots.draw(folder, rows, scope)
    except ImportError:
        show.err.print("no plots without matplotlib: pip install -e '.[bench]' gives it.")
        names = []
    (folder / "README.md").write_text(report.markdown(rows, scope, names), encoding="utf-8")
    show.err.print(f"wrote {folder}")


def write_ablation(folder: Path, results: Results) -> None:
    """Writes the page of single settings, if any were changed."""
    if text := ablation.markdown(results.rows.values()):
        (folder / "ablation.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        app()
    except spap.UserError as error:
        sys.exit(f"quality: {error}")
    except KeyboardInterrupt:
        sys.exit("quality: interrupted; the same command goes on from here.")
