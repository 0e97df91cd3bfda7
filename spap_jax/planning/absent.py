"""The mesh of a run on devices that are not there, for which programs can be compiled but not run."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import topologies

from spap_jax.backend import quick_compilation, traced_for
from spap_jax.errors import UserError, first_line
from spap_jax.parallel.mesh import arranged, one_device
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
    there = devices_of(mesh)
    with traced_for("tpu" if _is_slice(mesh) else "cuda"), quick_compilation():
        if mesh.devices == 1:
            with one_device(True):
                yield there[0]
            return
        with jax.set_mesh(arranged(there, mesh.sharers)):
            yield None


def devices_of(mesh: Mesh) -> list[Any]:
    """Returns the devices of a slice or a server.

    Raises:
        UserError: the compiler for these devices is not there, or cannot describe them.
    """
    kind, extra = (slices, "tpu") if _is_slice(mesh) else (servers, "cuda12")
    described = kind.topology_of(mesh)
    try:
        return _devices(**described)
    except RuntimeError as error:
        raise UserError(
            f"the compiler for {mesh.name} cannot describe it ({first_line(error)}): end other programs on this "
            f"machine that use it, or update it with pip install -U 'jax[{extra}]'."
        ) from error


@functools.cache  # programs are the same only if their devices are
def _devices(**described: Any) -> list[Any]:
    return topologies.get_topology_desc(**described).devices


def _is_slice(mesh: Mesh) -> bool:
    return mesh.accelerator.platform == "tpu"
