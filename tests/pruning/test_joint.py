"""Joint steps bring the entire model's predictions closer to the dense model's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruning_cases import KEPT, SETTINGS, loss, random_tokens, tiny

from spap_jax import api
from spap_jax.data.tokens import new_blocks
from spap_jax.errors import UserError
from spap_jax.models import Params, decoder
from spap_jax.pruning import joint, predictions
from spap_jax.pruning.run import Run, calibration_chunks, resolve
from spap_jax.settings import EFFORTS, PruneSettings, Update
from spap_jax.training import loop as engine
from spap_jax.training.loop import _order

JOINT = SETTINGS.replace(rounds=0, joint_passes=1, joint_learning_rate=0.01, joint_tokens=256)
"""With 512 sequences of random tokens the held-out loss falls; 16 would be memorized."""


@functools.cache
def adjusted(variant: str, **changes) -> api.PruneResult:
    return api.prune(tiny(variant), random_tokens(0, 512, 16), settings=JOINT.replace(**changes))


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("llama", {}),
        ("opt_350m_like", {"joint_learning_rate": 0.002}),
        ("llama", {"joint_blocks": 1, "joint_text_weight": 0.0}),
        ("gemma3", {"joint_last": 2}),
    ],
)
def test_the_loss_falls_and_is_the_one_reported(variant: str, changes: dict):
    model, held_out = tiny(variant), random_tokens(0, 512, 16)[384:]
    measure = functools.partial(loss, model, tokens=held_out, text_weight=changes.get("joint_text_weight", 0.3))
    without, result = adjusted(variant, joint_passes=0), adjusted(variant, **changes)
    first, *checks = result.report.joint
    assert (first.step, first.losses) == (0, ())
    assert first.held_out == pytest.approx(measure(without.model), rel=1e-3)
    assert [len(check.losses) for check in checks] == ([8] * 3 if "joint_blocks" in changes else [24])
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
    last = adjusted("llama", joint_last=1, joint_weights="mlp").model
    same = jax.tree.map(lambda a, b: (a == b).reshape(len(a), -1).all(axis=1), without.params, last.params)
    assert {tuple(alike.tolist()) for alike in jax.tree.leaves(same["layers"].pop("mlp"))} == {(True, True, False)}
    assert jax.tree.all(jax.tree.map(jnp.all, same))


def test_steps_that_do_harm_are_not_taken():
    without, result = adjusted("llama", joint_passes=0), adjusted("llama", joint_learning_rate=5.0)
    assert not any(check.taken for check in result.report.joint[1:])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), without.model.params, result.model.params))


def test_steps_that_lead_far_away_begin_again_half_as_large():
    opening, first, *_, last = adjusted("llama", joint_learning_rate=0.2, joint_passes=4).report.joint
    assert first.held_out > 1.5 * opening.held_out
    assert last.taken
    assert last.held_out < 0.9 * opening.held_out


def test_predictions_that_overflow_are_said():
    model = tiny("llama")
    head = jax.tree.map(lambda a: a * 1e37, model.params["head"])
    with pytest.raises(UserError, match="predictions are not finite before any joint step: they overflow in float32"):
        api.prune(model.replace(params=model.params | {"head": head}), random_tokens(), settings=JOINT)


def test_the_tokens_that_were_fitted_judge_where_none_are_held_out():
    tokens = random_tokens(0, 512, 16)[:384]
    result = api.prune(tiny("llama"), tokens, settings=JOINT.replace(held_out=0.0))
    reached = min(check.held_out for check in result.report.joint)
    assert loss(tiny("llama"), result.model, tokens) == pytest.approx(reached, rel=1e-3)


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
            expected = predictions.apply(model.config, predictions.get_layer(layers, index) | mlp, index, expected)
        found = predictions.rest(model.config, layers, first, other, x)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"moment_dtype": "float32", "compute_dtype": "bfloat16"}, {}])
def test_half_the_bits_do_as_well(changes: dict):
    """Half of those of the activations; or of the moments, as without settings."""
    exact, half = adjusted("llama", moment_dtype="float32").report.joint, adjusted("llama", **changes).report.joint
    gains = [checks[0].held_out - checks[-1].held_out for checks in (exact, half)]
    assert gains[1] == pytest.approx(gains[0], rel=0.1)
    assert [check.losses for check in exact] != [check.losses for check in half]


def test_further_text_is_fitted_as_if_it_had_been_asked_for():
    own, more = random_tokens(0, 512, 16), random_tokens(1, 400, 16)
    tokens = new_blocks(own, "random", 512, further=new_blocks(more, "random", 400))
    found = api.prune(tiny("llama"), tokens, settings=JOINT, joint_passes=2).report
    together = np.concatenate([own[:384], more[:384], own[384:]])
    expected = api.prune(tiny("llama"), together, settings=JOINT, held_out=128 / 896).report
    assert found.joint[-1].step == expected.joint[-1].step == 48
    assert [check.losses for check in found.joint] == [check.losses for check in expected.joint]
    assert [layer.calibration for layer in found.layers] == [layer.calibration for layer in expected.layers]
    assert found.calibration.further_sequences == 384


@pytest.mark.parametrize(("passes", "more"), [(0, 0), (0.5, 0), (1, 0), (2, 12), (4, 20)])
def test_text_is_read_again_only_if_there_is_no_other(passes: float, more: int):
    own, others = np.arange(16 * 8).reshape(16, 8), 1000 + np.arange(20 * 8).reshape(20, 8)
    counted = [tokens % 3 > 0 for tokens in (own, others)]
    tokens = new_blocks(own, "", 16, counted[0], new_blocks(others, "", 20, counted[1]))
    settings = PruneSettings(held_out=0.25, batch_tokens=24, joint_passes=passes)
    expected = np.concatenate([own[:12], others[:more]]), own[12:]
    for found, sequences in zip(calibration_chunks(tokens, settings), expected, strict=True):
        np.testing.assert_array_equal(found.rows, sequences)
        assert found.mask is not None
        np.testing.assert_array_equal(found.mask.reshape(-1, 8)[: found.real], sequences % 3 > 0)
    assert calibration_chunks(tokens, settings.replace(method="fasp"))[0].real == 12
    assert calibration_chunks(own, settings)[0].real == 12


def test_a_mask_of_ones_own_counts_although_further_text_has_none():
    own, others = np.arange(16 * 8).reshape(16, 8), np.arange(20 * 8).reshape(20, 8)
    tokens = dataclasses.replace(new_blocks(own, "", 16, None, new_blocks(others, "", 20)), mask=own % 3 > 0)
    fitted, _ = calibration_chunks(tokens, PruneSettings(held_out=0.25, joint_passes=2))
    expected = np.concatenate([own[:12] % 3 > 0, np.ones((12, 8), bool)])
    assert fitted.mask is not None
    np.testing.assert_array_equal(fitted.mask.reshape(-1, 8)[: fitted.real], expected)


def test_every_sequence_is_used_once_before_any_is_used_again():
    order = _order(12, 6, 5, (7,))
    assert order.shape == (6, 5)
    assert [sorted(part) for part in order.ravel()[:24].reshape(2, 12)] == [[*range(12)]] * 2
    assert (order == _order(12, 6, 5, (7,))).all()
    assert (order != _order(12, 6, 5, (8,))).any()


def test_a_group_of_blocks_leaves_no_stack_to_the_next(monkeypatch: pytest.MonkeyPatch):
    stacks, before, batch_of = [], jax.live_arrays(), engine.batch_of

    def recorded(rows: np.ndarray, *rest) -> engine.Minibatch:
        alike = [a for a in jax.live_arrays() if a.shape == (3, KEPT, 32)]  # all blocks' output projections
        stacks.append(sum(all(a is not other for other in before) for a in alike))
        return batch_of(rows, *rest)

    monkeypatch.setattr(engine, "batch_of", recorded)
    api.prune(tiny("llama"), random_tokens(0, 512, 16), settings=JOINT.replace(joint_blocks=1, joint_text_weight=0.0))
    assert set(stacks) == {1}


def test_a_group_of_blocks_is_put_into_the_stack_itself_once_its_steps_have_let_go(monkeypatch: pytest.MonkeyPatch):
    before, with_blocks = jax.live_arrays(), joint._with_blocks
    beside = []

    def recorded(stack: Params, first: int, some: Params) -> Params:
        alike = [a for a in jax.live_arrays() if a.shape == (1, KEPT, 32)]  # a group's output projections
        beside.append(sum(all(a is not other for other in before) for a in alike))
        put = with_blocks(stack, first, some)
        assert all(array.is_deleted() for array in jax.tree.leaves(stack))
        return put

    monkeypatch.setattr(joint, "_with_blocks", recorded)
    api.prune(tiny("llama"), random_tokens(0, 512, 16), settings=JOINT.replace(joint_blocks=1, joint_text_weight=0.0))
    *between, last = beside
    assert between == [1, 1]  # the group itself
    assert last > 1  # the state is there until it has been stored


BUDGET = PruneSettings(joint_tokens=4096, joint_learning_rate=1e-3)


def test_a_budget_is_shared_by_the_blocks():
    """The steps grow with the tokens, and not with the number of blocks."""
    settings = BUDGET.replace(joint_blocks=2)
    for layers in (4, 32):
        plan = joint.groups(layers, 360, 8, 2048, settings, 1)
        assert [group.first for group in plan] == [*range(0, layers, 2)]
        assert sum(group.schedule.steps for group in plan) == pytest.approx(3 * 120 / 2, rel=0.1)
    for spread, steps, sequences in ((1, 180, 2), (8, 180, 8)):  # as many steps, with a sequence for each device
        [whole] = joint.groups(32, 360, 8, 2048, settings.replace(joint_blocks=0), spread)
        assert (whole.blocks, whole.schedule.steps, whole.schedule.sequences) == (32, steps, sequences)


@pytest.mark.parametrize(("judged", "checks"), [(8, 8), (45, 2), (360, 1)])
def test_measurements_take_a_small_part_of_the_time(judged: int, checks: int):
    [whole] = joint.groups(32, 360, judged, 2048, BUDGET, 1)
    assert whole.schedule.checks == checks


def test_the_effort_means_what_is_not_set():
    assert [PruneSettings(effort=effort).passes for effort in EFFORTS] == [1, 4, 16]
    assert [PruneSettings(effort=effort).resolved(6, 32, 64, 64).joint_last for effort in EFFORTS] == [3, 6, 6]
    assert PruneSettings(joint_last=9).resolved(6, 32, 64, 64).joint_last == 6
    assert PruneSettings(effort="high", joint_passes=2).passes == 2
    for tokens, large, small in ((1000, 4, 4), (2**17, 2, 4), (2**22, 1, 4), (2**26, 1, 1)):
        assert PruneSettings().resolved(30, 576, 1536, tokens).joint_passes == large
        assert PruneSettings().resolved(6, 96, 320, tokens).joint_passes == small
    assert PruneSettings(joint_passes=3).resolved(30, 576, 1536, 2**22).joint_passes == 3
    with pytest.raises(UserError, match="effort must be one of low, default, high, not 'full'; joint_passes must be"):
        PruneSettings(effort="full", joint_passes=-1)  # type: ignore[arg-type]


def test_the_peers_own_updates_have_no_joint_steps():
    model = tiny("llama")

    def planned(update: Update) -> Run:
        settings = JOINT.replace(method="fasp", update=update)
        return resolve(model.config, {}, {}.__getitem__, random_tokens(), settings)

    assert (planned("own").joint_sequences, planned("own").jointly) == (0, False)
    assert (planned("alternate").joint_sequences, planned("alternate").jointly) == (12, True)
