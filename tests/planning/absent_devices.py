"""Programs of a run, compiled for devices that are not there, and what holds for all of them."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from spap_jax.planning import absent
from spap_jax.planning.accelerators import Mesh
from spap_jax.planning.compiled import Collective, Compiled, accepted, collectives
from spap_jax.planning.plan import USABLE, Request
from spap_jax.planning.programs import Program, programs
from spap_jax.planning.workload import Workload
from spap_jax.settings import EffortName, PruneSettings

SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 128}

_FOREIGN = re.compile(r"\bf64\[|\bc128\[|callback|outfeed|infeed|SendToHost|RecvFromHost")
"""Numbers of a wider type, and calls of the host."""


class Found(NamedTuple):
    mesh: Mesh
    load: Workload
    program: Program
    said: Compiled
    text: str

    @property
    def collectives(self) -> list[Collective]:
        return collectives(self.text)


def compiled(
    config, mesh: Mesh, names: tuple[str, ...], sequences: int, length: int, effort: EffortName = "default"
) -> Iterator[Found]:
    load = Request(config, PruneSettings(effort=effort), sequences, length, 2).on(mesh)
    with absent.described(mesh) as device:
        for program in programs(load, device):
            if not names or program.name in names:
                executable = program.lowered().compile()
                yield Found(mesh, load, program, accepted(program, executable, 0.0), executable.as_text())


def check(found: Found) -> None:
    """Check what holds for every program: it fits, it calls nothing foreign, and gathers nothing large."""
    load, said = found.load, found.said
    f, config = load.dense.intermediate, load.dense
    assert said.memory <= USABLE * found.mesh.accelerator.memory
    assert _FOREIGN.search(found.text) is None
    stream = 4 * load.fitted.count * load.fitted.size * config.width
    for each in found.collectives:
        if each.kind == "all-gather":
            assert each.size < min(4 * f * f, stream), each
