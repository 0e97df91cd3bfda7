"""TPU slices that are not there: their devices, as the TPU compiler describes them (``jax.experimental.topologies``).

Shapes of slices and of hosts follow Google Cloud's pages "TPU v5e", "TPU v5p" and "TPU v6e": a host of v5e or v6e has
eight chips in a slice of eight, and four in larger ones; one of v5p has four.
"""

import importlib.util
import math
import os
from typing import Any

from spap_jax.errors import UserError
from spap_jax.planning.accelerators import Mesh

_CUBE = 4
"""Chips along an edge of the cubes that large slices of v5p are made of."""

_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any: the topology is named
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment that the compiler's library expects, unless it is set."""


def topology_of(mesh: Mesh) -> dict[str, Any]:
    """Returns the arguments by which ``topologies.get_topology_desc`` describes a slice.

    Raises:
        UserError: the TPU compiler is not there.
    """
    version = mesh.accelerator.words.removeprefix("TPU ")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--compile needs the TPU compiler, which is not installed: install it with pip install 'spap-jax[tpu]', "
            "also on a machine without a TPU."
        )
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    shape = shape_of(version, mesh.devices)
    name = f"{version}:{'x'.join(map(str, shape))}"
    return {"topology_name": name, "platform": "tpu", "chips_per_host_bounds": host_of(version, shape)}


def shape_of(version: str, chips: int) -> tuple[int, ...]:
    """Returns the number of chips along each axis of a slice.

    Args:
        version: "v5e", "v5p" or "v6e".
        chips: Number of chips, one of the sizes of this version.
    """
    if version != "v5p":
        short = 2 ** (int(math.log2(chips)) // 2)
        return short, chips // short
    if chips < _CUBE**3:
        return {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}[chips]
    cubes = chips // _CUBE**3
    boxes = ((a, b, cubes // (a * b)) for a in _divisors(cubes) for b in _divisors(cubes // a))
    return tuple(_CUBE * side for side in min(map(sorted, boxes), key=max))


def host_of(version: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns the number of chips of a host along each of three axes, in a slice of a shape."""
    chips = math.prod(shape)
    if version == "v5p" or chips > 8:
        return 2, 2, 1
    return *shape, 1  # pyright: ignore[reportReturnType]


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
