"""The mesh of a run on devices that are not there, for which programs can be compiled but not run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from spap_jax import devices
from spap_jax.backend import quick_compilation, traced_for
from spap_jax.planning import servers, slices
from spap_jax.planning.accelerators import Mesh


@contextmanager
def described(mesh: Mesh) -> Iterator[Any]:
    """Makes devices that are not there the mesh of the code inside, and their platform the one that it is traced for.

    Yields:
        The device of a mesh of one; None if there are several.

    Raises:
        UserError: the compiler for these devices is not there.
    """
    platform, kind = ("tpu", slices) if mesh.accelerator.platform == "tpu" else ("cuda", servers)
    there = kind.devices_of(mesh)
    with traced_for(platform), quick_compilation():
        if mesh.devices == 1:
            with devices.one_device(True):
                yield there[0]
            return
        with jax.set_mesh(devices.arranged(there, mesh.sharers)):
            yield None
