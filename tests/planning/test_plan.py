"""Plans of tiny models: what a dry run says is compared with the run itself."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from plan_cases import CONFIG, FORWARD, JOINT, SHAPE

from spap_jax.models import decoder
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import bytes_of
from spap_jax.planning import plan as planning
from spap_jax.planning.dry_run import recording
from spap_jax.planning.plan import plan, run_that_fits
from spap_jax.pruning.prune import MemoryStore, prune
from spap_jax.pruning.run import Dense, resolve
from spap_jax.pruning.widths import choose_widths

FLOAT32 = np.dtype(np.float32)


class Measured(MemoryStore):
    """Measures what the devices hold whenever a run gives it something, which it does not keep."""

    def __init__(self, config: Any, held: Callable[[], int]) -> None:
        super().__init__(config)
        self.sizes: list[int] = []
        self._held = held

    def put(self, index: int, layer: Any, report: Any) -> None:
        self.sizes.append(self._held())

    def save_state(self, tree: Any, checks: Any) -> None:
        self.sizes.append(self._held())


def live() -> int:
    """Return the bytes that a device holds of all arrays but random keys."""
    arrays = [a for a in jax.live_arrays() if not jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        ((1, 1), {"attention_sparsity": 0.5}),
        ((4, 2), {}),
        ((4, 1), {"schedule": "parallel", "joint_last": 1}),
        ((2, 1), {"allocation": "global", "joint_passes": 0}),
    ],
)
def test_a_dry_run_holds_what_the_run_holds(devices: tuple[int, int], changes: dict[str, Any]):
    params = jax.tree.map(np.asarray, decoder.init(CONFIG, jax.random.key(0)))
    dense = Dense(CONFIG, params, lambda index: jax.tree.map(lambda a: a[index], params["layers"]))
    tokens = np.random.default_rng(0).integers(0, 96, SHAPE).astype(np.int32)
    with mesh.use_mesh(devices[0] * devices[1], devices[1]):
        run = resolve(CONFIG, tokens, JOINT.replace(**changes))
        with recording() as dry:
            if run.settings.allocation == "global":
                choose_widths(run, dense)
            described = Measured(run.pruned, lambda: dry.held)
            prune(run, dense, described)
        before = live()
        actual = Measured(run.pruned, lambda: live() - before)
        prune(run, dense, actual)
    # A choice that was read on the host is counted twice as long as it lives.
    assert described.sizes == pytest.approx(actual.sizes, rel=0.03)
    assert dry.peak[1] > max(actual.sizes)
    assert dry.held == 0


def test_a_plan_of_a_run_with_joint_steps():
    with mesh.use_mesh(2):
        found = plan(CONFIG, JOINT, SHAPE, FLOAT32, room=1e9)
    name, most = found.peak
    assert found.fits
    assert not found._replace(room=most - 1).fits
    assert not found._replace(refused=name).fits
    assert {"choose channels", "step", "measure"} <= found.programs.keys()
    assert found.programs["choose channels"].operations.quick == 0
    assert not any(found.programs[name].operations.full for name in (*FORWARD, "accumulate"))
    assert found.programs["choose channels"].calls == CONFIG.layers
    assert found.run.joint
    assert found.programs["step"].calls == found.run.joint.steps
    assert found.result < bytes_of(decoder.shapes(CONFIG))
    assert found.unfinished > found.result  # the state of the steps has moments, and blocks are changed


def test_joint_steps_change_as_many_blocks_as_fit(monkeypatch: pytest.MonkeyPatch):
    config, tokens = dataclasses.replace(CONFIG, layers=7), np.zeros(SHAPE, np.int32)
    run = run_that_fits(config, tokens, JOINT, {}, room=1.0)
    assert run.tail.layers == 7  # CPUs have the memory of the machine
    monkeypatch.setattr(planning, "platform", lambda: "gpu")
    assert run_that_fits(config, tokens, JOINT.replace(joint_last=3), {}, room=1.0).tail.layers == 3
    for limit in range(8):
        monkeypatch.setattr(planning, "_steps_fit", lambda run, outer, last, *_, limit=limit: last <= limit)
        with pytest.warns(match="as many as fit") if limit < 7 else contextlib.nullcontext():
            assert run_that_fits(config, tokens, JOINT, {}, room=1.0).tail.layers == max(1, limit)


def test_blocks_fit_if_the_programs_of_the_steps_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "platform", lambda: "gpu")
    outer = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), decoder.shapes(CONFIG))
    with mesh.use_mesh(2):
        assert run_that_fits(CONFIG, np.zeros(SHAPE, np.int32), JOINT, outer, room=1e9).tail.layers == 2
        with pytest.warns(match="last 1 of 2"):
            assert run_that_fits(CONFIG, np.zeros(SHAPE, np.int32), JOINT, outer, room=1.0).tail.layers == 1
