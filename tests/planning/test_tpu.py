"""Programs of a run, compiled for a TPU slice that is not there: ``make tpu-check`` has the compiler, libtpu.

Of the large model the programs are compiled whose memory or communication could get out of hand; all of them would take
too long.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from jax.sharding import get_mesh
from loads import LLAMA, config_of
from test_slices import check_looping

from spap_jax.planning import memory, slices
from spap_jax.planning.accelerators import mesh_named
from spap_jax.planning.compiled import Collective, Compiled, accepted, collectives, needs
from spap_jax.planning.described import bytes_here
from spap_jax.planning.plan import USABLE, Request
from spap_jax.planning.programs import Program, programs
from spap_jax.planning.workload import Workload
from spap_jax.settings import EffortName, PruneSettings

pytest.importorskip("libtpu", reason="the TPU compiler is not installed: make tpu-check")

MESH = mesh_named("v5e-8")
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 128}
LARGE = ("enter_mlp", "accumulate", "refit_weights", "choose_channels", "recover", "step", "measure")

FOREIGN = re.compile(r"\bf64\[|\bc128\[|callback|outfeed|infeed|SendToHost|RecvFromHost")
"""Numbers of a wider type, and calls of the host."""


class Found(NamedTuple):
    load: Workload
    program: Program
    said: Compiled
    text: str

    @property
    def collectives(self) -> list[Collective]:
        return collectives(self.text)


def compiled(
    config, names: tuple[str, ...], sequences: int, length: int, effort: EffortName = "default"
) -> Iterator[Found]:
    load = Request(config, PruneSettings(effort=effort), sequences, length, 2).on(MESH)
    with slices.described(MESH) as device:
        for program in programs(load, device):
            if not names or program.name in names:
                executable = program.lowered().compile()
                yield Found(load, program, accepted(program, executable, 0.0), executable.as_text())


def check(found: Found) -> None:
    """Check what holds for every program: it fits, it calls nothing foreign, and gathers nothing large."""
    load, said = found.load, found.said
    f, config = load.dense.intermediate, load.dense
    assert said.memory <= USABLE * MESH.accelerator.memory
    assert FOREIGN.search(found.text) is None
    stream = 4 * load.fitted.count * load.fitted.size * config.width
    for each in found.collectives:
        if each.kind == "all-gather":
            assert each.size < min(4 * f * f, stream), each


@pytest.fixture(scope="module")
def small() -> list[Found]:
    return list(compiled(config_of(LLAMA, **SMALL), (), 64, 512))


def test_collectives_of_a_tpu_program_are_read():
    with slices.described(MESH):
        check_looping(get_mesh())  # type: ignore[arg-type]


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
    everything = list(compiled(config_of(json.loads(file.read_text())), names, 128, 2048, effort))
    planned = memory.device_memory(everything[0].load)
    largest = needs([found.said for found in everything])
    assert largest.keys() <= planned.keys()
    for phase, needed in largest.items():
        assert sum(planned[phase].values()) == pytest.approx(needed, rel=0.15), phase
    for found in everything:
        if found.program.name != "measure":  # which gathers the head, for the whole vocabulary
            check(found)
        f = found.load.dense.intermediate
        if found.program.name == "choose_channels":
            assert found.said.temporaries <= 6 * 4 * f * f / MESH.devices
