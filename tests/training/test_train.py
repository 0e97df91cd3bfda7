"""Training: the loss falls, the best weights are kept, and devices and passes do not change the result."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import FULL, SETTINGS, counting, same, tiny

import spap_jax as spap
from spap_jax.api import FinetuneResult
from spap_jax.models.decoder import CHANNEL_AXES
from spap_jax.parallel.mesh import use_mesh
from spap_jax.settings import FinetuneSettings
from spap_jax.training import finetune, loop
from spap_jax.training.optimizers import rates

HELD_OUT = counting()[-4:]
WIDTHS = (20, 53, 7)
"""Widths of layers that are filled up with channels of zeros."""


def dense() -> spap.Model:
    """Return a teacher of another shape."""
    return tiny("llama_biases")


def test_before_any_step_the_model_is_as_it_was():
    model = tiny(dtype="bfloat16")
    stage = next(finetune.finetune_stages(model, counting(), None, FULL))
    assert stage.checks[0].held_out == pytest.approx(np.log(spap.perplexity(model, HELD_OUT)), rel=1e-5)
    assert same(stage.best, model.params)


@pytest.mark.parametrize(("variant", "settings"), [("llama_two_kv_heads", SETTINGS), ("opt_350m_like", FULL)])
def test_the_loss_falls(variant: str, settings: FinetuneSettings):
    model, seen = tiny(variant), []
    result = spap.finetune(model, counting(), settings=settings, progress=seen.append)
    report = result.report
    assert report.checks == tuple(seen)
    assert [check.step for check in seen] == [0, 3, 6]
    assert len(report.losses) == 6
    assert report.losses[-1] < 0.9 * report.losses[0]
    assert report.held_out["after"] < report.held_out["before"]
    assert np.log(spap.perplexity(result.model, HELD_OUT)) == pytest.approx(report.held_out["after"], rel=1e-4)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), result.model.params, model.params)
    assert changed["layers"]["attention"]["q"]
    assert changed["embed"]["tokens"] == settings.full


@pytest.fixture(scope="module")
def towards_the_teacher() -> FinetuneResult:
    return spap.finetune(tiny(), counting(), teacher=dense(), settings=SETTINGS, devices=1)


def test_the_divergence_from_a_teacher_falls(towards_the_teacher: FinetuneResult):
    held_out = towards_the_teacher.report.held_out
    assert held_out["after"] < 0.9 * held_out["before"]
    after = spap.divergence(dense(), towards_the_teacher.model, HELD_OUT)
    assert after == pytest.approx(held_out["after"], rel=1e-4)


@pytest.mark.parametrize(
    ("devices", "sharers", "batch_tokens"),
    [(1, 1, 12), (4, 2, 48)],
    ids=["one a pass", "divided weights"],
)
def test_devices_and_passes_change_nothing(
    towards_the_teacher: FinetuneResult, devices: int, sharers: int, batch_tokens: int
):
    assert batch_tokens in (SETTINGS.batch_tokens, counting().shape[1])
    settings = SETTINGS.replace(batch_tokens=batch_tokens)
    other = spap.finetune(
        tiny(), counting(), teacher=dense(), settings=settings, devices=devices, model_devices=sharers
    )
    np.testing.assert_allclose(other.report.losses, towards_the_teacher.report.losses, rtol=1e-4)
    for one, two in zip(*(jax.tree.leaves(r.model.params) for r in (towards_the_teacher, other)), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), atol=1e-4)


def test_measurements_change_no_step():
    """Nor does the learning rate begin anew after them."""
    once, often = (spap.finetune(tiny(), counting(), settings=SETTINGS, check_every=every) for every in (6, 2))
    assert once.report.losses == often.report.losses


def test_weights_and_moments_are_divided():
    """They stay sharded along both axes from the first step to the last when every weight is trained."""
    queries = tiny().params["layers"]["attention"]["q"].shape
    part = (queries[0], queries[1] // 2, queries[2] // 2, queries[3])
    with use_mesh(4, 2):
        for stage in finetune.finetune_stages(tiny(), counting(), None, FULL.replace(steps=2, check_every=1)):
            parts = [a for a in jax.tree.leaves((stage.state, stage.best)) if a.shape == queries]
            assert len(parts) == 4  # the weights, both of Adam's moments, and the best weights
            assert {a.addressable_data(0).shape for a in parts} == {part}


def test_a_model_that_was_trained_on_several_devices_is_on_one():
    result = spap.finetune(tiny(), counting(), settings=FULL, devices=8)
    assert result.report.kept.step > 0
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(result.model.params)} == {1}


def test_weights_that_are_worse_on_held_out_sequences_are_not_kept():
    """Training sequences count up and held-out ones count down, so what helps on the former harms on the latter."""
    tokens = np.concatenate([counting()[:-4], counting()[-4:, ::-1]])
    result = spap.finetune(tiny(), tokens, settings=SETTINGS)
    assert result.report.losses[-1] < result.report.losses[0]
    assert result.report.checks[-1].held_out > result.report.checks[0].held_out
    assert not any(check.taken for check in result.report.checks[1:])
    assert result.report.kept.step == 0
    assert same(result.model.params, tiny().params)


def test_weights_are_kept_as_they_were_when_they_were_best():
    """In bfloat16, as they are written: held-out loss first falls, then rises, since training sequences are few."""
    model = tiny(dtype="bfloat16")
    tokens = np.concatenate([counting()[:4], counting()[:4, ::-1]])
    result = spap.finetune(model, tokens, settings=SETTINGS, steps=24, held_out=0.5, check_every=2)
    kept = result.report.kept
    assert 0 < kept.step < 24
    assert kept.held_out == min(check.held_out for check in result.report.checks)
    assert np.log(spap.perplexity(result.model, tokens[-4:])) == pytest.approx(kept.held_out, rel=1e-5)


def test_a_measurement_that_is_not_finite_does_not_end_it(monkeypatch: pytest.MonkeyPatch):
    """Steps go on from the best weights, half as large and without gradients; that of the steps before it is kept."""
    real, made, given = loop.measure, [], []

    def measure(*arguments: Any) -> Any:
        made.append(real(*arguments))
        return made[-1] if len(made) != 3 else made[-1]._replace(loss=np.float32(np.nan))

    class Step:
        lower = loop.step.lower

        def __call__(self, job: Any, frozen: Any, read: Any, state: Any, rows: Any, rate: np.float32) -> Any:
            moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
            given.append((float(rate), all((moment == 0).all() for moment in moments)))
            return step(job, frozen, read, state, rows, rate)

    step = loop.step
    monkeypatch.setattr(loop, "measure", measure)
    monkeypatch.setattr(loop, "step", Step())
    checks = spap.finetune(tiny(), counting(), settings=SETTINGS, check_every=2, steps=8).report.checks
    assert [check.taken for check in checks] == [True, True, False, True, True]
    assert np.isnan(checks[2].held_out)
    expected = rates(SETTINGS.rate, 8) / np.repeat([1, 2], 4)
    assert [rate for rate, _ in given] == pytest.approx(expected.tolist())
    assert [number for number, (_, begun) in enumerate(given) if begun] == [0, 4]


@pytest.mark.parametrize("settings", [SETTINGS, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(("count", "sharers"), [(1, 1), (4, 2)])
def test_a_run_goes_on_from_a_stage_to_the_same_bits(settings: FinetuneSettings, count: int, sharers: int):
    model, seen = tiny(dtype="bfloat16"), []

    def restore(like: Any) -> Any:
        kept, checks = seen[1]
        placed = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), kept, like)
        assert [a.dtype for a in jax.tree.leaves(placed)] == [b.dtype for b in jax.tree.leaves(like)]
        return placed, checks

    with use_mesh(count, sharers):
        for stage in finetune.finetune_stages(model, counting(), None, settings):
            seen.append((jax.device_get((stage.state, stage.best)), stage.checks))
        resumed = [*finetune.finetune_stages(model, counting(), None, settings, restore)]
    assert [len(stage.checks) for stage in resumed] == [2, 3]
    assert same(jax.device_get((resumed[-1].state, resumed[-1].best)), seen[-1][0])
    for one, other in zip(resumed[-1].checks, seen[-1][1], strict=True):
        assert (one.losses, one.held_out, one.taken) == (other.losses, other.held_out, other.taken)


def beyond(mlp: dict) -> dict:
    """Return the weights beyond each layer's width, with zeros elsewhere."""
    idle = jnp.arange(max(WIDTHS))[None, :] >= jnp.array(WIDTHS)[:, None]  # [L, f]

    def one(array: jax.Array, axis: int) -> jax.Array:
        shape = [array.shape[0], *[1] * (array.ndim - 1)]
        shape[axis] = array.shape[axis]
        return jnp.where(idle.reshape(shape), array, 0)

    return {name: one(mlp[name], axis) for name, axis in CHANNEL_AXES.items() if name in mlp}


@pytest.mark.parametrize(
    ("variant", "settings"), [("llama_two_kv_heads", SETTINGS), ("opt_gelu", FULL)], ids=["lora", "full"]
)
def test_what_fills_up_stays_zero(variant: str, settings: FinetuneSettings):
    """The slope of gelu at zero is not zero, unlike that of relu and of gated MLPs; biases, only the second trains."""
    model = tiny(variant)
    mlp = model.params["layers"]["mlp"]
    mlp = mlp | {name: mlp[name] - idle for name, idle in beyond(mlp).items()}
    params = model.params | {"layers": model.params["layers"] | {"mlp": mlp}}
    narrow = spap.Model(model.config.with_widths(WIDTHS), params, model.source)
    result = spap.finetune(narrow, counting(), settings=settings)
    assert result.report.kept.step > 0
    trained = result.model.params["layers"]["mlp"]
    assert not any(idle.any() for idle in beyond(trained).values())
    assert all((trained[name] != mlp[name]).any() for name in CHANNEL_AXES if name in mlp and settings.full)
    assert (trained["down"] != mlp["down"]).any()


@pytest.mark.parametrize(
    ("tokens", "changes", "sentence"),
    [
        (counting(1), {}, "at least two sequences"),
        (counting(), {"full": True}, "lora_rank"),
        (counting(), {"lora_rank": 0}, "lora_rank"),
        (counting(4, 769), {}, "768 positions"),
    ],
)
def test_what_cannot_be_trained(tokens: np.ndarray, changes: dict, sentence: str):
    with pytest.raises(spap.UserError, match=sentence):
        spap.finetune(tiny(), tokens, settings=SETTINGS, **changes)


def test_a_teacher_with_another_vocabulary():
    with pytest.raises(spap.UserError, match="vocabulary"):
        spap.finetune(tiny(), counting(), teacher=spap.load("examples/llama-stories"), settings=SETTINGS)
