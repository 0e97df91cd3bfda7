"""Peak memory of ``spap prune`` on random checkpoints: by depth, or of one configuration.

``python -m benchmarks.memory`` prunes models of 8, 16 and 32 equal layers block by block (``--effort low``), which
should take the same memory; ``python -m benchmarks.memory --config FILE`` prunes a random model of that config.json.
Each is pruned by the real command in a process of its own, whose highest resident memory is shown. In small models that
is what compiling takes, which varies by some hundred megabytes from run to run.
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
"""Models of different depths may differ by so much of the smallest peak."""

out = Console(highlight=False, width=100)
app = App(name="memory", help=__doc__)


def peak(theirs: dict[str, Any], sequences: int, length: int, words: tuple[str, ...]) -> dict[str, int]:
    """Bytes on disk and at the peak of one run."""
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
    """Measures the highest resident memory of ``spap prune --effort low``.

    Args:
        words: Further words for the command, after ``--``, for example ``-- --rounds 1 --steps 5``.
        config: A config.json to prune a random model of, in the dtype that it names.
        layers: Depths to compare, without a config.
        width: Of the residual stream, without a config.
        intermediate: MLP channels, without a config.
        sequences: Calibration sequences.
        length: Tokens in a sequence.
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
