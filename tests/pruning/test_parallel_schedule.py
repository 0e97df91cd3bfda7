"""Parallel schedule: the channels of several layers are chosen at once, on the dense stream."""

import functools

import hf_models
import jax
import numpy as np
import pruning_cases as cases
import pytest
import torch

from spap_jax import api
from spap_jax.parallel import mesh
from spap_jax.pruning import streams
from spap_jax.pruning.ahead import Ahead
from spap_jax.pruning.run import Dense
from spap_jax.settings import Method, Update

LAYERS = 3
PARALLEL = cases.SETTINGS.replace(schedule="parallel", held_out=0.0, batch_tokens=256)
BOTH = pytest.mark.parametrize("variant", ["llama", "opt_125m_like"])


@functools.cache
def dense_channels(variant: str) -> list[tuple[np.ndarray, np.ndarray]]:
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
    return cases.prune(cases.tiny(variant), cases.random_tokens(), settings=PARALLEL, method=method, update=update,
                     **changes)  # fmt: skip


def by_wanda(h: np.ndarray, weight: np.ndarray) -> list[int]:
    return sorted(np.argsort(np.sqrt((h**2).mean(0)) * np.abs(weight).sum(1))[-cases.KEPT :])


@BOTH
def test_channels_are_chosen_on_the_dense_stream(variant: str):
    result = run(variant, "wanda")
    down = np.asarray(cases.tiny(variant).params["layers"]["mlp"]["down"], np.float64)
    for (h, _), weight, report in zip(dense_channels(variant), down, result.report.layers, strict=True):
        assert list(report.kept) == by_wanda(h, weight)
    assert result.report.layers[-1].kept != in_sequence(variant, "wanda").report.layers[-1].kept


def test_padding_counts_for_nothing():
    """Thirteen sequences in chunks of seven end in padding, whose weights all layers need."""
    settings = PARALLEL.replace(batch_tokens=128, method="wanda")
    model, tokens = cases.tiny("llama"), cases.random_tokens()[:13]
    report = cases.prune(model, tokens, settings=settings).report
    down = np.asarray(model.params["layers"]["mlp"]["down"], np.float64)
    for (h, _), weight, layer in zip(dense_channels("llama"), down, report.layers, strict=True):
        assert list(layer.kept) == by_wanda(h[: tokens.size], weight)


@BOTH
def test_the_bias_makes_up_for_the_means_of_the_dense_stream(variant: str):
    result, before = run(variant, "flap"), cases.tiny(variant).params["layers"]["mlp"]
    after = np.asarray(result.model.params["layers"]["mlp"]["down_bias"])
    for index, ((h, _), report) in enumerate(zip(dense_channels(variant), result.report.layers, strict=True)):
        removed = np.setdiff1d(np.arange(cases.CHANNELS), report.kept)
        old = np.asarray(before["down_bias"][index]) if "down_bias" in before else 0
        expected = old + h.mean(0)[removed] @ np.asarray(before["down"][index])[removed]
        np.testing.assert_allclose(after[index], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@functools.cache
def in_sequence(variant: str, method: Method) -> api.PruneResult:
    settings = PARALLEL.replace(schedule="sequential", method=method, update="none")
    return cases.prune(cases.tiny(variant), cases.random_tokens(), settings=settings)


@pytest.mark.parametrize("method", ["spap", "random"])
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


@pytest.mark.parametrize(("count", "sharers"), [(4, 2), (8, 1)])
def test_devices_share_the_layers_and_choose_alike(count: int, sharers: int):
    """Eight devices have more than there are layers."""
    alone = run("llama", "spap", "refit")
    shared = run("llama", "spap", "refit", devices=count, model_devices=sharers)
    assert [layer.kept for layer in shared.report.layers] == [layer.kept for layer in alone.report.layers]


def test_the_moments_of_a_batch_of_layers_are_divided_along_data():
    model = cases.tiny("llama")
    with mesh.use_mesh(3):
        config = cases.resolved(model.config, cases.random_tokens(), PARALLEL)
        dense = Dense(model.config, model.params, lambda index: cases.one_layer(model, index))
        fitted = streams.start(model.config, model.params, config.fitted)
        seen = Ahead(config, dense)._moments(range(LAYERS), fitted)
    for array in jax.tree.leaves(seen):
        assert [shard.data.shape[0] for shard in array.addressable_shards] == [1] * 3
    for index, (h, _) in enumerate(dense_channels("llama")):
        exact = h.T @ h / len(h)
        np.testing.assert_allclose(seen.problem.gram[index], exact, rtol=0, atol=1e-5 * np.abs(exact).max())
