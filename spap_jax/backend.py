"""Whether JAX has devices, the memory they gave, the platform that is traced for, and its compiler's effort."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from spap_jax.errors import first_line

_EFFORT = "jax_exec_time_optimization_effort"

traced_for = jax.make_user_context(None)
"""``with traced_for("tpu"):`` traces the programs inside for another platform than that of this machine's devices."""

one_device = jax.make_user_context(False)
"""True inside ``mesh.use_mesh`` of one device, although there may be others."""


def platform() -> str:
    """The platform that a program is traced for: "cpu", "tpu", "cuda" (NVIDIA from Ampere on) or "gpu" (others)."""
    if traced_for.value is not None:
        return traced_for.value
    name = jax.default_backend()
    if name == "gpu":
        capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # "9.0"; on AMD "gfx90a"
        return "cuda" if capability[:1].isdigit() and float(capability) >= 8 else "gpu"
    return name


def peak_of_a_device() -> int | None:
    """The most bytes that JAX took of a device of this process; None of CPUs, whose memory is that of the process."""
    local = [device for device in jax.local_devices() if device.platform != "cpu"]
    return max(((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in local), default=0) or None


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Lets the TPU's compiler search less for fast code in the programs inside; others compile as ever.

    Each program of a run is used for a short time. JAX_EXEC_TIME_OPTIMIZATION_EFFORT takes precedence, and so does what
    the calling program has set in JAX's configuration, which holds for all threads.
    """
    if platform() != "tpu" or _EFFORT.upper() in os.environ or getattr(jax.config, _EFFORT):
        yield
        return
    jax.config.update(_EFFORT, -1.0)
    try:
        yield
    finally:
        jax.config.update(_EFFORT, 0.0)


def missing_backend(error: BaseException) -> str | None:
    """Explains in one sentence that JAX has no device to compute on and what to do; None if it has one.

    Args:
        error: What a command failed with. JAX says only once that a GPU does not start: asked again, it has the CPU.
    """
    said = first_line(error)
    if not said.startswith("Unable to initialize backend"):
        try:
            jax.devices()
            return None
        except Exception as now:  # a RuntimeError, or an AssertionError without a message
            said = first_line(now) if str(now) else "it finds none"
    return (
        f"JAX cannot start the devices of this machine ({said}): look whether others use them, install JAX for them "
        "(jax[cuda12] or jax[tpu]), or set JAX_PLATFORMS=cpu to do without them."
    )
