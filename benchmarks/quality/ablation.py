"""``ablation.md``: what single settings change, made of the rows of methods "with" settings and of nothing else."""

import math
from collections.abc import Iterable

import spap_jax as spap
from benchmarks.quality.methods import settings_hash, settings_of
from benchmarks.quality.results import Row

_HEAD = ("model", "removed", "method", "with", "rise", "of its rise without", "KL", "of its KL without", "core seconds")


def markdown(rows: Iterable[Row]) -> str | None:
    """The page; None where there is nothing to compare.

    Args:
        rows: All that there are. Those whose settings meant something else when they ran are left out, and those of
            which the method by itself was not run on the same tokens and texts.
    """
    todays = [row for row in rows if _is_todays(row)]
    plain = {_case(row): row for row in todays if " with " not in row.method}
    lines = []
    for row in sorted(todays, key=lambda row: (row.model, row.sparsity, row.method, row.seed)):
        method, _, changes = row.method.partition(" with ")
        base = plain.get(_case(row, method))
        if changes and base:
            lines.append(_line(row, base, method, changes))
    if not lines:
        return None
    head = [f"| {' | '.join(_HEAD)} |", f"| {' | '.join(['---', '---:', '---', '---'] + ['---:'] * 5)} |"]
    return "\n".join([_ABOUT, *head, *lines]) + "\n"


_ABOUT = """# Ablation: one setting changed

Generated from `results.csv`; edits are lost. Each row is made by

```
python -m benchmarks.quality --model zoo/models/MODEL --seed 0 --sparsity FRACTION --method "METHOD with SETTING=VALUE"
```

*rise* is that of log-perplexity over the dense model, on text that calibration never saw; *of its rise without* is the
ratio to the same method without the change: below 1 the change helps. KL is the divergence from the dense model, nats
per token. Core seconds are of all processor cores together, compiling included.
"""


def _is_todays(row: Row) -> bool:
    try:
        return settings_hash(settings_of(row.method, row.sparsity, row.seed)) == row.settings
    except spap.UserError:  # of an earlier version
        return False


def _case(row: Row, method: str | None = None) -> tuple:
    return (row.model, row.sparsity, method or row.method, row.seed, row.sequences, row.windows, row.files)


def _line(row: Row, base: Row, method: str, changes: str) -> str:
    cells = (row.model, f"{row.sparsity:.0%}", method, f"`{changes}`", f"{row.rise:.4f}", f"{row.rise / base.rise:.3f}")
    more = (f"{row.divergence:.4f}", f"{row.divergence / base.divergence:.3f}", _seconds(row.processor_seconds))
    return f"| {' | '.join(cells + more)} |"


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}"
