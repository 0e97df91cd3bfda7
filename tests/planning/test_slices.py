"""TPU slices that are not there, and what is read from programs that are compiled for them."""

import math
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spap_jax.errors import UserError
from spap_jax.planning import slices
from spap_jax.planning.accelerators import ACCELERATORS, mesh_named
from spap_jax.planning.compiled import Collective, collectives, sent


@pytest.mark.parametrize(
    ("version", "chips", "shape", "host"),
    [
        ("v5e", 1, (1, 1), (1, 1, 1)),
        ("v5e", 8, (2, 4), (2, 4, 1)),
        ("v5e", 16, (4, 4), (2, 2, 1)),
        ("v6e", 4, (2, 2), (2, 2, 1)),
        ("v6e", 128, (8, 16), (2, 2, 1)),
        ("v5p", 32, (2, 4, 4), (2, 2, 1)),
        ("v5p", 64, (4, 4, 4), (2, 2, 1)),
        ("v5p", 768, (8, 8, 12), (2, 2, 1)),
    ],
)
def test_shapes_of_slices_and_hosts(version: str, chips: int, shape: tuple[int, ...], host: tuple[int, ...]):
    assert slices.shape_of(version, chips) == shape
    assert slices.host_of(version, shape) == host


@pytest.mark.parametrize("version", ["v5e", "v5p", "v6e"])
def test_every_slice_has_a_shape(version: str):
    for chips in ACCELERATORS[version].sizes:
        assert math.prod(slices.shape_of(version, chips)) == chips
        mesh = mesh_named(f"{version}-{chips * ACCELERATORS[version].named}")
        assert math.prod(slices.host_of(version, slices.shape_of(version, chips))) == mesh.host_devices


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h100x8", "programs cannot be compiled for h100x8 here: the compiler for GPUs needs the device"),
        ("v5e-8", "--compile needs the TPU compiler, which is not installed: install it with pip install"),
    ],
)
def test_meshes_without_a_compiler(name: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # as if it were not installed
    with pytest.raises(UserError, match=said):
        slices.devices_of(mesh_named(name))


def looping(mesh: Mesh) -> str:
    """Compile a program that sums in a loop of seven turns and then gathers, for four or more devices."""

    def own(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        summed = jax.lax.fori_loop(0, 7, lambda _, total: jax.lax.psum(total @ total.T @ total, "data") / 4, rows)
        return summed, jax.lax.all_gather(rows, "data")

    given = PartitionSpec("data")
    program = jax.shard_map(own, mesh=mesh, in_specs=given, out_specs=(given, PartitionSpec()), check_vma=False)
    rows = jax.ShapeDtypeStruct((mesh.size * 256, 128), jnp.float32, sharding=NamedSharding(mesh, given))
    return jax.jit(program).lower(rows).compile().as_text() or ""


def check_looping(mesh: Mesh) -> None:
    text = looping(mesh)
    found = collectives(text)
    assert Collective("all-reduce", (("f32", (256, 128)),), 7) in found
    [gathered] = [each for each in found if each.kind == "all-gather"]
    assert (gathered.times, gathered.size) == (1, mesh.size * 256 * 128 * 4)
    assert len(found) == 2
    assert sent(text) == {"all-reduce": 7 * 256 * 128 * 4, "all-gather": gathered.size}


def test_collectives_are_read_with_the_turns_of_their_loops():
    check_looping(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)))
