"""Pruning entire tiny models: what is removed, what is kept and what is reported."""

import dataclasses
import functools
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import hf_model, port
from pruning_cases import (
    CHANNELS,
    KEPT,
    SETTINGS,
    chosen_channels,
    divergence,
    logits,
    one_layer,
    prune,
    pruned,
    random_tokens,
    resolved,
    tiny,
    with_mlp,
)

from spap_jax.checkpoint import Reader
from spap_jax.errors import UserError
from spap_jax.models import decoder
from spap_jax.models.model import Model
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import streams
from spap_jax.pruning.layer import rounds_pay
from spap_jax.pruning.prune import MemoryStore
from spap_jax.pruning.prune import prune as prune_blocks
from spap_jax.pruning.run import Dense
from spap_jax.report.schema import Change, Errors, LayerReport
from spap_jax.settings import EffortName

FAMILIES = ("llama", "opt_125m_like")
LAYERS, REMOVED = 3, CHANNELS - KEPT


def same(one: dict, other: dict) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def zeroed(model: Model, names: tuple[str, ...], channels: np.ndarray) -> Model:
    """Return the model with some channels [layers, count] of some MLP parameters (channels last) set to 0."""
    mask = np.ones((LAYERS, CHANNELS), np.float32)
    np.put_along_axis(mask, channels, 0, axis=1)
    mlp = model.params["layers"]["mlp"]
    return with_mlp(model, **{n: mlp[n] * mask.reshape(LAYERS, *(1,) * (mlp[n].ndim - 2), CHANNELS) for n in names})


def test_rounds_end_when_layers_in_a_row_gained_little():
    some = pruned("llama").report.layers[0]

    def told(*gains: float) -> list[LayerReport]:
        errors = [Errors(0.5, 0.4, 0.4 * (1 - gain)) for gain in gains]
        return [dataclasses.replace(some, held_out=each, calibration=Errors(0.5, 0.4, 0.1)) for each in errors]

    model = tiny("llama")
    runs = {name: resolved(model.config, random_tokens(), SETTINGS.replace(effort=name)) for name in ("low", "default")}
    enough: dict[EffortName, list[list[LayerReport]]] = {
        "low": [[], told(0.3), told(0.05, 0.3)],
        "default": [[], told(0.0), told(0.05, 0.2), told(0.2, 0.05), told(0, 0, 0.2, 0)],
    }
    little: dict[EffortName, list[list[LayerReport]]] = {
        "low": [told(0.1), told(0.3, 0.1), told(0.3, 0.0, 0.0)],
        "default": [told(0.05, 0.09), told(0.3, 0.0, 0.005), told(0.3, 0.0, 0.0, 0.0, 0.0)],
    }
    assert all(rounds_pay(runs[effort], reports) for effort, each in enough.items() for reports in each)
    assert not any(rounds_pay(runs[effort], reports) for effort, each in little.items() for reports in each)
    assert rounds_pay(runs["default"], [dataclasses.replace(each, held_out=None) for each in told(0, 0)])
    assert not rounds_pay(resolved(model.config, random_tokens(), SETTINGS.replace(rounds=0)), [])


@pytest.mark.parametrize("variant", FAMILIES)
def test_errors_fall_from_stage_to_stage(variant: str):
    reports = pruned(variant).report.layers
    assert [report.layer for report in reports] == list(range(LAYERS))
    for report in reports:
        errors, held_out = report.calibration, report.held_out
        assert held_out is not None
        assert errors.selection >= errors.refit >= errors.alternating > 0
        assert held_out.alternating <= held_out.refit
        assert report.ridge == pytest.approx(1e-4)
        assert report.attention is None
        assert len(report.kept) == KEPT
        assert sorted(set(report.kept)) == list(report.kept)
        assert report.kept[-1] < CHANNELS
    assert any(report.rounds for report in reports)
    assert reports[0].calibration.alternating < 0.95 * reports[0].calibration.refit


@pytest.mark.parametrize(("variant", "changes"), [*((each, {}) for each in FAMILIES), (FAMILIES[0], {"rounds": 0})])
def test_the_errors_reported_are_those_of_the_model_returned(variant: str, changes: dict[str, int]):
    """Check the first block, whose input stream no other block has changed."""
    model, result = tiny(variant), pruned(variant, **changes)
    first, small = (jax.tree.map(lambda a: a[0], m.params["layers"]) for m in (model, result.model))
    report = result.report.layers[0]
    for tokens, told in zip(np.split(random_tokens(), [12]), (report.calibration, report.held_out), strict=True):
        both = streams.start(model.config, model.params, chunked(tokens, 4))
        seen = streams.fitting_tokens(streams.enter_mlp(model.config, first, both))
        found = decoder.block(result.model.config, small, seen.residual, method=streams.mlp_output)
        error = ((found - seen.target) ** 2).sum() / (seen.target**2).sum()
        assert told is not None
        assert float(error) == pytest.approx(told.alternating, rel=1e-3)


@pytest.mark.parametrize("variant", ["llama", "opt_125m_like"])
def test_dead_channels_are_lost_and_nothing_else(variant: str):
    dead = chosen_channels(3, REMOVED, LAYERS)
    names = ("up",) if variant == "llama" else ("up", "up_bias")
    model = zeroed(tiny(variant), names, dead)
    result = prune(model, random_tokens(), SETTINGS)
    for channels, report in zip(dead, result.report.layers, strict=True):
        assert not set(channels.tolist()) & set(report.kept)
        assert report.calibration.selection < 1e-5  # the difference of two equal numbers in float32
    tokens = random_tokens(7)
    np.testing.assert_allclose(logits(result.model, tokens), logits(model, tokens), rtol=0, atol=1e-4)


def test_one_of_two_equal_channels_is_lost_and_nothing_else():
    model = tiny("llama")
    mlp = {name: np.array(array) for name, array in model.params["layers"]["mlp"].items()}
    pairs = chosen_channels(4, 2 * REMOVED, LAYERS).reshape(LAYERS, 2, REMOVED)
    for name in ("gate", "up"):
        for layer, (ones, others) in enumerate(pairs):
            mlp[name][layer, ..., others] = mlp[name][layer, ..., ones]
    model = with_mlp(model, **{name: jnp.asarray(array) for name, array in mlp.items()})
    result = prune(model, random_tokens(), SETTINGS)
    for (ones, others), report in zip(pairs, result.report.layers, strict=True):
        kept = set(report.kept)
        assert all((one in kept) != (other in kept) for one, other in zip(ones.tolist(), others.tolist(), strict=True))
        assert report.calibration.selection > 0.01  # the dense weights alone do not replace a twin
        assert report.calibration.refit < 1e-6
    tokens = random_tokens(7)
    np.testing.assert_allclose(logits(result.model, tokens), logits(model, tokens), rtol=0, atol=1e-2)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    """What is told layer by layer is no part of either."""
    first, told = pruned("llama"), []
    again = prune(tiny("llama"), random_tokens(), settings=SETTINGS, progress=told.append)
    assert tuple(told) == again.report.layers + again.report.joint
    assert same(first.model.params, again.model.params)
    strip = lambda report: dataclasses.replace(report, seconds={})  # noqa: E731
    assert [*map(strip, first.report.layers)] == [*map(strip, again.report.layers)]
    other = pruned("llama", seed=1)
    assert other.report.layers[0].kept == first.report.layers[0].kept
    assert not same(first.model.params, other.model.params)


def test_the_model_given_is_left_as_it_is():
    model, result = tiny("opt_125m_like"), pruned("opt_125m_like")
    _, before = port(hf_model("opt_125m_like"))
    assert same(before, model.params)
    assert model.config.intermediate == CHANNELS
    assert result.model.config.intermediate == KEPT
    assert same(result.model.params["embed"], model.params["embed"])
    assert same(result.model.params["layers"]["attention"], model.params["layers"]["attention"])


def test_no_rounds_leave_the_refit():
    for report in pruned("llama", rounds=0).report.layers:
        assert report.rounds == 0
        assert report.calibration.alternating == report.calibration.refit


def test_bfloat16_stays_so_and_is_judged_as_it_is_written():
    model, tokens = tiny("llama"), random_tokens()
    half = model.replace(params=jax.tree.map(lambda array: array.astype(jnp.bfloat16), model.params))
    result = prune(half, tokens, joint_passes=4, joint_rate=0.003)
    assert {array.dtype for array in jax.tree.leaves(result.model.params)} == {jnp.dtype(jnp.bfloat16)}
    wide, narrow = result.report, pruned("llama").report
    for ours, exact in zip(wide.layers, narrow.layers, strict=True):
        assert ours.calibration.alternating == pytest.approx(exact.calibration.alternating, rel=0.2)
    assert any(check.taken for check in wide.joint[1:])
    least = min(check.held_out for check in wide.joint)
    assert divergence(half, result.model, tokens[12:]) == pytest.approx(least, rel=1e-2)


def test_fewer_different_tokens_than_channels():
    result = prune(tiny("llama"), np.tile(np.arange(16), (16, 1)), SETTINGS)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(result.model.params))
    assert all(report.calibration.refit < report.calibration.selection for report in result.report.layers)


def test_pruning_what_was_pruned():
    once = pruned("llama")
    twice = prune(once.model, random_tokens(), settings=SETTINGS, rounds=0)
    assert twice.model.config.intermediate == round(0.7 * KEPT)
    assert twice.report.model.intermediate == Change(KEPT, 26)
    assert np.isfinite(logits(twice.model, random_tokens())).all()


def test_a_layer_that_adds_nothing():
    model = tiny("llama")
    down = model.params["layers"]["mlp"]["down"].at[0].set(0)
    result = prune(with_mlp(model, down=down), random_tokens(), SETTINGS)
    assert result.report.layers[0].calibration.alternating == 0
    assert not np.any(result.model.params["layers"]["mlp"]["down"][0])


def test_activations_that_overflow_are_said():
    model = tiny("llama")
    up = model.params["layers"]["mlp"]["up"].at[1].set(3e38)
    with pytest.raises(UserError, match="the activations of layer 1 are not finite"):
        prune(with_mlp(model, up=up), random_tokens(), SETTINGS)


def test_activations_that_overflow_on_held_out_tokens_alone_are_said():
    """An axis of the stream that only their last token uses, and on which one channel is large."""
    model, axis, last = tiny("llama"), 5, tiny("llama").config.vocabulary - 1
    params = jax.tree.map(np.array, model.params)
    params["embed"]["tokens"][:, axis], params["embed"]["tokens"][last] = 0, 0
    params["embed"]["tokens"][last, axis] = 1
    params["layers"]["attention"]["o"][0] = 0
    params["layers"]["mlp"]["up"][0, axis] = 3e38
    tokens = random_tokens() % last
    with pytest.raises(UserError, match="the activations of layer 0 are not finite"):
        prune(model.replace(params=params), np.concatenate([tokens[:-1], tokens[-1:] * 0 + last]), settings=SETTINGS)


def test_blocks_that_are_read_ahead_give_the_same_bits(tmp_path: Path):
    hf_model("llama").save_pretrained(tmp_path)
    reader = Reader(tmp_path)
    model, read = reader.model(), []

    def read_layer(index: int) -> dict:
        read.append(index)
        return reader.layer(index)

    outer = {name: model.params[name] for name in ("embed", "head")}
    run, found = resolved(model.config, random_tokens(), SETTINGS.replace(rounds=0)), []
    for source in (functools.partial(one_layer, model), read_layer):
        store = MemoryStore(run.pruned)
        prune_blocks(run, Dense(model.config, outer, source), store)
        found.append(store.layers)
    assert all(same(one, other) for one, other in zip(*found, strict=True))
    assert found[0][0]["mlp"]["down"].shape == (KEPT, 32)
    assert read == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_the_report_as_json():
    report = pruned("llama").report
    read = json.loads(report.to_json())
    assert {name: read["settings"][name] for name in ("sparsity", "round_to", "joint_last", "effort")} == {
        "sparsity": 0.3, "round_to": 1, "joint_last": LAYERS, "effort": "default",
    }  # fmt: skip
    assert read["model"]["architecture"] == "LlamaForCausalLM"
    count = sum(array.size for array in jax.tree.leaves(pruned("llama").model.params))
    assert read["model"]["parameters"]["after"] == count
    before = sum(array.size for array in jax.tree.leaves(tiny("llama").params))
    assert read["model"]["parameters"]["before"] == before
    assert read["model"]["mlp_parameters"] == {"before": 3 * 3 * 32 * CHANNELS, "after": 3 * 3 * 32 * KEPT}
    assert (read["calibration"]["sequences"], read["calibration"]["sequence_length"]) == (16, 16)
    assert {"jax", "jaxlib", "spap-jax", "python", "device"} <= read["versions"].keys()
    assert read["layers"][2]["kept"] == list(report.layers[2].kept)
    assert read["seconds"]["selection"] == sum(layer["seconds"]["selection"] for layer in read["layers"])
    nothing = dataclasses.replace(report.layers[0].calibration, refit=float("nan"))
    lost = dataclasses.replace(report, layers=(dataclasses.replace(report.layers[0], calibration=nothing),))
    assert json.loads(lost.to_json())["layers"][0]["calibration"]["refit"] is None
