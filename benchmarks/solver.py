"""Solver performance against the limits of the device: ``python -m benchmarks.solver``, at LLaMA-3.1-8B's sizes.

The penalty method selects channels of a random layer and the remaining weights are solved for, with the programs that
pruning runs. The limits are measured in the same process, before and after: the rate of float32 matrix products at full
precision, and the memory bandwidth. Together with the operations and bytes that ``spap plan`` counts, they give a lower
bound on the time on this device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from cyclopts import App
from rich.console import Console
from rich.table import Table

from benchmarks.prune_time import Size, matmul_rate, seconds_of
from spap_jax.numerics import full_precision
from spap_jax.planning.counted import Work
from spap_jax.planning.programs import work
from spap_jax.planning.workload import workload
from spap_jax.pruning.layer import choice_key, choose_channels, refit_weights, search_of
from spap_jax.pruning.moments import Moments
from spap_jax.settings import PruneSettings
from spap_jax.solver.alternating import Weights
from spap_jax.solver.problem import Problem

TARGET = 0.50
"""Target on an accelerator, as a fraction of the matmul rate."""

TOKENS = 1024
"""Random tokens per step of the accumulation."""

out = Console(highlight=False, width=100)
app = App(name="solver", help=__doc__)


class Limits(NamedTuple):
    """Attributes: matmul: operations per second; memory: bytes per second, read and written."""

    matmul: float
    memory: float


def limits(size: int) -> Limits:
    """Measures the peak rates of the device."""
    return Limits(matmul_rate(size), memory_rate(size))


def memory_rate(size: int) -> float:
    """Returns the memory bandwidth of an addition in bytes per second, reads and writes together."""
    a = jnp.zeros((4, size, size))
    plus = jax.jit(lambda a: a + 1)
    return 2 * a.nbytes / seconds_of(lambda: plus(a), 7)


@jax.jit(static_argnames=("f", "d", "count"))
@full_precision
def random_moments(key: jax.Array, f: int, d: int, count: int) -> Moments:
    """Computes second moments of random channels, many of which are redundant.

    Args:
        key: Random key.
        f: Number of channels.
        d: Width of the target.
        count: Number of steps of ``TOKENS`` tokens; more tokens than channels make the moments non-singular.
    """
    mix, weight = (jax.random.normal(k, s) for k, s in zip(jax.random.split(key), ((f // 4, f), (f, d)), strict=True))

    def add(total: tuple, key: jax.Array) -> tuple[tuple, None]:
        shared, own = (
            jax.random.normal(k, (TOKENS, n)) for k, n in zip(jax.random.split(key), (f // 4, f), strict=True)
        )
        h = jax.nn.relu(shared @ mix / f**0.5 + own)
        return jax.tree.map(jnp.add, total, (h.T @ h, h.sum(axis=0))), None

    sums, _ = jax.lax.scan(add, (jnp.zeros((f, f)), jnp.zeros(f)), jax.random.split(key, count))
    gram, mean = (total / (count * TOKENS) for total in sums)
    cross = gram @ weight
    problem = Problem(gram, cross, (weight * cross).sum(), weight)
    return Moments(problem, mean, mean @ weight, jnp.diagonal(gram) - mean**2)


@app.default
def main(width: int = 4096, intermediate: int = 14336, sparsity: float = 0.3, repeats: int = 3) -> None:
    """Times channel selection, without swaps, and the closed form.

    Args:
        width: Width of the residual stream, d.
        intermediate: Number of MLP channels, f.
        sparsity: Fraction of channels to remove.
        repeats: Number of timed runs of each, whose median is shown.
    """
    settings = PruneSettings(sparsity=sparsity, swap_rounds=0)
    load = workload(Size(d=width, f=intermediate).config, settings, sequences=1, length=1)
    keep = load.narrow.intermediate
    before = limits(intermediate // 2)
    seen = random_moments(jax.random.key(0), intermediate, width, -(-2 * intermediate // TOKENS))
    key = choice_key(jax.random.key(settings.seed), load.dense, 0)
    choice = choose_channels(seen, key, keep, **search_of(settings))
    kept = choice.channels.kept
    selected = Weights({}, seen.problem.weight[kept], None)
    runs: dict[str, Callable[[], Any]] = {
        "selection": lambda: choose_channels(seen, key, keep, **search_of(settings)),
        "refit": lambda: refit_weights(seen, choice.ridge, kept, selected),
    }
    seconds = {phase: seconds_of(run, repeats) for phase, run in runs.items()}
    found = Limits(*((a + b) / 2 for a, b in zip(before, limits(intermediate // 2), strict=True)))
    show(seconds, {phase: Work().plus(done, 1 / load.dense.layers) for phase, done in work(load).items()}, found)


def show(seconds: dict[str, float], counted: dict[str, Work], found: Limits) -> None:
    """Prints the times beside their lower bounds, and the fraction of the matmul rate reached."""
    device = jax.devices()[0].device_kind
    out.print(f"{device}: float32 matmul {found.matmul / 1e9:.0f} GFLOP/s, memory {found.memory / 1e9:.0f} GB/s")
    table = Table("phase", "seconds", "GFLOP", "GB", "at least", "of that", "of matmul rate", show_edge=False)
    for phase, took in seconds.items():
        done = counted[phase]
        least = max(done.operations / found.matmul, done.memory_bytes / found.memory)
        share = done.operations / took / found.matmul
        cells = (f"{took:.3f}", f"{done.operations / 1e9:.1f}", f"{done.memory_bytes / 1e9:.1f}", f"{least:.3f}")
        table.add_row(phase, *cells, f"{least / took:.0%}", f"{share:.0%}")
    out.print(table)
    share = sum(counted[phase].operations for phase in seconds) / sum(seconds.values()) / found.matmul
    out.print(f"of the matmul rate, together: {share:.0%} (aim on an accelerator: {TARGET:.0%})")


if __name__ == "__main__":
    app()
