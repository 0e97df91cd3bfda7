"""Peak memory of ``spap prune`` on random checkpoints: at several depths, or for one configuration.

``python -m benchmarks.memory`` prunes models of 8, 16 and 32 equal layers block by block (``--effort low``), which
should need the same memory; ``python -m benchmarks.memory --config FILE`` prunes a random model of that config.json.
Each model is pruned by the real command in its own process, and the peak resident memory of that process is shown. In
small models compilation dominates the peak, which varies by some hundred megabytes from run to run.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from cyclopts import App
from rich.console import Console
from rich.table import Table

from benchmarks.prune_time import Size
from benchmarks.random_models import pruned_report
from spap_jax.quantities import bytes_text

SPREAD = 0.10
"""Allowed spread of the peaks of models of different depths, as a fraction of the smallest peak."""

out = Console(highlight=False, width=100)
app = App(name="memory", help=__doc__)


def peak(theirs: dict[str, Any], sequences: int, length: int, words: tuple[str, ...]) -> dict[str, int]:
    """Runs the command once and returns the bytes of the weights on disk and the peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        report = pruned_report(Path(folder), theirs, sequences, length, ["--effort", "low", *words])
    extras = report["extras"]
    return {"weights": extras["bytes"]["before"], "peak": extras["peak_memory_bytes"]}


@app.default
def main(
    *words: str,
    config: Path | None = None,
    layers: tuple[int, ...] = (8, 16, 32),
    width: int = 1024,
    intermediate: int = 4096,
    sequences: int = 8,
    length: int = 2048,
) -> None:
    """Measures the peak resident memory of ``spap prune --effort low``.

    Args:
        words: Further arguments for the command, after ``--``, for example ``-- --rounds 1 --steps 5``.
        config: A config.json; a random model of this configuration is pruned, in the dtype that it names.
        layers: Depths to compare; not used with a config.
        width: Width of the residual stream; not used with a config.
        intermediate: Number of MLP channels; not used with a config.
        sequences: Number of calibration sequences.
        length: Tokens per sequence.
    """
    table = Table("model", "weights", "peak memory", show_edge=False, pad_edge=False)
    if config is not None:
        found = peak(json.loads(config.read_text(encoding="utf-8")), sequences, length, words)
        table.add_row(config.stem, bytes_text(found["weights"]), bytes_text(found["peak"]))
        out.print(table)
        return
    peaks = []
    for count in layers:
        found = peak(Size(count, width, intermediate).theirs, sequences, length, words)
        table.add_row(f"{count} layers", bytes_text(found["weights"]), bytes_text(found["peak"]))
        peaks.append(found["peak"])
    out.print(table)
    spread = max(peaks) / min(peaks) - 1
    verdict = "met" if spread <= SPREAD else "missed"
    out.print(f"largest over smallest: {spread:+.1%} (target <= {SPREAD:.0%}: {verdict})")


if __name__ == "__main__":
    app()
