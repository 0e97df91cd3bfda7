"""A plan as tables of text, for a terminal and for a page, and as plain values for a file."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from spap_jax.planning.plan import Plan, notes, verdict
from spap_jax.quantities import bytes_text, duration_text

if TYPE_CHECKING:  # a plan that is only counted need not import the programs
    from spap_jax.planning.compiled import Compiled

_PARTS = {
    "weights": "weights",
    "streams": "streams",
    "moments": "moments",
    "solver": "solver",
    "gradients": "steps",
    "activations": "tokens",
}
"""Parts of the memory, with the short names of their columns."""

LEGEND = (
    "moments: second moments of a layer; solver: its system and tableau; steps: weights that are adjusted, their "
    "gradients and Adam's moments; tokens: activations of a chunk, and sums over it"
)

COMPILED_LEGEND = (
    "memory: what the program needs, with all that the run holds beside it; TFLOP, memory traffic and the compiler's "
    "estimate of the time count the body of a loop once, collectives every turn"
)


class Words(NamedTuple):
    """A table: title, column names and rows."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def shown(plans: list[Plan], found: "list[Compiled]") -> Iterator[Words | str]:
    """Yields the tables and lines that show a plan, or compare several.

    Args:
        plans: The plans.
        found: What the compiler says of the programs of the only one, if it was asked.
    """
    if len(plans) > 1:
        yield summary_words(plans)
        yield from (f"{planned.mesh.name}: {verdict(planned)}" for planned in plans if not planned.fits)
        yield "at the peak rates; --mesh NAME shows the phases of one"
        return
    [planned] = plans
    fits = f"{planned.mesh.name}: {verdict(planned)}"
    if found:
        yield compiled_words(found)
        yield from (COMPILED_LEGEND, *too_large(found, planned.room), fits)
    else:
        yield memory_words(planned)
        yield from (LEGEND, fits, host_line(planned), disk_line(planned))
        yield phase_words(planned)
        yield time_line(planned)
    yield from notes(planned)


def memory_words(planned: Plan) -> Words:
    """Returns a table of the memory of each device by phase and part."""
    power = min(4, int(math.log10(planned.peak[1])) // 3)
    rows = [
        (name, *(_number(parts[part] / 1000**power) if part in parts else "" for part in _PARTS),
         _number(sum(parts.values()) / 1000**power))
        for name, parts in planned.memory.items()
    ]  # fmt: skip
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return Words(f"memory of each device, {unit}", ("phase", *_PARTS.values(), "together"), rows)


def phase_words(planned: Plan) -> Words:
    """Returns a table of work and time by phase."""
    rows = [
        (phase.name, _number(phase.operations / 1e12), bytes_text(phase.memory_bytes), bytes_text(phase.sent_bytes),
         duration_text(phase.seconds), phase.bound)
        for phase in planned.phases
    ]  # fmt: skip
    columns = ("phase", "TFLOP", "memory traffic", "sent", "at least", "bound by")
    return Words("work of each device, all layers", columns, rows)


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if value >= 1000 else f"{value:.3g}"


def host_line(planned: Plan) -> str:
    """Returns a line on the memory of a host by part."""
    parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in planned.host.items())
    total = bytes_text(sum(planned.host.values()))
    read = bytes_text(planned.read)
    return f"memory of each host: {total} beside JAX itself ({parts}); every process reads at most {read}"


def disk_line(planned: Plan) -> str:
    """Returns a line on the disk of the first host by part."""
    parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in planned.disk.items())
    return f"disk of the first host until the end: {bytes_text(sum(planned.disk.values()))} ({parts})"


def time_line(planned: Plan) -> str:
    """Returns a line on the lower bound of the time, and what it does not include."""
    return (
        f"at least {duration_text(planned.seconds)} at the peak rates; compiling, reading and writing come on top, and "
        "no program reaches the peaks"
    )


def compiled_words(found: "list[Compiled]") -> Words:
    """Returns a table of what the compiler says of each program."""
    rows = [
        (each.phase, each.name, str(each.times), bytes_text(each.memory), bytes_text(each.arguments),
         "refused" if each.refused else bytes_text(each.temporaries), _known(each.operations / 1e12, _number),
         _known(each.moved, bytes_text), bytes_text(each.sent.total()), _known(each.seconds, duration_text),
         duration_text(each.compiling))
        for each in found
    ]  # fmt: skip
    columns = ("phase", "program", "calls", "memory", "arguments", "temporaries", "TFLOP", "memory traffic",
               "collectives", "estimate", "compiled in")  # fmt: skip
    return Words("programs as compiled, one call on each device", columns, rows)


def too_large(found: "list[Compiled]", room: float) -> list[str]:
    """Returns a line for each program that needs more than the usable memory of a device, in bytes."""
    return [
        f"{each.name} ({each.phase}) does not fit: it needs {bytes_text(each.memory)} of {bytes_text(room)}"
        + (", and the compiler refuses it" if each.refused else "")
        for each in found
        if each.refused or each.memory > room
    ]


def _known(value: float, words: Callable[[float], str]) -> str:
    return "" if math.isnan(value) else words(value)


def summary_words(plans: list[Plan]) -> Words:
    """Returns a table that compares several meshes, one row each."""
    rows = [
        (planned.mesh.name, f"{planned.mesh.devices} x {planned.mesh.accelerator.words}", planned.peak[0],
         bytes_text(planned.peak[1]), bytes_text(planned.room), "yes" if planned.fits else "no",
         duration_text(planned.seconds))
        for planned in plans
    ]  # fmt: skip
    columns = ("mesh", "devices", "largest phase", "needs", "of", "fits", "at least")
    return Words("needs of each device", columns, rows)


def as_values(planned: Plan) -> dict[str, Any]:
    """Returns the numbers of a plan as plain values."""
    chip = planned.mesh.accelerator
    return {
        "mesh": {
            "name": planned.mesh.name,
            "devices": planned.mesh.devices,
            "model_devices": planned.mesh.sharers,
            **{name: value for name, value in chip._asdict().items() if name != "sizes"},
        },
        "fits": planned.fits,
        "verdict": verdict(planned),
        "notes": notes(planned),
        "device_memory_bytes": planned.memory,
        "usable_bytes": planned.room,
        "host_memory_bytes": planned.host,
        "disk_bytes": planned.disk,
        "read_bytes": planned.read,
        "phases": [vars(phase) for phase in planned.phases],
        "seconds": planned.seconds,
    }
