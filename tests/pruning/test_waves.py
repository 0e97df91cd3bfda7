"""Parallel schedule: channels are chosen on the dense stream; each group of devices solves a layer of its own."""

import functools
import math
import re
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pruning_cases as cases
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

from spap_jax import api
from spap_jax.parallel import collectives, mesh
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import layer as layer_module
from spap_jax.pruning import streams, waves
from spap_jax.pruning.moments import Moments
from spap_jax.settings import Method, Update
from spap_jax.solver.problem import Problem
from spap_jax.solver.tableau import PANEL

LAYERS = 3
PARALLEL = cases.SETTINGS.replace(schedule="parallel", held_out=0.0, batch_tokens=256)
BOTH = pytest.mark.parametrize("variant", ["llama", "opt_125m_like"])


@functools.cache
def dense(variant: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return what transformers computes in every layer: hidden channels [N, f] and the MLP's output [N, d]."""
    model = hf_models.hf_model(variant)
    layers = model.model.decoder.layers if variant.startswith("opt") else model.model.layers
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in layers:
        down = layer.fc2 if variant.startswith("opt") else layer.mlp.down_proj
        down.register_forward_hook(lambda _, x, y: found.append((float64(x[0]), float64(y))))
    hf_models.hf_logits(model, cases.random_tokens())
    return found


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy().reshape(-1, tensor.shape[-1])


@functools.cache
def run(variant: str, method: Method, update: Update = "own", **changes) -> api.PruneResult:
    return api.prune(cases.tiny(variant), cases.random_tokens(), settings=PARALLEL, method=method, update=update,
                     **changes)  # fmt: skip


@BOTH
@pytest.mark.parametrize("size", [1, 2])
def test_every_group_has_the_moments_of_its_layer(variant: str, size: int):
    model = cases.tiny(variant)
    with mesh.use_mesh(4 * size, size):
        start = streams.start(model.config, model.params, chunked(cases.random_tokens(), 4))
        own = waves.own_moments(
            range(LAYERS), model.config, lambda index: cases.one_layer(model, index), start, layer_module.PhaseClock()
        )
    for array in jax.tree.leaves(own):
        rows = [rows // size if array.ndim > 2 and rows % size == 0 else rows for rows in array.shape[1:2]]
        shape = (1, *rows, *array.shape[2:])
        assert [shard.data.shape for shard in array.addressable_shards] == [shape] * 4 * size
    for place, (h, y) in enumerate([*dense(variant), dense(variant)[-1]]):  # one group has no own layer
        seen = jax.tree.map(lambda a, place=place: a[place], own)
        layer = cases.one_layer(model, min(place, LAYERS - 1))
        np.testing.assert_array_equal(seen.problem.weight, layer["mlp"]["down"])
        np.testing.assert_allclose(seen.hidden_mean, h.mean(0), rtol=0, atol=1e-5 * np.abs(h).max())
        if model.config.mlp_bias:
            h, y = h - h.mean(0), y - y.mean(0)
        for ours, exact in ((seen.problem.gram, h.T @ h), (seen.problem.cross, h.T @ y)):
            np.testing.assert_allclose(ours, exact / len(h), rtol=0, atol=1e-5 * np.abs(exact / len(h)).max())


def by_wanda(h: np.ndarray, weight: np.ndarray) -> list[int]:
    return sorted(np.argsort(np.sqrt((h**2).mean(0)) * np.abs(weight).sum(1))[-cases.KEPT :])


@BOTH
def test_channels_are_chosen_on_the_dense_stream(variant: str):
    result = run(variant, "wanda")
    down = np.asarray(cases.tiny(variant).params["layers"]["mlp"]["down"], np.float64)
    for (h, _), weight, report in zip(dense(variant), down, result.report.layers, strict=True):
        assert list(report.kept) == by_wanda(h, weight)
    assert result.report.layers[-1].kept != in_sequence(variant, "wanda").report.layers[-1].kept


def test_padding_counts_for_nothing():
    """Thirteen sequences in chunks of seven end in padding, whose weights all layers need."""
    settings = PARALLEL.replace(batch_tokens=128, method="wanda")
    model, tokens = cases.tiny("llama"), cases.random_tokens()[:13]
    report = api.prune(model, tokens, settings=settings).report
    down = np.asarray(model.params["layers"]["mlp"]["down"], np.float64)
    for (h, _), weight, layer in zip(dense("llama"), down, report.layers, strict=True):
        assert list(layer.kept) == by_wanda(h[: tokens.size], weight)


@BOTH
def test_the_bias_makes_up_for_the_means_of_the_dense_stream(variant: str):
    result, before = run(variant, "flap"), cases.tiny(variant).params["layers"]["mlp"]
    after = np.asarray(result.model.params["layers"]["mlp"]["down_bias"])
    for index, ((h, _), report) in enumerate(zip(dense(variant), result.report.layers, strict=True)):
        removed = np.setdiff1d(np.arange(cases.CHANNELS), report.kept)
        old = np.asarray(before["down_bias"][index]) if "down_bias" in before else 0
        expected = old + h.mean(0)[removed] @ np.asarray(before["down"][index])[removed]
        np.testing.assert_allclose(after[index], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@functools.cache
def in_sequence(variant: str, method: Method) -> api.PruneResult:
    settings = PARALLEL.replace(schedule="sequential", method=method, update="none")
    return api.prune(cases.tiny(variant), cases.random_tokens(), settings=settings)


@pytest.mark.parametrize("method", ["spap", "random", "wanda"])
def test_the_first_layer_is_chosen_as_in_sequence(method: Method):
    """The first layer's stream is the dense one; a method that ignores streams makes the same choice in all layers."""
    ours, theirs = (result.report.layers for result in (run("llama", method, "none"), in_sequence("llama", method)))
    alike = LAYERS if method == "random" else 1
    assert [report.kept for report in ours[:alike]] == [report.kept for report in theirs[:alike]]
    one, other = ours[0], theirs[0]
    assert (one.swaps, one.improving_swaps, one.ridge) == (other.swaps, other.improving_swaps, other.ridge)
    assert one.calibration.selection == pytest.approx(other.calibration.selection, rel=1e-4)


def test_channels_do_not_depend_on_the_heads_that_go():
    with_heads = run("llama_two_kv_heads", "spap", "refit", attention_sparsity=0.5).report.layers
    without = run("llama_two_kv_heads", "spap", "refit").report.layers
    assert [report.kept for report in with_heads] == [report.kept for report in without]
    for report in with_heads:
        assert report.attention is not None
        assert len(report.attention.kept) == 1
        assert report.calibration.refit < report.calibration.selection


WIDTH, KEEP = 64, 45


def stack(config, count: int, f: int = WIDTH) -> Moments:
    """Return abstract moments of f channels, one layer's on each group of devices."""
    d = config.width
    shapes = Moments(Problem((f, f), (f, d), (), (f, d)), (f,), (d,), (f,))  # type: ignore

    def one(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        own = NamedSharding(get_mesh(), PartitionSpec("data", *["model"][: len(shape) > 1]))
        return jax.ShapeDtypeStruct((count, *shape), jnp.float32, sharding=own)

    return jax.tree.map(one, shapes, is_leaf=lambda tree: isinstance(tree, tuple) and not hasattr(tree, "_fields"))


def largest_sent(compiled) -> int:
    """Return the number of elements of the largest array that devices send each other."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    sent = re.findall(rf"= (\S.*?) (?:{kinds})(?:-start)?\(", compiled.as_text())
    return max(
        [math.prod(map(int, dims.split(","))) for each in sent for dims in re.findall(r"\[([\d,]+)\]", each)] or [0]
    )


@pytest.mark.parametrize("method", ["spap", "flap"])
def test_no_moments_travel(method: Method):
    config = cases.tiny("llama").config
    with mesh.use_mesh(8):
        search = layer_module.search_of(PARALLEL.replace(method=method))
        found: Any = waves.own_choices.lower(stack(config, 8), config, jax.random.key(0), 0, KEEP, **search).compile()
    assert 0 < largest_sent(found) <= 8 * WIDTH < WIDTH * min(WIDTH, config.width)
    own = 4 * (WIDTH**2 + 2 * WIDTH * config.width + 2 * WIDTH + config.width)
    assert found.memory_analysis().argument_size_in_bytes == pytest.approx(own, rel=0.02)  # unused ones are left out


def test_devices_that_share_the_weights_divide_the_moments():
    config, search = cases.tiny("llama").config, layer_module.search_of(PARALLEL)
    f = 3 * PANEL
    with mesh.use_mesh(4, 2):
        given = stack(config, 2, f), config, jax.random.key(0), 0, f // 2
        found: Any = waves.own_choices.lower(*given, **search).compile()
    text = found.as_text()
    assert f"f32[{f // 2},{f}]" in text
    assert f"f32[{f},{f}]" not in text
    assert largest_sent(found) < f * f


def test_moments_that_travel_are_noticed():
    """As a control, run the same solver with the moments requested on every device."""
    config = cases.tiny("llama").config
    search = layer_module.search_of(PARALLEL)

    def on_all(own: Moments, key: jax.Array) -> layer_module.Choice:
        return layer_module.choose_channels(jax.tree.map(lambda a: a[0], own), key, KEEP, **search)

    with mesh.use_mesh(8):
        everywhere = functools.partial(jax.shard_map, in_specs=PartitionSpec(), out_specs=PartitionSpec())
        found = jax.jit(everywhere(on_all, check_vma=False)).lower(stack(config, 8), jax.random.key(0)).compile()
    assert largest_sent(found) >= WIDTH**2


@pytest.mark.parametrize("rows", [12, 7])
@pytest.mark.parametrize(("groups", "size"), [(1, 1), (6, 1), (2, 3), (1, 4)])
def test_each_group_gets_its_own(groups: int, size: int, rows: int):
    items = [
        {"matrix": jnp.arange(2 * rows).reshape(rows, 2) + 100 * group, "number": group} for group in range(groups)
    ]
    with mesh.use_mesh(groups * size, size):
        kept = None
        for group in range(groups):
            kept = jax.jit(collectives.keep_for_group)(kept, items[group], group)
        own = jax.tree.map(jax.jit(lambda a: collectives.exchange(a, rows)), kept)
        found = jax.jit(collectives.map_over_groups, static_argnums=0)(
            lambda item, number, add: (item["matrix"] + add, item["number"] - number), own, jnp.int32(1000)
        )
    np.testing.assert_array_equal(found[0], np.stack([item["matrix"] + 1000 for item in items]))
    np.testing.assert_array_equal(found[1], np.zeros(groups))


def test_moments_are_sent_once_to_their_own_device():
    """Keeping sends nothing, in place, and the exchange sends each device its own matrix and nothing else."""
    config = cases.tiny("llama").config
    with mesh.use_mesh(8):
        rows = NamedSharding(get_mesh(), PartitionSpec(("model", "data")))
        whole = NamedSharding(get_mesh(), PartitionSpec())
        seen = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape[1:], a.dtype, sharding=rows if a.ndim > 2 and a.shape[1] % 8 == 0 else whole
            ),
            stack(config, 8),
        )
        kept = waves._keep.lower(None, seen, 0).compile().output_shardings
        shapes = jax.eval_shape(waves._keep, None, seen, 0)
        kept = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, kept)
        keeping: Any = waves._keep.lower(kept, seen, 1).compile()
        gram = kept.problem.gram
        exchange: Any = waves._exchange.lower(gram, config.intermediate).compile()
    assert largest_sent(keeping) == 0
    sizes = keeping.memory_analysis()
    assert sizes.alias_size_in_bytes == pytest.approx(sizes.output_size_in_bytes, rel=0.01)
    assert largest_sent(exchange) <= math.prod(gram.shape[1:])
    assert "all-gather" not in exchange.as_text()
