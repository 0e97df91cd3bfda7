"""Devices that are not there, and what is read from programs that are compiled for them."""

import math
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spap_jax.errors import UserError
from spap_jax.planning import absent, servers, slices
from spap_jax.planning.accelerators import ACCELERATORS, mesh_named
from spap_jax.planning.compiled import Collective, collectives, compile_program, sent


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
        ("h100x8", "--compile needs the compiler for NVIDIA GPUs to compile for h100x8, and it is not installed"),
        ("v5e-8", "--compile needs the TPU compiler, which is not installed: install it with pip install"),
    ],
)
def test_meshes_without_a_compiler(name: str, said: str, monkeypatch: pytest.MonkeyPatch):
    for package in ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=said), absent.described(mesh_named(name)):
        pass


def test_every_gpu_is_described():
    for name, accelerator in ACCELERATORS.items():
        if accelerator.platform == "gpu":
            assert f"device_memory_size: {int(accelerator.memory)}" in servers.target_of(accelerator), name


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


@dataclass
class Refused:
    """A program that the compiler refuses with a message."""

    message: str
    name, phase, times, given_bytes, beside_bytes = "step", "joint steps", 1, 2 * 10**9, 10**9

    def lowered(self) -> "Refused":
        return self

    def compile(self) -> None:
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "needs"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 59.45G of "
         "15.75G hbm. Exceeded hbm capacity by 43.70G.", 59.45 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.62G) exceeds "
         "available HBM (15.75G)", 28.62 * 2**30 + 2e9),
    ],
)  # fmt: skip
def test_how_much_a_refused_program_needs_is_read(message: str, needs: float):
    found = compile_program(Refused(message))  # type: ignore[arg-type]
    assert found.refused
    assert found.memory == pytest.approx(needs + 1e9)


def test_other_errors_of_the_compiler_are_not_taken_for_refusals():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_program(Refused("INTERNAL: Mosaic failed"))  # type: ignore[arg-type]
