"""Whether JAX has devices, the memory they gave, the platform that is traced for, and its compiler's effort."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from spap_jax.errors import first_line

_PLATFORMS = {
    "cuda": "for NVIDIA GPUs install JAX with pip install -U 'jax[cuda12]'",
    "tpu": "for TPUs install JAX with pip install -U 'jax[tpu]'",
}
"""How to install JAX for each kind of accelerator, by its name in JAX_PLATFORMS."""

_NOT_STARTED = r"Unable to initialize backend '\w+': "
"""How the error begins that JAX raises if a device does not start."""

_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""The variables that say how much of a GPU's memory JAX takes; the second is an old name of the first."""

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

    Otherwise it takes ten minutes for LLaMA-3.1-8B, longer than the run on eight chips, of which nearly all is spent on
    the tiles of products at full precision. The programs do the same operations and move no more bytes
    (``python -m benchmarks.compilation``). JAX_EXEC_TIME_OPTIMIZATION_EFFORT takes precedence, and so does what the
    program that calls has set in JAX's configuration, which holds for all threads.
    """
    if platform() != "tpu" or _EFFORT.upper() in os.environ or getattr(jax.config, _EFFORT):
        yield
        return
    jax.config.update(_EFFORT, -1.0)
    try:
        yield
    finally:
        jax.config.update(_EFFORT, 0.0)


def more_memory(name: str) -> str:
    """How a GPU gives more of its memory, as a further sentence; none on other platforms, or if it is set already."""
    said = name != "gpu" or any(variable in os.environ for variable in _FRACTIONS)
    return "" if said else " JAX takes three quarters of a GPU's memory: XLA_CLIENT_MEM_FRACTION=0.95 gives more."


def missing_backend(error: BaseException) -> str | None:
    """Explains in one sentence why JAX has no device to compute on and what to do; None if it has one.

    Args:
        error: What a command failed with. JAX says only once that a GPU does not start: asked again, it has the CPU.
    """
    said = first_line(error)
    if not re.match(_NOT_STARTED, said):
        try:
            jax.devices()
            return None
        except Exception as now:  # a RuntimeError, or an AssertionError without a message if no GPU is found
            said = first_line(now)
    wanted = os.environ.get("JAX_PLATFORMS")  # JAX's own setting is "tpu,cpu" on a TPU VM where the user set nothing
    reason = re.split(r" \((?:set|you may) ", re.sub(_NOT_STARTED, "", said))[0].rstrip(".")
    reason = "it sees no such device on this machine" if said == "AssertionError" else reason
    if not wanted:
        return (
            f"JAX cannot start the devices of this machine ({reason}): look whether others use them and what "
            "nvidia-smi says of a GPU's driver, or set JAX_PLATFORMS=cpu to do without them."
        )
    advice = _PLATFORMS.get(wanted.split(",")[0], f"use one of the names cpu, {', '.join(_PLATFORMS)}")
    return f"JAX cannot use JAX_PLATFORMS={wanted} ({reason}): {advice}, or unset it to use the devices that JAX finds."
