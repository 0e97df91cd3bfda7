"""Accelerators and the meshes they come in: their memory and their peak rates.

Sources, per chip or board:

- TPU v5e, v5p, v6e: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" (docs.cloud.google.com/tpu/docs): peak
  bfloat16 rate, HBM capacity and bandwidth. They state the interconnect rate for both directions together; half of it
  is one way.
- A100 80GB SXM, H100 SXM, H200 SXM: NVIDIA's data sheets: FP32 and BF16 rates (BF16 without sparsity, half of what the
  sheets of H100 and H200 print), memory and bandwidth, and NVLink for both directions together.
- Sizes of slices: the tables of supported shapes on the pages of the TPUs. For v5p they list the shapes below a cube of
  4 x 4 x 4 chips, and above that whole cubes, of which nearly every number up to 96 is available.

Matrix products at full float32 precision, which everything but optimizer steps uses, take six bfloat16 passes on a TPU
(XLA's "highest" precision) and the FP32 units of a GPU. The steps of alternating rounds are at the device's default
precision, and joint steps in bfloat16.
"""

import re
from typing import Literal, NamedTuple

from spap_jax.errors import UserError

_PASSES = 6
"""Number of bfloat16 products per float32 product of full precision."""


Platform = Literal["cpu", "gpu", "tpu"]
"""What programs are compiled for."""


class Accelerator(NamedTuple):
    """One kind of device.

    Attributes:
        words: Its name.
        memory: Memory in bytes.
        bandwidth: Memory bandwidth in bytes per second, reads and writes together.
        full: Floating-point operations per second of float32 products at full precision.
        quick: Floating-point operations per second of products of bfloat16. Those of TF32, which a GPU makes at half
            this rate, count as these.
        link: Bytes per second that it sends to other devices, over all links together.
        sizes: Numbers of devices in the meshes that exist, ascending.
        platform: The platform that programs are compiled for.
        named: How much each device adds to the number in a mesh's name.
    """

    words: str
    memory: float
    bandwidth: float
    full: float
    quick: float
    link: float
    sizes: tuple[int, ...]
    platform: Platform
    named: int = 1


def _tpu(words: str, memory: float, bandwidth: float, bfloat16: float, both_ways: float, *sizes: int, named: int = 1):
    return Accelerator(words, memory, bandwidth, bfloat16 / _PASSES, bfloat16, both_ways / 2, sizes, "tpu", named)


def _gpu(words: str, memory: float, bandwidth: float, float32: float, bfloat16: float, both_ways: float):
    return Accelerator(words, memory, bandwidth, float32, bfloat16, both_ways / 2, tuple(range(1, 9)), "gpu")


_SQUARES = (1, 4, 8, 16, 32, 64, 128, 256)
_CUBES = (4, 8, 16, 32, *range(64, 6145, 64))

ACCELERATORS = {
    "v5e": _tpu("TPU v5e", 16e9, 819e9, 197e12, 400e9, *_SQUARES),
    "v5p": _tpu("TPU v5p", 95e9, 2765e9, 459e12, 1200e9, *_CUBES, named=2),  # names count TensorCores, two in a chip
    "v6e": _tpu("TPU v6e", 32e9, 1638e9, 918e12, 800e9, *_SQUARES),
    "a100": _gpu("A100 80GB SXM", 80e9, 2039e9, 19.5e12, 312e12, 600e9),
    "h100": _gpu("H100 SXM", 80e9, 3350e9, 67e12, 989e12, 900e9),
    "h200": _gpu("H200 SXM", 141e9, 4800e9, 67e12, 989e12, 900e9),
}
"""Accelerators, keyed by the prefix of a mesh's name."""

_LISTED = 9
"""Maximum number of sizes that an error message lists."""

_ALIASES = {"v5litepod": "v5e"}


class Mesh(NamedTuple):
    """Several devices of one kind.

    Attributes:
        name: The name that the user gave.
        accelerator: Kind of the devices.
        devices: Number of devices.
        sharers: Number of devices over which the weights are sharded.
    """

    name: str
    accelerator: Accelerator
    devices: int
    sharers: int = 1

    @property
    def host_devices(self) -> int:
        """Number of devices of a host: of TPU v5p four, of others eight, but four in TPU slices of more."""
        return min(self.devices, 4 if self.devices > 8 or self.accelerator.words == "TPU v5p" else 8)

    def with_devices(self, devices: int) -> "Mesh":
        """Returns a mesh of the same kind with another number of devices."""
        kind, mark, _ = _split(self.name)
        return self._replace(name=f"{kind}{mark}{devices * self.accelerator.named}", devices=devices)

    def shared_among(self, sharers: int) -> "Mesh":
        """Returns the same mesh with the weights sharded over groups of ``sharers`` devices.

        Raises:
            UserError: the devices cannot be divided into groups of this size.
        """
        if sharers < 1 or self.devices % sharers:
            raise UserError(
                f"the {self.devices} devices of {self.name} cannot be divided into groups of {sharers} that share the "
                f"weights: give --model-devices a number that divides {self.devices}."
            )
        return self._replace(sharers=sharers)


def mesh_named(name: str) -> Mesh:
    """Returns the mesh with a name: "v5e-8" (TPU slices as Cloud names them: v5p-64 has 32 chips), "h100x8" (GPUs).

    Raises:
        UserError: there is no mesh with this name.
    """
    kind, mark, number = _split(name)
    accelerator = ACCELERATORS.get(_ALIASES.get(kind, kind))
    if accelerator is None:
        raise UserError(
            f"there is no mesh {name!r}: name one like v5e-8 or h100x8, of the accelerators {', '.join(ACCELERATORS)}."
        )
    devices, rest = divmod(number, accelerator.named)
    if rest or devices not in accelerator.sizes:
        names = [f"{kind}{mark}{size * accelerator.named}" for size in accelerator.sizes]
        listed = names if len(names) <= _LISTED else [*names[: _LISTED - 1], "...", names[-1]]
        each = " (the names count TensorCores, two in a chip)" if accelerator.named > 1 else ""
        raise UserError(f"there is no mesh {name!r}: {accelerator.words} comes as {', '.join(listed)}{each}.")
    return Mesh(name, accelerator, devices)


def _split(name: str) -> tuple[str, str, int]:
    found = re.fullmatch(r"([a-z]\w*?)(-|x)(\d{1,6})", name.lower())
    return (found[1], found[2], int(found[3])) if found else (name, "", 0)
