"""The same result on one device and on several."""

import re

import jax
import numpy as np
import pruning_cases as cases
import pytest

from spap_jax import api, devices
from spap_jax.errors import UserError
from spap_jax.pruning import layer as layer_module
from spap_jax.pruning import moments, reduce, streams
from spap_jax.solver.alternating import Schedule, Tokens


@pytest.fixture(scope="module")
def alone():
    return run(1)


def run(count: int) -> api.PruneResult:
    settings = cases.SETTINGS.replace(sweeps=1, sweep_steps=5, batch_tokens=32, step_tokens=128)
    tokens = cases.random_tokens(sequences=64)
    return api.prune(cases.tiny("llama"), tokens, settings=settings, devices=count)


@pytest.mark.parametrize("count", [2, 8])
def test_the_number_of_devices_changes_nothing(alone: api.PruneResult, count: int):
    several = run(count)
    assert [r.kept for r in several.report.layers] == [r.kept for r in alone.report.layers]
    for one, other in zip(*(jax.tree.leaves(r.model.params) for r in (alone, several)), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-4)


@pytest.fixture
def mesh():
    with devices.sharing(8):
        yield


@pytest.fixture(scope="module")
def model():
    return cases.tiny("llama")


def spread_tokens(model, chunks: int = 16) -> Tokens:
    streams_ = streams.start(model.config, model.params, streams.chunked(cases.random_tokens(sequences=2 * chunks), 2))
    return Tokens(streams_.pruned, streams_.dense)


def collectives(compiled) -> list[str]:
    """The operations of a program that move data between devices."""
    return re.findall(
        r"= .*? ((?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*)\(", compiled.as_text()
    )


def test_chunks_lie_on_their_own_devices(mesh, model):
    tokens = spread_tokens(model)
    assert {shard.data.shape[0] for shard in tokens.residual.addressable_shards} == {2}
    tokens = spread_tokens(model, chunks=3)
    assert tokens.residual.is_fully_replicated


@pytest.mark.parametrize("accumulate", [moments.accumulate, moments.accumulate_attention])
def test_second_moments_are_reduced_once(mesh, model, accumulate):
    found = accumulate.lower(model.config, cases.one_layer(model, 0), spread_tokens(model)).compile()
    assert collectives(found) == ["all-reduce"]


@pytest.mark.parametrize("move", [streams.enter_mlp, streams.enter_attention, streams.leave_attention])
def test_streams_stay_apart(mesh, model, move):
    both = streams.start(model.config, model.params, streams.chunked(cases.random_tokens(sequences=32), 2))
    found = move.lower(model.config, cases.one_layer(model, 0), both).compile()
    assert collectives(found) == []


def test_steps_gather_no_stream(mesh, model):
    layer, tokens = cases.one_layer(model, 0), spread_tokens(model)
    schedule = Schedule(1, 3, 128, 0.1)
    arguments = (layer, reduce.to_weights(layer["mlp"]), tokens, tokens, 1e-4, jax.random.key(0))
    found = layer_module._recover.lower(model.config, schedule, *arguments).compile()
    assert set(collectives(found)) == {"reduce-scatter", "all-reduce"}


def test_too_many_devices_are_refused():
    with pytest.raises(UserError, match="9 devices are asked for, but JAX sees 8"):
        run(9)
