"""Residual streams match the decoder's, and every calibration sequence is either fitted on or held out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pruning_cases import logits, one_layer, random_tokens, tiny

from spap_jax.models import decoder
from spap_jax.numerics import in_float32
from spap_jax.parallel import mesh
from spap_jax.parallel.sequences import chunked, division
from spap_jax.pruning import streams
from spap_jax.pruning.run import resolve
from spap_jax.settings import PruneSettings


@pytest.mark.parametrize("variant", ["llama", "opt_125m_like", "opt_350m_like", "gemma3"])
def test_the_streams_of_an_unpruned_model_are_those_of_the_decoder(variant: str):
    model, tokens = tiny(variant), random_tokens(1, 6, 16)
    both = streams.start(model.config, model.params, chunked(tokens, 2))
    for index in range(model.config.layers):
        layer, config = one_layer(model, index), model.config.of_layer(index)
        both = streams.enter_mlp(config, layer, both)
        seen = streams.fitting_tokens(both)
        added = decoder.block(config, layer, seen.residual, method=streams.mlp_output)
        np.testing.assert_allclose(seen.target, added, rtol=0, atol=2e-5)
        both = streams.leave_mlp(config, layer, both)
    assert both.dense.shape == (3, 2, 16, 32)
    np.testing.assert_allclose(both.dense, both.pruned, rtol=0, atol=1e-5)
    for stream in (both.dense, both.pruned):
        found = decoder.head(model.config, model.params, stream.reshape(6, 16, 32))
        np.testing.assert_allclose(found, logits(model, tokens), rtol=0, atol=1e-4)


def test_the_target_repairs_what_earlier_blocks_broke():
    """The target is the dense sum minus the pruned stream, not the dense MLP's output on the pruned stream."""
    model = tiny("opt_350m_like")
    layer = one_layer(model, 0)
    both = streams.start(model.config, model.params, chunked(random_tokens(1, 4, 16), 4))
    damaged = streams.Streams(both.dense, both.pruned + 0.1)
    dense, pruned = (np.asarray(a) for a in (both.dense, damaged.pruned))
    after = streams.enter_mlp(model.config, layer, damaged)
    positions = jnp.broadcast_to(jnp.arange(16)[None, :], (4, 16))
    valid = jnp.ones((4, 16), bool)
    attend = decoder.Block.attend
    halves = [decoder.block(model.config, layer, x[0], positions, valid, method=attend) for x in (dense, pruned)]
    full = halves[0] + decoder.block(model.config, layer, halves[0], method=streams.mlp_output)
    seen = streams.fitting_tokens(after)
    np.testing.assert_allclose(seen.residual, halves[1][None], rtol=0, atol=1e-5)
    np.testing.assert_allclose(seen.target, (full - halves[1])[None], rtol=0, atol=1e-5)
    # With the target added, the pruned stream equals the dense one at the end of the block.
    ended = decoder.block(model.config, layer, seen.residual + seen.target, method=decoder.Block.finish)
    expected = streams.leave_mlp(model.config, layer, after).dense
    np.testing.assert_allclose(ended, expected, rtol=0, atol=1e-5)


def test_before_a_norm_the_target_is_the_dense_output_and_all_tokens_count_alike():
    model = tiny("gemma3")
    layer, config = one_layer(model, 1), model.config.of_layer(1)
    start = streams.start(config, model.params, chunked(random_tokens(1, 4, 16), 4))
    damaged = start._replace(pruned=start.pruned + jax.random.normal(jax.random.key(0), start.pruned.shape))
    dense, pruned = (np.asarray(stream)[0] for stream in damaged[:2])
    piece, where = functools.partial(decoder.block, config, layer), streams.causal(dense)
    heads = piece(dense, *where, method=decoder.Block.attended)
    attended = heads.reshape(64, -1) @ layer["attention"]["o"].reshape(-1, 32)
    half = jax.tree.map(jnp.copy, damaged)
    seen = streams.fitting_tokens(streams.enter_attention(config, layer, half))
    np.testing.assert_allclose(seen.target.reshape(64, 32), attended, rtol=0, atol=1e-4)

    after = streams.enter_mlp(config, layer, damaged)
    seen = streams.fitting_tokens(after).flat()
    rest = piece(pruned, *where, method=decoder.Block.attend)
    full = piece(piece(dense, *where, method=decoder.Block.attend), method=streams.mlp_output)
    full = np.asarray(full).reshape(64, 32)
    np.testing.assert_allclose(seen.residual, rest.reshape(64, 32), rtol=0, atol=1e-4)
    np.testing.assert_allclose(seen.target, full, rtol=0, atol=1e-4)
    size = np.sqrt((full**2).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(seen.weighted(seen.target), full / size, rtol=0, atol=1e-4)
    end = streams.leave_mlp(config, layer, after)
    for stream, before in ((end.dense, dense), (end.pruned, pruned)):
        np.testing.assert_allclose(stream[0], piece(before, *where), rtol=0, atol=1e-4)


def test_no_tokens_pass_through():
    model = tiny("llama")
    empty = streams.start(model.config, model.params, chunked(random_tokens()[:0], 1))
    layer = one_layer(model, 0)
    empty = streams.leave_mlp(model.config, layer, streams.enter_mlp(model.config, layer, empty))
    assert jax.tree.map(jnp.shape, empty) == ((0, 1, 16, 32), (0, 1, 16, 32), None, None)


counts, most = st.integers(1, 400), st.integers(1, 300)


@hypothesis_settings(max_examples=30, deadline=None)
@given(counts, most, st.integers(1, 70))
def test_a_division_needs_little_padding(count: int, most: int, shares: int):
    chunks, size = division(count, most, shares)
    own = -(-count // shares)
    assert min(most, own) / 2 <= size <= min(most, own)
    assert chunks % shares == 0
    assert own <= chunks // shares * size < own + size
    padding = [-own % other for other in range(max(1, own // 2), own + 1) if own / 2 <= other <= most]
    assert chunks // shares * size - own <= min(padding, default=size)


@pytest.mark.parametrize("number", [1, 2, 8])
def test_every_sequence_is_fitted_or_held_out_on_any_number_of_devices(number: int):
    """64 devices once held out half of 128 sequences, where 8 are asked for."""
    tokens, settings = random_tokens(sequences=29), PruneSettings(held_out=0.25, batch_tokens=64, joint_passes=0)
    with mesh.use_mesh(number):
        run = resolve(tiny("llama").config, tokens, settings)
        parts = run.fitted, run.held_out
        masks = [1 if part.counted is None else np.asarray(part.counted) for part in parts]
    found = [part.tokens[np.broadcast_to(mask > 0, part.tokens.shape)] for part, mask in zip(parts, masks, strict=True)]
    np.testing.assert_array_equal(found[0].reshape(-1, 16), tokens[:22])
    np.testing.assert_array_equal(found[1].reshape(-1, 16), tokens[22:])


def test_a_stream_is_rounded_to_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)), jnp.float32)
    np.testing.assert_array_equal(in_float32(streams.rounded(x)), x.astype(jnp.bfloat16).astype(jnp.float32))
