"""The objective's gradient, which is computed in its forward pass, is that of the plain formula."""

import functools
from collections.abc import Callable
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spap_jax.models import decoder, loss
from spap_jax.models.loss import Predictor, Target, compare, loss_sum

SHAPE = (3, 7)


@pytest.fixture(autouse=True, scope="module")
def several_turns_and_padding():
    """Make a turn of the loop so short that several are needed, and the last one is filled up."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loss, "CPU_HEAD_TOKENS", 4)
        yield


def plainly(own: Predictor, last: jax.Array, tokens: jax.Array, weights: jax.Array, target: Target | None) -> jax.Array:
    mine = jax.nn.log_softmax(decoder.head(own.config, own.params, last))
    if target is None:
        return -(weights * at(tokens, mine)).sum()
    theirs = jax.nn.log_softmax(decoder.head(target.teacher.config, target.teacher.params, target.stream))
    divergence, share = (jnp.exp(theirs) * (theirs - mine)).sum(axis=-1), target.text_weight
    return (weights * ((1 - share) * divergence + share * at(tokens, theirs - mine))).sum()


def at(tokens: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]


def arguments(variant: str, text_weight: float | None = None) -> tuple[Any, Any, jax.Array, jax.Array, jax.Array, Any]:
    (config, params), rng = hf_models.port(hf_models.hf_model(variant)), np.random.default_rng(0)
    outer = {name: params[name] for name in ("embed", "head")}
    last, other = (jnp.asarray(rng.normal(size=(*SHAPE, config.width)), jnp.float32) for _ in range(2))
    other_outer = jax.tree.map(lambda a: 1.1 * a, outer)
    next_token = jnp.asarray(rng.integers(0, config.vocabulary, SHAPE))
    target = None if text_weight is None else Target(Predictor(config, other_outer), other, text_weight)
    weights = jnp.asarray(rng.choice([0.0, 0.5, 1.0], size=SHAPE), jnp.float32)
    return config, outer, last, next_token, weights, target


@pytest.mark.parametrize(
    ("variant", "text_weight", "moving"),
    [
        ("llama_two_kv_heads", 0.0, ("last",)),
        ("llama_two_kv_heads", 0.3, ("last", "outer")),
        ("opt_350m_like", 1.0, ("last", "outer")),
        ("opt_350m_like", None, ("last", "outer")),
    ],
    ids=["divergence", "both", "rise", "next token"],
)
def test_sum_and_gradient(variant: str, text_weight: float | None, moving: tuple[str, ...]):
    config, outer, last, *fixed = arguments(variant, text_weight)

    def of(function: Callable[..., jax.Array], moved: dict[str, Any]) -> jax.Array:
        now = {"last": last, "outer": outer} | moved
        return 3 * function(Predictor(config, now["outer"]), now["last"], *fixed)

    moved = {"last": last, "outer": outer}
    given = {name: moved[name] for name in moving}
    found, expected = (jax.jit(jax.value_and_grad(functools.partial(of, f)))(given) for f in (loss_sum, plainly))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_nothing_is_lost_against_the_same_predictions():
    config, outer, last, tokens, weights, _ = arguments("llama_two_kv_heads")
    own = Predictor(config, outer)
    assert loss_sum(own, last, tokens, weights, Target(own, last, 0.3)) == 0
    value, gradient = jax.value_and_grad(lambda x: loss_sum(own, x, tokens, weights, Target(own, last)))(last)
    assert value == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_a_comparison_has_the_sums_of_all_that_is_measured():
    config, outer, last, tokens, weights, target = arguments("opt_350m_like", 0.3)
    own, counts = Predictor(config, outer), weights > 0
    found = compare(own, last, tokens, counts, target)
    mine, theirs = (
        np.asarray(jax.nn.log_softmax(decoder.head(config, who.params, stream)))[counts]
        for who, stream in ((own, last), (target.teacher, target.stream))
    )
    following = np.asarray(tokens)[counts][:, None]
    np.testing.assert_allclose(found.loss, -np.take_along_axis(mine, following, 1).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.teacher_loss, -np.take_along_axis(theirs, following, 1).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.divergence, (np.exp(theirs) * (theirs - mine)).sum(), rtol=1e-4)
    assert found.agreement == (mine.argmax(-1) == theirs.argmax(-1)).sum()
    share = target.text_weight
    objective = (1 - share) * found.divergence + share * (found.loss - found.teacher_loss)
    np.testing.assert_allclose(loss_sum(own, last, tokens, counts, target), objective, rtol=1e-5)
