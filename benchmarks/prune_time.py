"""Time, operations and memory of ``spap prune`` on a random LLaMA, against the limits of the machine.

``python -m benchmarks.prune_time`` writes a checkpoint and tokens into a temporary folder, runs the real command in its
own process and reads its report. The achieved rates are compared with the rate of float32 matrix products, which is
measured in this process before and after. Targets are shown, never asserted: other load on the machine slows both.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from cyclopts import App
from rich.console import Console
from rich.table import Table

from benchmarks.random_models import pruned_report
from spap_jax.models import DecoderConfig, family_of
from spap_jax.planning.programs import work
from spap_jax.planning.workload import workload
from spap_jax.settings import PruneSettings

TARGET_SHARE = 0.60
"""Target rate of the pass that accumulates the second moments, as a fraction of the matmul rate."""

TARGET_SELECTION = 10.0
"""Target time for channel selection in one layer on 2 cores, in seconds."""

IDLE = 1e-3
"""Seconds below which a layer left a phase out, so that its operations have no rate."""

ROOM = 2**30
"""Bytes of memory allowed beside the weights and the streams."""

out = Console(highlight=False, width=110)
app = App(name="prune_time", help=__doc__)


@dataclass(frozen=True)
class Size:
    """Sizes of the random LLaMA and of its calibration, named after the axis letters of ``docs/architecture.md``."""

    layers: int = 8
    d: int = 1024
    f: int = 4096
    n: int = 16
    m: int = 4
    vocabulary: int = 1024
    sequences: int = 8
    length: int = 2048

    @property
    def theirs(self) -> dict[str, Any]:
        """The config.json of the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "vocab_size": self.vocabulary,
            "hidden_size": self.d,
            "intermediate_size": self.f,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.n,
            "num_key_value_heads": self.m,
            "max_position_embeddings": max(4096, self.length),
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }

    @property
    def config(self) -> DecoderConfig:
        """The same configuration in this project's format."""
        return family_of(self.theirs).read_config(self.theirs)


def seconds_of(run: Callable[[], Any], repeats: int) -> float:
    """Returns the median time of several runs, after one that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def matmul_rate(size: int = 2048) -> float:
    """Returns the rate of float32 matrix products in floating-point operations per second."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    return 2 * size**3 / seconds_of(lambda: product(a), 7)


def counted_operations(size: Size, report: dict) -> dict[str, float]:
    """Counts one layer's operations by report phase, without the swap rounds, which the report does not count."""
    settings = PruneSettings(**report["settings"]).replace(swap_rounds=0)
    layers, run = size.config.layers, work(workload(size.config, settings, size.sequences, size.length))
    counted = {phase: each.operations / layers for phase, each in run.items()}
    return counted | {"joint steps": counted.get("joint steps", 0) + counted.pop("joint checks", 0)}


def show_phases(report: dict, counted: dict[str, float], rate: float) -> dict[str, float]:
    """Prints seconds and rates by phase; returns the seconds of a layer that compiles nothing.

    Of the joint steps, a layer's share is shown.
    """
    first, *rest = (layer["seconds"] for layer in report["layers"])
    rest = rest or [first]
    table = Table(title="one layer", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("phase", "seconds", "first layer: more", "GFLOP", "GFLOP/s", "of matmul rate"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    steady = {phase: median(layer.get(phase, 0.0) for layer in rest) for phase in first}
    if steps := report["seconds"].get("joint steps"):
        steady["joint steps"] = first["joint steps"] = steps / len(report["layers"])
    for phase, seconds in steady.items():
        row = (phase, f"{seconds:.2f}", f"{first[phase] - seconds:+.2f}")
        if phase in counted and seconds > IDLE:
            achieved = counted[phase] / seconds
            row += (f"{counted[phase] / 1e9:.1f}", f"{achieved / 1e9:.1f}", f"{achieved / rate:.0%}")
        table.add_row(*row)
    out.print(table)
    return steady


def show_targets(report: dict, size: Size, counted: dict[str, float], steady: dict[str, float], rate: float) -> None:
    """Prints the targets and whether they are met."""
    share = counted["statistics"] / steady["statistics"] / rate
    states = 2 * size.sequences * size.length * size.d * 4
    bound = report["extras"]["bytes"]["before"] + states + ROOM
    peak = report["extras"]["peak_memory_bytes"]
    rows = (
        ("statistics, share of the matmul rate", f"{share:.0%}", f">= {TARGET_SHARE:.0%}", share >= TARGET_SHARE),
        ("selection of a layer, seconds", f"{steady['selection']:.1f}", f"< {TARGET_SELECTION:.0f}",
         steady["selection"] < TARGET_SELECTION),
        ("peak memory, MiB (bound: weights + streams + 1 GiB)", f"{peak / 2**20:.0f}", f"<= {bound / 2**20:.0f}",
         peak <= bound),
    )  # fmt: skip
    for name, value, target, met in rows:
        out.print(f"{name}: {value} (target {target}: {'met' if met else 'missed'})")


@app.default
def main(
    *words: str,
    layers: int = 8,
    width: int = 1024,
    intermediate: int = 4096,
    heads: int = 16,
    kv_heads: int = 4,
    sequences: int = 8,
    length: int = 2048,
) -> None:
    """Measures one run of ``spap prune --sparsity 0.3 --effort low``.

    Other efforts would read further text, of which the random tokens hold none, though it would be counted.

    Args:
        words: Further arguments for the command, after ``--``, for example ``-- --rounds 1 --steps 20``.
        layers: Number of blocks; the first one compiles and is shown separately.
        width: Width of the residual stream.
        intermediate: Number of MLP channels.
        heads: Number of query heads.
        kv_heads: Number of key/value heads.
        sequences: Number of calibration sequences.
        length: Tokens per sequence.
    """
    size = Size(layers, width, intermediate, heads, kv_heads, sequences=sequences, length=length)
    before = matmul_rate()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = pruned_report(Path(folder), size.theirs, size.sequences, size.length, ["--effort", "low", *words])
    seconds = time.perf_counter() - start
    after = matmul_rate()
    rate = (before + after) / 2
    counted = counted_operations(size, report)
    out.print(f"float32 matmul: {before / 1e9:.1f} GFLOP/s before, {after / 1e9:.1f} after; {os.cpu_count()} cores")
    steady = show_phases(report, counted, rate)
    show_targets(report, size, counted, steady, rate)
    out.print(f"whole command, writing its input included: {seconds:.1f} s")


if __name__ == "__main__":
    app()
