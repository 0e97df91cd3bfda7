"""Programs of a run, compiled for a TPU slice that is not there: ``make tpu-check`` has the compiler, libtpu.

Of the large model the programs are compiled whose memory or communication could get out of hand; all of them would take
too long.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from absent_devices import SMALL, Found, check, compiled
from jax.sharding import get_mesh
from loads import LLAMA, config_of
from test_slices import check_looping

from spap_jax.parallel.mesh import arranged
from spap_jax.planning import absent, memory
from spap_jax.planning.accelerators import mesh_named
from spap_jax.planning.compiled import needs
from spap_jax.planning.described import bytes_here
from spap_jax.settings import EffortName

pytest.importorskip("libtpu", reason="the TPU compiler is not installed: make tpu-check")

MESH = mesh_named("v5e-8")
LARGE = (
    "enter_mlp", "accumulate", "refit_weights", "choose_channels", "held_out_errors", "recover", "step", "measure",
)  # fmt: skip


@pytest.fixture(scope="module")
def small() -> list[Found]:
    return list(compiled(config_of(LLAMA, **SMALL), MESH, (), 64, 512))


def test_collectives_of_a_tpu_program_are_read():
    with absent.described(MESH):
        check_looping(get_mesh())  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "sharers"), [("v6e-16", 2), ("v6e-64", 16), ("v5p-128", 8)])
def test_groups_may_take_up_a_part_of_an_axis(name: str, sharers: int):
    there = absent.devices_of(mesh_named(name))
    groups = arranged(there, sharers).devices
    assert groups.shape == (len(there) // sharers, sharers)
    for group in groups:  # each is connected
        near = [sum(abs(a - b) for a, b in zip(x.coords, y.coords, strict=True)) for x, y in pairwise(group)]
        assert max(near) <= 2


def test_some_chips_of_a_slice_that_form_no_grid():
    there = absent.devices_of(MESH)[:3]
    assert arranged(there, 1).devices[:, 0].tolist() == there


def test_all_programs_of_a_small_model(small: list[Found]):
    assert {"choose_channels", "recover", "step", "measure"} <= {found.program.name for found in small}
    for found in small:
        check(found)


def test_steps_gather_a_block_at_a_time(small: list[Found]):
    [step] = [found for found in small if found.program.name == "step"]
    moved = step.program.arguments[2].moved
    whole = MESH.devices * bytes_here(moved) // 2  # of the MLPs of all blocks, in bfloat16
    gathered = [each.size for each in step.collectives if each.kind == "all-gather"]
    assert 0 < max(gathered) < whole / 2  # one of four blocks, with its attention


@pytest.mark.parametrize("effort", ["default", "low"])
def test_an_8b_model(effort: EffortName):
    """Programs of every phase: the plan's memory is within 15 % of what the compiler says of the largest."""
    file = Path(__file__).parents[1] / "configs" / "llama-3.1-8b.json"
    names = LARGE if effort == "default" else ("enter_mlp", "step", "measure")
    everything = list(compiled(config_of(json.loads(file.read_text())), MESH, names, 128, 2048, effort))
    planned = memory.device_memory(everything[0].load)
    largest = needs([found.said for found in everything])
    assert largest.pop("errors", 0) <= largest.get("statistics", 0)  # so no plan counts them
    assert largest.keys() <= planned.keys()
    for phase, needed in largest.items():
        assert sum(planned[phase].values()) == pytest.approx(needed, rel=0.15), phase
    for found in everything:
        if found.program.name != "measure":  # which gathers the head, for the whole vocabulary
            check(found)
        f = found.load.dense.intermediate
        if found.program.name == "choose_channels":
            assert found.said.temporaries <= 6 * 4 * f * f / MESH.devices
