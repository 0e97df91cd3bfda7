"""Each experimental idea differs from ``spap prune`` only in the one thing that it changes."""

import functools

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spap_jax as spap
from benchmarks.quality import ideas
from benchmarks.quality.ideas import Metric
from benchmarks.quality.methods import idea_of, settings_of
from spap_jax.model import Source
from spap_jax.models import decoder
from spap_jax.pruning import layer as pruning_layer
from spap_jax.pruning import streams
from spap_jax.solver.alternating import Tokens

SETTINGS = spap.PruneSettings(rounds=1, steps=10, effort="low", step_tokens=128, batch_tokens=64, held_out=0.25)
TOKENS = np.random.default_rng(0).integers(0, 97, (16, 16)).astype(np.int32)


@functools.cache
def tiny(variant: str) -> spap.Model:
    config, params = hf_models.port(hf_models.hf_model(variant))
    return spap.Model(config, jax.tree.map(jnp.asarray, params), Source(variant, None, ""))


def pruned(variant: str, idea: str, **changes) -> spap.Model:
    return ideas.prune(tiny(variant), TOKENS, SETTINGS.replace(**changes), idea)


def assert_close(one, other) -> None:
    """The steps, as Adam's, enlarge rounding where gradients are small."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=3e-3), one, other)


def first_and_last(model: spap.Model) -> tuple[dict, dict]:
    return tuple(jax.tree.map(lambda a, at=at: np.asarray(a[at]), model.params["layers"]["mlp"]) for at in (0, -1))


@pytest.mark.parametrize(("variant", "passes"), [("llama", 1), ("opt_350m_like", 0)])
def test_without_an_idea_it_is_the_built_in_way(variant: str, passes: int):
    built_in = spap.prune(tiny(variant), TOKENS, settings=SETTINGS, joint_passes=passes).model
    found = pruned(variant, "", joint_passes=passes)
    assert found.config == built_in.config
    assert_close(found.params, built_in.params)


@pytest.mark.parametrize("idea", ["dense_target", "mixed_target"])
def test_other_targets_differ_behind_the_first_block_alone(idea: str):
    (first, last), (same, other) = first_and_last(pruned("llama", "")), first_and_last(pruned("llama", idea))
    assert_close(first, same)
    assert max(np.abs(last[name] - other[name]).max() for name in last) > 0.01


def test_targets_are_what_their_names_say():
    config = tiny("llama").config
    layer = jax.tree.map(lambda a: a[0], tiny("llama").params["layers"])
    rng = np.random.default_rng(1)
    dense, before = (jnp.asarray(rng.normal(size=(1, 2, 8, config.width)), jnp.float32) for _ in range(2))

    def target(idea: str) -> np.ndarray:
        part = streams.Streams(jnp.copy(dense), jnp.copy(before))
        return np.asarray(ideas.enter_mlp(config, layer, [part, jax.tree.map(jnp.copy, part)], idea)[0].target[0])

    added = decoder.block(config, layer, dense[0], method=streams.mlp_output)
    attended = decoder.block(config, layer, before[0], *streams.causal(before[0]), method=decoder.Block.attend)
    own, repairing = np.asarray(added), np.asarray(dense[0] + added - attended)
    np.testing.assert_allclose(target("dense_target"), own, atol=1e-4)
    np.testing.assert_allclose(target(""), repairing, atol=1e-4)
    np.testing.assert_allclose(target("mixed_target"), (own + repairing) / 2, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "opt_350m_like"])
def test_attention_is_refitted_by_least_squares(variant: str):
    config, params = tiny(variant).config, tiny(variant).params
    layer = jax.tree.map(lambda a: a[0], params["layers"])
    rng = np.random.default_rng(1)
    x, r = (jnp.asarray(rng.normal(size=(4, 8, 16, config.width)), jnp.float32) for _ in range(2))
    attention = ideas.with_attention_refitted(config, layer, Tokens(x, r), 1e-6)["attention"]
    heads = np.concatenate([np.asarray(decoder.block(config, layer, part, method=streams.attended)) for part in x])
    heads, wanted = heads.reshape(-1, heads.shape[-1]).astype(float), np.asarray(r - x, float).reshape(-1, config.width)
    if config.output_bias:
        heads = np.concatenate([heads, np.ones((len(heads), 1))], axis=1)
    solution = np.linalg.lstsq(heads, wanted)[0]
    got = np.asarray(attention["o"]).reshape(-1, config.width)
    np.testing.assert_allclose(got, solution[: len(got)], rtol=1e-2, atol=2e-3)
    if config.output_bias:
        np.testing.assert_allclose(attention["o_bias"], solution[-1], atol=2e-3)


def test_directions_count_by_the_gradient_there():
    config, params = tiny("llama").config, tiny("llama").params
    root, inverse = ideas.output_metrics(config, params, jnp.asarray(TOKENS))
    tokens = jnp.asarray(TOKENS)
    valid = jnp.ones(tokens.shape, bool)
    positions = decoder.token_positions(valid)

    def loss(stream: jax.Array, first: int) -> jax.Array:
        for index in range(first, config.layers):
            block = jax.tree.map(lambda a, index=index: a[index], params["layers"])
            stream = decoder.block(config, block, stream, positions, valid)
        logits = decoder.head(config, params, stream)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).sum()

    x = decoder.embed(config, params, tokens, positions, jnp.float32)
    first = jax.tree.map(lambda a: a[0], params["layers"])
    gradient = jax.grad(loss)(decoder.block(config, first, x, positions, valid), 1)
    moment = np.einsum("bti,btj->ij", gradient, gradient)
    expected = moment / np.trace(moment) * config.width + ideas.EVERY_DIRECTION * np.eye(config.width)
    np.testing.assert_allclose(root[0] @ root[0], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(root @ inverse, np.broadcast_to(np.eye(config.width), root.shape), atol=1e-3)


@pytest.mark.parametrize("variant", ["llama", "opt_350m_like"])
def test_weights_of_one_change_nothing_and_a_heavy_direction_fits_better(variant: str):
    config = tiny(variant).config
    layer = jax.tree.map(lambda a: a[0], tiny(variant).params["layers"])
    narrow = config.with_widths([config.intermediate * 7 // 10] * config.layers)
    x = np.random.default_rng(1).normal(size=(5, 4, 16, config.width)).astype(np.float32)
    r = jnp.asarray(x)
    full = jnp.stack([part + decoder.block(config, layer, part, method=streams.mlp_output) for part in r])
    fitted, judged = Tokens(r[:4], full[:4]), Tokens(r[4:], full[4:])

    def fit(metric: Metric) -> dict:
        return ideas.prune_weighted(0, config, narrow, layer, fitted, judged, SETTINGS, metric)["mlp"]

    def error(mlp: dict) -> np.ndarray:
        got = decoder.block(narrow, layer | {"mlp": mlp}, fitted.residual, method=streams.mlp_output)
        return np.square(np.asarray(fitted.target - got)).mean(axis=(0, 1, 2))

    eye = jnp.eye(config.width)
    plain = fit(Metric(eye, eye))
    built_in, _ = pruning_layer.prune_layer(
        0, config, narrow, layer, fitted, judged, SETTINGS, pruning_layer.PhaseClock()
    )
    assert_close(plain, built_in["mlp"])
    heavy = eye.at[3, 3].set(30.0)
    assert error(fit(Metric(heavy, jnp.linalg.inv(heavy))))[3] < 0.9 * error(plain)[3]


def test_how_an_idea_is_asked_for():
    asked = "spap, low effort with idea=weighted rounds=1"
    assert idea_of(asked) == "weighted"
    assert settings_of(asked, 0.2, 0) == spap.PruneSettings(sparsity=0.2, effort="low", rounds=1)
    assert idea_of("spap with rounds=1") is None
    with pytest.raises(spap.UserError, match="unknown idea 'luck'; the ideas are dense_target"):
        settings_of("spap with idea=luck", 0.2, 0)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("spap with sampled=1", "without sampled text"),
        ("spap, refit only", "with steps on the weights"),
        ("obs", "with steps on the weights"),
        ("spap with schedule=parallel", "with schedule=sequential alone"),
        ("spap with allocation=global", "with allocation=uniform alone"),
    ],
)
def test_what_an_idea_would_pass_over_is_refused_before_any_work(method: str, sentence: str):
    asked = method + (" idea=weighted" if " with " in method else " with idea=weighted")
    with pytest.raises(spap.UserError, match=sentence):
        settings_of(asked, 0.2, 0)
