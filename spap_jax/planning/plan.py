"""A plan: whether a run fits a mesh, what would make it fit, and a lower bound on its time."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from spap_jax.models import DecoderConfig
from spap_jax.planning import memory
from spap_jax.planning.accelerators import Accelerator, Mesh
from spap_jax.planning.counted import Work
from spap_jax.planning.memory import Parts
from spap_jax.planning.workload import Workload, workload
from spap_jax.quantities import bytes_text
from spap_jax.settings import FinetuneSettings, PruneSettings

USABLE = 0.9
"""Usable fraction of a device's memory; the rest is left for programs, fragmentation and compiler overhead."""

_TAKEN_BY_JAX = 0.75
"""Fraction of a GPU's memory that JAX allocates by default."""

_HELD = ("weights", "streams")
"""The parts of a phase's memory that are no workspace: they are held before it and after it."""

_JOINT = ("joint steps", "joint checks")
"""The phases whose memory depends on how many blocks are adjusted together."""


@dataclass(frozen=True)
class Request:
    """The run to plan.

    Attributes:
        config: The dense decoder.
        settings: How to prune it.
        sequences: Number of calibration sequences.
        length: Number of tokens of each sequence.
        weight_bytes: Bytes of a stored weight.
        training: Settings of recovery training, to plan that of the pruned decoder towards the dense one.
        known: Phases of which a compiler has said how much memory they need, as pairs: the name, and the factor by
            which their workspace differs from what is counted here.
    """

    config: DecoderConfig
    settings: PruneSettings
    sequences: int
    length: int
    weight_bytes: int
    training: FinetuneSettings | None = None
    known: tuple[tuple[str, float], ...] = ()

    def changed(self, **settings: Any) -> "Request":
        """Returns the same run with other settings."""
        return dataclasses.replace(self, settings=self.settings.replace(**settings))

    def on(self, mesh: Mesh) -> Workload:
        """Returns the workload of this run on a mesh."""
        sizes = self.sequences, self.length, mesh.devices // mesh.sharers, mesh.sharers, self.weight_bytes
        return workload(self.config, self.settings, *sizes, mesh.accelerator.platform, self.training)


@dataclass(frozen=True)
class Phase:
    """One phase of the run, for all layers on one device.

    Attributes:
        name: Name of the phase, as in reports.
        operations: Floating-point operations.
        memory_bytes: Bytes moved from and to the device's memory.
        sent_bytes: Bytes that the device sends to others.
        full_operations: The operations of float32 products at full precision, which are among ``operations``.
        seconds: Lower bound by the roofline: the slower of compute and memory, plus the interconnect.
        bound: What takes most of the time: "compute", "memory" or "interconnect".
    """

    name: str
    operations: float
    memory_bytes: float
    sent_bytes: float
    full_operations: float
    seconds: float
    bound: str


@dataclass(frozen=True)
class Plan:
    """Requirements of a run on a mesh.

    Attributes:
        request: The run.
        mesh: The devices.
        memory: Peak memory of each device in each phase, in bytes by part.
        host: Bytes on each host, by part.
        disk: Bytes on the disk of the first host until the result is complete, by part.
        read: Bytes of weights that every process reads.
    """

    request: Request
    mesh: Mesh
    memory: dict[str, Parts]
    host: Parts
    disk: Parts
    read: float

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Work and time of each phase; the programs are traced when they are asked for."""
        from spap_jax.planning.programs import work  # which takes a while to import, and only this needs

        counts = work(self.request.on(self.mesh))
        return tuple(_phase(name, count, self.mesh.accelerator) for name, count in counts.items() if count.operations)

    @property
    def room(self) -> float:
        """Usable memory of a device in bytes."""
        return USABLE * self.mesh.accelerator.memory

    @property
    def peak(self) -> tuple[str, float]:
        """The phase that needs the most memory, and its bytes."""
        totals = {name: sum(parts.values()) for name, parts in self.memory.items()}
        name = max(totals, key=lambda each: totals[each])
        return name, totals[name]

    @property
    def fits(self) -> bool:
        """Whether the devices have enough memory."""
        return self.peak[1] <= self.room

    @property
    def seconds(self) -> float:
        """Seconds of all phases at the peak rates."""
        return sum(phase.seconds for phase in self.phases)


def plan(request: Request, mesh: Mesh) -> Plan:
    """Computes the requirements of a run on a mesh, whose joint steps adjust as many blocks together as fit.

    Raises:
        UserError: there is nothing to remove.
    """
    request = with_blocks_that_fit(request, mesh)
    load = request.on(mesh)
    models = (load.dense, load.narrow) if load.training else (load.dense,)
    read = sum(map(memory.decoder_elements, models))
    return Plan(
        request=request,
        mesh=mesh,
        memory=_device_memory(request, mesh),
        host=memory.host_memory(load, mesh.host_devices),
        disk=memory.disk_space(load, mesh.host_devices),
        read=read * load.weight_bytes,
    )


def with_blocks_that_fit(request: Request, mesh: Mesh) -> Request:
    """Returns a run whose joint steps adjust no more blocks together than fit the devices, if it leaves that open.

    If all blocks fit, or not even one alone, the run is returned as it is.

    Raises:
        UserError: there is nothing to remove.
    """
    if request.training or request.settings.joint_blocks is not None:
        return request
    together = request.on(mesh).tail.layers
    room = USABLE * mesh.accelerator.memory
    for count in (number for number in range(together, 0, -1) if together % number == 0):
        some = request if count == together else request.changed(joint_blocks=count)
        needed = _device_memory(some, mesh)
        if all(sum(needed[name].values()) <= room for name in _JOINT if name in needed):
            return some
    return request


def _device_memory(request: Request, mesh: Mesh) -> dict[str, Parts]:
    counted = memory.device_memory(request.on(mesh))
    factors = dict(request.known)
    return {
        name: {part: size if part in _HELD else factors.get(name, 1.0) * size for part, size in parts.items()}
        for name, parts in counted.items()
    }


def _phase(name: str, work: Work, chip: Accelerator) -> Phase:
    spent = {
        "compute": work.full_operations / chip.full + (work.operations - work.full_operations) / chip.quick,
        "memory": work.memory_bytes / chip.bandwidth,
        "interconnect": work.sent_bytes / chip.link,
    }
    seconds = max(spent["compute"], spent["memory"]) + spent["interconnect"]
    return Phase(name, **vars(work), seconds=seconds, bound=max(spent, key=lambda each: spent[each]))


def corrected(planned: Plan, needs: dict[str, float]) -> Plan:
    """Returns the plan of the same run with the memory that a compiler says its phases need, in bytes.

    What the run holds is known, so the rest is workspace. Ways to make the run fit are judged by what is counted for
    them, with the workspace of these phases in the same proportion to the count. As many blocks are adjusted together
    as in the programs that were compiled.
    """
    known = []
    for name, parts in planned.memory.items():
        held = sum(size for part, size in parts.items() if part in _HELD)
        workspace = sum(parts.values()) - held
        if name in needs and workspace:
            known.append((name, max(0.0, needs[name] - held) / workspace))
    request = planned.request.changed(joint_blocks=planned.request.settings.joint_blocks or 0)
    return plan(dataclasses.replace(request, known=tuple(known)), planned.mesh)


def verdict(planned: Plan) -> str:
    """Returns a sentence or two on whether the run fits and, if not, what would make it fit."""
    name, need = planned.peak
    room = f"{bytes_text(planned.room)} ({USABLE:.0%} of its {bytes_text(planned.mesh.accelerator.memory)})"
    if planned.fits:
        return f"it fits: a device needs at most {bytes_text(need)}, in the phase {name!r}, and has {room} for it."
    needs = f"a device needs {bytes_text(need)} in the phase {name!r} and has {room} for it"
    return f"it does not fit: {needs}. {remedy(planned)}"


def remedy(planned: Plan) -> str:
    """Returns a sentence or two on what would make a run fit that does not."""
    request, mesh = planned.request, planned.mesh
    training, pruning = (_lighter,), (_halved, _fewer, _partly, _easier)
    ways = (_narrower, *(training if request.training else pruning), _divided, _more)
    if found := [words for way in ways if (words := _first(way(request, mesh)))]:
        return f"It would fit with {', or with '.join(found)}."
    if request.training:
        return "It takes more devices, or larger ones."
    *_, (_, easiest, _) = _easier(request, mesh)
    least = easiest.changed(batch_tokens=min(request.length, easiest.settings.batch_tokens))
    words = "--effort low" if least == easiest else f"--effort low --batch-tokens {request.length}"
    spread = _first(_spread(request, mesh))
    combined = None if spread and easiest == request else _first(_combined(words, least, mesh))
    if found := [each for each in (spread, combined) if each]:
        return f"It would fit with {', or with '.join(found)}."
    return _never(words, least, mesh)


def _combined(words: str, least: Request, mesh: Mesh) -> Iterator[tuple[str, Request, Mesh]]:
    """Yields what may help a run that is as easy as it can be, which ``words`` say."""
    yield words, least, mesh
    for way, link in ((_divided, " "), (_fewer, " "), (_more, " and "), (_spread, " ")):
        yield from ((f"{words}{link}{more}", request, changed) for more, request, changed in way(least, mesh))


def _never(words: str, least: Request, mesh: Mesh) -> str:
    """Returns the sentences on a run of which not even the easiest fits on any number of such devices."""
    smallest = plan(dataclasses.replace(least, sequences=2), mesh)
    name, need = smallest.peak
    part = max(smallest.memory[name], key=lambda each: smallest.memory[name][each])
    more = mesh.accelerator.sizes[-1] > mesh.devices  # larger meshes were tried
    tried = "Neither fewer sequences nor more devices make it fit" if more else "Fewer sequences do not make it fit"
    return (
        f"{tried}: even with {words} and 2 sequences the phase {name!r} needs {bytes_text(need)}, "
        f"{bytes_text(smallest.memory[name][part])} of it for its {part}. It takes devices with "
        f"{bytes_text(need / USABLE)} or more{'' if more else ', or more devices that share the weights'}."
    )


def _first(changes: Iterable[tuple[str, Request, Mesh]]) -> str | None:
    """Returns the description of the first change that makes the run fit."""
    return next((words for words, request, mesh in changes if plan(request, mesh).fits), None)


def _narrower(request: Request, mesh: Mesh) -> Iterator[tuple[str, Request, Mesh]]:
    tokens = request.settings.batch_tokens
    while tokens > request.length:
        tokens = max(request.length, tokens // 2)
        yield f"--batch-tokens {tokens}", request.changed(batch_tokens=tokens), mesh


def _halved(request: Request, mesh: Mesh) -> Iterator[tuple[str, Request, Mesh]]:
    if request.settings.stream_dtype != "bfloat16":
        yield "--stream-dtype bfloat16", request.changed(stream_dtype="bfloat16"), mesh


def _lighter(request: Request, mesh: Mesh) -> Iterator[tuple[str, Request, Mesh]]:
    assert request.training
    if request.training.full:
        yield "--finetune lora", dataclasses.replace(request, training=request.training.replace(full=False)), mesh


def _easier(request: Request, mesh: Mesh) -> Iterator[tuple[str, Request, Mesh]]:
    for effort in ["default"] * (request.settings.effort == "high") + ["low"]:
        yield f"--effort {effort}", request.changed(effort=effort), mesh


def _partly(request: Request, mesh: Mesh) -> Iterator[tuple[str, Request, Mesh]]:
    if request.settings.passes and request.settings.joint_weights == "block":
        yield "--joint-weights mlp", request.changed(joint_weights="mlp"), mesh
    blocks = request.on(mesh).together
    while blocks > 1 and request.settings.passes:
        blocks //= 2
        yield f"--joint-blocks {blocks}", request.changed(joint_blocks=blocks), mesh


def _fewer(request: Request, mesh: Mesh) -> Iterator[tuple[str, Request, Mesh]]:
    sequences = request.sequences // 2
    while sequences >= 2:
        yield f"--sequences {sequences}", dataclasses.replace(request, sequences=sequences), mesh
        sequences //= 2


def _divided(request: Request, mesh: Mesh) -> Iterator[tuple[str, Request, Mesh]]:
    sharers = 2 * mesh.sharers
    while mesh.devices % sharers == 0:
        multiple = request.settings.multiple(request.config.intermediate)
        rounded = math.lcm(multiple, sharers)
        words = f"--model-devices {sharers}{f' --round-to {rounded}' if rounded != multiple else ''}"
        yield words, request.changed(round_to=rounded), mesh.shared_among(sharers)
        sharers *= 2


def _more(request: Request, mesh: Mesh) -> Iterator[tuple[str, Request, Mesh]]:
    for larger in _larger(mesh):
        if larger.devices // larger.sharers <= request.sequences:
            yield f"{larger.name} in place of {mesh.name}", request, larger


def _spread(request: Request, mesh: Mesh) -> Iterator[tuple[str, Request, Mesh]]:
    for larger in _larger(mesh):
        for words, changed, shared in _divided(request, larger):
            if shared.devices // shared.sharers <= request.sequences:
                yield f"{words} and {larger.name} in place of {mesh.name}", changed, shared


def _larger(mesh: Mesh) -> Iterator[Mesh]:
    devices, sizes = 2 * mesh.devices, mesh.accelerator.sizes
    while devices <= sizes[-1]:
        if devices in sizes:
            yield mesh.with_devices(devices)
        devices *= 2


def notes(planned: Plan) -> list[str]:
    """Returns remarks on a run on this mesh, one sentence each."""
    load = planned.request.on(planned.mesh)
    chip, found = planned.mesh.accelerator, []
    if load.groups and load.together < load.tail.layers:
        found.append(f"Joint steps adjust {load.together} of {load.tail.layers} blocks at a time (--joint-blocks).")
    if load.fitted.real < load.devices:
        whose = "devices" if load.sharers == 1 else "groups of devices"
        found.append(
            f"{load.fitted.real} sequences to fit are fewer than the {load.devices} {whose}: those without one of "
            "their own have nothing to do."
        )
    if load.narrow.intermediate % load.sharers:
        rounded = math.lcm(load.settings.multiple(load.dense.intermediate), load.sharers)
        found.append(
            f"The {load.narrow.intermediate} channels kept cannot be divided among {load.sharers} devices, so each "
            f"holds all of them: give --round-to {rounded}."
        )
    by_default = USABLE * _TAKEN_BY_JAX * chip.memory  # what a run finds usable
    if chip.named == 1 and "TPU" not in chip.words and planned.fits and planned.peak[1] > by_default:
        found.append("JAX takes too little of a GPU's memory, three quarters: set XLA_CLIENT_MEM_FRACTION=0.95.")
    return found
