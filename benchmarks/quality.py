"""How much perplexity pruning costs: ours beside Wanda's criterion with least-squares refit, on the same tokens.

``python -m benchmarks.quality --quick`` prunes the bundled model; ``--zoo DIR`` every model of a folder with
``models/NAME`` and ``text/``. The rise is that of log-perplexity over the dense model, on text that calibration never
saw. The peer is given all calibration tokens and our residual-correcting target, so only the method differs.
"""

import csv
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cyclopts
from rich.console import Console
from rich.table import Table

import spap_jax as spap

REFIT_ONLY = {"rounds": 0, "held_out": 0.0}
PEER = "wanda + refit"
QUICK = {PEER: {"method": "wanda"} | REFIT_ONLY, "spap, refit only": REFIT_ONLY, "spap": {}}
OTHERS = {f"{method} + refit": {"method": method} | REFIT_ONLY for method in ("magnitude", "flap", "obs")}
TARGET = 0.70  # ours must save at least 30 % of the peer's rise
ROOT = Path(__file__).parent.parent / "examples"
out, err = Console(), Console(stderr=True)


@dataclass(frozen=True)
class Case:
    """A model and its texts."""

    model: Path
    calibration: Path
    evaluation: Path


@dataclass(frozen=True)
class Row:
    """One pruned model."""

    model: str
    sparsity: float
    method: str
    dense: float
    perplexity: float
    seconds: float

    @property
    def rise(self) -> float:
        """Of the log-perplexity over dense."""
        return math.log(self.perplexity / self.dense)


def zoo(folder: Path) -> list[Case]:
    """The models of a zoo with the texts of their language."""
    texts = {"stories": ("stories_calibration", "stories_evaluation"),
             "english": ("english_calibration", "english_wikitext2_test")}  # fmt: skip
    return [
        Case(model, *(folder / "text" / f"{text}.txt" for text in texts[model.name.split("-")[-1]]))
        for model in sorted((folder / "models").iterdir())
    ]


def measure(case: Case, sequences: int, sequence_length: int, quick: bool) -> list[Row]:
    """Prunes one model by every method at every sparsity."""
    methods, sparsities = (QUICK, (0.1, 0.2, 0.3)) if quick else (QUICK | OTHERS, (0.1, 0.2, 0.3, 0.5))
    model = spap.load(case.model)
    common: dict[str, Any] = {"tokenizer": case.model, "sequence_length": sequence_length}
    calibration = spap.load_tokens(case.calibration, sequences=sequences, role="calibration", **common)
    evaluation = spap.load_tokens(case.evaluation, sequences=None, role="evaluation", **common)
    dense = spap.perplexity(model, evaluation)
    rows = []
    for sparsity in sparsities:
        for method, changes in methods.items():
            start = time.perf_counter()
            settings = spap.PruneSettings().replace(sparsity=sparsity, **changes)
            smaller = spap.prune(model, calibration, settings=settings).model
            seconds = time.perf_counter() - start
            value = spap.perplexity(smaller, evaluation)
            rows.append(Row(case.model.name, sparsity, method, dense, value, seconds))
            err.print(f"{case.model.name} {sparsity:.0%} {method}: {value:.4f} ({seconds:.0f} s)")
    return rows


def show(rows: list[Row]) -> None:
    """Prints the table: the rise of every method, and ours over the peer's."""
    table = Table("model", "cut", "method", "dense", "perplexity", "rise", "of the peer's", "target", "seconds")
    peers = {(row.model, row.sparsity): row.rise for row in rows if row.method == PEER}
    for row in rows:
        ratio = row.rise / peers[row.model, row.sparsity]
        judged = ("met" if ratio <= TARGET else "missed") if row.method == "spap" else ""
        table.add_row(row.model, f"{row.sparsity:.0%}", row.method, f"{row.dense:.4f}", f"{row.perplexity:.4f}",
                      f"{row.rise:.5f}", f"{ratio:.3f}", judged, f"{row.seconds:.0f}")  # fmt: skip
    out.print(table)


def main(
    *,
    quick: bool = False,
    zoo_folder: Path | None = None,
    only: list[str] | None = None,
    sequences: int = 256,
    sequence_length: int = 256,
    csv_file: Path | None = None,
) -> None:
    """Prints the quality table.

    Args:
        quick: At 10, 20 and 30 %, against the peer alone; without it also at 50 % and the other selections.
        zoo_folder: Folder with models/NAME and text/; the bundled model where absent.
        only: Names of the zoo's models to take.
        sequences: Calibration sequences.
        sequence_length: Tokens in each.
        csv_file: Also write the rows here.
    """
    bundled = Case(ROOT / "llama-stories", ROOT / "stories_calibration.txt", ROOT / "stories_evaluation.txt")
    cases = zoo(zoo_folder) if zoo_folder else [bundled]
    cases = [case for case in cases if not only or case.model.name in only]
    start = time.perf_counter()
    rows = [row for case in cases for row in measure(case, sequences, sequence_length, quick)]
    show(rows)
    err.print(f"{time.perf_counter() - start:.0f} s in all")
    if csv_file:
        with csv_file.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    cyclopts.run(main)
