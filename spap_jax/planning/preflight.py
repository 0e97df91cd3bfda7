"""Before a run: how many blocks joint steps adjust together in the memory at hand, or a warning of too little."""

import jax

from spap_jax import devices, memory
from spap_jax.errors import warn
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
    here = _mesh_here()
    planned = plan(request, here)
    phase, need = planned.peak
    if need > here.accelerator.memory:
        warn(
            f"a plan of this run needs {bytes_text(need)} of each device in the phase {phase!r}, and a device here has "
            f"{bytes_text(here.accelerator.memory)}. {remedy(planned)}"
        )
    return planned.request.settings


def _mesh_here() -> Mesh:
    count, device = devices.mesh_size(), jax.local_devices()[0]
    reported = (device.memory_stats() or {}).get("bytes_limit")
    each = reported or memory.of_machine() / count  # which CPUs share
    # Rates and sizes are those of no accelerator: neither the time nor more devices are asked for.
    platform = device.platform if device.platform in ("cpu", "tpu") else "gpu"
    kind = Accelerator(device.device_kind, each, 1, 1, 1, 1, sizes=(count,), platform=platform)
    return Mesh("this machine", kind, count, devices.model_size())
