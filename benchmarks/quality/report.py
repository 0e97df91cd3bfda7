"""``README.md`` of the results, generated from the rows alone."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from benchmarks.markdown import table
from benchmarks.quality.cases import LENGTH
from benchmarks.quality.judge import SEEDS, Judge, Median, Verdict
from benchmarks.quality.methods import PEERS, STEPPED, TARGETS
from benchmarks.quality.results import Row
from benchmarks.quality.scope import Scope

MISSING = "-"

VERDICT_HEAD = ("method", "model", "removed", "best peer", "ratio", "range", "target", "is", "over peer + steps")

VERDICT_WORDS = ("method", "model", "best peer", "is")
"""Columns of the verdict table that hold text."""


def markdown(rows: Sequence[Row], scope: Scope, plots: Sequence[str] = ()) -> str:
    """Returns the full text.

    Args:
        rows: Rows of the scope.
        scope: What the report covers.
        plots: Names of PNG files in the report's folder.
    """
    judge = Judge(rows)
    parts = [
        "# Quality: perplexity and divergence after pruning",
        _origin(rows, scope),
        _protocol(rows, scope),
        "## Judgement",
        _judgement(judge, scope),
        *(f"![{name}]({name})" for name in plots if name in ("summary.png", "effort.png")),
        "Seconds, here and below, are core seconds: the sum over the processor cores, which hardly depends on what "
        "else the machine does. Rows of different days may come from machines of different speed.",
    ]
    for model in scope.models:
        parts += [f"## {model}", _sizes(model, rows)]
        parts += [f"![{name}]({name})" for name in plots if name == f"{model}.png"]
        parts += [
            "Perplexity, (rise in log-perplexity; ratio to the best peer's rise):",
            _grid(scope, lambda method, cut, model=model: _perplexity_cell(judge, scope, model, cut, method)),
            "KL divergence from the dense model, nats per token:",
            _grid(scope, lambda method, cut, model=model: _divergence_cell(judge, scope, model, cut, method)),
            "Seconds of processor cores to prune, all of them together, compiling included:",
            _grid(scope, lambda method, cut, model=model: _seconds_cell(judge, scope, model, cut, method)),
        ]
    return "\n\n".join(parts) + "\n"


def _origin(rows: Sequence[Row], scope: Scope) -> str:
    commits = sorted({row.commit for row in rows})
    lines = [
        "This page is generated, and edits are lost. Every number is in `results.csv`, which has one row for each run. "
        "The last command was",
        f"```\n{scope.command}\n```",
        "and `--model`, `--sparsity`, `--method` and `--seed` select single rows.",
        f"Commit of the code: {', '.join(f'`{name}`' for name in commits) or MISSING}. "
        f"Newest row: {max((row.date for row in rows), default=MISSING)}. Runs: {len(rows)} of {scope.runs}.",
    ]
    if len(commits) > 1:
        lines.append("The rows come from several commits; `results.csv` gives the commit of each row.")
    return "\n\n".join(lines)


def _protocol(rows: Sequence[Row], scope: Scope) -> str:
    calibration = _numbers(row.calibration_tokens for row in rows)
    parts = ", ".join(sorted({"all of it" if row.windows == "all" else f"its first {row.windows}" for row in rows}))
    return f"""\
Every method removes the same fraction of MLP channels from every layer. With the same seed all methods see the same
calibration tokens ({calibration}: sequences of {LENGTH}, drawn from the calibration text by the seed). All are
evaluated on the evaluation text, which is not used for calibration, in windows of {LENGTH} tokens ({parts or MISSING})
that do not overlap and in which every token but the first is predicted.

- Numbers are medians over the seeds {", ".join(map(str, scope.seeds))}. If some seeds are missing, the cell says how
  many there are. `{MISSING}` means not run.
- *rise*: log-perplexity of the pruned model minus that of the dense one.
- *best peer*: the method with the lowest rise on the same seed among {", ".join(PEERS)}, each with the weight update of
  its paper (`docs/method.md`). *ratio*: a method's rise divided by the best peer's; ∞, which is not plotted, if the
  best peer's rise is not positive. It is negative, and plotted as 0, if a model ends better than the dense one.
- *range*: range of the ratio over the seeds. *over peer + steps*: ratio to the better of {" and ".join(STEPPED)}.
- *{", ".join(STEPPED)}*: a peer's channels with the same optimizer steps on the weights as `spap` at its default
  effort.
- *spap, refit only*: our channels without optimizer steps. *low effort*: joint steps on the last three blocks. *high
  effort*: with more of them, on all blocks.
- Methods without optimizer steps fit all tokens; those with steps hold some sequences out, as they do by default."""


def _judgement(judge: Judge, scope: Scope) -> str:
    lines = verdict_lines(judge, scope)
    if not lines:
        return "None of the methods that have targets was asked for."
    return "\n\n".join([table(VERDICT_HEAD, lines, VERDICT_WORDS), *summaries(judge, scope)])


def verdict_lines(judge: Judge, scope: Scope) -> list[tuple[str, ...]]:
    """Returns the verdict table: a line for every model and sparsity, for each of our methods in the scope."""
    cases = itertools.product(TARGETS, scope.models, scope.sparsities)
    verdicts = (judge.verdict(model, cut, method) for method, model, cut in cases if (cut, method) in scope.cells)
    return [_verdict_line(verdict, len(scope.seeds)) for verdict in verdicts]


def summaries(judge: Judge, scope: Scope) -> list[str]:
    """Returns sentences that say how often each of our methods meets its targets."""
    return [_summary(judge, scope, method) for method in TARGETS if method in scope.methods]


def _summary(judge: Judge, scope: Scope, method: str) -> str:
    cases = itertools.product(scope.models, scope.sparsities)
    verdicts = [judge.verdict(model, cut, method) for model, cut in cases if (cut, method) in scope.cells]
    asked = [verdict for verdict in verdicts if verdict.target is not None]
    met = sum(bool(verdict.met) and verdict.complete for verdict in asked)
    lacking = [verdict for verdict in asked if not verdict.complete]
    so_far = sum(bool(verdict.met) for verdict in lacking)
    unfinished = f", and so far in {so_far} of {len(lacking)} that lack runs" if lacking else ""
    return f"{method}: target met in {met} of {len(asked)} cases{unfinished}."


def _verdict_line(verdict: Verdict, seeds: int) -> tuple[str, ...]:
    ratio = verdict.ratio
    return (
        verdict.method,
        verdict.model,
        f"{verdict.sparsity:.0%}",
        ", ".join(verdict.best) or MISSING,
        _median(ratio, ".3f", seeds),
        MISSING if ratio is None else f"{_text(ratio.low, '.3f')} to {_text(ratio.high, '.3f')}",
        MISSING if verdict.target is None else f"<= {verdict.target:.2f}",
        _met_or_missed(verdict),
        _median(verdict.stepped, ".3f", seeds),
    )


def _met_or_missed(verdict: Verdict) -> str:
    """Returns "met" or "missed", or a placeholder if there is no ratio or target."""
    if verdict.met is None:
        return MISSING
    word = "met" if verdict.met else "missed"
    if verdict.complete:
        return word
    seeds = verdict.ratio.seeds if verdict.ratio else 0
    return f"{word} so far ({verdict.peers} of {len(PEERS)} peers, {seeds} of {SEEDS} seeds)"


def _sizes(model: str, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row.model == model]
    if not own:
        return "No runs."
    dense = ", ".join(sorted({f"{row.dense:.4f}" for row in own}))
    widths = ", ".join(f"{cut:.0%}: {width}" for cut, width in sorted({(row.sparsity, row.width) for row in own}))
    judged = _numbers(row.evaluation_tokens for row in own)
    return f"Dense perplexity {dense} on {judged} evaluation tokens. Channels kept in every layer: {widths}."


def _perplexity_cell(judge: Judge, scope: Scope, model: str, sparsity: float, method: str) -> str:
    perplexity = judge.median(model, sparsity, method, lambda row: row.perplexity)
    rise = judge.median(model, sparsity, method, lambda row: row.rise)
    if perplexity is None or rise is None:
        return MISSING
    ratio = _median(judge.ratio(model, sparsity, method, PEERS), ".2f", len(scope.seeds))
    return f"{_median(perplexity, '.4f', len(scope.seeds))} ({_text(rise.value, '.4f')}; {ratio})"


def _divergence_cell(judge: Judge, scope: Scope, model: str, sparsity: float, method: str) -> str:
    return _median(judge.median(model, sparsity, method, lambda row: row.divergence), ".4f", len(scope.seeds))


def _seconds_cell(judge: Judge, scope: Scope, model: str, sparsity: float, method: str) -> str:
    return _median(judge.median(model, sparsity, method, lambda row: row.processor_seconds), ".0f", len(scope.seeds))


def _grid(scope: Scope, cell: Callable[[str, float], str]) -> str:
    """Returns a table of methods x sparsities."""
    head = ("method", *(f"{cut:.0%}" for cut in scope.sparsities))
    return table(head, [(method, *(cell(method, cut) for cut in scope.sparsities)) for method in scope.methods])


def _median(found: Median | None, format_spec: str, seeds: int) -> str:
    """Formats a median, with its number of seeds if some are missing."""
    if found is None:
        return MISSING
    return _text(found.value, format_spec) + (f" [{found.seeds} of {seeds} seeds]" if found.seeds < seeds else "")


def _text(value: float, format_spec: str) -> str:
    return "∞" if value == math.inf else f"{value:{format_spec}}"


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}".replace(",", " ") for value in sorted(set(values))) or MISSING
