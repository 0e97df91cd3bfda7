"""A run that goes on from what an interrupted one has kept ends with the same bits, wherever that one stopped."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from pruning_cases import SETTINGS, one_layer, random_tokens, resolved, tiny

from spap_jax.checkpoint.store import FinishedBlock
from spap_jax.models import DecoderConfig, Params
from spap_jax.parallel import mesh
from spap_jax.pruning.prune import MemoryStore, prune
from spap_jax.pruning.run import Dense
from spap_jax.report.schema import Check, LayerReport

LAYERS = 3
QUICK = SETTINGS.replace(rounds=1)
JOINT = QUICK.replace(rounds=0, attention_sparsity=0.5, joint_passes=4)
SPREAD = QUICK.replace(held_out=0.0, batch_tokens=32)
CASES = {
    "heads, joint steps": ("llama_two_kv_heads", JOINT, 1, 0.01),
    "last blocks far away, two devices": ("llama_two_kv_heads", JOINT.replace(joint_last=2), 2, 0.4),
    "two devices": ("opt_350m_like", SPREAD, 2, 0.01),
    "parallel schedule, two devices": ("opt_350m_like", SPREAD.replace(schedule="parallel"), 2, 0.01),
}


class KeptStore(MemoryStore):
    """What a run has kept, of which another run goes on from the first ``blocks`` and ``states``."""

    def __init__(self, config: DecoderConfig, earlier: "KeptStore | None" = None, blocks: int = 0, states: int = 0):
        super().__init__(config)
        self.kept: list[FinishedBlock] = earlier.kept[:blocks] if earlier else []
        self.states: list[tuple[Any, Any]] = earlier.states[:states] if earlier else []
        self.layers[: len(self.kept)] = [block.params for block in self.kept]
        self._found = len(self.kept)

    def block(self, index: int) -> FinishedBlock | None:
        return self.kept[index] if index < self._found else None

    def put(self, index: int, layer: Params, report: dict[str, Any]) -> None:
        super().put(index, layer, report)
        self.kept.append(FinishedBlock(self.layers[index], json.loads(json.dumps(report))))

    def save_state(self, tree: Any, checks: Any) -> None:
        if len(checks) > 1:  # after steps
            self.states.append((jax.device_get(tree), json.loads(json.dumps(checks))))

    def restore_state(self, like: Any) -> tuple[Any, Any] | None:
        if not self.states:
            return None
        state, checks = self.states[-1]
        return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), state, like), checks


def made(case: str, *earlier: Any) -> tuple[KeptStore, list[Any], list[bool]]:
    """Return what a run keeps, its reports without their times, and whether each was made anew."""
    variant, settings, count, rate = CASES[case]
    model, fresh = tiny(variant), []
    with mesh.use_mesh(count):
        run = resolved(model.config, random_tokens(), settings, steps=3, joint_tokens=64, joint_rate=rate)
        dense = Dense(model.config, model.params, lambda index: one_layer(model, index))
        store = KeptStore(run.pruned, *earlier)
        reports = prune(run, dense, store, lambda _, anew: fresh.append(anew))
    untimed = [dataclasses.replace(r, seconds={} if isinstance(r, LayerReport) else 0.0) for r in reports]
    return store, untimed, fresh


@pytest.mark.parametrize("case", CASES)
def test_it_ends_with_the_same_bits(case: str):
    whole, reports, fresh = made(case)
    assert fresh == [True] * len(reports)
    checks = [report for report in reports if isinstance(report, Check)]
    assert len(whole.states) == max(0, len(checks) - 1)  # none before the first step
    assert any(check.taken for check in checks[1:]) or len(checks) == 1  # that of a run without joint steps
    stops = [(1, 0), (LAYERS, 0)] + [(LAYERS, states) for states in {1, 2, len(whole.states)} if checks[1:]]
    for blocks, states in stops:
        again, found, anew = made(case, whole, blocks, states)
        assert found == reports
        there = blocks + (states and states + 1)
        assert anew == [number >= there for number in range(len(reports))]
        for one, other in zip(whole.layers, again.layers, strict=True):
            assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_a_block_that_was_made_is_not_made_again():
    """What an earlier run kept is used unchanged, whatever it is."""
    whole, *_ = made("two devices")
    block = whole.kept[0]
    whole.kept[0] = block._replace(params=jax.tree.map(lambda a: a + 1, block.params))
    again, *_ = made("two devices", whole, 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.layers[0], whole.kept[0].params))
    assert not jax.tree.all(jax.tree.map(np.array_equal, again.layers[1], whole.layers[1]))
