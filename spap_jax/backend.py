"""Whether JAX has a device to compute on, and the platform that programs are traced for."""

import jax

from spap_jax.hub import first_line

_PLATFORMS = {
    "cuda": "for NVIDIA GPUs install JAX with pip install -U 'jax[cuda12]'",
    "tpu": "for TPUs install JAX with pip install -U 'jax[tpu]'",
}
"""How to install JAX for each kind of accelerator, by its name in JAX_PLATFORMS."""


traced_for = jax.make_user_context(None)
"""``with traced_for("tpu"):`` traces the programs inside for another platform than that of this machine's devices."""


def platform() -> str:
    """The platform that a program is traced for: "cpu", "tpu", "cuda" (NVIDIA from Ampere on) or "gpu" (others)."""
    if traced_for.value is not None:
        return traced_for.value
    name = jax.default_backend()
    if name == "gpu":
        capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # "9.0"; on AMD "gfx90a"
        return "cuda" if capability[:1].isdigit() and float(capability) >= 8 else "gpu"
    return name


def missing_backend() -> str | None:
    """Explains in one sentence why JAX has no device to compute on and what to do; None if it has one."""
    try:
        jax.devices()
        return None
    except Exception as error:  # a RuntimeError, or an AssertionError without a message if no GPU is found
        said = first_line(error)
    wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    reason = said.partition(" (set")[0].removeprefix(f"Unable to initialize backend '{wanted}': ").rstrip(".")
    reason = "it sees no such device on this machine" if said == "AssertionError" else reason
    if not wanted:
        return f"JAX cannot start the devices of this machine ({reason}): set JAX_PLATFORMS=cpu to do without them."
    advice = _PLATFORMS.get(wanted.split(",")[0], f"use one of the names cpu, {', '.join(_PLATFORMS)}")
    return f"JAX cannot use JAX_PLATFORMS={wanted} ({reason}): {advice}, or unset it to use the devices that JAX finds."
