"""The counts of a plan with sharded weights, compared with XLA's analysis of the partitioned programs.

As in ``test_compiled.py``, but with attention as on an accelerator, where each device computes its own heads at once.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from phases import LLAMA, collectives, config_of, described, load_of
from test_compiled import one_block
from test_plan import request_of

from spap_jax.backend import traced_for
from spap_jax.errors import UserError
from spap_jax.planning import memory, operations, shared, traffic
from spap_jax.planning.accelerators import mesh_named
from spap_jax.planning.plan import notes, plan
from spap_jax.planning.workload import Workload
from spap_jax.settings import PruneSettings

DATA, MODEL = 2, 4


@pytest.fixture(scope="module")
def load() -> Workload:
    config = config_of(LLAMA, num_attention_heads=8, num_key_value_heads=4)
    tokens = {"batch_tokens": 512, "step_tokens": DATA * 512, "joint_tokens": DATA * 512}
    found = load_of(config, 4 * DATA, 512, DATA, 2, MODEL, **tokens)
    return dataclasses.replace(found, heads_at_once=config.heads // MODEL)


@pytest.fixture(scope="module")
def once(load: Workload) -> Workload:
    """The workload with one turn of every loop, which is what XLA counts."""
    settings = load.settings.replace(rounds=1, steps=1)
    parts = {name: dataclasses.replace(getattr(load, name), count=DATA) for name in ("fitted", "held_out")}
    return dataclasses.replace(load, settings=settings, **parts)


@pytest.fixture(scope="module")
def programs(load: Workload) -> Iterator[dict[str, Any]]:
    with traced_for("gpu"), described(load) as phases:
        names = ("enter_mlp", "leave_mlp", "statistics", "recover", "errors", "joint_step", "joint_check")
        yield {name: getattr(phases, name)().compile() for name in names}


def test_operations(once: Workload, programs: dict[str, Any]):
    def flops(*names: str) -> float:
        return sum(programs[name].cost_analysis()["flops"] for name in names)

    near = functools.partial(pytest.approx, rel=0.07)
    assert flops("enter_mlp", "leave_mlp") == near(operations.streams_operations(once) / 2)
    assert flops("statistics") == near(operations.statistics_operations(once))
    k, d = once.narrow.intermediate, once.narrow.width
    # One panel of the solver is counted, and little of the loop that inverts its small system.
    shares = once.sharing_rows(k)
    more = operations.solution_operations(k, d, k, shares) - operations.pivot_operations(k, d, 256, shares)
    assert flops("recover") == near(operations.alternating_operations(once) - more - 2 * 256**3)
    assert flops("errors") == near(operations.errors_operations(once, once.held_out))
    assert flops("joint_step") == near(operations.joint_step_operations(one_block(once)))
    assert flops("joint_check") == near(operations.joint_check_operations(one_block(once)))


def test_bytes_between_devices(once: Workload, programs: dict[str, Any]):
    """Reductions over the sequences and exchanges among devices that share the weights are counted together."""

    def found(*names: str) -> dict[str, int]:
        kinds = sum((collectives(programs[name], DATA) for name in names), start=Counter())
        return {kind: size for kind, size in kinds.items() if kind not in ("collective-permute", "all-to-all")}

    near = functools.partial(pytest.approx, rel=0.02)
    exchanged = shared.exchanged(once)
    assert found("enter_mlp", "leave_mlp") == near({"all-reduce": exchanged["streams"]["all-reduce"] / 2})
    assert found("statistics") == near(dict(traffic.statistics_collectives(once) + exchanged["statistics"]))
    fitted = traffic.step_collectives(once) + traffic.closed_form_collectives(once)
    assert found("recover") == near(dict(exchanged["alternating"] + fitted))
    assert found("errors") == near({"all-reduce": exchanged["errors"]["all-reduce"] / once.stages})


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("statistics", memory.summing_bytes),
        ("recover", lambda load: sum(memory.recovering_bytes(load))),
        ("joint_step", lambda load: memory.joint_bytes(load)[1]),
        ("joint_check", lambda load: memory.checking_bytes(load)[1]),
    ],
)
def test_memory_of_workspaces(name: str, counted, load: Workload, programs: dict[str, Any]):
    temporary = programs[name].memory_analysis().temp_size_in_bytes
    assert 0.8 * temporary < counted(load) < 1.35 * temporary


def test_memory_that_is_held(load: Workload, programs: dict[str, Any]):
    def held(name: str, field: str) -> int:
        return getattr(programs[name].memory_analysis(), f"{field}_size_in_bytes")

    fitted = memory.streams_bytes(load) * load.fitted.tokens / load.tokens
    block = load.weight_bytes * memory.block_elements(load.mine.dense)
    assert block < 1.05 * load.weight_bytes * memory.block_elements(load.dense) / MODEL
    assert held("enter_mlp", "argument") == pytest.approx(fitted + block, rel=0.01)
    f, d = load.dense.intermediate, load.dense.width
    assert held("statistics", "output") == pytest.approx(memory.moments_bytes(f, d) / (DATA * MODEL), rel=0.03)
    spread = load.narrow.intermediate * d / MODEL  # the output projection leaves the solver divided among all devices
    found = memory._mlp_elements(load.mine.narrow) - spread * (1 - 1 / DATA)
    assert held("recover", "output") == pytest.approx(4 * found, rel=0.01)


def test_a_model_that_fits_no_device_fits_those_that_share_it():
    request = request_of("llama-3.1-405b", settings=PruneSettings(round_to=8))
    mesh = mesh_named("v5p-64")
    alone, shared_ = plan(request, mesh), plan(request, mesh.shared_among(8))
    assert alone.peak[1] > 1.05 * shared_.peak[1]
    # Along both axes, whichever way they are split.
    assert shared_.memory["joint steps"]["weights"] == pytest.approx(alone.memory["joint steps"]["weights"], rel=0.01)
    assert shared_.memory["statistics"]["weights"] < 0.8 * alone.memory["statistics"]["weights"]
    assert shared_.memory["selection"]["solver"] == alone.memory["selection"]["solver"]  # divided along both axes
    work = [{phase.name: phase for phase in each.phases} for each in (alone, shared_)]
    assert work[0]["streams"].sent_bytes == 0 < work[1]["streams"].sent_bytes
    assert work[0]["selection"].operations == work[1]["selection"].operations


def test_what_cannot_be_divided_is_said():
    request = request_of("llama-3.1-8b")
    planned = plan(request, mesh_named("v5e-8").shared_among(4))
    assert any("The 10035 channels kept cannot be divided among 4 devices" in note for note in notes(planned))
    with pytest.raises(UserError, match="the 8 devices of v5e-8 cannot be divided into groups of 3"):
        mesh_named("v5e-8").shared_among(3)
