"""Parallel efficiency: the same work on one CPU device and on two, ``python -m benchmarks.parallel``.

Each number of devices has its own process, with as many threads as devices. The processes take turns, so that every
timing on one device is paired with one on two. The efficiency of a pair is the time on one device over the total
device time on all of them; medians are shown, of wall-clock and of CPU time. Other load on the machine takes cores away
and distorts the wall-clock figure; the CPU figure only shows duplicated work and busy waiting. Compare numbers within
one run only. The efficiency that the operation counts of ``spap plan`` allow is shown beside the measured one.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cyclopts import App
from rich.console import Console
from rich.table import Table

from benchmarks.prune_time import Size
from spap_jax.models import DecoderConfig, decoder
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import fully_shard_params
from spap_jax.parallel.sequences import Sequences as Padded
from spap_jax.parallel.sequences import chunked
from spap_jax.planning import programs
from spap_jax.planning.workload import Workload, workload
from spap_jax.pruning import joint, layer, moments, streams, waves
from spap_jax.pruning.narrow import pruned_config
from spap_jax.pruning.streams import Streams
from spap_jax.settings import PruneSettings
from spap_jax.training.engine import batch_of
from spap_jax.training.step import Given, Sequences, begin, step

COUNTS = (1, 2)
SIZE = Size(layers=4, d=256, f=1024, n=4, m=2, sequences=32, length=256)
STEP_SEQUENCES = 4
SETTINGS = PruneSettings(
    joint_learning_rate=0.01,
    schedule="parallel", held_out=0.25, batch_tokens=4 * SIZE.length, step_tokens=STEP_SEQUENCES * SIZE.length,
    joint_passes=1000, joint_tokens=STEP_SEQUENCES * SIZE.length, compute_dtype="float32", remat="full",
)  # fmt: skip
STATISTICS, SELECTION, JOINT_STEP = "statistics", "selection in waves", "joint step"

out = Console(highlight=False, width=100)
app = App(name="parallel", help=__doc__)


class Measured(NamedTuple):
    """Attributes: seconds: wall-clock time; busy: CPU seconds."""

    seconds: float
    busy: float


def load_on(count: int) -> Workload:
    """Returns the workload on the given number of devices."""
    return workload(SIZE.config, SETTINGS, SIZE.sequences, SIZE.length, count)


def work(count: int) -> Iterator[tuple[str, Any]]:
    """Yields the computations in an endless cycle: second moments, channel selection, and a joint step."""
    load = load_on(count)
    config = load.narrow
    params = jax.device_get(decoder.init(config, jax.random.key(0)))  # on the host, as those of a checkpoint
    tokens = np.random.default_rng(0).integers(0, SIZE.vocabulary, (SIZE.sequences, SIZE.length)).astype(np.int32)
    fitted = load.fitted.real
    chunks = chunked(tokens[:fitted], load.fitted.sequences), chunked(tokens[fitted:], 1)
    both = [streams.start(config, params, part) for part in chunks]
    one = jax.tree.map(lambda a: jnp.asarray(a[0]), params["layers"])
    select = selection(config, params, both[0])
    steps = joint_steps(config, params, chunks[0], both[0].dense)
    while True:
        yield STATISTICS, lambda: moments.accumulate(config, one, streams.fitting_tokens(both[0]))
        yield SELECTION, select
        yield JOINT_STEP, lambda: next(steps)


def joint_steps(config: DecoderConfig, params: decoder.Params, tokens: Padded, final: jax.Array) -> Iterator[Any]:
    """Yields the loss of one joint step after the other, all on the same sequences."""
    params = fully_shard_params(config, params)
    job = joint.job_of(config, SETTINGS)
    given = Given(params, None, Sequences(mesh.shard_chunks(tokens.tokens), final), tokens.real)
    state = begin(job, {"layers": {"mlp": params["layers"]["mlp"]}})
    batch = batch_of(np.arange(STEP_SEQUENCES), given, SETTINGS.batch_tokens)
    while True:
        state, loss = step(job, given, state, batch, np.float32(1e-3))
        yield loss


def selection(config: DecoderConfig, params: decoder.Params, fitted: Streams) -> Callable[[], Any]:
    """Returns a function that selects channels for as many layers as there are devices at most, in waves if needed."""
    wave, keep = mesh.data_size(), pruned_config(config, SETTINGS).intermediate
    search, key = layer.search_of(SETTINGS), jax.random.key(0)

    def read_layer(index: int) -> decoder.Params:
        return jax.tree.map(lambda a: a[index], params["layers"])

    of_waves = [
        waves.own_moments(range(first, first + wave), config, read_layer, fitted, layer.PhaseClock())
        for first in range(0, COUNTS[-1], wave)
    ]
    return lambda: [waves.own_choices(own, config, key, 0, keep, **search) for own in of_waves]


@app.command(show=False)
def serve(count: int) -> None:
    """Runs one computation for every line on standard input, and prints its name, wall-clock time and CPU time.

    Args:
        count: Number of devices.
    """
    with mesh.use_mesh(count):
        for name, compute in work(count):
            if not sys.stdin.readline():
                return
            start, busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(compute())
            print(name, time.perf_counter() - start, time.process_time() - busy, sep="\t", flush=True)


def started(count: int) -> subprocess.Popen[str]:
    """Starts a process that runs ``serve``."""
    threads = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count), "PJRT_NPROC": str(count)}
    command = [sys.executable, "-m", "benchmarks.parallel", "serve", str(count)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | threads)


def asked(process: subprocess.Popen[str]) -> tuple[str, Measured]:
    """Runs the next computation of a process and returns its name and times."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("\n")
        process.stdin.flush()
    name, *numbers = process.stdout.readline().split("\t")
    if not numbers:
        raise SystemExit(f"a process ended with exit code {process.wait()}; what it said is above.")
    return name, Measured(*map(float, numbers))


def measured(pairs: int) -> dict[str, list[tuple[Measured, ...]]]:
    """Returns the pairs of timings by name, taken in turns; the first pair of each compiles and is left out."""
    found: dict[str, list[tuple[Measured, ...]]] = {STATISTICS: [], SELECTION: [], JOINT_STEP: []}
    processes = [started(count) for count in COUNTS]
    try:
        for _ in range(len(found) * (pairs + 1)):
            (name, first), *others = [asked(process) for process in processes]
            found[name].append((first, *(other for _, other in others)))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {name: rows[1:] for name, rows in found.items()}


def efficiencies(pairs: list[tuple[Measured, ...]]) -> tuple[list[float], list[float]]:
    """Returns the wall-clock and the CPU efficiency of each pair."""
    by_clock = [pair[0].seconds * COUNTS[0] / (pair[-1].seconds * COUNTS[-1]) for pair in pairs]
    return by_clock, [pair[0].busy / pair[-1].busy for pair in pairs]


def counted_efficiency(name: str) -> float:
    """Returns the efficiency by operation counts, in which work that every device repeats is a loss."""

    def count(devices_: int) -> float:
        load = load_on(devices_)
        phase = {STATISTICS: "statistics", SELECTION: "selection", JOINT_STEP: "joint steps"}[name]
        return programs.work(load)[phase].operations / (load.joint_steps if name == JOINT_STEP else 1)

    return count(COUNTS[0]) / count(COUNTS[-1]) * COUNTS[0] / COUNTS[-1]


def show(found: dict[str, list[tuple[Measured, ...]]]) -> None:
    """Prints the medians."""
    table = Table(show_edge=False, pad_edge=False)
    columns = [f"{count} device{'s' * (count > 1)}, s" for count in COUNTS]
    for name in ("", *columns, "efficiency", "of pairs", "by processor", "by counting"):
        table.add_column(name, justify="right" if name else "left")
    for name, pairs in found.items():
        times = [f"{median(each.seconds for each in several):.3f}" for several in zip(*pairs, strict=True)]
        clock, processor = efficiencies(pairs)
        spread = f"{min(clock):.0%} to {max(clock):.0%}"
        shares = f"{median(clock):.0%}", spread, f"{median(processor):.0%}", f"{counted_efficiency(name):.0%}"
        table.add_row(name, *times, *shares)
    out.print(table)


@app.default
def main(*, pairs: int = 5) -> None:
    """Measures second moments of a layer, channel selection, and joint steps.

    Args:
        pairs: Number of runs of each on one device and on two; medians are shown.
    """
    out.print(
        f"LLaMA of {SIZE.layers} layers, d {SIZE.d}, f {SIZE.f}; {SIZE.sequences} sequences of {SIZE.length} tokens; "
        f"{os.cpu_count()} cores, shared with whatever else runs: compare within this run only"
    )
    show(measured(pairs))


if __name__ == "__main__":
    app()
