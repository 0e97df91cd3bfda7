"""What a program does on one device, read from its trace: operations, bytes moved in memory, bytes sent to others.

A trace shows arrays whole, and only the shardings of its arguments and those that the program asks for. The others are
found as the compiler finds them: along a dimension that arrays share in an operation, the sharding of one passes to the
others, in both directions. A product is then divided among all axes of the mesh that divide one of its dimensions.

Matrix products are counted, two operations for each multiplication; the bytes of the arrays that have to be written or
read, where what is computed element by element is computed where it is read; and the collectives that the program asks
for, and those that its shardings take. A compiled program does more, so this is a lower bound.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.lax import Precision
from jax.sharding import NamedSharding

Axes = tuple[str, ...]
"""Axes of a mesh, along which one dimension of an array is divided."""

_CALLS = ("jit", "remat2", "custom_vjp_call", "custom_jvp_call", "closed_call")

_READING = ("reduce_", "arg", "cum", "sort", "top_k")
"""Beginnings of the names of operations that read an array as it lies in memory."""

_STORING = ("dot_general", "gather", "dynamic_update_slice", "psum", "reduce_scatter", "all_gather", "all_to_all")
"""Operations that write their result to memory, as do those that read one and those that scatter."""

_COLLECTIVE = {"psum": "axes", "reduce_scatter": "axis_name", "all_gather": "axis_name", "all_to_all": "axis_name"}
"""Collectives that a program asks for, and what names their axes."""

_VIEWS = ("sharding_constraint", "reshard", "reshape", "squeeze")
"""Operations whose result lies in memory where their operand does."""

_HIGHEST = (Precision.HIGHEST, Precision.HIGHEST)

_CACHED = 2**20
"""Bytes of an array that a loop carries without writing it to the device's memory."""

_RESIZING = ("concatenate", "split", "pad")
"""Operations that keep the sharding of a dimension whose size they change."""


@dataclass(frozen=True)
class Work:
    """Work on one device.

    Attributes:
        operations: Floating-point operations.
        memory_bytes: Bytes moved from and to the device's memory.
        sent_bytes: Bytes that the device sends to others, in rings (Patarasuk and Yuan 2009).
        full_operations: The operations of float32 products at full precision, which are among ``operations``.
    """

    operations: float = 0.0
    memory_bytes: float = 0.0
    sent_bytes: float = 0.0
    full_operations: float = 0.0

    def plus(self, other: "Work", times: float = 1) -> "Work":
        """Adds other work that is done some times."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(own + times * more for own, more in pairs))


def counted(jaxpr: core.ClosedJaxpr, arguments: list[Any], turns: dict[str, int] | None = None) -> Work:
    """Counts the work of one call of a program.

    Args:
        jaxpr: Its trace.
        arguments: The arrays that it was traced for, described with their shardings.
        turns: Number of turns of loops whose end a trace does not say, by the name of the function that is repeated;
            one of those that are not named.
    """
    shardings = [each.sharding for each in arguments if isinstance(each.sharding, NamedSharding)]
    trace = _Trace(dict(shardings[0].mesh.shape) if shardings else {}, turns or {})
    specs = (each.sharding.spec if isinstance(each.sharding, NamedSharding) else () for each in arguments)
    given = [_Array(each, spec) for each, spec in zip(arguments, specs, strict=True)]
    used, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals), instantiate=True)
    for result in trace.read(used, given, 1, {}):
        trace.store(result, 1)
    return trace.work()


class _Array:
    """An array of a program.

    Attributes:
        shape: Its shape.
        itemsize: Bytes of an element.
        axes: The axes of the mesh that divide each of its dimensions.
        fixed: Whether these were asked for, so that nothing changes them.
        stored: Whether it lies in memory, and is not computed where it is read.
    """

    def __init__(self, like: Any, spec: Any = None, stored: bool = True):
        self.shape, self.itemsize = tuple(like.shape), like.dtype.itemsize
        self.axes = _axes(spec or (), len(self.shape))
        self.fixed, self.stored = spec is not None, stored

    def divide(self, dimension: int, axes: Axes, count: int) -> bool:
        """Divides a dimension among ``count`` devices, unless something speaks against it; returns whether it did."""
        taken = {name for each in self.axes for name in each}
        if self.fixed or self.axes[dimension] or taken & set(axes) or self.shape[dimension] % count:
            return False
        self.axes[dimension] = axes
        return True


def _axes(spec: Any, rank: int) -> list[Axes]:
    names = [*spec, *[None] * rank][:rank]
    return [() if name is None else (name,) if isinstance(name, str) else tuple(name) for name in names]


Dimensions = list[tuple[_Array, int]]
"""Dimensions of several arrays that are one dimension of an operation."""

_Done = dict[tuple, list[_Array]]
"""Results by operation and operands."""


class _Trace:
    """A trace that is read: which dimensions are alike, and what to count once it is known what divides them."""

    def __init__(self, sizes: dict[str, int], turns: dict[str, int]):
        self._sizes, self._turns = sizes, turns
        self._alike: list[tuple[Dimensions, frozenset[str]]] = []
        self._counts: list[tuple[float, Callable[[], Work]]] = []
        self._gathered: set[tuple[_Array, Axes]] = set()

    def work(self) -> Work:
        """Passes the shardings on, and returns the work of all that was read."""
        changed = bool(self._sizes)
        while changed:
            changed = False
            for alike, manual in self._alike:
                axes = max((array.axes[dimension] for array, dimension in alike), key=len)
                axes = tuple(name for name in axes if name not in manual)
                count = self._devices(axes)
                for array, dimension in alike if axes else ():
                    changed |= array.divide(dimension, axes, count)
        total = Work()
        for times, count in self._counts:
            total = total.plus(count(), times)
        return total

    def read(self, jaxpr: core.Jaxpr, given: list[_Array], times: float, before: _Done) -> list[_Array]:
        """Reads a program that is called some times, beside what was computed before; returns its results."""
        known: dict[Any, _Array] = {each: _Array(each.aval) for each in jaxpr.constvars}
        known |= zip(jaxpr.invars, given, strict=True)

        def array_of(value: Any) -> _Array:
            if not isinstance(value, core.Literal):
                return known[value]
            [array] = before.setdefault((str(value.val), str(value.aval)), [_Array(value.aval, stored=False)])
            return array

        for equation in jaxpr.eqns:
            results = self._results(equation, list(map(array_of, equation.invars)), times, before)
            known |= zip(equation.outvars, results, strict=True)
        return list(map(array_of, jaxpr.outvars))

    def store(self, array: _Array, times: float, passes: int = 1) -> None:
        """Passes over an array in memory, if what computes it has not written it there."""
        if not array.stored:
            self._counts.append((times, lambda: Work(memory_bytes=passes * self._here(array))))

    def _results(self, equation: Any, given: list[_Array], times: float, before: _Done) -> list[_Array]:
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            inner = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
            before = {} if name == "remat2" else before  # which computes again
            return self.read(getattr(inner, "jaxpr", inner), given, times, before)
        if name == "shard_map":
            return self._mapped(equation, given, times)
        if name == "scan":
            first = params["num_consts"]
            ends = first, first + params["num_carry"]
            return self._looped(equation, params["jaxpr"].jaxpr, given, ends, times * params["length"])
        if name == "while":
            body, first = params["body_jaxpr"].jaxpr, params["cond_nconsts"]
            turns = self._turns.get(body.debug_info.func_name, 1)
            return self._looped(equation, body, given[first:], (params["body_nconsts"], len(given)), times * turns)
        if name == "cond":
            return self._dearest([each.jaxpr for each in params["branches"]], given[1:], times)
        done = name, *given, str(params)
        if done not in before:  # a compiler computes it once
            before[done] = self._simple(equation, given, times)
        return before[done]

    def _mapped(self, equation: Any, given: list[_Array], times: float) -> list[_Array]:
        """Reads what every device does with its own part along some axes."""
        params, jaxpr = equation.params, equation.params["jaxpr"]
        manual, inside = frozenset(params["newly_manual_axes"]), [_Array(each.aval) for each in jaxpr.invars]
        for outer, inner, spec in zip(given, inside, params["in_specs"], strict=True):
            self._pass(_in_order(outer, inner), manual)
            asked = _axes(spec, len(outer.shape))
            self._counts.append((times, lambda o=outer, a=asked: self._gather(o, dict(enumerate(a)), manual)))
        results = [_Array(each.aval, spec) for each, spec in zip(equation.outvars, params["out_specs"], strict=True)]
        for outer, inner in zip(results, self.read(jaxpr, inside, times, {}), strict=True):
            outer.fixed = False  # along other axes
            self._pass(_in_order(outer, inner), manual)
        return results

    def _looped(
        self, equation: Any, body: core.Jaxpr, given: list[_Array], carried: tuple[int, int], times: float
    ) -> list[_Array]:
        """Reads a loop; what a turn changes of what is carried is read and written, unless it only writes a part."""
        first, last = carried
        inside = [*given[:first], *(_Array(each.aval) for each in body.invars[first:])]
        ends = self.read(body, inside, times, {})
        results = [_Array(each.aval) for each in equation.outvars]
        for number, (start, inner) in enumerate(zip(given[first:last], inside[first:last], strict=True)):
            self._pass(_in_order(start, inner, ends[number], results[number]))
            if ends[number].itemsize * math.prod(ends[number].shape) > _CACHED:
                self.store(ends[number], times, passes=2)
        for stack, inner in zip(given[last:], inside[last:], strict=True):
            self._pass(_in_order(stack, inner, skipped=1))
        for stack, inner in zip(results[last - first :], ends[last - first :], strict=True):
            self._pass(_in_order(stack, inner, skipped=1))
            self.store(inner, times)
        return results

    def _dearest(self, branches: list[core.Jaxpr], given: list[_Array], times: float) -> list[_Array]:
        """Reads the branches of which one is taken, and keeps the one with the most to count."""
        before, found = self._counts, []
        for branch in branches:
            self._counts = []
            found.append((self.read(branch, given, times, {}), self._counts))
        results, counts = max(found, key=lambda each: sum(count().operations for _, count in each[1]))
        self._counts = before + counts
        self._gathered.clear()  # what was counted to compare the branches
        return results

    def _simple(self, equation: Any, given: list[_Array], times: float) -> list[_Array]:
        name, params = equation.primitive.name, equation.params
        stored = name in _STORING or name.startswith(("scatter", *_READING)) or (name in _VIEWS and given[0].stored)
        asked = params["sharding"] if name == "sharding_constraint" else None
        results = [_Array(each.aval, asked and asked.spec, stored) for each in equation.outvars]
        alike = list(_alike(name, params, given, results))
        self._pass(alike)
        self._counts.append((times, lambda: self._work(name, params, given, results, alike)))
        return results

    def _pass(self, alike: list[Dimensions], manual: frozenset[str] = frozenset()) -> None:
        """Notes dimensions along which shardings pass, but for axes along which the program divides by itself."""
        if self._sizes:
            self._alike += [(each, manual) for each in alike]

    def _work(
        self, name: str, params: Any, given: list[_Array], results: list[_Array], alike: list[Dimensions]
    ) -> Work:
        """Counts an operation."""
        if name in _COLLECTIVE:
            axes = params[_COLLECTIVE[name]]
            axes = (axes,) if isinstance(axes, str) else axes
            rounds, arrays = (2, given) if name == "psum" else (1, results if name == "all_gather" else given)
            return self._sent(axes, rounds * sum(map(self._here, arrays)))
        operations, full, passed = 0.0, 0.0, []
        if name == "dot_general":
            passed = [*given, *results]
            sizes = (array.shape[i] for (array, i), *_ in alike)
            divided = {axis for dimensions in alike for array, i in dimensions for axis in array.axes[i]}
            operations = 2 * math.prod(sizes) / self._devices(divided)
            full = operations * (params["precision"] == _HIGHEST and results[0].itemsize == given[0].itemsize == 4)
        elif name == "gather":
            passed = 2 * results
        elif name == "dynamic_update_slice" or name.startswith("scatter"):
            part = given[1 if name == "dynamic_update_slice" else 2]
            passed = [part, part] if given[0].stored else [part, part, given[0], given[0]]
        elif name.startswith(_READING):
            passed = given
        work = Work(operations, sum(map(self._here, passed)), full_operations=full)
        return work.plus(self._moved(given, results[0], alike)) if self._sizes and results else work

    def _moved(self, given: list[_Array], result: _Array, alike: list[Dimensions]) -> Work:
        """Counts the collectives that the shardings of an operation take.

        What is divided along a dimension that the result does not have is added up, and every device gets the part
        that it holds of the result. What is divided in another way than the result is gathered.
        """
        total, summed = Work(), set()
        for operand in given:
            wanted = {
                i: result.axes[j]
                for dimensions in alike
                for array, i in dimensions
                if array is operand
                for other, j in dimensions
                if other is result
            }
            summed |= {name for i, axes in enumerate(operand.axes) if i not in wanted for name in axes}
            total = total.plus(self._gather(operand, wanted))
        return total.plus(self._add_up(result, summed))

    def _gather(self, array: _Array, wanted: dict[int, Axes], among: frozenset[str] | None = None) -> Work:
        """Gathers an array along the axes that its dimensions have and that are not wanted of them; once each."""
        lost = [set(array.axes[dimension]) - set(axes) for dimension, axes in wanted.items()]
        names = tuple(sorted(name for each in lost for name in each if among is None or name in among))
        if not names or (array, names) in self._gathered:
            return Work()
        self._gathered.add((array, names))
        return self._sent(names, self._here(array) * self._devices(names))

    def _add_up(self, result: _Array, names: set[str]) -> Work:
        """Adds up an array whose summands are divided along some axes; along those of its own it is scattered."""
        own = {name for axes in result.axes for name in axes}
        scattered, whole = tuple(names & own), tuple(names - own)
        work = self._sent(scattered, self._here(result) * self._devices(scattered))
        return work.plus(self._sent(whole, 2 * self._here(result)))

    def _sent(self, axes: Axes, size: float) -> Work:
        count = self._devices(axes)
        return Work(sent_bytes=size * (count - 1) / count)

    def _devices(self, axes: Any) -> int:
        return math.prod(self._sizes[name] for name in axes)

    def _here(self, array: _Array) -> float:
        """Bytes of an array on one device."""
        return array.itemsize * math.prod(array.shape) / self._devices(name for axes in array.axes for name in axes)


def _in_order(first: _Array, *others: _Array, skipped: int = 0) -> list[Dimensions]:
    """Returns the dimensions that arrays share one by one, after those that only the first one has."""
    return [[(first, i), *((other, i - skipped) for other in others)] for i in range(skipped, len(first.shape))]


def _alike(name: str, params: Any, given: list[_Array], results: list[_Array]) -> Iterator[Dimensions]:
    """Yields the dimensions of an operation, each as that of all operands and results that share it."""
    if not results or not given:
        return
    first, result = given[0], results[0]
    ranks = range(len(first.shape)), range(len(result.shape))
    if name == "dot_general":
        yield from _of_product(params["dimension_numbers"], first, given[1], result)
    elif name == "broadcast_in_dim":
        yield from ([(first, i), (result, d)] for i, d in enumerate(params["broadcast_dimensions"]))
    elif name == "transpose":
        yield from ([(first, d), (result, i)] for i, d in enumerate(params["permutation"]))
    elif name == "reshape":
        yield from ([(first, i), (result, j)] for i, j in _reshaped(first.shape, result.shape))
    elif name == "squeeze" or (name.startswith(("reduce_", "arg")) and "axes" in params):
        gone = params["dimensions"] if name == "squeeze" else params["axes"]
        left = [i for i in ranks[0] if i not in gone]
        yield from ([(first, i), (result, j)] for j, i in enumerate(left))
    elif name == "gather":
        numbers = params["dimension_numbers"]
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        windows = [i for i in ranks[0] if i not in gone]
        outside = [i for i in ranks[1] if i not in numbers.offset_dims]
        for i, j in zip(windows, numbers.offset_dims, strict=True):
            if params["slice_sizes"][i] == first.shape[i]:
                yield [(first, i), (result, j)]
        yield from ([(given[1], i), (result, j)] for i, j in enumerate(outside))
    elif name.startswith("scatter"):
        numbers = params["dimension_numbers"]
        gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        windows = dict(zip((i for i in ranks[0] if i not in gone), numbers.update_window_dims, strict=True))
        for i in ranks[0]:
            updates = [(given[2], windows[i])] if i in windows and given[2].shape[windows[i]] == first.shape[i] else []
            yield [(first, i), (result, i), *updates]
    else:
        for i in ranks[1]:
            arrays = (each for each in (*given, *results) if len(each.shape) == len(result.shape))
            yield [(each, i) for each in arrays if each.shape[i] == result.shape[i] or name in _RESIZING]


def _of_product(numbers: Any, left: _Array, right: _Array, result: _Array) -> Iterator[Dimensions]:
    """Yields the dimensions of a matrix product: those of a batch, those of each side, and those that are summed."""
    (summed, also_summed), (batch, also_batch) = numbers
    mine = [i for i in range(len(left.shape)) if i not in (*summed, *batch)]
    others = [i for i in range(len(right.shape)) if i not in (*also_summed, *also_batch)]
    places = iter(range(len(result.shape)))
    yield from ([(left, i), (right, j), (result, next(places))] for i, j in zip(batch, also_batch, strict=True))
    yield from ([(left, i), (result, next(places))] for i in mine)
    yield from ([(right, i), (result, next(places))] for i in others)
    yield from ([(left, i), (right, j)] for i, j in zip(summed, also_summed, strict=True))


def _reshaped(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields the dimensions that stay, and the first of those that are merged or split."""
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] == 1 != after[j] or after[j] == 1 != before[i]:
            i, j = (i + 1, j) if before[i] == 1 else (i, j + 1)
            continue
        yield i, j
        sizes = [before[i], after[j]]
        i, j = i + 1, j + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                sizes[0], i = sizes[0] * before[i], i + 1
            else:
                sizes[1], j = sizes[1] * after[j], j + 1
