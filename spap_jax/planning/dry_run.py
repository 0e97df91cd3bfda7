"""A dry run: programs are compiled for devices that need not be there, and their arrays are only described."""

import math
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params
from jax.lax import DotAlgorithmPreset, Precision
from jax.sharding import get_mesh

from spap_jax.backend import platform
from spap_jax.parallel.program import Described, in_place_of_programs

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_REFUSED = re.compile(r"(?:Used|required for HLO temporaries \() ?([\d.]+)([KMGT])\b")
"""How the compiler for TPUs says how much memory a program needs that does not fit."""


_FALL = 0.75
"""Factor from one float that the host reads to the next: so alternating rounds seem to be worth their time."""


class RefusedError(Exception):
    """The compiler refuses a program, which needs more bytes than a device has."""

    def __init__(self, program: str, needed: float) -> None:
        """Says which program is refused."""
        super().__init__(f"{program} does not fit")
        self.program, self.needed = program, needed


class Operations(NamedTuple):
    """Floating-point operations of matrix products: in float32 at full precision, and others.

    A product of `numerics.moments_precision` counts as the three that it is made of, except on CPUs.
    """

    full: float = 0.0
    quick: float = 0.0

    def plus(self, other: "Operations", times: float = 1) -> "Operations":
        """Adds others, which are made ``times`` times."""
        return Operations(self.full + times * other.full, self.quick + times * other.quick)


class _Compiled(NamedTuple):
    """What the compiler says of a program; bytes are those of one device.

    Attributes:
        results: Shapes, dtypes and shardings of its results, in a tree.
        workspace: Bytes beside the arguments: temporaries, and results that take no argument's place.
        arguments: Bytes of the arguments, as the compiler lays them out.
        operations: Operations of one call, of all devices.
    """

    results: Any
    workspace: int
    arguments: int
    operations: Operations


_COMPILED: dict[Any, _Compiled] = {}
"""What was compiled, by program, arguments, mesh and platform; a plan compiles joint steps before the run as well."""


class Program(NamedTuple):
    """All calls of a program in a dry run.

    Attributes:
        calls: Their number.
        memory: The most bytes of a device that are in use during a call, with what is held beside.
        operations: Operations of all calls, of all devices.
    """

    calls: int = 0
    memory: float = 0.0
    operations: Operations = Operations()


class DryRun:
    """The programs that were called, by name, in the order of their first calls, and the arrays that are ``alive``."""

    def __init__(self, watch: Callable[[str], None]) -> None:
        """Begins; ``watch`` is called with the name of each program before it is compiled."""
        self.programs: dict[str, Program] = {}
        self.alive = weakref.WeakSet[Described]()
        self._watch = watch
        self._measured = 1.0

    @property
    def peak(self) -> tuple[str, float]:
        """The program during which a device holds most, and its bytes; ("", 0) if none was called."""
        return max(((name, each.memory) for name, each in self.programs.items()), key=lambda p: p[1], default=("", 0))

    @property
    def held(self) -> int:
        """Bytes of a device that are taken by arrays that are alive now."""
        return sum(array.bytes_of_a_device for array in self.alive)

    def measure(self) -> float:
        """Returns a positive number below all that were returned before."""
        self._measured *= _FALL
        return self._measured

    def call(self, jitted: Any, given: dict[str, Any], static: dict[str, Any], donated: Any) -> Any:
        """Compiles a program, unless it was for such arguments before, and returns its described results.

        Raises:
            RefusedError: The compiler refuses it.
            ValueError: An argument was donated before.
        """
        leaves, structure = jax.tree.flatten(given)
        arrays = [leaf for leaf in leaves if isinstance(leaf, Described)]
        if not all(array in self.alive for array in arrays):
            raise ValueError(f"{jitted.__name__} is given an array that was donated or deleted")
        alike = tuple((leaf.shape, leaf.dtype, leaf.sharding) if isinstance(leaf, Described) else jax.typeof(leaf)
                      for leaf in leaves)  # fmt: skip
        key = jitted, tuple(static.items()), structure, alike, get_mesh(), platform()
        name = jitted.__name__.strip("_").replace("_", " ")
        if key not in _COMPILED:
            self._watch(name)
            _COMPILED[key] = self._compile(jitted, structure.unflatten(map(_like, leaves)), static, name)
        found, before = _COMPILED[key], self.programs.get(name, Program())
        # Arguments that a program does not use are held all the same; it may lay out the others with padding.
        padding = max(0, found.arguments - sum(array.bytes_of_a_device for array in arrays))
        memory = max(before.memory, self.held + padding + found.workspace)
        self.programs[name] = Program(before.calls + 1, memory, before.operations.plus(found.operations))
        for array in jax.tree.leaves(donated):
            if isinstance(array, Described):
                array.delete()
        return jax.tree.map(lambda a: Described(a.shape, a.dtype, a.sharding), found.results)

    def _compile(self, jitted: Any, given: dict[str, Any], static: dict[str, Any], name: str) -> _Compiled:
        with in_place_of_programs(None):
            traced = jitted.trace(**given, **static)
            try:
                compiled = traced.lower().compile()
            except jax.errors.JaxRuntimeError as error:
                if not (said := _REFUSED.search(str(error))):
                    raise
                raise RefusedError(name, self.held + float(said[1]) * _UNITS[said[2]]) from error
        sizes = compiled.memory_analysis()
        several = not get_mesh().empty
        results = jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding if several else None),
            traced.out_info, compiled.output_shardings,
        )  # fmt: skip
        return _Compiled(
            results=results,
            workspace=sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
            arguments=sizes.argument_size_in_bytes,
            operations=_operations(traced.jaxpr.jaxpr),
        )


@contextmanager
def recording(watch: Callable[[str], None] = lambda _: None) -> Iterator[DryRun]:
    """Makes what is run inside a dry run, on the mesh around."""
    with in_place_of_programs(run := DryRun(watch)):
        yield run


def _like(leaf: Any) -> Any:
    """Returns the description of an argument for which a program is lowered."""
    if isinstance(leaf, Described | jax.Array):
        sharding = leaf.sharding if isinstance(leaf, Described) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return leaf


def _operations(jaxpr: Any) -> Operations:
    """Counts the operations of a traced program's matrix products, with all turns of loops and the costliest branch."""
    total = Operations()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        shape: Any = getattr(equation.invars[0].aval, "shape", ()) if equation.invars else ()
        if name == "dot_general":
            summed = math.prod(shape[axis] for axis in params["dimension_numbers"][0][0])
            count = 2.0 * summed * math.prod(equation.outvars[0].aval.shape)
            full = params["precision"] == (Precision.HIGHEST,) * 2 and equation.invars[0].aval.dtype.itemsize == 4
            passes = 3 if params["precision"] == DotAlgorithmPreset.BF16_BF16_F32_X3 and platform() != "cpu" else 1
            total = total.plus(Operations(full=count) if full else Operations(quick=passes * count))
        elif name == "cond":
            total = total.plus(max((_operations(branch.jaxpr) for branch in params["branches"]), key=sum))
        else:
            times = params["length"] if name == "scan" else 1
            if name == "shard_map":
                times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            if name == "pallas_call":
                times = math.prod(params["grid_mapping"].grid)
            for inner in jaxprs_in_params(params):
                total = total.plus(_operations(inner), times)
    return total
