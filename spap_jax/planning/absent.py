"""TPU slices and GPU servers that are not attached, as their compilers describe them.

Shapes of slices and hosts follow Google Cloud's pages "TPU v5e", "TPU v5p" and "TPU v6e": hosts of v5e or v6e have
eight chips in a slice of eight, and four in larger ones; those of v5p have four. GPUs are described as their driver
would (``cudaGetDeviceProperties``), by NVIDIA's white papers on the A100 and H100 architectures and the tables of
compute capabilities in the CUDA C++ Programming Guide.
"""

import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from spap_jax.backend import one_device, quick_compilation, traced_for
from spap_jax.errors import UserError, first_line
from spap_jax.parallel.mesh import arranged
from spap_jax.planning.accelerators import Accelerator, Mesh

_CUBE = 4
"""Chips along an edge of the cubes that large slices of v5p are made of."""

_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any: the topology is named
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # the compiler for GPUs says that there is no driver, which it does not need
}
"""Environment that the compilers expect, unless it is set."""

_COMPILERS = {"tpu": ("tpu", ("libtpu",)), "gpu": ("cuda", ("jax_cuda12_plugin", "jax_cuda13_plugin"))}
"""The extra that installs a platform's compiler, and the packages of which one holds it."""


class _Chip(NamedTuple):
    """A GPU's multiprocessors.

    Attributes:
        capability: Major compute capability.
        cores: Number of multiprocessors.
        lanes: FP32 units of each.
        shared: KiB of shared memory of each, of which a block of threads can use all but one.
        cache: MiB of L2 cache.
        clock: GHz.
    """

    capability: int
    cores: int
    lanes: int
    shared: int
    cache: int
    clock: float


_HOPPER = _Chip(capability=9, cores=132, lanes=128, shared=228, cache=50, clock=1.98)
_CHIPS = {
    "A100 80GB SXM": _Chip(capability=8, cores=108, lanes=64, shared=164, cache=40, clock=1.41),
    "H100 SXM": _HOPPER,
    "H200 SXM": _HOPPER,
}


@contextmanager
def use_absent_mesh(mesh: Mesh, model: int = 1) -> Iterator[None]:
    """Sets devices that are not attached as the mesh of the code inside, and their platform as the one it is traced
    for.

    ``model`` is the number of devices that the weights are sharded over.

    Raises:
        UserError: the compiler for these devices is not installed, or the devices cannot be divided in this way.
    """
    devices = arranged(devices_of(mesh), model)
    with (
        jax.enable_x64(False),
        traced_for("tpu" if mesh.accelerator.platform == "tpu" else "cuda"),
        quick_compilation(),
        one_device(mesh.devices == 1),
        jax.set_mesh(devices),
    ):
        yield


def devices_of(mesh: Mesh) -> list[Any]:
    """Returns the devices of a slice or a server.

    Raises:
        UserError: the compiler for these devices is not installed, or cannot describe them.
    """
    extra, packages = _COMPILERS[mesh.accelerator.platform]
    if not any(map(importlib.util.find_spec, packages)):
        raise UserError(
            f"the compiler for {mesh.name} is not installed: install it with pip install 'spap-jax[{extra}]', also on "
            "a machine without such a device."
        )
    os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
    jax.config.update("jax_platforms", "cpu")  # arrays are only described: no device has to be started for them
    try:
        return _devices(mesh)
    except RuntimeError as error:
        raise UserError(
            f"the compiler for {mesh.name} cannot describe it ({first_line(error)}): end other programs on this "
            f"machine that use it, or update it with pip install -U 'spap-jax[{extra}]'."
        ) from error


@functools.cache  # programs are the same only if their devices are
def _devices(mesh: Mesh) -> list[Any]:
    if mesh.accelerator.platform == "gpu":
        shape = f"1x1x{mesh.devices}"  # servers that share NVLink, processes, GPUs of each
        given = {"topology": shape, "target_config": target_of(mesh.accelerator)}
        return topologies.get_topology_desc(platform="cuda", **given).devices
    version = mesh.accelerator.words.removeprefix("TPU ")
    shape = shape_of(version, mesh.devices)
    name = f"{version}:{'x'.join(map(str, shape))}"
    return topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=host_of(version, shape)).devices


def shape_of(version: str, chips: int) -> tuple[int, ...]:
    """Returns the number of chips along each axis of a slice of "v5e", "v5p" or "v6e"."""
    if version != "v5p":
        short = 2 ** (int(math.log2(chips)) // 2)
        return short, chips // short
    if chips < _CUBE**3:
        return {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}[chips]
    cubes = chips // _CUBE**3
    boxes = ((a, b, cubes // (a * b)) for a in _divisors(cubes) for b in _divisors(cubes // a))
    return tuple(_CUBE * side for side in min(map(sorted, boxes), key=max))


def host_of(version: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the number of chips of a host along each of three axes, in a slice of a shape."""
    return (2, 2, 1) if version == "v5p" or math.prod(shape) > 8 else (*shape, 1)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def target_of(accelerator: Accelerator) -> str:
    """Describes a GPU to the compiler, as the text of XLA's message GpuTargetConfigProto."""
    chip = _CHIPS[accelerator.words]
    return f"""
        platform_name: "CUDA"
        device_description_str: "NVIDIA {accelerator.words}"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 8 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {chip.capability} }}
          core_count: {chip.cores}
          fpus_per_core: {chip.lanes}
          clock_rate_ghz: {chip.clock}
          device_memory_size: {int(accelerator.memory)}
          memory_bandwidth: {int(accelerator.bandwidth)}
          l2_cache_size: {chip.cache << 20}
          shared_memory_per_core: {chip.shared << 10}
          shared_memory_per_block_optin: {(chip.shared - 1) << 10}
          shared_memory_per_block: {48 << 10}
          registers_per_core_limit: {1 << 16}
          registers_per_block_limit: {1 << 16}
          threads_per_warp: 32
          threads_per_core_limit: 2048
          threads_per_block_limit: 1024
          block_dim_limit_x: {(1 << 31) - 1}
          block_dim_limit_y: {(1 << 16) - 1}
          block_dim_limit_z: {(1 << 16) - 1}
        }}
    """
