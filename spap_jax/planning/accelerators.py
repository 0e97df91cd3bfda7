"""Accelerators and the meshes they come in: their memory and their peak rates.

Sources, per chip or board:

- TPU v5e, v5p, v6e: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" (docs.cloud.google.com/tpu/docs): peak
  bfloat16 rate, HBM capacity and bandwidth, and the tables of supported shapes. For v5p these list the shapes below a
  cube of 4 x 4 x 4 chips, and above that whole cubes, of which nearly every number up to 96 is available.
- A100 80GB SXM, H100 SXM, H200 SXM: NVIDIA's data sheets: FP32 and BF16 rates (BF16 without sparsity, half of what the
  sheets of H100 and H200 print), memory and bandwidth.

Matrix products at full float32 precision, which the solver uses, take six bfloat16 passes on a TPU (XLA's "highest"
precision) and the FP32 units of a GPU.
"""

import re
from typing import Literal, NamedTuple

from spap_jax.errors import UserError

_PASSES = 6
"""Number of bfloat16 products per float32 product of full precision."""


class Accelerator(NamedTuple):
    """One kind of device.

    Attributes:
        words: Its name.
        memory: Memory in bytes.
        bandwidth: Memory bandwidth in bytes per second, reads and writes together.
        full: Floating-point operations per second of float32 products at full precision.
        quick: Floating-point operations per second of products of bfloat16.
        sizes: Numbers of devices in the meshes that exist, ascending.
        platform: "tpu" or "gpu".
        named: How much each device adds to the number in a mesh's name.
    """

    words: str
    memory: float
    bandwidth: float
    full: float
    quick: float
    sizes: tuple[int, ...]
    platform: Literal["gpu", "tpu"]
    named: int = 1


_SQUARES = (1, 4, 8, 16, 32, 64, 128, 256)
_CUBES = (4, 8, 16, 32, *range(64, 6145, 64))
_SERVERS = tuple(range(1, 9))

ACCELERATORS = {
    "v5e": Accelerator("TPU v5e", 16e9, 819e9, 197e12 / _PASSES, 197e12, _SQUARES, "tpu"),
    # Names count TensorCores, two in a chip.
    "v5p": Accelerator("TPU v5p", 95e9, 2765e9, 459e12 / _PASSES, 459e12, _CUBES, "tpu", named=2),
    "v6e": Accelerator("TPU v6e", 32e9, 1638e9, 918e12 / _PASSES, 918e12, _SQUARES, "tpu"),
    "a100": Accelerator("A100 80GB SXM", 80e9, 2039e9, 19.5e12, 312e12, _SERVERS, "gpu"),
    "h100": Accelerator("H100 SXM", 80e9, 3350e9, 67e12, 989e12, _SERVERS, "gpu"),
    "h200": Accelerator("H200 SXM", 141e9, 4800e9, 67e12, 989e12, _SERVERS, "gpu"),
}
"""Accelerators, keyed by the prefix of a mesh's name."""

_LISTED = 9
"""Maximum number of sizes that an error message lists."""


class Mesh(NamedTuple):
    """Several devices of one kind: the name that the user gave, their kind, and their number."""

    name: str
    accelerator: Accelerator
    devices: int

    def seconds(self, full: float, quick: float) -> float:
        """Seconds of floating-point operations, at full precision and others, at the devices' peak rates."""
        return (full / self.accelerator.full + quick / self.accelerator.quick) / self.devices


def mesh_named(name: str) -> Mesh:
    """Returns the mesh with a name: "v5e-8" (TPU slices as Cloud names them: v5p-64 has 32 chips), "h100x8" (GPUs).

    Raises:
        UserError: there is no mesh with this name.
    """
    found = re.fullmatch(r"([a-z]\w*?)(-|x)(\d{1,6})", name.lower().replace("v5litepod", "v5e"))
    kind, mark, number = found.groups() if found else (name, "", "0")
    if kind not in ACCELERATORS:
        raise UserError(
            f"there is no mesh {name!r}: name one like v5e-8 or h100x8, of the accelerators {', '.join(ACCELERATORS)}."
        )
    accelerator = ACCELERATORS[kind]
    devices, rest = divmod(int(number), accelerator.named)
    if rest or devices not in accelerator.sizes:
        names = [f"{kind}{mark}{size * accelerator.named}" for size in accelerator.sizes]
        listed = names if len(names) <= _LISTED else [*names[: _LISTED - 1], "...", names[-1]]
        raise UserError(f"there is no mesh {name!r}: {accelerator.words} comes as {', '.join(listed)}.")
    return Mesh(name, accelerator, devices)
