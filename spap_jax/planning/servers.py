"""GPU servers that are not there: their devices, as XLA's compiler for NVIDIA GPUs takes them from a description.

What it has to know of a GPU is what its driver would say (``cudaGetDeviceProperties``). The numbers are those of
NVIDIA's white papers "NVIDIA A100 Tensor Core GPU Architecture" and "NVIDIA H100 Tensor Core GPU Architecture", and of
the tables of compute capabilities in the CUDA C++ Programming Guide.
"""

import importlib.util
import os
from typing import Any, NamedTuple

from spap_jax.errors import UserError
from spap_jax.planning.accelerators import Accelerator, Mesh


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

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
"""The packages that hold the compiler, which also compiles for GPUs that are not there."""


def topology_of(mesh: Mesh) -> dict[str, Any]:
    """Returns the arguments by which ``topologies.get_topology_desc`` describes a server.

    Raises:
        UserError: the compiler for NVIDIA GPUs is not there.
    """
    if not any(map(importlib.util.find_spec, _PLUGINS)):
        raise UserError(
            f"--compile needs the compiler for NVIDIA GPUs to compile for {mesh.name}, and it is not installed: "
            "install it with pip install 'spap-jax[cuda]', also on a machine without a GPU."
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # it says that there is no driver, which it does not need
    shape = f"1x1x{mesh.devices}"  # servers that share NVLink, processes, GPUs of each
    return {"platform": "cuda", "topology": shape, "target_config": target_of(mesh.accelerator)}


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
