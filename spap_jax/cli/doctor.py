"""``spap doctor``."""


def doctor() -> None:
    """Show devices, memory and versions, and whether the hub can be reached.

    Look here first when something goes wrong, and attach the output when you ask for help.
    """
    import jax

    from spap_jax.cli import console
    from spap_jax.hub import hub_problem
    from spap_jax.pruning.prune_report import versions

    with console.waiting("looking around"):
        devices = [(str(device), device.device_kind, _memory_of(device)) for device in jax.devices()]
        hub = hub_problem()
        found = {name: version for name, version in versions().items() if name != "device"} | _optional_versions()
    hub_words = "the hub answers" if hub is None else f"the hub cannot be reached: {hub}; local folders work"
    console.table("devices", ("device", "kind", "memory"), devices)
    for name, value in (*_machine(), *found.items()):
        console.out.print(f"{name:<18} {value}")
    console.out.print(hub_words)


def _memory_of(device) -> str:
    """Returns the memory that the device reports; CPUs report none."""
    from spap_jax.cli.console import bytes_text

    limit = (device.memory_stats() or {}).get("bytes_limit")
    return bytes_text(limit) if limit else "the machine's"


def _machine() -> list[tuple[str, str]]:
    import math
    import os
    import platform
    import shutil

    import jax

    from spap_jax import memory
    from spap_jax.cli.console import bytes_text

    rows = [("system", platform.platform()), ("cores", str(os.cpu_count()))]
    if math.isfinite(memory.of_machine()):
        rows.append(("memory", bytes_text(memory.of_machine())))
    rows.append(("free disk here", bytes_text(shutil.disk_usage(".").free)))
    rows.append(("processes", str(jax.process_count())))
    return rows


def _optional_versions() -> dict[str, str]:
    """Returns the versions of packages that only some commands need."""
    import importlib.metadata

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    names = ("torch", "lm_eval", "gcsfs", "s3fs", "orbax-checkpoint", "datasets", "huggingface-hub")
    return {name: version(name) for name in names}
