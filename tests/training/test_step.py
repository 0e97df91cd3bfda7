"""What XLA makes of a step on eight devices: an eighth of the work each, and nowhere the weights of all blocks."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from spap_jax.models import decoder, loss
from spap_jax.models.registry import family_of
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import fully_shard_params
from spap_jax.parallel.sequences import Sequences
from spap_jax.training import lora
from spap_jax.training.loop import rows_of
from spap_jax.training.optimizers import clipped, rates, relative
from spap_jax.training.step import Frozen, Job, Recipe, State, begin, measure, step

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIG = family_of(LLAMA).read_config(LLAMA)
SEQUENCES, LENGTH = 8, 32
RATE, WHOLE_GRADIENT = np.float32(1e-3), np.float32(1)
WHOLE = ["3,64,1024", "3,1024,64", "3,64,4,16", "3,4,16,64", "3,64,2,16"]
"""Shapes of the weights of all blocks."""


def whole_weights(compiled: Any) -> list[str]:
    """Return which shapes of `WHOLE` occur in a compiled program."""
    return [shape for shape in WHOLE if re.search(rf"\[{shape}\]", compiled.as_text())]


@functools.cache
def model() -> Any:
    return jax.device_get(jax.jit(lambda key: decoder.init(CONFIG, key))(jax.random.key(0)))


def started(what: str) -> tuple[Job, Frozen, Sequences, State, Any]:
    """Return the arguments of a step that moves MLPs, low-rank updates or all weights."""
    params, recipe = fully_shard_params(CONFIG, model()), Recipe(clipped, (0.0,))
    rng = np.random.default_rng(0)
    tokens = mesh.shard_chunks(rng.integers(0, 256, (SEQUENCES, 1, LENGTH)).astype(np.int32))
    teacher, frozen, target = params, params, None
    if what == "mlp":
        moved, recipe = {"layers": {"mlp": params["layers"]["mlp"]}}, Recipe(relative, ())
        teacher, target = None, mesh.shard_chunks(rng.normal(size=(SEQUENCES, 1, LENGTH, 64)).astype(np.float32))
    elif what == "updates":
        moved = fully_shard_params(
            CONFIG, {"updates": jax.jit(lora.start, static_argnums=1)(model()["layers"], 4, jax.random.key(0))}
        )
    else:
        moved, frozen = params, {}
    job = Job(CONFIG, recipe, "float32", teacher=CONFIG if teacher else None)
    sequences = Sequences(tokens, SEQUENCES, target=target)
    rows = rows_of(np.arange(SEQUENCES), sequences, LENGTH * SEQUENCES)
    return job, Frozen(frozen, teacher), sequences, begin(job, moved), rows


@pytest.mark.parametrize("what", ["mlp", "all"])
def test_eight_devices_share_a_step(what: str):
    compiled, after = [], []
    for count in (1, 8):
        with mesh.use_mesh(count):
            arguments = started(what)
            compiled.append(step.lower(*arguments, RATE).compile())
            after.append(jax.device_get(step(*arguments, RATE)))
    alone, shared = compiled
    assert shared.cost_analysis()["flops"] < alone.cost_analysis()["flops"] / 7
    for one, other in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)  # Adam's first step, of noise as well
    assert not whole_weights(shared)
    assert whole_weights(alone)
    held = [sizes.memory_analysis().argument_size_in_bytes for sizes in compiled]
    assert held[1] < held[0] / 7


def test_a_measurement_gathers_a_block_at_a_time():
    with mesh.use_mesh(8):
        job, frozen, sequences, state, rows = started("all")
        assert not whole_weights(measure.lower(job, frozen, sequences, state.moved, rows).compile())


def test_the_gradient_of_the_head_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch):
    """Over groups of tokens, of which there are many, and with the gradient of the embedding, which the head is."""
    monkeypatch.setattr(loss, "CPU_HEAD_TOKENS", 1)
    config = dataclasses.replace(CONFIG, tied=True)
    with mesh.use_mesh(1):
        params = fully_shard_params(config, jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0)))
        tokens = np.random.default_rng(0).integers(0, 256, (SEQUENCES, 1, LENGTH)).astype(np.int32)
        tokens[..., ::2] = 7
        sequences = Sequences(tokens, SEQUENCES).sharded()
        rows = rows_of(np.arange(SEQUENCES), sequences, LENGTH * SEQUENCES)
        found = []
        for dtype in ("float32", "bfloat16"):
            job = Job(config, Recipe(optax.sgd, (1.0,)), dtype)
            after, _ = step(job, Frozen({}), sequences, begin(job, params), rows, WHOLE_GRADIENT)
            found.append(np.asarray(params["embed"]["tokens"] - after.moved["embed"]["tokens"]))
    assert np.linalg.norm(found[1] - found[0]) < 0.006 * np.linalg.norm(found[0])


def test_a_measurement_converts_a_block_at_a_time():
    """A CPU's compiler would convert all of a bfloat16 stack before the loop over the blocks."""
    job, _, sequences, state, rows = started("all")
    stored = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state.moved)
    text: Any = measure.lower(job._replace(teacher=None), Frozen({}), sequences, stored, rows).compile().as_text()
    assert "u16[3,64,1024]" in text
    assert "f32[3,64,1024]" not in text


def test_moments_are_replaced_in_place():
    """A second array for each would take as much memory as the weights that move."""
    job, frozen, sequences, before, rows = started("mlp")
    job = job._replace(recipe=Recipe(relative, ("bfloat16",)))
    state = begin(job, before.moved)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.optimizer)} == {jnp.dtype("bfloat16"), jnp.dtype("int32")}
    text: Any = step.lower(job, frozen, sequences, state, rows, RATE).compile().as_text()
    assert "bf16[3,64,1024]" in text
    assert not re.findall(r"= bf16\[3,[^=]* copy\(", text)


def test_it_is_adam():
    rng = np.random.default_rng(0)
    weights, *gradients = ({"a": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)} for _ in range(4))
    ours = optax.chain(clipped(0.1), optax.scale(-1e-3))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
    found = []
    for optimizer in (ours, theirs):
        now: Any = weights
        updated = jax.jit(optimizer.update)
        state = optimizer.init(weights)
        for gradient in gradients:
            update, state = updated(gradient, state, now)
            now = optax.apply_updates(now, update)
        found.append(now["a"] - weights["a"])
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-7)
    assert np.abs(found[0]).max() > 1e-4


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield all equations of a program."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def equations_of_step(what: str, sequences: int, name: str) -> list[Any]:
    """Return the equations of one primitive in a step on a number of sequences."""
    job, frozen, read, state, _ = started(what)
    rows = rows_of(np.arange(sequences), read, sequences * LENGTH)
    program = jax.make_jaxpr(step, static_argnums=0)(job, frozen, read, state, rows, RATE)
    return [each for each in equations(program.jaxpr) if each.primitive.name == name]


def test_logits_and_scales_are_summed_without_an_axis_of_length_1():
    """With one for the only device, or the only sequence, XLA's sums on CPUs take ten to thirty times as long."""
    found = {each.invars[0].aval.shape for each in equations_of_step("all", 1, "reduce_sum")}
    assert {(LENGTH, 256), (LENGTH, 64)} <= found
    assert (1, LENGTH, 256) not in found


@pytest.mark.parametrize("what", ["all", "mlp", "updates"])
def test_products_sum_over_tokens_or_queries_on_a_single_axis(what: str):
    """XLA's products on CPUs that sum over sequences and tokens, or heads and queries, take up to twice as long."""
    found = equations_of_step(what, 2, "dot_general")
    given = [(each.invars[0].aval.shape, each.params["dimension_numbers"][0][0]) for each in found]
    summed = [tuple(shape[axis] for axis in axes) for shape, axes in given]
    assert {(2 * LENGTH,), (1024,)} <= set(summed)
    assert {sizes for sizes in summed if len(sizes) > 1} <= {(4, 16), (2, 16)}  # the heads of a projection


def test_passes_change_nothing():
    """Also where sequences fill up a pass: of five, a device has three at a time, and each of two devices three."""
    found = []
    for count, most, shape in ((1, 8, (1, 5)), (1, 4, (2, 3)), (2, 1, (3, 2))):
        with mesh.use_mesh(count):
            job, frozen, sequences, state, _ = started("mlp")
            rows = rows_of(np.arange(5), sequences, most * LENGTH)
            assert rows.shape == shape
            assert (rows >= 0).sum() == 5
            found.append(jax.device_get(step(job, frozen, sequences, state, rows, RATE)))
    for one, *others in zip(*map(jax.tree.leaves, found), strict=True):
        for other in others:
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def test_a_step_suits_the_size_of_each_block():
    """Adam's first step is as large as its learning rate wherever there is a gradient."""
    scale = jnp.asarray([1.0, 8.0, 1.0])
    with mesh.use_mesh(1):
        job, frozen, sequences, state, rows = started("mlp")
        moved = jax.tree.map(lambda a: a * scale.reshape(3, *[1] * (a.ndim - 1)), state.moved)
        before = jax.device_get(moved)
        after, _ = step(job, frozen, sequences, begin(job, moved), rows, RATE)
    for name, old in before["layers"]["mlp"].items():
        size = np.sqrt(np.square(old).mean(axis=(1, 2)))
        new = np.asarray(after.moved["layers"]["mlp"][name])
        found = np.quantile(np.abs(new - old).reshape(3, -1), 0.98, axis=1)
        np.testing.assert_allclose(found, RATE * size, rtol=0.05)


def test_steps_grow_at_first_and_then_fall_linearly():
    expected = [0.25, 0.5, 0.75, *(1 - np.arange(27) / 27)]
    np.testing.assert_allclose(rates(0.02, 30), 0.02 * np.asarray(expected), rtol=1e-6)
    np.testing.assert_allclose(rates(0.02, 1), [0.02], rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_step_suits_each_scale_of_a_norm(shift: float):
    """One that is stored less a shift moves relative to what is used."""
    used = jnp.asarray([[0.01, 0.1, 1.0, 50.0]] * 3)
    weights: Any = {
        "mlp_norm": {"scale": used - shift},
        "mlp": {"up": jnp.ones((3, 4, 4)), "up_bias": jnp.zeros((3, 4))},
    }
    optimizer = relative(norm_shift=shift)
    update: Any = optimizer.update(jax.tree.map(jnp.ones_like, weights), optimizer.init(weights), weights)[0]
    np.testing.assert_allclose(update["mlp_norm"]["scale"], used, rtol=1e-3)
    np.testing.assert_allclose(update["mlp"]["up"], np.ones((3, 4, 4)), rtol=1e-3)
    np.testing.assert_allclose(update["mlp"]["up_bias"], np.full((3, 4), 1e-3), rtol=1e-3)
