"""Before a run: how many blocks joint steps adjust together in the memory at hand, or a warning of too little."""

import jax

from spap_jax import memory
from spap_jax.backend import more_memory
from spap_jax.errors import warn
from spap_jax.parallel import mesh, processes
from spap_jax.planning.accelerators import Accelerator, Mesh
from spap_jax.planning.plan import Request, plan, remedy
from spap_jax.quantities import bytes_text
from spap_jax.settings import PruneSettings


def settings_here(request: Request) -> PruneSettings:
    """Returns the settings of a run for the devices of the mesh around; those of all processes are of one kind.

    Joint steps adjust as many blocks together as a plan says these have memory for, unless the settings name a number.
    If the run does not fit even so, a warning says what would make it fit; a plan is too rough to refuse a run.

    Only the memory is planned, for which no program is traced, so that this takes no time for a model of any size.
    """
    if request.config.widths or request.settings.allocation != "uniform":
        return request.settings  # of which there is no plan
    room = _room()
    if room is None:
        warn(
            "JAX does not say how much memory a device here has, as with another allocator than its own, so the run is "
            "not planned: see spap plan, and name --joint-blocks if joint steps on all blocks need more than there is."
        )
        return request.settings
    here = _mesh_here(room)
    planned = plan(request, here)
    phase, need = planned.peak
    if need > here.accelerator.memory:
        warn(
            f"a plan of this run needs {bytes_text(need)} of each device in the phase {phase!r}, and a device here has "
            f"{bytes_text(here.accelerator.memory)}. {remedy(planned)}{more_memory(here.accelerator.platform)}"
        )
    elif planned.request.settings.joint_blocks != request.settings.joint_blocks and (
        more := more_memory(here.accelerator.platform)
    ):
        warn(f"joint steps on all blocks together would gain more, and need more than {bytes_text(room)}.{more}")
    return planned.request.settings


def _mesh_here(room: float) -> Mesh:
    count, device = mesh.mesh_size(), jax.local_devices()[0]
    # Rates and sizes are those of no accelerator: neither the time nor more devices are asked for.
    platform = device.platform if device.platform in ("cpu", "tpu") else "gpu"
    kind = Accelerator(device.device_kind, room, 1, 1, 1, 1, sizes=(count,), platform=platform)
    return Mesh("this machine", kind, count, mesh.model_size())


def _room() -> float | None:
    """Bytes that a device has left for a run, the same in all processes; None if it does not say.

    In a notebook, the model to prune is on the devices already, and so may be others.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        left = memory.of_machine() / mesh.mesh_size()  # which CPUs share
    else:
        about = device.memory_stats() or {}
        left = about["bytes_limit"] - about.get("bytes_in_use", 0) if "bytes_limit" in about else None
    return processes.broadcast_from_leader(left)
