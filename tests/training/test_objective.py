"""The objective's gradient, which is computed in its forward pass, is that of the plain formula."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import tiny

from spap_jax.models import decoder
from spap_jax.training import objective
from spap_jax.training.objective import Predictor, Wanted, loss_sum

SHAPE = (3, 7)


@pytest.fixture(autouse=True, scope="module")
def several_turns_and_padding():
    """Make a turn of the loop so short that several are needed, and the last one is filled up."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(objective, "CPU_HEAD_TOKENS", 4)
        yield


def plainly(own: Predictor, last: jax.Array, target: Any, weights: jax.Array) -> jax.Array:
    mine = jax.nn.log_softmax(decoder.head(own.config, own.outer, last))
    if isinstance(target, Wanted):
        theirs = jax.nn.log_softmax(decoder.head(target.predictor.config, target.predictor.outer, target.stream))
        return (weights * (jnp.exp(theirs) * (theirs - mine)).sum(axis=-1)).sum()
    return -(weights * jnp.take_along_axis(mine, target[..., None], axis=-1)[..., 0]).sum()


def arguments(variant: str, divergence: bool) -> tuple[Any, Any, jax.Array, Any, jax.Array]:
    model, rng = tiny(variant), np.random.default_rng(0)
    config, outer = model.config, {name: model.params[name] for name in ("embed", "head")}
    last, other = (jnp.asarray(rng.normal(size=(*SHAPE, config.width)), jnp.float32) for _ in range(2))
    other_outer = jax.tree.map(lambda a: 1.1 * a, outer)
    next_token = jnp.asarray(rng.integers(0, config.vocabulary, SHAPE))
    target = Wanted(Predictor(config, other_outer), other) if divergence else next_token
    weights = jnp.asarray(rng.choice([0.0, 0.5, 1.0], size=SHAPE), jnp.float32)
    return config, outer, last, target, weights


@pytest.mark.parametrize("divergence", [True, False], ids=["divergence", "next token"])
@pytest.mark.parametrize("variant", ["llama_two_kv_heads", "opt_350m_like"])
@pytest.mark.parametrize("moving", [("last",), ("last", "outer")], ids=["stream", "stream and head"])
def test_sum_and_gradient(variant: str, divergence: bool, moving: tuple[str, ...]):
    config, outer, last, target, weights = arguments(variant, divergence)

    def of(function: Callable[..., jax.Array], moved: dict[str, Any]) -> jax.Array:
        now = {"last": last, "outer": outer} | moved
        return 3 * function(Predictor(config, now["outer"]), now["last"], target, weights)

    moved = {"last": last, "outer": outer}
    given = {name: moved[name] for name in moving}
    found, expected = (jax.jit(jax.value_and_grad(functools.partial(of, f)))(given) for f in (loss_sum, plainly))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_no_divergence_from_the_same_predictions():
    config, outer, last, _, weights = arguments("llama_two_kv_heads", divergence=True)
    own = Predictor(config, outer)
    value, gradient = jax.value_and_grad(lambda x: loss_sum(own, x, Wanted(own, last), weights))(last)
    assert value == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
