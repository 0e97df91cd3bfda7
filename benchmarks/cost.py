"""What pruning costs, beside the limits of the device: the solver, and a run on a random model.

The limits are measured in the same process, before and after: the rate of float32 matrix products at full precision and
the memory bandwidth. Times are compared with the least that the arithmetic needs at that rate, so that they mean the
same on any machine. `python -m benchmarks.cost --width 4096 --channels 14336` has the sizes of LLaMA-3.1-8B.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cyclopts import App

import spap_jax as spap
from benchmarks.shared import table
from spap_jax import memory, solver
from spap_jax.backend import peak_of_a_device
from spap_jax.models import cost, decoder, family_of
from spap_jax.models.model import Model, Source
from spap_jax.numerics import full_precision
from spap_jax.quantities import bytes_text
from spap_jax.settings import EffortName

app = App(name="cost", help=__doc__)


@app.default
def main(
    *,
    width: int = 576,
    channels: int = 1536,
    layers: int = 4,
    vocabulary: int = 8192,
    sequences: int = 32,
    sequence_length: int = 512,
    sparsity: float = 0.3,
    effort: EffortName = "default",
) -> None:
    """Measures the device, the solver and a run, and prints a table of each.

    Args:
        width: Width of the residual stream.
        channels: MLP channels of a layer.
        layers: Number of blocks of the random model.
        vocabulary: Number of tokens that it knows.
        sequences: Number of calibration sequences.
        sequence_length: Tokens in a sequence.
        sparsity: Fraction of channels to remove.
        effort: As in ``spap prune``.
    """
    size = min(channels, 4096)
    before = matmul_rate(size)
    print(f"{jax.devices()[0].device_kind}: {before / 1e9:.0f} GFLOP/s, {memory_rate(size) / 1e9:.1f} GB/s\n")
    solving = solver_seconds(width, channels, sparsity)
    model = random_model(width, channels, layers, vocabulary)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (sequences, sequence_length))
    settings = spap.PruneSettings(sparsity=sparsity, effort=effort)
    first, report = (spap.prune(model, tokens, settings=settings).report for _ in range(2))
    rate = (before + matmul_rate(size)) / 2
    product = 2 * channels**3 / rate
    lines = [[name, f"{spent:.3f}", f"{spent / product:.1f}"] for name, spent in solving.items()]
    print(table(("solver, one layer", "seconds", f"products of {channels} x {channels} matrices"), lines), "\n")
    least = {name: operations / rate for name, operations in counted(model, report.calibration, settings).items()}
    rows = []
    for phase, spent in report.seconds.items():
        known = phase in least
        bound = [f"{least[phase]:.2f}", f"{least[phase] / spent:.0%}"] if known else ["-", "-"]
        rows.append([phase, f"{first.seconds[phase]:.2f}", f"{spent:.2f}", *bound])
    rows.append(["all", *(f"{sum(run.seconds.values()):.2f}" for run in (first, report)), "-", "-"])
    print(table(("run, by phase", "first run, s", "second run, s", "at least, s", "of the device's rate"), rows))
    weights = 4 * cost.parameters(model.family, model.config).total
    peak = peak_of_a_device() or memory.peak()
    print(f"\npeak memory {bytes_text(peak)}, {peak / weights:.1f} times the model's weights")


def seconds_of(run: Callable[[], Any], repeats: int = 3) -> float:
    """Returns the median time of a call, after one that compiles it."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def matmul_rate(size: int) -> float:
    """Measures the operations per second of float32 matrix products at full precision."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    multiply = jax.jit(full_precision(lambda a: a @ a))
    return 2 * size**3 / seconds_of(lambda: multiply(a))


def memory_rate(size: int) -> float:
    """Measures the bytes per second of an addition, read and written together."""
    a = jnp.zeros((4, size, size))
    plus = jax.jit(lambda a: a + 1)
    return 2 * a.nbytes / seconds_of(lambda: plus(a))


def solver_seconds(width: int, channels: int, sparsity: float) -> dict[str, float]:
    """Times the steps of the solver on random channels, a part of which is redundant."""
    keys = jax.random.split(jax.random.key(0), 3)
    mix = jax.random.normal(keys[0], (channels // 4, channels)) / channels**0.5
    shared, own = (jax.random.normal(key, (4 * channels, n)) for key, n in zip(keys[:2], mix.shape, strict=True))
    hidden = jax.nn.relu(shared @ mix + own)
    weight = jax.random.normal(keys[2], (channels, width))
    gram = hidden.T @ hidden / len(hidden)
    solve = jax.jit(functools.partial(solver.solve, keep=round((1 - sparsity) * channels)))
    problem = solver.Problem(gram, gram @ weight, (weight * (gram @ weight)).sum(), weight)
    kept = solve(gram, problem.cross, weight).kept
    refit = jax.jit(lambda problem, kept: solver.refit(solver.equilibrate(problem, 1e-4), kept))
    return {
        "channels, swaps and weights": seconds_of(lambda: solve(gram, problem.cross, weight)),
        "weights alone": seconds_of(lambda: refit(problem, kept)),
    }


def random_model(width: int, channels: int, layers: int, vocabulary: int) -> Model:
    """Returns a LLaMA with random weights and heads of 64 features."""
    heads = max(1, width // 64)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "head_dim": width // heads,
        "intermediate_size": channels, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "vocab_size": vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float32",
    }  # fmt: skip
    found = family_of(config).read_config(config)
    return Model(found, decoder.init(found, jax.random.key(0)), Source("random", None, json.dumps(config)))


def counted(model: Model, read: Any, settings: spap.PruneSettings) -> dict[str, float]:
    """Returns the least operations of a run's phases: matrix products with weights, and the second moments."""
    config = model.config
    tokens = (read.sequences + read.further_sequences) * read.sequence_length
    mlp = 3 * config.width * config.intermediate
    attention = 2 * config.width * config.width * (1 + config.kv_heads / config.heads)
    kept = 1 - settings.channel_sparsity
    passes = 2 * tokens * config.layers
    return {
        "streams": passes * (2 * attention + (1 + kept) * mlp),
        "statistics": passes * config.intermediate * (config.intermediate / 2 + config.width),
    }


if __name__ == "__main__":
    app()
