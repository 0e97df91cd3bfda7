"""Pruning gives the same result on one device and on several."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pruning_cases as cases
import pytest
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

from spap_jax import api
from spap_jax.errors import UserError
from spap_jax.parallel import collectives, mesh, placement
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import layer as layer_module
from spap_jax.pruning import moments, predictions, reduce, streams
from spap_jax.solver.alternating import RoundSchedule, Tokens

SETTINGS = cases.SETTINGS.replace(sparsity=0.25, rounds=1, joint_passes=1, batch_tokens=32)
FIT = {"steps": 5, "joint_tokens": 128, "joint_rate": 1e-3}


@functools.cache
def run(count: int, sharers: int = 1, schedule: str = "sequential") -> api.PruneResult:
    passes = 1 if schedule == "sequential" else 0  # joint steps are the same after the parallel schedule
    settings = SETTINGS.replace(schedule=schedule, joint_passes=passes)
    tokens = cases.random_tokens(sequences=59) % 96  # 44 and 15 held out: eight devices need padding
    return cases.prune(cases.divisible(), tokens, settings, devices=count, model_devices=sharers, **FIT)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_the_mesh_changes_nothing(schedule: str):
    alone, several = run(1, 1, schedule), run(8, 2, schedule)
    assert alone.report.settings["schedule"] == schedule
    assert {"reading", "streams", "statistics", "selection", "refit"} <= alone.report.seconds.keys()
    assert [r.kept for r in several.report.layers] == [r.kept for r in alone.report.layers]
    assert [r.rounds for r in several.report.layers] == [r.rounds for r in alone.report.layers] == [1, 1]
    for one, other in zip(alone.report.layers, several.report.layers, strict=True):
        assert one.held_out is not None
        assert one.calibration.selection > one.calibration.refit >= one.calibration.alternating > 0
        for name in ("calibration", "held_out"):
            errors, others = (dataclasses.astuple(getattr(report, name)) for report in (one, other))
            np.testing.assert_allclose(others, errors, rtol=1e-3)
    losses, others = ([check.held_out for check in each.report.joint] for each in (alone, several))
    np.testing.assert_allclose(others, losses, rtol=1e-4)
    assert [r.taken for r in several.report.joint] == [r.taken for r in alone.report.joint]
    assert schedule == "parallel" or any(r.taken for r in alone.report.joint[1:])
    for one, other in zip(*(jax.tree.leaves(r.model.params) for r in (alone, several)), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=2e-4)


def test_the_result_is_divided_as_the_run_was():
    layers = run(8, 2).model.params["layers"]
    assert shares(layers["mlp"])["down"][0] == shares(layers["attention"])["o"][0] == 2
    assert layers["mlp"]["down"].addressable_data(0).nbytes == layers["mlp"]["down"].nbytes // 2


@pytest.fixture
def eight():
    with mesh.use_mesh(8):
        yield


@pytest.fixture
def two_by_four():
    with mesh.use_mesh(8, 4):
        yield


@pytest.fixture
def layer() -> dict:
    """The first layer of the random model, placed on the current mesh."""
    model = cases.divisible()
    return placement.shard_params(model.config, cases.one_layer(model, 0))


def shares(tree: dict) -> dict:
    """Return, by name, the number of shards of an array and the shape of one device's shard."""
    return {name: (len(set(map(str, a.sharding.devices_indices_map(a.shape).values()))), a.addressable_data(0).shape)
            for name, a in tree.items()}  # fmt: skip


def test_an_array_on_a_device_stays_when_that_of_the_host_changes():
    room = np.zeros(80, np.float32)
    aligned = room[-room.ctypes.data // 4 % 16 :][:64]  # so that JAX could share its memory
    found = mesh.put(aligned)
    aligned += 1
    assert not np.asarray(found).any()


def test_a_device_holds_its_share_of_the_weights(two_by_four, layer: dict):
    """Weights are sharded over four devices; what cannot be divided among them, or is small, is replicated."""
    config, params = cases.divisible().config, cases.divisible().params
    assert shares(layer["mlp"]) == {name: (4, shape) for name, shape in
                                    {"gate": (16, 16), "up": (16, 16), "down": (16, 16)}.items()}  # fmt: skip
    q, k = (4, (16, 2, 2)), (4, (16, 1, 2))
    assert shares(layer["attention"]) == {"q": q, "k": k, "v": k, "o": (4, (2, 2, 16))}
    assert shares(layer["mlp_norm"]) == {"scale": (1, (16,))}
    outer = placement.shard_params(config, {name: params[name] for name in ("embed", "head")})
    assert shares(outer["embed"])["tokens"] == shares({"weight": outer["head"]["weight"]})["weight"] == (4, (24, 16))
    whole = jax.tree.map(mesh.array_to_host, layer)
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(np.asarray, cases.one_layer(cases.divisible(), 0)))
    in_parts = [mesh.gathered(layer["mlp"]["up"], most) for most in (1, 3 * 16 * 4, 2**30)]  # of 1, 3 and 16 rows
    for gathered in in_parts:
        np.testing.assert_array_equal(gathered, whole["mlp"]["up"])
    with mesh.use_mesh(8, 8):
        assert shares(placement.shard_params(config, cases.one_layer(cases.divisible(), 0))["attention"])["k"] == (
            1, (16, 4, 2),
        )  # fmt: skip


def test_a_stack_of_blocks_is_divided_as_a_block(two_by_four, layer: dict):
    config = dataclasses.replace(cases.divisible().config, layers=3)
    room = placement.zeros_for_blocks(config, layer, placement.param_spec)
    assert shares(room["mlp"])["down"] == (4, (3, 16, 16))
    stack = predictions.set_layer(room, 1, layer)
    assert shares(stack["mlp"])["up"] == (4, (3, 16, 16))
    assert shares(stack["attention"])["q"] == (4, (3, 16, 2, 2))
    np.testing.assert_array_equal(np.asarray(stack["mlp"]["up"][1]), np.asarray(layer["mlp"]["up"]))


def test_no_device_holds_all_second_moments_while_they_are_summed(two_by_four, layer: dict):
    """The channels f of tokens [N, f] are gathered one chunk at a time; G [f, f] is never gathered."""
    compiled: Any
    config = cases.divisible().config.narrowed(256)
    wide = {name: jnp.zeros(shape) for name, shape in {"gate": (16, 256), "up": (16, 256), "down": (256, 16)}.items()}
    layer = placement.shard_params(config, layer | {"mlp": wide})
    tokens = jax.device_put(np.zeros((2, 2, 16, 16), np.float32), NamedSharding(get_mesh(), PartitionSpec("data")))
    compiled = moments.accumulate.lower(config, layer, Tokens(tokens, tokens)).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert "f32[64,256]" in text
    assert "f32[256,256]" not in text
    assert memory.output_size_in_bytes < 1.1 * 4 * (64 * 256 + 2 * 64 * 16 + 2 * 256)
    assert memory.temp_size_in_bytes < 4 * 256 * 256


@pytest.fixture(scope="module")
def model():
    return cases.tiny("llama")


def spread_tokens(model, chunks: int = 16) -> Tokens:
    streams_ = streams.start(model.config, model.params, chunked(cases.random_tokens(sequences=2 * chunks), 2))
    return streams.fitting_tokens(streams_)


def moves(compiled) -> list[str]:
    """Return the operations of a compiled program that move data between devices."""
    return re.findall(
        r"= .*? ((?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*)\(", compiled.as_text()
    )


def test_chunks_lie_on_their_own_devices(eight, model):
    tokens = spread_tokens(model)
    assert {shard.data.shape[0] for shard in tokens.residual.addressable_shards} == {2}
    tokens = spread_tokens(model, chunks=3)
    assert {shard.data.shape[0] for shard in tokens.residual.addressable_shards} == {1}
    assert tokens.real == 6 * 16


@pytest.mark.parametrize(
    ("accumulate", "divided"), [(moments.accumulate, []), (moments.accumulate_attention, ["reduce-scatter"] * 2)]
)
def test_second_moments_are_reduced_once(eight, model, accumulate, divided: list[str]):
    """Rows that eight devices can divide end divided: those of the heads' 32 channels, not those of the MLP's 53."""
    found = accumulate.lower(model.config, cases.one_layer(model, 0), spread_tokens(model)).compile()
    assert moves(found) == [*divided, "all-reduce"]


@pytest.mark.parametrize("move", [streams.enter_mlp, streams.enter_attention, streams.leave_attention])
def test_streams_stay_apart(eight, model, move):
    both = streams.start(model.config, model.params, chunked(cases.random_tokens(sequences=32), 2))
    found = move.lower(model.config, cases.one_layer(model, 0), both).compile()
    assert moves(found) == []


def test_steps_gather_no_stream(eight, model):
    layer, tokens = cases.one_layer(model, 0), spread_tokens(model)
    schedule = RoundSchedule(1, 3, 128, 0.1)
    arguments = (layer, reduce.to_weights(layer["mlp"]), (1.0, 1.0), (tokens, tokens), 1e-4, jax.random.key(0))
    found = layer_module._recover.lower((model.config, model.config), 0.5, schedule, *arguments).compile()
    assert set(moves(found)) == {"reduce-scatter", "all-reduce"}


@pytest.mark.parametrize("count", [16, 5])
def test_what_is_drawn_arrives_to_the_bit(eight, count: int):
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**16, (16, 2, 3))
    chunks = {dtype: numbers.astype(dtype) for dtype in ("float32", "uint16", "bool")}
    places = rng.integers(0, 16, count), rng.integers(0, 2, count)
    found = jax.jit(collectives.take_from_chunks)(
        jax.tree.map(mesh.shard_chunks, chunks), tuple(map(jnp.asarray, places))
    )
    jax.tree.map(lambda array, chunk: np.testing.assert_array_equal(array, chunk[places]), found, chunks)


def test_meshes_that_there_are_not_are_refused():
    with pytest.raises(UserError, match="9 devices are asked for, but JAX sees 8"):
        run(9)
    with pytest.raises(UserError, match="8 devices cannot be divided into groups of 3 that share the weights"):
        run(8, 3)


def test_every_process_takes_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # all devices here are those of the first
    with pytest.raises(UserError, match="4 devices are asked for, and only 1 of 2 processes have any of them"):
        run(4)
