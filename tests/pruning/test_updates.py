"""Updates of the kept weights, layer by layer, against float64 NumPy on the stream that each layer sees."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest
from pruning_cases import CHANNELS, KEPT, SETTINGS, logits, one_layer, prune, random_tokens, tiny

from spap_jax import api
from spap_jax.errors import UserError
from spap_jax.models import decoder
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import streams
from spap_jax.pruning.run import pruned_config
from spap_jax.report.schema import Biases, MethodAccount
from spap_jax.settings import Method, Update

PLAIN = SETTINGS.replace(held_out=0.0, batch_tokens=256)
BOTH = pytest.mark.parametrize("variant", ["llama", "opt_125m_like"])


class Seen(NamedTuple):
    """One layer before and after pruning: its MLP's parameters, and the channels kept and removed.

    Attributes:
        hidden: [N,f] the dense hidden channels.
        target: [N,d] what the pruned MLP should add to the stream.
        added: [N,d] what the pruned MLP adds.
    """

    dense: dict
    small: dict
    kept: np.ndarray
    removed: np.ndarray
    hidden: np.ndarray
    target: np.ndarray
    added: np.ndarray


def float64(array: jax.Array) -> np.ndarray:
    return np.asarray(array, np.float64)


@functools.cache
def run(variant: str, method: Method, update: Update = "own", **changes) -> api.PruneResult:
    return prune(tiny(variant), random_tokens(), settings=PLAIN, method=method, update=update, **changes)


def layers_of(variant: str, result: api.PruneResult) -> Iterator[Seen]:
    """Yield every layer with its input from the pruned layers before it, in float64."""
    model = tiny(variant)
    both = streams.start(model.config, model.params, chunked(random_tokens(), 16))
    for index, report in enumerate(result.report.layers):
        dense, small = one_layer(model, index), one_layer(result.model, index)
        both = streams.enter_mlp(model.config, dense, both)
        tokens = streams.fitting_tokens(both).flat()
        hidden = decoder.block(model.config, dense, tokens.residual, method=streams.mlp_hidden)
        kept = np.array(report.kept)
        removed = np.setdiff1d(np.arange(CHANNELS), kept)
        before, after = ({name: float64(a) for name, a in layer["mlp"].items()} for layer in (dense, small))
        added = decoder.block(result.model.config, small, tokens.residual, method=streams.mlp_output)
        yield Seen(before, after, kept, removed, float64(hidden), float64(tokens.target), float64(added))
        both = streams.leave_mlp(result.model.config, small, both)


def assert_as_it_was(seen: Seen, names: set[str]) -> None:
    for name in names:
        whole = seen.dense[name]
        axis = next((n for n, size in enumerate(whole.shape) if size == CHANNELS), None)
        expected = whole if axis is None else whole.take(seen.kept, axis)
        np.testing.assert_array_equal(seen.small[name], expected, err_msg=name)


@BOTH
@pytest.mark.parametrize("method", ["random", "wanda"])
def test_none_leaves_the_weights(variant: str, method: Method):
    result = run(variant, method)
    assert result.model.config == tiny(variant).config.narrowed(KEPT)
    for seen, report in zip(layers_of(variant, result), result.report.layers, strict=True):
        assert seen.small.keys() == seen.dense.keys()
        assert_as_it_was(seen, set(seen.dense))
        errors = report.calibration
        assert errors.selection == errors.refit == errors.alternating > 0
        assert report.rounds == 0


@pytest.mark.parametrize("variant", ["llama", "qwen2", "opt_125m_like"])
def test_flap_adds_the_mean_of_what_is_lost_to_the_output_bias(variant: str):
    result = run(variant, "flap")
    config = result.model.config
    assert config.mlp_bias
    assert config.intermediate == KEPT
    for seen in layers_of(variant, result):
        assert_as_it_was(seen, set(seen.dense) - {"down_bias"})
        inner = {"gate_bias", "up_bias"} & seen.small.keys()
        assert inner == ({"gate_bias", "up_bias"} if config.gated else {"up_bias"})
        assert all(not seen.small[name].any() for name in inner - seen.dense.keys())
        lost = sum(seen.hidden[:, j].mean() * seen.dense["down"][j] for j in seen.removed)
        expected = seen.dense.get("down_bias", 0) + lost
        np.testing.assert_allclose(seen.small["down_bias"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_bias_of_flap_is_the_best_one_in_the_first_layer():
    """In the first layer the target is the dense output, so any other bias has a larger error."""
    errors = run("llama", "flap").report.layers[0].calibration
    seen = next(layers_of("llama", run("llama", "flap")))
    rest = seen.target - seen.hidden[:, seen.kept] @ seen.small["down"]
    power = (seen.target**2).sum()
    assert errors.selection == pytest.approx((rest**2).sum() / power, rel=1e-4)
    assert errors.refit == pytest.approx(((rest - rest.mean(0)) ** 2).sum() / power, rel=1e-4)
    assert errors.refit < 0.999 * errors.selection


@BOTH
@pytest.mark.parametrize(
    ("method", "schedule"),
    [("obs", "sequential"), ("random", "parallel")],
)
def test_the_refit_solves_least_squares(variant: str, method: Method, schedule: str):
    """The ridge towards the dense weights adds rows: sqrt(ridge) |h_j| times the difference of each weight."""
    result = run(variant, method, "refit" if method == "random" else "own", schedule=schedule)
    for seen, report in zip(layers_of(variant, result), result.report.layers, strict=True):
        bias = "down_bias" in seen.dense
        centre, y_mean = (seen.hidden.mean(0), seen.target.mean(0)) if bias else (0, 0)
        h, y = seen.hidden - centre, seen.target - y_mean
        energy = (h**2).sum(0)
        energy = np.maximum(energy, 1e-6 * energy.mean())  # a channel that never fires keeps its weights
        h, pull = h[:, seen.kept], np.diag(np.sqrt(report.ridge * energy[seen.kept]))
        rows, right = np.vstack([h, pull]), np.vstack([y, pull @ seen.dense["down"][seen.kept]])
        expected = np.linalg.lstsq(rows, right)[0]
        np.testing.assert_allclose(seen.small["down"], expected, rtol=0, atol=2e-3 * np.abs(expected).max())
        if bias:
            constant = y_mean - seen.hidden.mean(0)[seen.kept] @ seen.small["down"]
            np.testing.assert_allclose(seen.small["down_bias"], constant, rtol=0, atol=1e-4 * np.abs(constant).max())
        assert_as_it_was(seen, set(seen.dense) - {"down", "down_bias"})
        assert report.rounds == 0
        assert report.calibration.selection > report.calibration.refit == report.calibration.alternating


@pytest.mark.parametrize(
    ("variant", "method", "update", "schedule"),
    [("llama", "wanda", "none", "sequential"), ("llama", "flap", "bias", "sequential"),
     ("llama", "obs", "alternate", "sequential"), ("opt_125m_like", "obs", "refit", "sequential"),
     ("llama", "obs", "alternate", "parallel")],
)  # fmt: skip
def test_the_errors_told_are_those_of_every_stage(variant: str, method: Method, update: Update, schedule: str):
    """Each stage computes its error differently: from moments, from the closed form, or in a pass of its own."""
    result = run(variant, method, update, schedule=schedule)
    for seen, report in zip(layers_of(variant, result), result.report.layers, strict=True):
        power = (seen.target**2).sum()
        dense = seen.hidden[:, seen.kept] @ seen.dense["down"][seen.kept] + seen.dense.get("down_bias", 0)
        told = report.calibration
        assert report.held_out is None
        assert told.selection == pytest.approx(((seen.target - dense) ** 2).sum() / power, rel=1e-4)
        assert told.alternating == pytest.approx(((seen.target - seen.added) ** 2).sum() / power, rel=1e-4)
        if update == "alternate":
            assert told.selection > told.refit >= told.alternating
        else:
            assert told.refit == told.alternating


def test_wanda_refitted_is_fasp():
    one, other = run("llama", "wanda", "refit"), run("llama", "fasp")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one.model.params, other.model.params)))


def test_a_peer_with_our_steps():
    plain, more = run("llama", "obs"), run("llama", "obs", "alternate")
    first, better = plain.report.layers[0], more.report.layers[0]
    assert better.kept == first.kept
    assert better.calibration.refit == pytest.approx(first.calibration.refit, rel=1e-5)  # computed in two ways
    assert better.rounds > 0
    assert better.calibration.alternating < 0.95 * first.calibration.alternating
    settled = run("llama", "obs", "alternate", rounds=0)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, settled.model.params, plain.model.params)))


def test_ours_without_its_steps_is_its_refit():
    one, other = run("llama", "spap", "refit"), run("llama", "spap", rounds=0)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one.model.params, other.model.params)))
    assert one.report.method == MethodAccount("spap", "refit")


def test_random_differs_by_seed_and_by_layer():
    first, again, other = (
        [layer.kept for layer in prune(tiny("llama"), random_tokens(), settings=PLAIN, method="random", seed=seed)
         .report.layers]
        for seed in (3, 3, 4)
    )  # fmt: skip
    assert first == again
    assert len({*first, *other}) == 6


def test_added_biases_have_the_dtype_of_the_weights():
    model = tiny("llama")
    half = jax.tree.map(lambda array: array.astype("bfloat16"), model.params)
    small = prune(api.Model(model.config, half, model.source), random_tokens(), settings=PLAIN, method="flap").model
    assert {str(array.dtype) for array in jax.tree.leaves(small.params)} == {"bfloat16"}


def test_qwen2_with_flap_works_in_memory():
    result = run("qwen2", "flap")
    tokens = random_tokens(7)
    biased = logits(result.model, tokens)
    mlp = result.model.params["layers"]["mlp"]
    silent = mlp | {"down_bias": np.zeros_like(mlp["down_bias"])}
    layers = result.model.params["layers"] | {"mlp": silent}
    without = api.Model(result.model.config, result.model.params | {"layers": layers}, result.model.source)
    assert np.abs(biased - logits(without, tokens)).max() > 1e-2
    assert np.isfinite(api.perplexity(result.model, tokens))


def test_the_report_tells_the_method_and_its_update():
    report = run("llama", "flap").report
    assert report.settings["update"] == "own"
    assert report.method == MethodAccount("flap", "bias")
    assert run("llama", "flap", "refit").report.method == MethodAccount("flap", "refit")
    assert report.model.mlp_bias == Biases(False, True)
    added = report.model.mlp_parameters.after - 3 * 3 * 32 * KEPT
    assert added == 3 * (2 * KEPT + 32)


def test_biases_come_only_with_the_update_that_adds_them():
    config = tiny("llama").config
    cases = (("flap", "own", True), ("flap", "none", False), ("flap", "refit", False), ("obs", "bias", True))
    for method, update, biases in cases:
        assert pruned_config(config, PLAIN.replace(method=method, update=update)).mlp_bias == biases
    assert pruned_config(tiny("opt_125m_like").config, PLAIN).mlp_bias
    with pytest.raises(UserError, match="nothing to remove"):
        pruned_config(config, PLAIN.replace(method="flap", sparsity=0.001))


def test_no_bias_is_added_before_a_norm():
    with pytest.raises(UserError, match="divides by another number for every token"):
        pruned_config(tiny("olmo2").config, SETTINGS.replace(update="bias"))
