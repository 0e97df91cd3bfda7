"""A run resumed from the steps of an earlier one ends with the same bits, wherever the earlier one stopped."""

import dataclasses
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest
from pruning_cases import SETTINGS, one_layer, random_tokens, tiny

from spap_jax.models.decoder import Params
from spap_jax.parallel import mesh
from spap_jax.pruning.pipeline import prune_layers
from spap_jax.pruning.prune_report import report_of
from spap_jax.pruning.run import NOTHING, Begun, resolve
from spap_jax.report.schema import Check, LayerReport
from spap_jax.settings import PruneSettings
from spap_jax.training import loop as engine

LAYERS = 3
QUICK = SETTINGS.replace(rounds=1, steps=3)
JOINT = QUICK.replace(
    rounds=0, attention_sparsity=0.5, joint_passes=4, joint_tokens=64, joint_learning_rate=0.01, moment_dtype="bfloat16"
)
SPREAD = QUICK.replace(held_out=0.0, batch_tokens=32)
WAVES = SPREAD.replace(schedule="parallel")
GROUPS = QUICK.replace(rounds=0, joint_passes=4, joint_tokens=64, joint_blocks=1, joint_last=2, joint_learning_rate=0.4)
"""Steps so large that the first of each group lead far away, and others begin again half as large."""
CASES = [
    ("llama_two_kv_heads", JOINT, 1),
    ("llama_two_kv_heads", GROUPS, 2),
    ("opt_350m_like", SPREAD, 2),
    ("opt_350m_like", WAVES, 2),
]


class Made(NamedTuple):
    """A step, with what it keeps and the blocks that it settles."""

    report: LayerReport | Check
    kept: Params
    final: dict[int, Params]
    fresh: bool


def steps(variant: str, settings: PruneSettings, count: int, begun: Begun = NOTHING) -> list[Made]:
    model = tiny(variant)
    with mesh.use_mesh(count):
        run = resolve(model.config, model.params, lambda i: one_layer(model, i), random_tokens(), settings)
        found = prune_layers(dataclasses.replace(run, begun=begun))
        return [Made(s.report, jax.device_get(s.kept()), jax.device_get(dict(s.final)), s.fresh) for s in found]


def through_json(report: LayerReport | Check) -> LayerReport | Check:
    return report_of(json.loads(json.dumps(dataclasses.asdict(report))))


def untimed(report: LayerReport | Check) -> LayerReport | Check:
    return dataclasses.replace(report, seconds={} if isinstance(report, LayerReport) else 0.0)  # type: ignore[arg-type]


def same(one: Params, other: Params) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other))


@pytest.mark.parametrize(
    ("variant", "settings", "count"),
    CASES,
    ids=["heads, joint steps", "groups of blocks, two devices", "two devices", "two devices, in waves"],
)
def test_it_ends_with_the_same_bits(variant: str, settings: PruneSettings, count: int):
    whole = steps(variant, settings, count)
    assert [step.fresh for step in whole] == [True] * len(whole)
    assert {index for step in whole for index in step.final} == set(range(LAYERS))
    if jointly := settings.passes > 0:
        assert len(whole) > LAYERS + 3
        opening, *checks = [step.report for step in whole if isinstance(step.report, Check)]
        assert any(check.taken for check in checks)
        assert (max(check.held_out for check in checks) > 1.5 * opening.held_out) == (settings is GROUPS)
    stops = {1, LAYERS - 1, LAYERS, LAYERS + 1, LAYERS + 3, LAYERS + 4, len(whole)}
    for made in {stop for stop in stops if stop <= len(whole)}:
        begun = Begun([through_json(step.report) for step in whole[:made]], lambda number: whole[number].kept)
        again = steps(variant, settings, count, begun)
        assert [untimed(step.report) for step in again] == [untimed(step.report) for step in whole]
        assert [step.fresh for step in again] == [number >= made for number in range(len(whole))]
        for one, other in zip(whole, again, strict=True):
            assert one.final.keys() == other.final.keys()
            assert all(same(one.final[index], other.final[index]) for index in one.final)
            assert not other.fresh or same(one.kept, other.kept)
    assert jointly == (len(whole) > LAYERS)


def test_a_step_that_was_made_is_not_made_again():
    """Weights saved by an earlier run are used unchanged, whatever they are."""
    whole = steps(*CASES[2])
    other = jax.tree.map(lambda a: a + 1, whole[0].kept)
    again = steps(*CASES[2], Begun([whole[0].report], {0: other}.__getitem__))
    assert same(again[0].final[0], other)
    assert not same(again[1].final[1], whole[1].final[1])


def test_a_state_is_read_when_the_steps_need_it(monkeypatch: pytest.MonkeyPatch):
    """Check that it is not in memory beside the state that the steps begin with, which is as large."""
    whole, order = steps("llama_two_kv_heads", JOINT, 1), []
    made = LAYERS + 2

    def read(number: int) -> Params:
        order.append(number)
        return whole[number].kept

    begin = engine.begin
    monkeypatch.setattr(engine, "begin", lambda *given: order.append("begin") or begin(*given))
    steps("llama_two_kv_heads", JOINT, 1, Begun([step.report for step in whole[:made]], read))
    assert order == [*range(LAYERS), "begin", made - 1]
