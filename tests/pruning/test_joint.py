"""Joint steps bring the entire model's predictions closer to the dense model's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruning_cases import SETTINGS, divergence, prune, random_tokens, tiny

from spap_jax import api
from spap_jax.data.tokens import TokenBlocks
from spap_jax.errors import UserError
from spap_jax.models import DecoderConfig, decoder
from spap_jax.parallel import mesh
from spap_jax.pruning import predictions, streams
from spap_jax.pruning.run import Run, multiple_of, resolve
from spap_jax.settings import EFFORTS, PruneSettings, Update
from spap_jax.training.loop import _order

JOINT = SETTINGS.replace(rounds=0, joint_passes=1)
"""With 512 sequences of random tokens the held-out loss falls; 16 would be memorized."""


@functools.cache
def adjusted(variant: str, **changes) -> api.PruneResult:
    return prune(tiny(variant), random_tokens(0, 512, 16), JOINT, **changes)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("llama", {}),
        ("opt_350m_like", {"joint_rate": 0.002}),
        ("gemma3", {"joint_last": 2}),
    ],
)
def test_the_divergence_falls_and_is_the_one_reported(variant: str, changes: dict):
    model, held_out = tiny(variant), random_tokens(0, 512, 16)[384:]
    measure = functools.partial(divergence, model, tokens=held_out)
    without, result = adjusted(variant, joint_passes=0), adjusted(variant, **changes)
    first, *checks = result.report.joint
    assert (first.step, first.losses) == (0, ())
    assert first.held_out == pytest.approx(measure(without.model), rel=1e-3)
    assert [len(check.losses) for check in checks] == [24]
    assert checks[-1].step == 24
    assert [check.tokens for check in checks] == [256 * check.step for check in checks]
    least = first.held_out
    for check in checks:
        assert check.taken == (check.held_out < least)
        least = min(least, check.held_out)
    assert measure(result.model) == pytest.approx(least, rel=1e-3)
    assert least < 0.97 * first.held_out
    assert result.report.layers[0].kept == without.report.layers[0].kept


def test_what_moves():
    without, blocks = adjusted("llama", joint_passes=0).model, adjusted("llama").model
    same = jax.tree.map(lambda a, b: bool((a == b).all()), without.params, blocks.params)
    assert not any(jax.tree.leaves(same.pop("layers")))
    assert jax.tree.all(same)
    last = adjusted("llama", joint_last=1).model
    same = jax.tree.map(lambda a, b: (a == b).reshape(len(a), -1).all(axis=1), without.params, last.params)
    assert {tuple(alike.tolist()) for alike in jax.tree.leaves(same.pop("layers"))} == {(True, True, False)}
    assert jax.tree.all(jax.tree.map(jnp.all, same))


def test_steps_that_do_harm_are_not_taken():
    without, result = adjusted("llama", joint_passes=0), adjusted("llama", joint_rate=5.0)
    assert not any(check.taken for check in result.report.joint[1:])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), without.model.params, result.model.params))


def test_learning_the_text_is_not_taken_where_it_leads_away_from_the_model():
    without, result = adjusted("llama", joint_passes=0), adjusted("llama", joint_passes=8, joint_text_weight=1.0)
    first, *checks = result.report.joint
    assert checks[-1].losses[-1] < checks[0].losses[0]
    assert not any(check.taken for check in checks if check.held_out >= first.held_out)
    tokens = random_tokens(0, 512, 16)[384:]
    assert divergence(tiny("llama"), result.model, tokens) <= divergence(tiny("llama"), without.model, tokens) + 1e-6


def test_steps_that_lead_far_away_begin_again_half_as_large():
    opening, first, *_, last = adjusted("llama", joint_rate=0.2, joint_passes=4).report.joint
    assert first.held_out > 1.5 * opening.held_out
    assert last.taken


def test_predictions_that_overflow_are_said():
    model = tiny("llama")
    head = jax.tree.map(lambda a: a * 1e37, model.params["head"])
    with pytest.raises(UserError, match="predictions are not finite before any joint step: they overflow in float32"):
        prune(model.replace(params=model.params | {"head": head}), random_tokens(), settings=JOINT)


def test_the_tokens_that_were_fitted_judge_where_none_are_held_out():
    tokens = random_tokens(0, 512, 16)[:384]
    result = prune(tiny("llama"), tokens, settings=JOINT.replace(held_out=0.0))
    reached = min(check.held_out for check in result.report.joint)
    assert divergence(tiny("llama"), result.model, tokens) == pytest.approx(reached, rel=1e-3)


def test_the_rest_of_a_model_is_its_blocks_one_after_the_other():
    model, tokens = tiny("llama"), random_tokens()
    x = decoder.embed(
        model.config, model.params, jnp.asarray(tokens), jnp.arange(16)[None] * jnp.ones((16, 1), int), jnp.float32
    )
    layers = model.params["layers"]
    other = jax.tree.map(lambda a: 0.9 * a[0], layers["mlp"])
    for first in range(3):
        expected = x
        for index in range(first, 3):
            mlp = {"mlp": other} if index == first else {}
            block = jax.tree.map(lambda a, index=index: a[index], layers) | mlp
            expected = decoder.block(model.config, block, expected, *streams.causal(expected))
        found = predictions.rest(model.config, layers, x, other, first)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_further_text_is_fitted_as_if_it_had_been_asked_for():
    own, more = random_tokens(0, 512, 16), random_tokens(1, 400, 16)
    tokens = TokenBlocks(own, "random", 512, further=TokenBlocks(more, "random", 400))
    found = prune(tiny("llama"), tokens, settings=JOINT, joint_passes=2).report
    together = np.concatenate([own[:384], more[:384], own[384:]])
    expected = prune(tiny("llama"), together, settings=JOINT, held_out=128 / 896).report
    assert found.joint[-1].step == expected.joint[-1].step == 48
    assert [check.losses for check in found.joint] == [check.losses for check in expected.joint]
    assert [layer.calibration for layer in found.layers] == [layer.calibration for layer in expected.layers]
    assert found.calibration.further_sequences == 384


@pytest.mark.parametrize(("passes", "more"), [(0.5, 0), (2, 12), (4, 20)])
def test_text_is_read_again_only_if_there_is_no_other(passes: float, more: int):
    own, others = np.arange(16 * 8).reshape(16, 8), 1000 + np.arange(20 * 8).reshape(20, 8)
    counted = [tokens % 3 > 0 for tokens in (own, others)]
    tokens = TokenBlocks(own, "", 16, counted[0], TokenBlocks(others, "", 20, counted[1]))
    settings = PruneSettings(held_out=0.25, batch_tokens=24, joint_passes=passes)
    expected = np.concatenate([own[:12], others[:more]]), own[12:]
    config = tiny("llama").config
    run = resolve(config, tokens, settings)
    for found, sequences in zip((run.fitted, run.held_out), expected, strict=True):
        np.testing.assert_array_equal(found.rows, sequences)
        assert found.mask is not None
        np.testing.assert_array_equal(found.mask.reshape(-1, 8)[: found.real], sequences % 3 > 0)
    assert resolve(config, tokens, settings.replace(method="fasp")).fitted.real == 12
    assert resolve(config, own, settings).fitted.real == 12


def test_a_mask_of_ones_own_counts_although_further_text_has_none():
    own, others = np.arange(16 * 8).reshape(16, 8), np.arange(20 * 8).reshape(20, 8)
    tokens = dataclasses.replace(TokenBlocks(own, "", 16, None, TokenBlocks(others, "", 20)), mask=own % 3 > 0)
    fitted = resolve(tiny("llama").config, tokens, PruneSettings(held_out=0.25, joint_passes=2)).fitted
    expected = np.concatenate([own[:12] % 3 > 0, np.ones((12, 8), bool)])
    assert fitted.mask is not None
    np.testing.assert_array_equal(fitted.mask.reshape(-1, 8)[: fitted.real], expected)


def test_every_sequence_is_used_once_before_any_is_used_again():
    order = _order(12, 6, 5, (7,))
    assert order.shape == (6, 5)
    assert [sorted(part) for part in order.ravel()[:24].reshape(2, 12)] == [[*range(12)]] * 2
    assert (order == _order(12, 6, 5, (7,))).all()
    assert (order != _order(12, 6, 5, (8,))).any()


def test_several_devices_make_fewer_and_larger_joint_steps_on_the_same_text():
    tokens, config = np.zeros((128, 512), np.int32), dataclasses.replace(tiny("llama").config, positions=512)
    settings, schedules = PruneSettings(joint_passes=3, batch_tokens=512), {}
    for count in (1, 4, 8):
        with mesh.use_mesh(count):
            schedules[count] = resolve(config, tokens, settings).joint
    one, four, eight = schedules.values()
    assert one == four  # whose steps have a sequence for each of four devices
    assert one
    assert eight
    assert (one.steps, one.sequences, eight.steps, eight.sequences) == (90, 4, 45, 8)
    assert eight.rate == pytest.approx(2**0.5 * one.rate)
    with mesh.use_mesh(8):
        few = resolve(config, tokens, settings.replace(joint_passes=1)).joint
    assert few
    assert (few.steps, few.sequences) == (30, 4)  # two sequences in a step more would leave too few steps


def test_measurements_take_a_small_part_of_the_time():
    tokens, config = np.zeros((128, 16), np.int32), tiny("llama").config
    for held_out, checks in ((0.0625, 4), (0.5, 1)):
        schedule = resolve(config, tokens, PruneSettings(joint_passes=1, held_out=held_out)).joint
        assert schedule is not None
        assert schedule.checks == min(checks, schedule.steps)


def test_the_effort_means_what_is_not_set():
    small = tiny("llama").config
    large = dataclasses.replace(small, layers=30, width=576, intermediate=1536, positions=2**12)

    def run(config: DecoderConfig, tokens: int = 2**12, **changes) -> Run:
        length = min(tokens, 16)
        return resolve(config, np.zeros((tokens // length, length), np.int32), PruneSettings(**changes))

    assert [run(small, effort=effort).settings.joint_passes for effort in EFFORTS] == [1, 4, 16]
    assert [run(large, effort=effort).settings.joint_last for effort in EFFORTS] == [3, 30, 30]
    assert run(small, joint_last=9).settings.joint_last == 3
    assert run(small, effort="high", joint_passes=2).settings.joint_passes == 2
    for tokens, passes in ((1024, 4), (2**17, 2), (2**20, 1)):
        assert run(large, tokens).settings.joint_passes == passes
        assert run(small, tokens).settings.joint_passes == 4
    low, default = run(large, 2**16, effort="low"), run(large, 2**16)
    assert low.joint
    assert default.joint
    assert low.rounds
    assert default.rounds
    assert (low.rounds.steps, default.rounds.steps) == (16, 64)
    assert low.joint.rate == pytest.approx(0.06 / (24 * 3 ** (2 / 3)))
    assert default.joint.rate == pytest.approx(5.8 / (30 * 576))
    all_three = run(small, effort="low").joint
    assert all_three
    assert all_three.rate == pytest.approx(5.8 / (3 * 32))


def test_the_update_decides_how_closely_weights_are_fitted():
    def fit(**changes) -> tuple[float, float]:
        run = resolve(tiny("llama").config, random_tokens(), PruneSettings(**changes))
        return run.ridge, run.correction

    assert fit() == fit(method="obs", update="alternate") == (1e-2, 0.5)
    assert fit(method="obs") == fit(update="refit") == (1e-4, 1.0)


def test_wide_mlps_keep_a_multiple_of_8():
    found = [multiple_of(PruneSettings(), channels) for channels in (320, 1023, 1024, 8191, 8192, 53248)]
    assert found == [1, 1, 8, 8, 64, 64]
    assert multiple_of(PruneSettings(round_to=5), 4096) == 5


def test_the_peers_own_updates_have_no_joint_steps():
    model = tiny("llama")

    def planned(update: Update) -> Run:
        return resolve(model.config, random_tokens(), JOINT.replace(method="fasp", update=update))

    assert planned("own").joint is None
    assert planned("alternate").joint is not None
