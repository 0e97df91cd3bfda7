"""What a pruned MLP is fitted to: its dense output, and a share of what earlier blocks broke."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruning_cases import one_layer, random_tokens, tiny

from spap_jax.models import decoder
from spap_jax.models.decoder import Block
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import moments, streams
from spap_jax.pruning.target import aim
from spap_jax.solver.alternating import Tokens


def damaged(variant: str, by: float = 1.0) -> tuple[Any, Any, Tokens]:
    """Returns a config, its second block, and the tokens of this block after damage to the stream before it."""
    model = tiny(variant)
    layer, config = one_layer(model, 1), model.config.of_layer(1)
    both = streams.start(config, model.params, chunked(random_tokens(1, 4, 16), 4))
    noise = by * jax.random.normal(jax.random.key(0), both.pruned.shape)
    after = streams.enter_mlp(config, layer, both._replace(pruned=both.pruned + noise))
    return config, layer, streams.fitting_tokens(after)


def test_a_share_of_what_is_missing_is_added_to_the_dense_output():
    config, layer, seen = damaged("llama")
    own = decoder.block(config, layer, seen.residual, method=streams.mlp_output)
    np.testing.assert_allclose(aim(config, layer, 0.25, seen), 0.75 * own + 0.25 * seen.target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["gemma3", "olmo2"])
def test_before_a_norm_errors_are_repaired_as_far_as_that_changes_the_output_little(variant: str):
    config, layer, seen = damaged(variant)
    scale = np.linspace(-0.5, 3, config.width)  # also near 0
    stored = layer["mlp_output_norm"]["scale"]
    norm = functools.partial(decoder.block, config, method=Block.mlp_addition)
    by_ones = (np.asarray(norm(layer, jnp.ones(config.width))) - stored).round(5)  # 1 if it is the distance from 1
    layer = layer | {"mlp_output_norm": {"scale": jnp.asarray(scale - by_ones, jnp.float32)}}
    flat = seen.flat()
    assert flat.output is not None
    output = np.asarray(flat.output, np.float64)
    errors = np.asarray(flat.total - norm(layer, flat.output) - flat.residual, np.float64)
    for correction in (0.0, 0.25, 0.9):
        added = []
        for row, error in zip(output, errors, strict=True):
            pull = np.sqrt((1 - correction) * (error**2).mean())
            system = np.concatenate([correction**0.5 * np.diag(scale), pull * np.eye(len(scale))])
            wanted = np.concatenate([correction**0.5 * error, 0 * error])
            added.append(np.sqrt((row**2).mean()) * np.linalg.lstsq(system, wanted, rcond=None)[0])
        found, expected = aim(config, layer, correction, flat), output + np.array(added)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(aim(config, layer, 1.0, flat), flat.output)


def test_before_a_norm_it_repairs_small_damage():
    config, layer, seen = damaged("gemma3", by=1e-3)
    norm = functools.partial(decoder.block, config, layer, method=Block.mlp_addition)

    def lost(output: jax.Array) -> float:
        return float(jnp.square(seen.total - norm(output) - seen.residual).sum())

    assert lost(aim(config, layer, 0.5, seen)) < 0.5 * lost(seen.target)


def test_the_moments_before_a_norm_are_those_of_this_target():
    config, layer, seen = damaged("gemma3")
    found = moments.accumulate(config, layer, seen, 0.5)
    flat = seen.flat()
    hidden = decoder.block(config, layer, flat.residual, method=streams.mlp_hidden)
    h, y = (flat.weighted(rows) for rows in (hidden, aim(config, layer, 0.5, flat)))
    np.testing.assert_allclose(found.problem.cross, h.T @ y / len(h), rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.problem.target_power, jnp.square(y).sum() / len(y), rtol=1e-4)
