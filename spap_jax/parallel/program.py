"""The programs of a run: jitted functions, which a dry run describes instead of running.

All work of the devices happens in programs, and nothing is computed between them. So a run on described arrays calls
the same programs as the run itself, and ``planning/dry_run.py`` can compile each for devices that are not attached.
"""

import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

_dry_run: ContextVar[Any] = ContextVar("dry_run", default=None)
"""The ``planning.dry_run.DryRun`` that programs are called in; None if they run."""


@contextmanager
def in_place_of_programs(dry_run: Any) -> Iterator[None]:
    """Calls ``dry_run`` in place of the programs that the code inside calls; None runs them, as outside."""
    token = _dry_run.set(dry_run)
    try:
        yield
    finally:
        _dry_run.reset(token)


def program(function: Any = None, /, **options: Any) -> Any:
    """Does what `jax.jit` does with these arguments; see the module's docstring for how the result differs."""
    if function is None:
        return functools.partial(program, **options)
    static, donated = (
        (names,) if isinstance(names, str) else names
        for names in (options.get("static_argnames", ()), options.get("donate_argnames", ()))
    )
    jitted, signature = jax.jit(function, **options), inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        dry_run = _dry_run.get()
        if dry_run is None:
            return jitted(*args, **kwargs)
        given = dict(signature.bind(*args, **kwargs).arguments)
        fixed = {name: given.pop(name) for name in static if name in given}
        return dry_run.call(jitted, given, fixed, [given[name] for name in donated if name in given])

    call.lower = jitted.lower  # type: ignore[attr-defined]
    return call


class Described(jax.ShapeDtypeStruct):
    """An array on the devices of a dry run: shape, dtype and sharding.

    The host reads zeros from it; from whole numbers [n], which may have to be different, 0 to n - 1; single floats fall
    from one to the next, so that a run goes on with what it measures.
    """

    is_fully_addressable = True

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: Any) -> None:
        """Describes an array, which the devices hold as long as the description is alive."""
        super().__init__(shape, dtype, sharding=sharding)
        key = jax.numpy.issubdtype(self.dtype, jax.dtypes.prng_key)
        part = sharding.shard_shape(shape) if sharding else shape
        self.bytes_of_a_device = 0 if key else math.prod(part) * np.dtype(self.dtype).itemsize
        self._run = _dry_run.get()
        self._run.alive.add(self)

    def __eq__(self, other: object) -> bool:
        return self is other  # two arrays of one shape are not the same array

    def __hash__(self) -> int:
        return id(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def delete(self) -> None:
        """Frees the memory, as `jax.Array.delete` does."""
        self._run.alive.discard(self)

    def block_until_ready(self) -> "Described":
        """Returns the array itself."""
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if np.issubdtype(self.dtype, np.integer) and len(self.shape) == 1:
            return np.arange(*self.shape, dtype=dtype or self.dtype)
        return np.broadcast_to(np.zeros((), dtype or self.dtype), self.shape)

    def tolist(self) -> Any:
        """Returns what the host reads, as nested lists."""
        return np.asarray(self).tolist()

    item = tolist

    def __float__(self) -> float:
        return self._run.measure()

    def __int__(self) -> int:
        return int(np.asarray(self))

    def __bool__(self) -> bool:
        return bool(np.asarray(self))


def is_dry() -> bool:
    """Whether arrays are to be described and not put on devices."""
    return _dry_run.get() is not None


def describe(array: Any, spec: PartitionSpec | None = None) -> Any:
    """Describes an array that a dry run puts on its devices, sharded by ``spec`` on the mesh around.

    Without a spec it is on every device, or stays where it is.
    """
    if isinstance(array, Described) and spec is None:
        return array
    mesh, array = get_mesh(), array if hasattr(array, "dtype") else np.asarray(array)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    return Described(array.shape, dtype, None if mesh.empty else NamedSharding(mesh, spec or PartitionSpec()))
