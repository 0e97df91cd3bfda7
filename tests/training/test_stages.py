"""The state of the loop is kept and comes back in the parts that devices hold, to the same bits."""

from typing import Any

import jax
import pytest
from training_cases import FULL, SETTINGS, counting, same, tiny

from spap_jax.parallel import mesh
from spap_jax.settings import FinetuneSettings
from spap_jax.training import finetune


@pytest.mark.parametrize("settings", [SETTINGS, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(("count", "sharers"), [(1, 1), (4, 2)])
def test_a_run_goes_on_from_a_stage_to_the_same_bits(settings: FinetuneSettings, count: int, sharers: int):
    model, seen = tiny(dtype="bfloat16"), []

    def restore(like: Any) -> Any:
        kept, checks = seen[1]
        placed = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), kept, like)
        assert [a.dtype for a in jax.tree.leaves(placed)] == [b.dtype for b in jax.tree.leaves(like)]
        return placed, checks

    with mesh.use_mesh(count, sharers):
        for stage in finetune.finetune_stages(model, counting(), None, settings):
            seen.append((jax.device_get((stage.state, stage.best)), stage.checks))
        resumed = [*finetune.finetune_stages(model, counting(), None, settings, restore)]
    assert [len(stage.checks) for stage in resumed] == [2, 3]
    assert same(jax.device_get((resumed[-1].state, resumed[-1].best)), seen[-1][0])
    for one, other in zip(resumed[-1].checks, seen[-1][1], strict=True):
        assert (one.losses, one.held_out, one.taken) == (other.losses, other.held_out, other.taken)
