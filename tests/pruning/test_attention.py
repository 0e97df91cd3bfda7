"""Pruning of key/value groups: the choice, the output projection and the smaller model, against float64 NumPy."""

import functools
from itertools import combinations
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruning_cases import SETTINGS, logits, one_layer, prune, random_tokens, tiny

from spap_jax import api
from spap_jax.errors import UserError
from spap_jax.models import decoder
from spap_jax.models.decoder import Block
from spap_jax.models.model import Model
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import moments, reduce, streams
from spap_jax.pruning.run import pruned_config
from spap_jax.report.schema import AttentionReport, Change
from spap_jax.solver.alternating import Tokens

HALF = SETTINGS.replace(attention_sparsity=0.5, update="refit", held_out=0.25)
FITTED = slice(0, 12)
VARIANTS = pytest.mark.parametrize("variant", ["qwen2_two_kv_heads", "llama_biases"])


through, attend, queries_keys_values = (
    jax.jit(functools.partial(decoder.block, method=method), static_argnums=0)
    for method in (Block.__call__, Block.attend, Block.queries_keys_values)
)


class Seen(NamedTuple):
    """One layer's attention before and after pruning, and its report.

    Attributes:
        channels: [N, m, w] outputs of the dense heads, in the groups that share a key/value head.
        target: [N, d] the dense stream after attention minus the pruned one before it.
    """

    dense: dict
    small: dict
    report: AttentionReport
    channels: np.ndarray
    target: np.ndarray

    @property
    def kept(self) -> list[int]:
        return [*self.report.kept]

    def of(self, groups) -> np.ndarray:
        return self.channels[:, list(groups)].reshape(len(self.channels), -1)

    def rows(self, groups) -> np.ndarray:
        """Return the dense output projection of some groups, [.., d]."""
        whole = self.dense["o"].reshape(self.channels.shape[1], -1, self.target.shape[1])
        return whole[list(groups)].reshape(-1, self.target.shape[1])


@functools.cache
def run(variant: str, **changes) -> api.PruneResult:
    return prune(tiny(variant), random_tokens(), settings=HALF.replace(**changes))


def attended64(config, layer: dict, x: jax.Array) -> np.ndarray:
    """Compute the outputs of the heads, separated by group: x [B, T, d] -> [N, m, w]."""
    positions, _ = streams.causal(x)
    pieces = queries_keys_values(config, layer, x, positions)
    q, k, v = (np.asarray(piece, np.float64) for piece in pieces)
    heads = []
    for j in range(config.heads):
        g = j * config.kv_heads // config.heads
        scores = np.einsum("bth,bsh->bts", q[:, :, j], k[:, g]) / np.sqrt(config.head_dim)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads.append(np.einsum("bts,bsh->bth", weights / weights.sum(axis=-1, keepdims=True), v[:, g]))
    return np.stack(heads, axis=2).reshape(x.shape[0] * x.shape[1], config.kv_heads, -1)


def layers_of(variant: str, result: api.PruneResult, part: slice = FITTED) -> list[Seen]:
    """Return every layer with its input from the pruned layers before it, for a part of the sequences."""
    model, found = tiny(variant), []
    dense = pruned = streams.start(model.config, model.params, chunked(random_tokens()[part], 16)).dense[0]
    for index, report in enumerate(result.report.layers):
        assert report.attention is not None
        whole, small = one_layer(model, index), one_layer(result.model, index)
        after = attend(model.config, whole, dense, *streams.causal(dense))
        target = np.asarray(after, np.float64) - np.asarray(pruned, np.float64)
        channels = attended64(model.config, whole, pruned)
        before, after = (
            {name: np.asarray(array, np.float64) for name, array in layer["attention"].items()}
            for layer in (whole, small)
        )
        found.append(Seen(before, after, report.attention, channels, target.reshape(len(channels), -1)))
        dense = through(model.config, whole, dense, *streams.causal(dense))
        pruned = through(result.model.config, small, pruned, *streams.causal(pruned))
    return found


def refitted(seen: Seen, groups, ridge: float) -> tuple[np.ndarray, float]:
    """Return the best output projection of some groups and its ridged squared error, without the target's mean."""
    bias = "o_bias" in seen.dense
    h, y = seen.of(range(seen.channels.shape[1])), seen.target
    h, y = (h - h.mean(0), y - y.mean(0)) if bias else (h, y)
    energy = (h**2).sum(0).reshape(seen.channels.shape[1:])[list(groups)].reshape(-1)
    h = h.reshape(seen.channels.shape)[:, list(groups)].reshape(len(h), -1)
    pull = np.diag(np.sqrt(ridge * energy))
    rows, right = np.vstack([h, pull]), np.vstack([y, pull @ seen.rows(groups)])
    best = np.linalg.lstsq(rows, right)[0]
    removed = [g for g in range(seen.channels.shape[1]) if g not in groups]
    lost = seen.of(removed) - (seen.of(removed).mean(0) if bias else 0)
    pulled = ridge * ((lost**2).sum(0)[:, None] * seen.rows(removed) ** 2).sum()
    return best, ((right - rows @ best) ** 2).sum() + pulled


@VARIANTS
def test_moments_are_those_of_float64(variant: str):
    model = tiny(variant)
    layer, rng = one_layer(model, 1), np.random.default_rng(1)
    x, total = (jnp.asarray(rng.normal(size=(3, 4, 16, 32)) + 0.5, jnp.float32) for _ in range(2))
    found = moments.accumulate_attention(model.config, layer, Tokens(x, total))
    h = np.concatenate([attended64(model.config, layer, chunk).reshape(64, -1) for chunk in x])
    y = np.asarray(total - x, np.float64).reshape(192, 32)
    means, variance = (h.mean(0), y.mean(0)), h.var(0)
    assert model.config.output_bias == ("bias" in variant)
    if model.config.output_bias:
        h, y = h - h.mean(0), y - y.mean(0)
    weight = np.asarray(layer["attention"]["o"]).reshape(-1, 32)
    expected = (h.T @ h / 192, h.T @ y / 192, (y**2).sum() / 192, weight)
    for ours, array in zip((*found.problem, *found[1:]), (*expected, *means, variance), strict=True):
        np.testing.assert_allclose(ours, array, rtol=0, atol=3e-6 * max(1, np.abs(array).max()))


@VARIANTS
def test_the_best_groups_stay_and_their_projection_solves_least_squares(variant: str):
    m = tiny(variant).config.kv_heads
    for seen in layers_of(variant, run(variant)):
        ridge = seen.report.ridge
        errors = {groups: refitted(seen, groups, ridge)[1] for groups in combinations(range(m), m // 2)}
        assert errors[tuple(seen.kept)] == pytest.approx(min(errors.values()), rel=1e-3)
        assert seen.report.improving_swaps == 0
        expected = refitted(seen, seen.kept, ridge)[0]
        found = seen.small["o"].reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
        if "o_bias" in seen.dense:
            constant = seen.target.mean(0) - seen.of(seen.kept).mean(0) @ found
            np.testing.assert_allclose(seen.small["o_bias"], constant, rtol=0, atol=1e-4 * np.abs(constant).max())


@VARIANTS
def test_the_errors_are_those_of_the_weights(variant: str):
    for part in (FITTED, slice(12, 16)):
        for seen in layers_of(variant, run(variant), part):
            told = seen.report.calibration if part == FITTED else seen.report.held_out
            assert told is not None
            for o, bias, said in (
                (seen.rows(seen.kept), seen.dense.get("o_bias", 0), told.selection),
                (seen.small["o"].reshape(-1, 32), seen.small.get("o_bias", 0), told.refit),
            ):
                wrong = seen.target - seen.of(seen.kept) @ o - bias
                assert said == pytest.approx((wrong**2).sum() / (seen.target**2).sum(), rel=1e-3)
            assert told.refit == told.alternating
            assert part != FITTED or told.selection > told.refit


@VARIANTS
def test_taking_groups_is_silencing_the_others(variant: str):
    model = tiny(variant)
    kept = [1] if model.config.kv_heads == 2 else [0, 3]
    take = functools.partial(reduce.take_groups, model.family, kept=jnp.asarray(kept))
    layers = [one_layer(model, index) for index in range(model.config.layers)]
    layers = [layer | {"attention": take(attention=layer["attention"])} for layer in layers]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    narrow = Model(model.config.with_kv_heads(len(kept)), model.params | {"layers": stacked}, model.source)
    attention = model.params["layers"]["attention"]
    o = attention["o"].reshape(3, model.config.kv_heads, -1, 8, 32)
    o = jnp.zeros_like(o).at[:, kept].set(o[:, kept]).reshape(attention["o"].shape)
    layers = model.params["layers"] | {"attention": attention | {"o": o}}
    silenced = Model(model.config, model.params | {"layers": layers}, model.source)
    expected = logits(silenced, random_tokens())
    assert np.abs(expected - logits(model, random_tokens())).max() > 0.1
    np.testing.assert_allclose(logits(narrow, random_tokens()), expected, rtol=0, atol=1e-4)


def test_dead_groups_are_lost_and_nothing_else():
    model = tiny("qwen2")
    attention = dict(model.params["layers"]["attention"])
    for layer, dead in enumerate(([0, 1], [1, 3], [0, 2])):  # their heads output zeros
        attention["v"] = attention["v"].at[layer, :, dead].set(0)
        attention["v_bias"] = attention["v_bias"].at[layer, dead].set(0)
    layers = model.params["layers"] | {"attention": attention}
    model = Model(model.config, model.params | {"layers": layers}, model.source)
    result = prune(model, random_tokens(), settings=HALF)
    kept = [layer.attention.kept for layer in result.report.layers if layer.attention]
    assert kept == [(2, 3), (0, 2), (1, 3)]
    first = result.report.layers[0].attention
    assert first is not None
    assert first.calibration.selection < 1e-9


def test_the_report_counts_what_is_left():
    result = run("qwen2")
    told = result.report.model
    assert told.heads == told.kv_heads == Change(4, 2)
    assert result.model.config.head_dim == 8
    assert told.parameters.after == sum(array.size for array in jax.tree.leaves(result.model.params))


REFUSED = [
    ("opt_125m_like", 0.5, "square"),
    ("llama_one_kv_head", 0.5, "keeps all of them"),
    ("llama", 0.25, "3 does not"),
]


@pytest.mark.parametrize(("variant", "sparsity", "sentence"), REFUSED)
def test_refusals(variant: str, sparsity: float, sentence: str):
    with pytest.raises(UserError, match=sentence):
        prune(tiny(variant), random_tokens(), settings=HALF, attention_sparsity=sparsity)


@pytest.mark.parametrize(
    ("variant", "sparsity", "kept"),
    [("qwen2", 0.3, 3), ("llama", 0.4, 2), ("qwen2_two_kv_heads", 0.9, 1)],
)
def test_kept_heads(variant: str, sparsity: float, kept: int):
    config = tiny(variant).config
    narrow = pruned_config(config, HALF.replace(attention_sparsity=sparsity))
    assert (narrow.kv_heads, narrow.heads) == (kept, kept * config.heads // config.kv_heads)
    assert narrow.head_dim == config.head_dim
    assert pruned_config(config, SETTINGS) == config.narrowed(37)
