"""Weight updates of one layer: Adam on minibatches, as built in, against L-BFGS and Gauss-Newton-CG on all tokens.

``python -m benchmarks.updates [--model DIR --data FILE]``: in each layer on the dense stream, channels are selected and
the output projection is solved for as in ``spap prune``; from there each method minimizes the same objective and ends
with the same closed form. Held-out sequences evaluate all methods but guide only the first, which is used unchanged.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import cyclopts
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.sparse.linalg import cg
from rich.console import Console
from rich.progress import track
from rich.table import Table

import spap_jax as spap
from spap_jax.models import FAMILIES, DecoderConfig, Params
from spap_jax.numerics import full_precision
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import moments, reduce, streams
from spap_jax.pruning.layer import choose_channels, hidden_channels, refit_weights, search_of
from spap_jax.solver import alternating
from spap_jax.solver.alternating import MlpFunctions, RoundSchedule, Tokens, Weights

SETTINGS = spap.PruneSettings(rounds=2)

STEPS = 200
"""Optimizer steps in a round."""

Descent = Callable[[MlpFunctions, Weights, Tokens, Tokens], Weights]


@dataclass(frozen=True)
class Row:
    """Relative errors of one layer on held-out and on calibration tokens, and CPU seconds, by method."""

    layer: int
    held_out: dict[str, float]
    calibration: dict[str, float]
    seconds: dict[str, float]


def adam(mlp: MlpFunctions, weights: Weights, calibration: Tokens, held_out: Tokens) -> Weights:
    """Runs the alternating rounds of ``spap prune``."""
    schedule = RoundSchedule(SETTINGS.rounds, STEPS, SETTINGS.step_tokens, SETTINGS.learning_rate)
    key = jax.random.key(SETTINGS.seed)
    own, other = (alternating.relative_error(mlp, weights, tokens) for tokens in (calibration, held_out))
    return alternating.recover(
        mlp, weights, (own, other), calibration, held_out, schedule, SETTINGS.fit.ridge, key
    ).weights


def lbfgs(mlp: MlpFunctions, weights: Weights, calibration: Tokens, held_out: Tokens, iterations: int) -> Weights:
    """Runs L-BFGS with its line search on all weights and all tokens."""
    unit, start = relative(weights)

    def loss(u: Any) -> jax.Array:
        return alternating.relative_error(mlp, unit(u), calibration)

    optimizer, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        u, state = carry
        value, grad = value_and_grad(u, state=state)
        change, state = optimizer.update(grad, state, u, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(u, change), state), None

    (u, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=iterations)
    return alternating.closed_form(mlp, unit(u), calibration, SETTINGS.fit.ridge).weights


def gauss_newton(
    mlp: MlpFunctions, weights: Weights, calibration: Tokens, held_out: Tokens, iterations: int, inner: int
) -> Weights:
    """Runs Levenberg-Marquardt: ``inner`` CG iterations solve for each step, which is kept if the error decreases."""
    unit, start = relative(weights)
    power = jnp.square(calibration.target).sum()

    def loss(u: Any) -> jax.Array:
        return alternating.relative_error(mlp, unit(u), calibration)

    def curvature(u: Any, v: Any) -> Any:
        def add(total: Any, chunk: Tokens) -> tuple[Any, None]:
            def out(u: Any) -> jax.Array:
                return alternating.output(mlp.hidden, unit(u), chunk.residual)

            pushed, pull = jax.jvp(out, (u,), (v,))[1], jax.vjp(out, u)[1]
            return jax.tree.map(jnp.add, total, pull(pushed)[0]), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, v), calibration)
        return jax.tree.map(lambda t: 2 * t / power, total)

    def step(carry: tuple[Any, jax.Array, jax.Array], _: None) -> tuple[tuple[Any, jax.Array, jax.Array], None]:
        u, best, damping = carry

        def system(v: Any) -> Any:
            return jax.tree.map(lambda c, v: c + damping * v, curvature(u, v), v)

        change, _ = cg(system, jax.tree.map(jnp.negative, jax.grad(loss)(u)), maxiter=inner)
        tried = jax.tree.map(jnp.add, u, change)
        now = loss(tried)
        better = now < best
        u = jax.tree.map(lambda new, old: jnp.where(better, new, old), tried, u)
        return (u, jnp.where(better, now, best), damping * jnp.where(better, 1 / 3, 4)), None

    (u, _, _), _ = jax.lax.scan(step, (start, loss(start), jnp.float32(1e-5)), length=iterations)
    return alternating.closed_form(mlp, unit(u), calibration, SETTINGS.fit.ridge).weights


def relative(weights: Weights) -> tuple[Callable[[Any], Weights], Any]:
    """Returns a map from weight changes, in units of each array's RMS, to weights, and a zero change to start from."""
    size = jax.tree.map(lambda w: jnp.sqrt(jnp.square(w).mean()) + 1e-12, weights)
    start = jax.tree.map(jnp.zeros_like, weights)
    return lambda u: cast(Weights, jax.tree.map(lambda w, s, u: w + s * u, weights, size, u)), start


WAYS: dict[str, Descent] = {
    "adam": adam,
    "l-bfgs 20": functools.partial(lbfgs, iterations=20),
    "l-bfgs 60": functools.partial(lbfgs, iterations=60),
    "gauss-newton 5 x 5": functools.partial(gauss_newton, iterations=5, inner=5),
    "gauss-newton 8 x 20": functools.partial(gauss_newton, iterations=8, inner=20),
}


@functools.partial(jax.jit, static_argnames=("config", "way"))
@full_precision
def descended(
    config: DecoderConfig, way: str, layer: Params, weights: Weights, calibration: Tokens, held_out: Tokens
) -> tuple[jax.Array, jax.Array]:
    """Returns the relative errors after one method's descent, on held-out and on calibration tokens."""
    mlp = MlpFunctions(functools.partial(hidden_channels, config, layer))
    done = weights if way == "refit" else WAYS[way](mlp, weights, calibration, held_out)
    error = functools.partial(alternating.relative_error, mlp, done)
    return error(held_out), error(calibration)


def compare(model: spap.Model, tokens: np.ndarray, sparsity: float, held_out: int) -> Iterator[Row]:
    """Yields a row for every layer. tokens: [B, T], of which the last ``held_out`` sequences are for evaluation."""
    config = model.config
    keep = reduce.kept_width(config.intermediate, sparsity, 1)
    narrow = config.with_widths([keep] * config.layers)
    parts = [chunked(part, streams.largest_divisor(len(part), max(1, 4096 // tokens.shape[1])))
             for part in (tokens[:-held_out], tokens[-held_out:])]  # fmt: skip
    both = [streams.start(config, model.params, part) for part in parts]
    for index in range(config.layers):
        layer = jax.tree.map(lambda array, index=index: jnp.asarray(array[index]), model.params["layers"])
        both = [streams.enter_mlp(config, layer, each) for each in both]
        fitted, judged = (streams.fitting_tokens(each) for each in both)
        seen = moments.accumulate(config, layer, fitted)
        choice = choose_channels(seen, jax.random.key(index), keep, **search_of(SETTINGS))
        kept = choice.channels.kept
        taken = reduce.to_weights(reduce.take_channels(FAMILIES[config.family], layer["mlp"], kept))
        weights = refit_weights(seen, choice.ridge, kept, taken)
        errors, seconds = {}, {}
        for way in ("refit", *WAYS):
            args = narrow, way, layer, weights, fitted, judged
            compiled = descended.lower(*args).compile()
            start = time.process_time()
            errors[way] = [float(error) for error in compiled(*args[2:])]
            seconds[way] = time.process_time() - start
        held, own = ({way: each[which] for way, each in errors.items()} for which in (0, 1))
        yield Row(index, held, own, seconds)
        both = [streams.leave_mlp(config, layer, each) for each in both]


def main(
    model: str = "examples/llama-stories",
    data: str = "examples/stories_calibration.txt",
    sparsity: float = 0.3,
    sequences: int = 256,
    held_out: int = 32,
    sequence_length: int = 256,
) -> None:
    """Prints the table.

    Args:
        model: Checkpoint folder.
        data: Text or token file.
        sparsity: Fraction of channels to remove.
        sequences: Number of sequences to fit.
        held_out: Number of held-out sequences for evaluation.
        sequence_length: Tokens per sequence.
    """
    loaded = spap.load(model)
    blocks = spap.load_tokens(data, tokenizer=model, sequence_length=sequence_length,
                              sequences=sequences + held_out, role="calibration")  # fmt: skip
    table = Table("layer", "refit", *WAYS, title=f"{model}, {sparsity:.0%}: held-out error of refit's (calibration's)")
    rows, console = [], Console(width=120)
    found = compare(loaded, blocks.tokens, sparsity, held_out)
    for row in track(found, "layers", total=loaded.config.layers, console=console, transient=True):
        rows.append(row)
        table.add_row(str(row.layer), f"{row.held_out['refit']:.5f}", *(cell(row, way) for way in WAYS))
    medians = (statistics.median(row.held_out[way] / row.held_out["refit"] for row in rows) for way in WAYS)
    table.add_section()
    table.add_row("median", "", *(f"{ratio:.3f}" for ratio in medians))
    table.add_row("core s", "", *(f"{sum(row.seconds[way] for row in rows):.0f}" for way in WAYS))
    console.print(table)


def cell(row: Row, way: str) -> str:
    """Formats a method's two errors, as fractions of the refit's."""
    held, own = (errors[way] / errors["refit"] for errors in (row.held_out, row.calibration))
    return f"{held:.3f} ({own:.3f})"


if __name__ == "__main__":
    cyclopts.run(main)
