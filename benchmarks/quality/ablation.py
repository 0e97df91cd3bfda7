"""``ablation.md``: the effect of single settings and of less text, generated from the rows alone."""

import math
from collections.abc import Iterable, Sequence
from statistics import median

from benchmarks.markdown import table
from benchmarks.quality.judge import Judge, ratio_of
from benchmarks.quality.methods import PEERS, TARGETS, is_current
from benchmarks.quality.results import Row
from benchmarks.quality.runs import SEQUENCES

_HEAD = ("model", "removed", "seeds", "method", "with", "rise", "of its rise without", "KL", "of its KL without",
         "operations of those without", "core seconds")  # fmt: skip
_TOKENS_HEAD = ("model", "removed", "seed", "calibration tokens", "method", "rise", "best of its peers", "ratio")
_WORDS = ("method", "with", "best of its peers")


def markdown(rows: Iterable[Row]) -> str | None:
    """Returns the page, or None if there is nothing to compare.

    Args:
        rows: All rows. Left out are those whose settings had another meaning when they ran, and those for which the
            method without its last change was not run on the same tokens and texts.
    """
    todays = [row for row in rows if is_current(row)]
    by_case = {_case(row): row for row in todays}
    pairs: dict[tuple[str, str, str, str], list[tuple[Row, Row]]] = {}
    for row in sorted(todays, key=_order):
        method, change = _parted(row.method)
        base = by_case.get(_case(row, method))
        if change and base:
            pairs.setdefault((row.model, f"{row.sparsity:.0%}", method, change), []).append((row, base))
    lines = [_line(*cell, of_seeds) for cell, of_seeds in pairs.items()]
    by_tokens = _lines_by_tokens([row for row in todays if " with " not in row.method])
    compared = [row for pairs_of_cell in pairs.values() for row, _ in pairs_of_cell]
    parts = [_ABOUT + table(_HEAD, lines, _WORDS), *_other_amounts(compared)] if lines else []
    parts += [_ABOUT_TOKENS + table(_TOKENS_HEAD, by_tokens, _WORDS)] if by_tokens else []
    return "\n\n".join(["# Ablation: one thing changed", _ORIGIN, *parts]) + "\n" if parts else None


def _other_amounts(rows: Iterable[Row]) -> list[str]:
    """Says which models were pruned and judged on other amounts of text than by default."""
    words = []
    for model, sequences, windows in sorted({(row.model, row.sequences, row.windows) for row in rows}):
        asked = f"--sequences {sequences}" + ("" if windows == "all" else f" --windows {windows}")
        if (sequences, windows) != (SEQUENCES, "all"):
            words.append(f"- {model}: with `{asked}`, and its texts as `--data` and `--evaluation`.")
    return ["\n".join(words)] if words else []


def _lines_by_tokens(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Compares our methods, where they were run on different amounts of text, with the best peer on the same text."""
    amounts: dict[tuple, set[int]] = {}
    for row in rows:
        amounts.setdefault(_cell(row), set()).add(row.sequences)
    lines = []
    for row in sorted(rows, key=_order):
        judge = Judge(other for other in rows if (other.sequences, other.windows) == (row.sequences, row.windows))
        best = judge.best(row.model, row.sparsity, row.seed, PEERS)
        if row.method in TARGETS and len(amounts[_cell(row)]) > 1 and best:
            found = (row.method, f"{row.rise:.4f}", best.method, f"{ratio_of(row.rise, best.rise):.3f}")
            lines.append((row.model, f"{row.sparsity:.0%}", str(row.seed), str(row.calibration_tokens), *found))
    return lines


def _cell(row: Row) -> tuple:
    return (row.model, row.sparsity, row.method, row.seed, row.windows, row.files)


def _order(row: Row) -> tuple:
    return (row.model, row.sparsity, row.method, row.seed, row.sequences)


_ORIGIN = """\
This page is generated from `results.csv`, and edits are lost. *rise* is the rise in log-perplexity over the dense
model, on text that is not used for calibration. KL is the divergence from the dense model in nats per token. Core
seconds are those of all processor cores together, compilation included. `docs/method.md` ("The weights") compares the
optimizer steps of a round with Gauss-Newton and L-BFGS, and has what was tried in prototypes."""

_ABOUT = """## Settings

Each row is made by

```
python -m benchmarks.quality --model zoo/models/MODEL --seed SEED --sparsity FRACTION \\
  --method "METHOD with SETTING=VALUE"
```

*of its rise without* is the ratio to the same method without the last change: if it is below 1, the change helps. What
`+` joins is a single change, most often one that costs operations and one that saves them.
*operations of those without* is the ratio of what `spap plan` counts for the two runs, where it was counted, as if the
text were as long as they ask for. With several seeds a ratio is the median of theirs, and the other numbers are medians
too.

"""

_ABOUT_TOKENS = """## Calibration tokens

Rows with fewer tokens are made with `--sequences NUMBER`. *best of its peers*: the peer with the lowest rise among
those that were run on the same tokens.

"""


def _case(row: Row, method: str | None = None) -> tuple:
    return (row.model, row.sparsity, method or row.method, row.seed, row.sequences, row.windows, row.files)


def _parted(method: str) -> tuple[str, str]:
    """Splits a method into the method without its last change, and that change, or "" if it has none."""
    if " with " not in method:
        return method, ""
    before, _, change = method.rpartition(" ")
    return before.removesuffix(" with"), change


def _line(model: str, removed: str, method: str, change: str, pairs: Sequence[tuple[Row, Row]]) -> tuple[str, ...]:
    """Formats a line from pairs of rows, with the change and without it, one pair per seed."""
    numbers = []
    for value in (lambda row: row.rise, lambda row: row.divergence):
        numbers.append(f"{median(value(row) for row, _ in pairs):.4f}")
        numbers.append(f"{median(ratio_of(value(row), value(base)) for row, base in pairs):.3f}")
    operations = _known((row.teraflops / base.teraflops for row, base in pairs), ".2f")
    seconds = _known((row.processor_seconds for row, _ in pairs), ".0f")
    seeds = ", ".join(str(row.seed) for row, _ in pairs)
    return (model, removed, seeds, method, f"`{change}`", *numbers, operations, seconds)


def _known(values: Iterable[float], digits: str) -> str:
    """Formats the median of the values that are not nan."""
    known = [value for value in values if not math.isnan(value)]
    return f"{median(known):{digits}}" if known else "-"
