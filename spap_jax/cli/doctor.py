"""``spap doctor``."""

import importlib.metadata
import math
import os
import platform
import shutil

from spap_jax import memory
from spap_jax.cli import console
from spap_jax.quantities import bytes_text
from spap_jax.storage.files import hub_problem

_MORE = ("torch", "lm_eval", "gcsfs", "s3fs", "orbax-checkpoint", "datasets", "huggingface-hub")
"""Packages beside those of a report that may cause a failure."""


def doctor() -> None:
    """Show devices, memory and versions, and whether the hub can be reached.

    ```
    spap doctor
    spap doctor > doctor.txt
    ```

    Look here first when something goes wrong, and attach the output when you ask for help.
    """
    import jax

    from spap_jax.report.account import versions

    with console.waiting("looking around"):
        limits = [(device, (device.memory_stats() or {}).get("bytes_limit")) for device in jax.devices()]
        hub = hub_problem()
        found = {name: version for name, version in versions().items() if name != "device"}
    words = [bytes_text(most) if most else "the machine's" for _, most in limits]  # CPUs report no limit
    rows = [(str(device), device.device_kind, word) for (device, _), word in zip(limits, words, strict=True)]
    console.table("devices", ("device", "kind", "memory"), rows)
    machine = {"system": platform.platform(), "cores": str(os.cpu_count())}
    if math.isfinite(memory.of_machine()):
        machine["memory"] = bytes_text(memory.of_machine())
    machine |= {"free disk here": bytes_text(shutil.disk_usage(".").free), "processes": str(jax.process_count())}
    machine["compiled programs"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", "not kept")
    for name, value in (machine | found | {name: _version(name) for name in _MORE}).items():
        console.out.print(f"{name:<18} {value}")
    console.out.print("the hub answers" if hub is None else f"the hub cannot be reached: {hub}; local folders work")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
