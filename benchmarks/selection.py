"""Channel selection alone: the refitted error of every layer by each method, at 10, 30 and 50 %.

``python -m benchmarks.selection [--model DIR --data FILE]`` works on the dense stream, so that all methods see the same
second moments. The reference is one-at-a-time OBS elimination; Wanda-sp and FLAP select by a score alone.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import cyclopts
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import spap_jax as spap
from spap_jax.numerics import full_precision
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import moments, streams
from spap_jax.pruning.moments import Moments
from spap_jax.solver.methods import Search, SelectorInputs, select_channels
from spap_jax.solver.problem import equilibrate, refit, relative_error

METHODS = ("spap", "obs", "osscar", "wanda", "flap")
SPARSITIES = (0.1, 0.3, 0.5)


@dataclass(frozen=True)
class Row:
    """Relative errors of one layer at one sparsity, by method, and the improving swaps left after our polish."""

    layer: int
    sparsity: float
    errors: dict[str, float]
    improving: int


@functools.partial(jax.jit, static_argnames=("method", "keep"))
@full_precision
def refitted(method: str, keep: int, seen: Moments) -> tuple[jax.Array, jax.Array]:
    """Returns the refitted relative error of a method's selection, and the number of swaps that would improve it."""
    settings = spap.PruneSettings()
    system = equilibrate(seen.problem, settings.fit.ridge)
    layer = SelectorInputs(seen.problem, system, seen.hidden_mean, seen.variance, jax.random.key(settings.seed))
    chosen = select_channels(method, layer, keep, Search())
    return relative_error(seen.problem, chosen.kept, refit(system, chosen.kept)), chosen.improving


def compare(model: spap.Model, tokens: np.ndarray, sparsities: tuple[float, ...] = SPARSITIES) -> Iterator[Row]:
    """Yields a row for every layer and sparsity. tokens: [B, T]."""
    config = model.config
    chunk = streams.largest_divisor(len(tokens), max(1, 4096 // tokens.shape[1]))
    both = streams.start(config, model.params, chunked(tokens, chunk))
    for index in range(config.layers):
        layer = jax.tree.map(lambda array, index=index: jnp.asarray(array[index]), model.params["layers"])
        both = streams.enter_mlp(config, layer, both)
        seen = moments.accumulate(config, layer, streams.fitting_tokens(both))
        for sparsity in sparsities:
            keep = round((1 - sparsity) * config.intermediate)
            found = {method: refitted(method, keep, seen) for method in METHODS}
            errors = {method: float(error) for method, (error, _) in found.items()}
            yield Row(index, sparsity, errors, int(found["spap"][1]))
        both = streams.leave_mlp(config, layer, both)


def main(
    model: str = "examples/llama-stories",
    data: str = "examples/stories_calibration.txt",
    sequences: int = 128,
    sequence_length: int = 256,
) -> None:
    """Prints the table.

    Args:
        model: Checkpoint folder.
        data: Text or token file.
        sequences: Number of calibration sequences.
        sequence_length: Tokens per sequence.
    """
    loaded = spap.load(model)
    blocks = spap.load_tokens(data, tokenizer=model, sequence_length=sequence_length, sequences=sequences,
                              role="calibration")  # fmt: skip
    table = Table("layer", "cut", *METHODS, "spap/obs", "swaps left", title=model)
    worst = -1.0
    for row in compare(loaded, blocks.tokens):
        ratio = row.errors["spap"] / row.errors["obs"] - 1 if row.errors["obs"] else 0.0
        worst = max(worst, ratio)
        table.add_row(str(row.layer), f"{row.sparsity:.0%}", *(f"{row.errors[m]:.5f}" for m in METHODS),
                      f"{ratio:+.3%}", str(row.improving))  # fmt: skip
    console = Console(width=100)
    console.print(table)
    console.print(f"worst layer against OBS: {worst:+.3%}")


if __name__ == "__main__":
    cyclopts.run(main)
