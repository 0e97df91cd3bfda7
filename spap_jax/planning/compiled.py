"""The programs of a run, compiled for the devices of a mesh that is not there: what their compiler says of them."""

import functools
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from spap_jax.planning import absent
from spap_jax.planning.accelerators import Mesh
from spap_jax.planning.programs import Program, programs
from spap_jax.planning.workload import Workload

_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """What the compiler says of one call of a program, on one device.

    Attributes:
        phase: Name of the phase.
        name: Name of the program.
        times: How often the run calls it.
        memory: Bytes of memory while it runs, with all that the run holds beside; of a program that was refused, what
            the compiler says that it would have needed.
        arguments: Bytes of its arguments.
        temporaries: Bytes of its temporaries; nan if it was refused.
        operations: Floating-point operations, with the body of a loop counted once; nan if it was refused.
        moved: Bytes moved from and to the device's memory, counted likewise.
        sent: Bytes of the results of collectives by kind, each as often as its loops make it.
        seconds: The compiler's estimate of the seconds; nan if it makes none.
        compiling: Seconds that lowering and compiling took.
        refused: Whether the compiler refused the program, since it does not fit the device.
    """

    phase: str
    name: str
    times: int
    memory: float
    arguments: float
    temporaries: float = np.nan
    operations: float = np.nan
    moved: float = np.nan
    sent: Counter[str] = Counter()  # noqa: RUF012 (never changed)
    seconds: float = np.nan
    compiling: float = 0.0
    refused: bool = False


def compiled(load: Workload, mesh: Mesh, watch: Callable[[str, int, int], None]) -> Iterator[Compiled]:
    """Compiles the programs of a run, one after the other.

    Args:
        load: The run.
        mesh: Its mesh.
        watch: Called before each program and after the last with what is done, their number so far, and that of all.

    Raises:
        UserError: the compiler for its devices is not there.
    """
    with absent.described(mesh) as device:
        every, what = list(programs(load, device)), f"compiling for {mesh.name}"
        for number, program in enumerate(every):
            watch(what, number, len(every))
            leaves, structure = jax.tree.flatten((program.arguments, program.options))
            alone = _alone(program.function, structure, tuple(leaves))
            held = alone.memory + program.beside_bytes
            yield alone._replace(phase=program.phase, times=program.times, memory=held)
        watch(what, len(every), len(every))


@functools.cache  # runs that differ in one phase have the same programs in the others
def _alone(function: Any, structure: Any, leaves: tuple) -> Compiled:
    """Compiles one call of a function, with nothing held beside it."""
    arguments, options = jax.tree.unflatten(structure, leaves)
    return compile_program(Program("", function, arguments, options, times=1, beside=()))


def needs(found: list[Compiled]) -> dict[str, float]:
    """Returns the bytes of memory that each phase needs, by its largest program."""
    most: dict[str, float] = {}
    for each in found:
        most[each.phase] = max(each.memory, most.get(each.phase, 0))
    return most


def compile_program(program: Program) -> Compiled:
    """Compiles one program for the devices of its arguments."""
    start = time.perf_counter()
    try:
        found = program.lowered().compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := _needed(str(error), program.given_bytes)) is None:
            raise
        return Compiled(
            phase=program.phase,
            name=program.name,
            times=program.times,
            memory=needed + program.beside_bytes,
            arguments=program.given_bytes,
            compiling=time.perf_counter() - start,
            refused=True,
        )
    return accepted(program, found, time.perf_counter() - start)


def accepted(program: Program, found: Any, compiling: float) -> Compiled:
    """Reads what the compiler says of a program that it compiled in some seconds."""
    sizes, costs = found.memory_analysis(), found.cost_analysis() or {}
    own = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    seconds = costs.get("optimal_seconds", np.nan)
    return Compiled(
        phase=program.phase,
        name=program.name,
        times=program.times,
        # Arguments that a program does not use are held all the same.
        memory=own + max(program.given_bytes, sizes.argument_size_in_bytes) + program.beside_bytes,
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        operations=costs.get("flops", np.nan),
        moved=costs.get("bytes accessed", np.nan),
        sent=sent(found.as_text()),
        seconds=seconds if seconds > 0 else np.nan,
        compiling=compiling,
    )


def _needed(message: str, arguments: float) -> float | None:
    """Returns the bytes that a refused program needs; None if it was not refused for its memory.

    Args:
        message: What the compiler says. If the temporaries alone are too large, it says nothing of the arguments.
        arguments: Bytes of these.
    """
    if said := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message):
        return float(said[1]) * _UNITS[said[2]]
    if said := re.search(r"required for HLO temporaries \(([\d.]+)([KMGT])\)", message):
        return float(said[1]) * _UNITS[said[2]] + arguments
    return None


class Collective(NamedTuple):
    """A collective of a compiled program: its kind, the shapes of its results on a device, and how often it is run."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    times: int

    @property
    def size(self) -> int:
        """Bytes of the results."""
        return sum(_bits(dtype) * int(np.prod(shape)) // 8 for dtype, shape in self.shapes)


def sent(text: str) -> Counter[str]:
    """Sums the bytes of the results of a program's collectives by kind, each as often as it is run."""
    found: Counter[str] = Counter()
    for each in collectives(text):
        found[each.kind] += each.times * each.size
    return found


def collectives(text: str) -> list[Collective]:
    """Reads the collectives of a compiled program; those of a loop whose number of turns is unknown count once."""
    bodies, entry = _computations(text)
    found, kinds = [], "|".join(_KINDS)

    def walk(name: str, times: int) -> None:
        if _goes_on(name, bodies[name]):
            return
        for line in bodies[name]:
            if operation := re.search(rf"= (\S.*?) ({kinds})(-start)?\(", line):
                found.append(Collective(operation[2], _results(operation[1], operation[2], operation[3]), times))
            turns = _turns(line, bodies) if " while(" in line else 1
            for inner in _called(line):
                walk(inner, times * turns)

    walk(entry, 1)
    return found


def _goes_on(name: str, body: list[str]) -> bool:
    """Whether a computation only continues or ends a collective that another one starts, as a TPU's programs do."""
    return name.startswith("async_collective_fusion") or any('"AsyncCollectiveDone"' in line for line in body)


def _turns(loop: str, bodies: dict[str, list[str]]) -> int:
    """Returns the number of turns of a loop: what the compiler notes, or the limit of a counter that begins at 0."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    lines = bodies[condition[1]] if condition else []
    limits = [found[1] for found in (re.search(r"= s32\[\]\S* constant\((\d+)\)", line) for line in lines) if found]
    counted = any(re.search(r"^\s*ROOT .* compare\(.*direction=LT", line) for line in lines)
    return int(limits[0]) if counted and len(limits) == 1 else 1


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Splits a program into computations, as lines by name, and names the one that it enters by."""
    bodies: dict[str, list[str]] = defaultdict(list)
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
        else:
            bodies[name].append(line)
    return bodies, entry


def _called(line: str) -> list[str]:
    """Returns the computations that an instruction runs."""
    alone = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
    branches = re.search(r"branch_computations=\{([^}]*)\}", line)
    return alone + ([name.strip(" %") for name in branches[1].split(",")] if branches else [])


def _results(result: str, kind: str, start: str | None) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns data types and shapes of a collective's results; one that is only started also lists its operands."""
    arrays = [(dtype, tuple(map(int, filter(None, dims.split(",")))))
              for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", result)]  # fmt: skip
    if start and kind in ("all-gather", "collective-permute"):
        arrays = [each for each in arrays if each[1]]
        arrays = arrays[len(arrays) // 2 :]
    return tuple(arrays)


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.sub(r"^\D*(\d+).*$", r"\1", dtype))
