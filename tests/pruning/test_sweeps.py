"""Sweeps bring the entire model's predictions closer to the dense model's, block by block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruning_cases import SETTINGS, one_layer, random_tokens, tiny

from spap_jax import api
from spap_jax.api import logits
from spap_jax.errors import UserError
from spap_jax.model import Model
from spap_jax.models import decoder
from spap_jax.pruning import pipeline, predictions, streams, sweeps
from spap_jax.pruning.report import LayerReport, SweepReport
from spap_jax.settings import EFFORTS, PruneSettings

SWEPT = SETTINGS.replace(rounds=0, sweeps=2, sweep_steps=20, sweep_learning_rate=0.01, step_tokens=1024)
"""With 512 sequences of random tokens the held-out divergence falls; 16 would be memorized."""


def divergence(dense: Model, other: Model, tokens: np.ndarray) -> float:
    """Compute the mean KL divergence in nats per token, from logits."""
    wanted, got = (np.asarray(logits(model, tokens), np.float64) for model in (dense, other))
    wanted, got = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (wanted, got))
    return float((np.exp(wanted) * (wanted - got)).sum(-1).mean())


@functools.cache
def swept(variant: str, **changes) -> api.PruneResult:
    return api.prune(tiny(variant), random_tokens(0, 512, 16), settings=SWEPT.replace(**changes))


@pytest.mark.parametrize("variant", ["llama", "opt_350m_like"])
def test_the_divergence_falls_and_is_the_one_reported(variant: str):
    model, held_out = tiny(variant), random_tokens(0, 512, 16)[384:]
    without, result = swept(variant, sweeps=0), swept(variant)
    steps = result.report.sweeps
    assert [(step.sweep, step.layer) for step in steps] == [(s, layer) for s in range(2) for layer in range(3)]
    assert steps[0].before == pytest.approx(divergence(model, without.model, held_out), rel=1e-3)
    reached = steps[0].before
    for step in steps:
        assert step.before == pytest.approx(reached, rel=1e-5)
        assert step.taken == (step.after < step.before)
        reached = step.after if step.taken else step.before
    assert divergence(model, result.model, held_out) == pytest.approx(reached, rel=1e-3)
    assert reached < 0.95 * steps[0].before
    assert result.report.layers[0].kept == without.report.layers[0].kept


def test_only_mlps_change():
    without, result = swept("llama", sweeps=0).model, swept("llama").model
    same = jax.tree.map(lambda a, b: bool((a == b).all()), without.params, result.params)
    assert not any(jax.tree.leaves(same["layers"].pop("mlp")))
    assert jax.tree.all(same)


@pytest.mark.parametrize("variant", ["llama", "opt_350m_like"])
def test_blocks_that_are_adjusted_together(variant: str):
    model, held_out, parts = tiny(variant), random_tokens(0, 512, 16)[384:], []
    settings = SWEPT.replace(sweeps=1, sweep_blocks=0)
    steps = pipeline.prune_layers(
        model.config, model.params, lambda i: one_layer(model, i), random_tokens(0, 512, 16), settings,
        watch=lambda *part: parts.append(part),
    )  # fmt: skip
    swept_steps = [step for step in steps if isinstance(step.report, SweepReport)]
    assert parts == [(0, 3), (1, 3), (2, 3)]
    assert [step.report.layer for step in swept_steps if step.final] == [0, 1, 2]
    first = swept_steps[0].report
    assert isinstance(first, SweepReport)
    assert {step.report.reached for step in swept_steps if isinstance(step.report, SweepReport)} == {first.after}
    layers = jax.tree.map(lambda *a: jnp.stack(a), *[step.layer for step in swept_steps])
    result = Model(pipeline.pruned_config(model.config, settings), model.params | {"layers": layers}, model.source)
    assert divergence(model, result, held_out) == pytest.approx(first.after, rel=1e-3)
    assert first.after < 0.95 * first.before
    in_turn = swept(variant, sweeps=1).report.sweeps
    assert first.before == pytest.approx(in_turn[0].before, rel=1e-5)


def test_a_step_suits_the_size_of_each_block():
    """Adam's first step is as large as its learning rate wherever there is a gradient."""
    model, tokens = tiny("llama"), random_tokens()[None]
    layers = jax.tree.map(
        lambda a: a * jnp.asarray([1, 8, 1], a.dtype).reshape(3, *[1] * (a.ndim - 1)), model.params["layers"]
    )
    stream = streams.embed(model.config, model.params, tokens)
    both = streams.Streams(jnp.copy(stream[..., ::-1]), stream)
    one = sweeps.Steps(3, 1, 16, 0.01)
    begin, descend = sweeps.programs(model.config, one, layers["mlp"])
    begun = begin(layers["mlp"], 0)
    start = jax.device_get(begun.mlps)
    ended = descend(model.params, layers, 0, both, jax.random.key(0), begun)
    assert ended.made == 1
    for name, old in start.items():
        size = np.sqrt(np.square(old).mean(axis=tuple(range(1, old.ndim))))
        found = np.quantile(np.abs(ended.mlps[name] - old).reshape(3, -1), 0.9, axis=1)
        np.testing.assert_allclose(found, 0.01 * size, rtol=0.05)


def test_steps_that_do_harm_are_not_taken():
    without, result = swept("llama", sweeps=0), swept("llama", sweeps=1, sweep_learning_rate=5.0)
    assert not any(step.taken for step in result.report.sweeps)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), without.model.params, result.model.params))


def test_the_tokens_that_were_fitted_judge_where_none_are_held_out():
    settings = SWEPT.replace(held_out=0.0, sweeps=1)
    tokens = random_tokens()
    result = api.prune(tiny("llama"), tokens, settings=settings)
    reached = min(result.report.sweeps[-1].before, result.report.sweeps[-1].after)
    assert divergence(tiny("llama"), result.model, tokens) == pytest.approx(reached, rel=1e-3)


def test_the_rest_of_a_model_is_its_blocks_one_after_the_other():
    model, tokens = tiny("llama"), random_tokens()
    x = decoder.embed(
        model.config, model.params, jnp.asarray(tokens), jnp.arange(16)[None] * jnp.ones((16, 1), int), jnp.float32
    )
    layers = model.params["layers"]
    others = jax.tree.map(lambda a: 0.9 * a[::-1], layers["mlp"])
    for first in range(3):
        for count in range(1, 4 - first):
            expected = x
            for index in range(first, 3):
                mlp = {"mlp": predictions.at(others, index - first)} if index < first + count else {}
                expected = predictions.apply(model.config, predictions.at(layers, index) | mlp, expected)
            found = predictions.rest(model.config, layers, first, predictions.some(others, 0, count), x)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_bfloat16_weights_stay_so_and_are_judged_as_they_are_written():
    model = tiny("llama")
    half = Model(model.config, jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params), model.source)
    tokens = random_tokens()
    result = api.prune(half, tokens, settings=SWEPT)
    assert {array.dtype for array in jax.tree.leaves(result.model.params)} == {jnp.dtype(jnp.bfloat16)}
    last = result.report.sweeps[-1]
    assert divergence(half, result.model, tokens[12:]) == pytest.approx(min(last.before, last.after), rel=1e-2)


def test_the_effort_means_what_is_not_set():
    assert [PruneSettings(effort=effort).decided for effort in EFFORTS] == [
        (0, 1, 150, 0),
        (1, 2, 150, 0),
        (1, 0, 300, 1),
    ]
    assert PruneSettings(effort="high", sweeps=2, sampled=0).decided == (2, 0, 300, 0)
    with pytest.raises(UserError, match="effort must be one of low, default, high, not 'full'; sweeps must be a whole"):
        PruneSettings(effort="full", sweeps=-1)  # type: ignore[arg-type]


def test_the_peers_own_updates_are_not_swept():
    told = []
    api.prune(tiny("llama"), random_tokens(), settings=SWEPT.replace(method="fasp"), progress=told.append)
    assert {type(report) for report in told} == {LayerReport}
    told.clear()
    api.prune(
        tiny("llama"), random_tokens(), settings=SWEPT.replace(method="fasp", update="alternate"), progress=told.append
    )
    assert {type(report) for report in told} == {LayerReport, SweepReport}
