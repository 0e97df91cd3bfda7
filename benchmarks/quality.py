"""Quality after pruning of small models: perplexity and divergence, for all methods side by side.

``python -m benchmarks.quality --zoo DIR`` prunes every folder under ``DIR/models`` with every method, on three samples
of the calibration text, and writes ``out/quality/``: the runs, a page with tables, and a picture. A zoo's texts are in
``DIR/text`` and are chosen by the model's name: ``llama-stories`` reads the stories. Without a zoo the bundled model is
pruned. ``--quick`` compares three methods in a few minutes. An interrupted call goes on where it was.
"""

import itertools
import math
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import jax
import msgspec
from cyclopts import App, Parameter

import spap_jax as spap
from benchmarks.shared import EXAMPLES, METHODS, PEERS, command, commit, rows_in, settings_of, store, table
from spap_jax.evaluation.perplexity import compare

app = App(name="quality", help=__doc__, suppress_keyboard_interrupt=False)

Several = Parameter(consume_multiple=True, negative=())

LENGTH = 256
"""Tokens per sequence or window, as in the training of the zoo's models."""

TEXTS = {
    "stories": ("stories_calibration.txt", "stories_evaluation.txt"),
    "english": ("english_calibration.txt", "english_wikitext2_test.txt"),
}
"""Calibration and evaluation text, by the last word of a model's name."""

QUICK = ("obs", "spap, low effort", "spap")

SHOWN = {"spap, low effort": "#f0b48a", "obs + steps": "#cc79a7", "spap": "#d55e00", "spap, high effort": "#0072b2"}
"""Methods in the picture, with their colours."""


class Row(msgspec.Struct, frozen=True):
    """Measurements of one pruned model.

    Attributes:
        sequences: Number of calibration sequences.
        windows: Number of evaluation windows; 0 is all.
        dense: Perplexity of the dense model.
        perplexity: Perplexity of the pruned model.
        divergence: KL(dense || pruned), nats per predicted token.
        core_seconds: Time of pruning over all cores, compilation included; None if it was not measured.
        commit: Commit of the code.
        date: When the run ended, in UTC.
    """

    model: str
    sparsity: float
    method: str
    seed: int
    sequences: int
    windows: int
    dense: float
    perplexity: float
    divergence: float
    core_seconds: float | None
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, float, str, int, int, int]:
        """What identifies a run."""
        return self.model, self.sparsity, self.method, self.seed, self.sequences, self.windows

    @property
    def rise(self) -> float:
        """Rise in log-perplexity over the dense model."""
        return math.log(self.perplexity / self.dense)


class Case(NamedTuple):
    """A model's folder and its two texts."""

    model: Path
    calibration: Path
    evaluation: Path


@app.default
def main(
    *,
    zoo: Path = EXAMPLES,
    model: Annotated[tuple[str, ...], Several] = (),
    sparsity: Annotated[tuple[float, ...], Several] = (0.3, 0.2, 0.1, 0.5),
    method: Annotated[tuple[str, ...], Several] = tuple(METHODS),
    seed: Annotated[tuple[int, ...], Several] = (0, 1, 2),
    sequences: int = 1024,
    windows: int = 0,
    quick: Annotated[bool, Parameter(negative=())] = False,
    output: Path = Path("out/quality"),
) -> None:
    """Prunes every model at every sparsity with every method, and compares perplexity and divergence.

    Args:
        zoo: Folder with ``models/NAME`` and ``text/``.
        model: Names of models in it. By default all.
        sparsity: Fractions of channels to remove, in the order in which they are run.
        method: Names of methods, or one with changed settings: "spap with rounds=3 round_to=8".
        seed: Seeds of the calibration sample and of the pruning.
        sequences: Calibration sequences of 256 tokens.
        windows: Evaluation windows of 256 tokens; 0 takes all.
        quick: Only three methods, 30 %, one seed, 256 sequences and 200 windows.
        output: Folder for the rows, the page and the picture. Runs that it has rows of are not repeated.
    """
    if quick:
        sparsity, method, seed, sequences, windows = (0.3,), QUICK, (0,), 256, 200
    rows = rows_in(output / "results.jsonl", Row)
    runs = list(itertools.product(sparsity, seed, method))
    settings = [settings_of(way, cut, number) for cut, number, way in runs]  # all are checked before the first run
    for case in cases_of(zoo, model):
        dense, done = None, {row.key for row in rows}
        for (cut, number, way), asked in zip(runs, settings, strict=True):
            if (case.model.name, cut, way, number, sequences, windows) in done:
                continue
            dense = dense or spap.load(case.model)
            rows.append(measured(case, dense, way, asked, sequences, windows))
            store(output / "results.jsonl", rows)
            row = rows[-1]
            print(
                f"{row.model}, {cut:.0%}, {way}, seed {number}: perplexity {row.perplexity:.4f} (dense "
                f"{row.dense:.4f}), KL {row.divergence:.4f}, {row.core_seconds:.0f} core seconds",
                flush=True,
            )
        jax.clear_caches()  # programs compiled for one model are of no use to the next
    shown = [row for row in rows if (row.sequences, row.windows) == (sequences, windows)]
    draw(output / "summary.png", shown)
    text = markdown(shown, command("benchmarks.quality", sys.argv[1:]))
    (output / "README.md").write_text(text, encoding="utf-8")
    print(f"wrote {output}")


def cases_of(zoo: Path, names: Sequence[str] = ()) -> list[Case]:
    """Returns the models of a zoo, or of the examples, with their texts.

    Raises:
        UserError: there is no such model, or its name tells no text.
    """
    models, texts = (zoo, zoo) if zoo == EXAMPLES else (zoo / "models", zoo / "text")
    folders = sorted(file.parent for file in models.glob("*/config.json") if not names or file.parent.name in names)
    if not folders or len(folders) < len(names):
        raise spap.UserError(f"{models} holds not all of the models that were asked for.")
    cases = []
    for folder in folders:
        files = TEXTS.get(folder.name.rpartition("-")[2])
        if files is None:
            raise spap.UserError(f"the name of {folder} ends in none of {', '.join(TEXTS)}, which would tell its text.")
        cases.append(Case(folder, *(texts / file for file in files)))
    return cases


def measured(
    case: Case, dense: spap.Model, method: str, settings: spap.PruneSettings, sequences: int, windows: int
) -> Row:
    """Prunes a model and compares it with the dense one."""
    common: dict[str, Any] = {
        "tokenizer": case.model,
        "sequence_length": LENGTH,
        "vocabulary": dense.config.vocabulary,
    }
    tokens = spap.load_tokens(case.calibration, role="calibration", sequences=sequences, seed=settings.seed, **common)
    judged = spap.load_tokens(case.evaluation, role="evaluation", sequences=windows or None, **common).tokens
    start = time.process_time()
    pruned = spap.prune(dense, tokens, settings=settings).model
    jax.block_until_ready(pruned.params)
    busy = time.process_time() - start
    found = compare(dense, pruned, judged)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Row(
        case.model.name, settings.channel_sparsity, method, settings.seed, sequences, windows, found.dense,
        found.pruned, found.divergence, round(busy, 1), commit(), date,
    )  # fmt: skip


def ratio(rows: Sequence[Row], model: str, sparsity: float, method: str) -> float | None:
    """Returns the median over seeds of the rise over the lowest of a peer *on the same seed*; None if none was run.

    It is infinite if a peer ends no worse than the dense model.
    """
    rises: dict[str, dict[int, float]] = {}
    for row in rows:
        if (row.model, row.sparsity) == (model, sparsity):
            rises.setdefault(row.method, {})[row.seed] = row.rise
    found = []
    for seed, rise in rises.get(method, {}).items():
        peers = [rises[name][seed] for name in PEERS if seed in rises.get(name, {})]
        if peers:
            found.append(rise / min(peers) if min(peers) > 0 else math.inf)
    return median(found) if found else None


def markdown(rows: Sequence[Row], asked: str) -> str:
    """Returns the page."""
    parts = [
        "# Quality: small models after pruning",
        f"This page is generated by\n\n```\n{asked}\n```\n\nand edits are lost; every number is in `results.jsonl`.",
        f"""\
Every method removes the same fraction of MLP channels from every layer. With the same seed all methods see the same
calibration text; all are evaluated on another text, in windows of {LENGTH} tokens that do not overlap. Numbers are
medians over the seeds that were run, of {_seeds(rows)}. In brackets: the rise in log-perplexity over the dense model,
divided by that of the best of {", ".join(PEERS)},
each with the weight update of its paper. The models of the zoo are not in the repository.""",
        "![Damage as a fraction of the best other method's](summary.png)",
    ]
    for model in sorted({row.model for row in rows}):
        mine = [row for row in rows if row.model == model]
        cuts = sorted({row.sparsity for row in mine})
        lines = []
        for method in _ordered(row.method for row in mine):
            cells = [_cell([row for row in mine if (row.sparsity, row.method) == (cut, method)], rows) for cut in cuts]
            lines.append([method, *cells])
        head = ["perplexity (ratio), KL in nats, core seconds", *(f"{cut:.0%} removed" for cut in cuts)]
        parts += [f"## {model}\n\nThe dense model's perplexity is {mine[0].dense:.4f}.", table(head, lines)]
    return "\n\n".join(parts) + "\n"


def _seeds(rows: Iterable[Row]) -> str:
    return ", ".join(map(str, sorted({row.seed for row in rows})))


def _ordered(methods: Iterable[str]) -> list[str]:
    """Returns the methods without repetitions: known ones in their order, then those with changed settings."""
    found = set(methods)
    return [name for name in METHODS if name in found] + sorted(found - METHODS.keys())


def _cell(rows: Sequence[Row], others: Sequence[Row]) -> str:
    if not rows:
        return "-"
    first, times = rows[0], [row.core_seconds for row in rows if row.core_seconds is not None]
    share = ratio(others, first.model, first.sparsity, first.method)
    words = f"{median(row.perplexity for row in rows):.4f}" + ("" if share is None else f" ({share:.2f})")
    return f"{words}, {median(row.divergence for row in rows):.4f}" + (f", {median(times):.0f}" if times else "")


def draw(file: Path, rows: Sequence[Row]) -> None:
    """Draws the ratio of our methods by model and sparsity; what is below 0 is drawn as 0."""
    from matplotlib.figure import Figure

    from spap_jax.report.figures import style

    models = sorted({row.model for row in rows})
    cuts = sorted({row.sparsity for row in rows if row.method in SHOWN})
    methods = [name for name in SHOWN if any(row.method == name for row in rows)]
    with style():
        figure = Figure((2 + 2.4 * len(models), 3.6), layout="constrained")
        for axes, model in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
            for place, method in enumerate(methods):
                found = [(group, ratio(rows, model, cut, method)) for group, cut in enumerate(cuts)]
                bars = [(group, max(0.0, value)) for group, value in found if value is not None and value < math.inf]
                shift = (place + 0.5) / len(methods) - 0.5
                xs, heights = [group + 0.8 * shift for group, _ in bars], [height for _, height in bars]
                axes.bar(xs, heights, 0.72 / len(methods), color=SHOWN[method], label=method)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_xticks(range(len(cuts)), [f"{cut:.0%}" for cut in cuts])
            axes.set_xlim(-0.5, max(1, len(cuts)) - 0.5)
            axes.set_title(model, fontsize=10)
            axes.set_xlabel("MLP channels removed")
        figure.axes[0].set_ylabel("damage / best other method's")
        labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(*labels, loc="outside lower center", ncols=max(1, len(methods)))
        figure.savefig(file)


if __name__ == "__main__":
    try:
        app()
    except spap.UserError as error:
        sys.exit(f"quality: {error}")
    except KeyboardInterrupt:
        sys.exit("quality: interrupted; the same command goes on from here.")
