"""Programs of a run, compiled for a GPU server that is not there: ``make gpu-check`` has the compiler."""

import json
from pathlib import Path

import pytest
from absent_devices import SMALL, check, compiled
from jax.sharding import get_mesh
from loads import LLAMA, config_of
from test_slices import check_looping

from spap_jax.planning import absent, memory
from spap_jax.planning.accelerators import mesh_named
from spap_jax.planning.compiled import needs

pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is not installed: make gpu-check")

MESH = mesh_named("h100x8")


def test_collectives_of_a_gpu_program_are_read():
    with absent.described(MESH):
        check_looping(get_mesh())  # type: ignore[arg-type]


def test_all_programs_of_a_small_model():
    small = list(compiled(config_of(LLAMA, **SMALL), MESH, (), 64, 512))
    assert {"choose_channels", "recover", "step", "measure"} <= {found.program.name for found in small}
    assert any("__cudnn$fmha" in found.text for found in small if found.program.name == "step")
    for found in small:
        check(found)


def test_an_8b_model():
    """The plan's memory is within 15 % of what the compiler says of the largest of these programs in each phase."""
    file = Path(__file__).parents[1] / "configs" / "llama-3.1-8b.json"
    names = ("enter_mlp", "choose_channels", "recover", "step")
    everything = list(compiled(config_of(json.loads(file.read_text())), MESH, names, 128, 2048))
    planned = memory.device_memory(everything[0].load)
    for phase, needed in needs([found.said for found in everything]).items():
        assert sum(planned[phase].values()) == pytest.approx(needed, rel=0.15), phase
    for found in everything:
        check(found)
