"""Plans for GPU servers that are not there: ``make gpu-check`` has their compiler."""

import numpy as np
import pytest
from plan_cases import CONFIG, FORWARD, JOINT, SHAPE

from spap_jax.planning.absent import use_absent_mesh
from spap_jax.planning.accelerators import mesh_named
from spap_jax.planning.plan import USABLE, plan

pytest.importorskip("jax_cuda12_plugin", reason="the compiler for GPUs is not installed: make gpu-check")


@pytest.mark.parametrize(("name", "model"), [("h100x1", 1), ("h100x8", 2)])
def test_a_run_of_a_small_model(name: str, model: int):
    mesh = mesh_named(name)
    with use_absent_mesh(mesh, model):
        found = plan(CONFIG, JOINT, SHAPE, np.dtype("float32"), USABLE * mesh.accelerator.memory)
    assert found.fits
    assert {"choose channels", "recover", "step", "measure"} <= found.programs.keys()
    assert not any(found.programs[name].operations.full for name in FORWARD)
