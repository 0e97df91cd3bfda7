"""A run resumed from the steps of an earlier one ends with the same bits, wherever the earlier one stopped."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from pruning_cases import SETTINGS, random_tokens, tiny

from spap_jax import devices
from spap_jax.models.decoder import Params
from spap_jax.pruning.pipeline import Begun, Step, prune_layers, together
from spap_jax.pruning.report import LayerReport, SweepReport, report_of
from spap_jax.settings import PruneSettings

LAYERS = 3
QUICK = SETTINGS.replace(rounds=1, steps=3)
SWEPT = QUICK.replace(rounds=0, attention_sparsity=0.5, sweeps=2, sweep_steps=3, sweep_learning_rate=0.01)
SPREAD = QUICK.replace(held_out=0.0, batch_tokens=32)
WAVES = SPREAD.replace(schedule="parallel")
TOGETHER = SWEPT.replace(sweep_blocks=0)
CASES = [
    ("llama_two_kv_heads", SWEPT, 1),
    ("llama_two_kv_heads", TOGETHER, 1),
    ("opt_350m_like", SPREAD, 2),
    ("opt_350m_like", WAVES, 2),
]


def steps(variant: str, settings: PruneSettings, count: int, begun: Begun | None = None) -> list[Step]:
    model = tiny(variant)
    with devices.sharing(count):
        found = prune_layers(
            model.config, model.params, lambda i: jax.tree.map(lambda a: a[i], model.params["layers"]),
            random_tokens(), settings, begun,
        )  # fmt: skip
        return [step._replace(layer=jax.device_get(step.layer)) for step in found]


def through_json(report: LayerReport | SweepReport) -> LayerReport | SweepReport:
    return report_of(json.loads(json.dumps(dataclasses.asdict(report))))


def untimed(report: LayerReport | SweepReport) -> LayerReport | SweepReport:
    return dataclasses.replace(report, seconds={})


def same(one: Params, other: Params) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other))


@pytest.mark.parametrize(
    ("variant", "settings", "count"),
    CASES,
    ids=["heads, sweeps", "sweeps over all blocks", "two devices", "two devices, in waves"],
)
def test_it_ends_with_the_same_bits(variant: str, settings: PruneSettings, count: int):
    whole = steps(variant, settings, count)
    assert [step.fresh for step in whole] == [True] * LAYERS * (1 + settings.decided.sweeps)
    assert {step.report.layer for step in whole if step.final} == set(range(LAYERS))
    if settings.decided.sweeps == 2:
        taken = {step.report.taken for step in whole if isinstance(step.report, SweepReport)}
        assert taken == {True, False} or settings.decided.sweep_blocks == 0
    stops = {1, LAYERS - 1, LAYERS, LAYERS + 2, 2 * LAYERS, 2 * LAYERS + 1, len(whole)} & {*range(len(whole) + 1)}
    for made in {stop for stop in stops if stop <= LAYERS or stop % together(LAYERS, settings) == 0}:
        newest = {step.report.layer: step.layer for step in whole[:made]}
        begun = Begun([through_json(step.report) for step in whole[:made]], newest.__getitem__)
        again = steps(variant, settings, count, begun)
        assert [untimed(step.report) for step in again] == [untimed(step.report) for step in whole]
        assert [(step.fresh, step.final) for step in again] == [(n >= made, s.final) for n, s in enumerate(whole)]
        for one, other in zip(whole, again, strict=True):
            assert same(one.layer, other.layer) or not (other.final or other.fresh)


def test_a_step_that_was_made_is_not_made_again():
    """Weights saved by an earlier run are used unchanged, whatever they are."""
    whole = steps(*CASES[2])
    other = jax.tree.map(lambda a: a + 1, whole[0].layer)
    again = steps(*CASES[2], Begun([whole[0].report], {0: other}.__getitem__))
    assert same(again[0].layer, other)
    assert not same(again[1].layer, whole[1].layer)
