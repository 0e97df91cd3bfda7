"""Plans for TPU slices that are not there: ``make tpu-check`` has their compiler."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from plan_cases import CONFIG, FORWARD, JOINT

from spap_jax.parallel.mesh import arranged
from spap_jax.planning.absent import devices_of, use_absent_mesh
from spap_jax.planning.accelerators import mesh_named
from spap_jax.planning.plan import USABLE, plan

pytest.importorskip("libtpu", reason="the TPU compiler is not installed: make tpu-check")


@pytest.mark.parametrize(("name", "sharers"), [("v6e-16", 2), ("v6e-64", 16), ("v5p-128", 8)])
def test_groups_may_take_up_a_part_of_an_axis(name: str, sharers: int):
    there = devices_of(mesh_named(name))
    groups = arranged(there, sharers).devices
    assert groups.shape == (len(there) // sharers, sharers)
    for group in groups:  # each is connected
        near = [sum(abs(a - b) for a, b in zip(x.coords, y.coords, strict=True)) for x, y in pairwise(group)]
        assert max(near) <= 2


def test_some_chips_of_a_slice_that_form_no_grid():
    there = devices_of(mesh_named("v5e-8"))[:3]
    assert arranged(there, 1).devices[:, 0].tolist() == there


@pytest.mark.parametrize(("name", "model"), [("v5e-1", 1), ("v5e-8", 1), ("v5e-8", 2)])
def test_a_run_of_a_small_model(name: str, model: int):
    mesh = mesh_named(name)
    with use_absent_mesh(mesh, model):
        found = plan(CONFIG, JOINT, (64, 64), np.dtype("float32"), USABLE * mesh.accelerator.memory)
    assert found.fits
    assert {"choose channels", "recover", "step", "measure"} <= found.programs.keys()
    assert not any(found.programs[name].operations.full for name in FORWARD)


def test_eight_devices_share_the_sequences_and_the_rows_of_the_solver():
    needed, settings = {}, JOINT.replace(joint_passes=0, rounds=0)
    config = dataclasses.replace(CONFIG, positions=512, width=256, intermediate=1024, head_dim=32)
    for name in ("v5e-1", "v5e-8"):
        with use_absent_mesh(mesh_named(name)):
            found = plan(config, settings, (64, 512), np.dtype("float32"), 1e9)
        needed[name] = {program: each.memory for program, each in found.programs.items()}
    for program in ("enter mlp", "accumulate", "choose channels", "leave mlp"):
        assert needed["v5e-8"][program] < needed["v5e-1"][program] / 2.5, program


def test_joint_steps_change_as_many_blocks_as_fit():
    with use_absent_mesh(mesh_named("v5e-1")), pytest.warns(match="last 1 of 2"):
        found = plan(CONFIG, JOINT, (64, 64), np.dtype("float32"), 1.0)
    assert not found.fits
    assert found.run.tail.layers == 1
