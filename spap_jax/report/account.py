"""What a report says of the data it was made with, and of the software and the devices."""

import importlib.metadata
import platform
from typing import Any

import jax

from spap_jax.data.tokens import ids_of
from spap_jax.parallel import mesh
from spap_jax.report.schema import DataAccount

_COMPUTING = ("spap-jax", "jax", "jaxlib", "flax", "optax", "device")


def data_account(tokens: Any) -> DataAccount:
    """Describes tokens: an array [B, T], or ``TokenBlocks`` with a description and a hash."""
    blocks = ids_of(tokens)
    description = getattr(tokens, "description", "token ids from memory")
    return DataAccount(len(blocks), len(blocks[0]), description, getattr(tokens, "sha256", None))


def versions() -> dict[str, str]:
    """Returns the versions of this package, its numerical dependencies and Python, and the kind of device."""
    names = ("spap-jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "safetensors")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version(), "device": jax.devices()[0].device_kind}


def computing() -> dict[str, Any]:
    """Returns the properties of the software and hardware that a run's numbers depend on."""
    found = versions()
    sizes = {"devices": mesh.mesh_size(), "model devices": mesh.model_size(), "processes": jax.process_count()}
    return sizes | {name: found[name] for name in _COMPUTING}
