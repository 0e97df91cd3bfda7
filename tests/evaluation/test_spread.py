"""Perplexity, generation and speed on several devices: the result of one, and a share of the work and the weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DIVISIBLE

from spap_jax import api
from spap_jax.backend import traced_for
from spap_jax.errors import UserError
from spap_jax.evaluation.generation import generate
from spap_jax.evaluation.perplexity import compare, negative_log_likelihood, perplexity
from spap_jax.evaluation.sequences import continuations
from spap_jax.evaluation.speed import arithmetic, time_generation
from spap_jax.models import decoder
from spap_jax.models.model import Model, Source
from spap_jax.models.registry import family_of
from spap_jax.parallel import mesh as meshes
from spap_jax.parallel.placement import bytes_of, place_params, shard_params
from spap_jax.report.schema import GenerationWorkload

THEIRS = DIVISIBLE | {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3}
TOKENS = np.random.default_rng(0).integers(0, 96, (11, 64), np.int32)
MESHES = [(8, 2), (4, 4)]


@functools.cache
def model() -> Model:
    config = family_of(THEIRS).read_config(THEIRS)
    params = jax.tree.map(
        lambda a: 4 * a, jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
    )  # far from equal probabilities
    return Model(config, params, Source("test", None, "{}"))


@pytest.mark.parametrize(("count", "sharers"), MESHES)
def test_the_mesh_changes_no_measure(count: int, sharers: int):
    """Eleven windows cannot be divided evenly among the devices: the rest of the last batch does not count."""
    alone, told = perplexity(model(), TOKENS, batch_tokens=192), []
    mesh = {"devices": count, "model_devices": sharers}
    assert api.perplexity(model(), TOKENS, 64, **mesh) == pytest.approx(alone, rel=1e-5)
    with meshes.use_mesh(count, sharers):
        measured = perplexity(model(), TOKENS, 64, lambda *so_far: told.append(so_far))
    assert measured == pytest.approx(alone, rel=1e-5)
    groups = count // sharers
    assert told == [(done, 11) for done in (*range(0, 11, groups), 11)]
    other = model().replace(params=jax.tree.map(lambda a: 0.9 * a, model().params))
    with meshes.use_mesh(count, sharers):
        spread = compare(model(), other, TOKENS, 64)
    np.testing.assert_allclose(spread, compare(model(), other, TOKENS), rtol=1e-5)


def test_a_device_has_its_share_of_the_work_and_of_the_weights():
    def analysed(count: int, sharers: int) -> tuple[float, int]:
        with meshes.use_mesh(count, sharers):
            params: Any = shard_params(model().config, model().params)
            groups = meshes.data_size()
            batch = meshes.shard_chunks(np.resize(TOKENS, (groups, 8 // groups, 16)))  # one piece for the head
            counts = meshes.shard_chunks(np.ones((*batch.shape[:2], 15), bool))
            compiled: Any = negative_log_likelihood.lower(model().config, params, batch, counts).compile()
            return compiled.cost_analysis()["flops"], compiled.memory_analysis().argument_size_in_bytes

    (work, weights), (eighth, _), (_, quarter) = analysed(1, 1), analysed(8, 1), analysed(8, 4)
    assert eighth < work / 7
    assert quarter < 0.3 * weights


def test_groups_whose_texts_end_at_different_steps_take_the_same_turns():
    prompts, ends = TOKENS[:4, :8], tuple(range(0, 96, 12))
    alone = generate(model(), prompts, 24, eos=ends, pad=0)
    lengths = [np.isin(row, ends).argmax() if np.isin(row, ends).any() else 24 for row in alone[:, 8:]]
    assert max(lengths[:2]) != max(lengths[2:])
    with meshes.use_mesh(4, 2):
        np.testing.assert_array_equal(generate(model(), prompts, 24, eos=ends, pad=0), alone)


def test_tasks_run_where_the_weights_are_shared():
    def written(placed: Model) -> dict[int, list[int]]:
        prompts = [row[:9].tolist() for row in TOKENS]
        parts = continuations(placed, prompts, 40, lambda _: False, 64)
        return {number: text for part in parts for number, text in part.items()}

    alone = written(model())
    with meshes.use_mesh(8, 4):
        shared = model().replace(params=shard_params(model().config, model().params))
        assert shared.params["layers"]["mlp"]["up"].addressable_shards[0].data.shape == (3, 32, 32)
        found = written(shared)
    assert found == alone


def test_speed_is_measured_on_a_mesh():
    work = GenerationWorkload(batch=2, prompt=8, new=2, repeats=1)
    with meshes.use_mesh(8, 4):
        (speed,) = time_generation([model()], work)
        with pytest.raises(UserError, match="batch of 3 cannot be divided evenly among 2 devices"):
            time_generation([model()], GenerationWorkload(batch=3, prompt=8, new=2, repeats=1))
    assert len(speed.decode) == 1


def test_the_cache_that_decoding_reads_is_of_the_type_of_the_weights():
    half = model().replace(params=jax.tree.map(lambda array: array.astype(jnp.bfloat16), model().params))
    work = GenerationWorkload(batch=2, prompt=8, new=2, repeats=1)
    with traced_for("gpu"):
        _, fewer = arithmetic(half, work)
        [speed] = time_generation([half], work)
    assert len(speed.prefill) == 1
    cached = 2 * 2 * (8 + 2) * half.config.layers * half.config.kv_heads * half.config.head_dim
    assert arithmetic(half, work)[1] - fewer == 2 * cached


def test_the_layout_for_speed_is_shared():
    with meshes.use_mesh(4, 4):
        _, params = decoder.unstacked(model().config, model().params, shard_params)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert held < 0.3 * bytes_of(params)


def test_as_many_devices_share_the_weights_as_they_need():
    assert meshes.smallest_model_size(60, 100, 8) == 1
    assert meshes.smallest_model_size(140, 100, 8) == 2
    assert meshes.smallest_model_size(141, 100, 6) == 3
    assert meshes.smallest_model_size(10**6, 100, 8) == 8
    assert meshes.smallest_model_size(10**6, None, 8) == 1
    params = place_params(model().config, model().params, 4, 4)
    assert params["embed"]["tokens"].addressable_shards[0].data.shape == (24, 32)
    with meshes.use_mesh(1):
        alone = shard_params(model().config, params)
    assert all(len(array.devices()) == 1 for array in jax.tree.leaves(alone))
