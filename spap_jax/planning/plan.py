"""A plan of a pruning run: the run itself on described arrays, from the dense model's config alone."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from spap_jax import memory
from spap_jax.backend import platform
from spap_jax.data.tokens import POOL, TokenBlocks
from spap_jax.errors import Notice, warn
from spap_jax.models import DecoderConfig, Params, decoder
from spap_jax.parallel import mesh, processes
from spap_jax.parallel.placement import bytes_of, shard_params
from spap_jax.planning.dry_run import Operations, Program, RefusedError, recording
from spap_jax.pruning import joint, streams
from spap_jax.pruning.prune import prune
from spap_jax.pruning.run import Dense, Run, resolve
from spap_jax.pruning.widths import choose_widths
from spap_jax.settings import PruneSettings

USABLE = 0.9
"""Usable fraction of a device's memory; the rest is left for programs, fragmentation and compiler overhead."""

Watch = Callable[[str], None]


class Plan(NamedTuple):
    """What a run needs.

    Attributes:
        room: Bytes of a device that the run may use.
        programs: Its programs by name, in the order of their first calls; without those after a refused one.
        refused: Name of a program that the compiler refuses, since it does not fit; None if there is none.
        result: Bytes of the weights of the result.
        unfinished: Bytes that an unfinished run keeps on disk at most.
    """

    run: Run
    room: float
    programs: dict[str, Program]
    refused: str | None
    result: int
    unfinished: int

    @property
    def peak(self) -> tuple[str, float]:
        """The program during which a device holds most, and its bytes."""
        name = max(self.programs, key=lambda name: self.programs[name].memory)
        return name, self.programs[name].memory

    @property
    def fits(self) -> bool:
        """Whether the devices have enough memory."""
        return self.refused is None and self.peak[1] <= self.room


class _Sizes:
    """A store that keeps only the sizes of what the disk holds besides the output's own blocks."""

    def __init__(self) -> None:
        self.changed: dict[int, int] = {}
        self.steps = 0

    def block(self, index: int) -> None:
        """Returns None: no block is finished."""

    def put(self, index: int, layer: Params, report: Any) -> None:
        """Keeps nothing."""

    def replace(self, index: int, layer: Params) -> None:
        """Notes the size of a block that joint steps have changed."""
        self.changed[index] = bytes_of(layer)

    def save_state(self, tree: Any, checks: Any) -> None:
        """Notes the size of the state of the joint steps."""
        self.steps = bytes_of(tree)

    def restore_state(self, like: Any) -> None:
        """Returns None: there were no steps."""


def plan(
    config: DecoderConfig,
    settings: PruneSettings,
    shape: tuple[int, int],
    dtype: np.dtype,
    room: float,
    watch: Watch = lambda _: None,
) -> Plan:
    """Plans a run on the mesh around, whose joint steps change as many blocks as fit, unless the settings say.

    Args:
        shape: Number and length of the calibration sequences.
        dtype: Data type of the stored weights.
        room: Bytes of a device that the run may use.
        watch: Called with the name of each program before it is compiled.

    Raises:
        UserError: there is nothing to remove.
    """
    params = jax.tree.map(lambda a: _zeros(a.shape, dtype), decoder.shapes(config))
    dense = Dense(config, params, lambda index: jax.tree.map(lambda a: a[index], params["layers"]))
    tokens = _tokens(shape, _tokens(((POOL - 1) * shape[0], shape[1])))
    run, store, refused = run_that_fits(config, tokens, settings, dense.outer, room=room, watch=watch), _Sizes(), None
    with recording(watch) as dry:
        try:
            if settings.allocation == "global":
                run = dataclasses.replace(run, pruned=run.pruned.with_widths(choose_widths(run, dense)))
            prune(run, dense, store)
        except RefusedError as error:
            refused = error.program
            dry.programs[refused] = Program(1, error.needed, Operations())
    result = bytes_of(jax.tree.map(lambda a: _zeros(a.shape, dtype), decoder.shapes(run.pruned)))
    return Plan(run, room, dry.programs, refused, result, result + sum(store.changed.values()) + store.steps)


def run_that_fits(
    config: DecoderConfig,
    tokens: np.ndarray | TokenBlocks,
    settings: PruneSettings,
    outer: Params,
    dtype: str | None = None,
    room: float | None = None,
    watch: Watch = lambda _: None,
) -> Run:
    """Resolves a run, whose joint steps change as many of the last blocks as fit, unless the settings say how many.

    The programs of the steps are compiled for the mesh around, which the run needs anyway; not on CPUs, which have the
    memory of the machine. All processes of a run have to call this.

    Arguments are those of `resolve` and `plan`, and ``outer``, the dense decoder's parameters outside the blocks. By
    default the run may use what its devices have left.

    Raises:
        UserError: see `resolve`.
    """
    run = resolve(config, tokens, settings, dtype)
    if run.joint is None or settings.joint_last is not None or platform() == "cpu":
        return run
    room = float(processes.broadcast_from_leader(room_here())) if room is None else room
    fits, fails = 0, run.tail.layers + 1
    while fails - fits > 1:
        count = run.tail.layers if fails > run.tail.layers else (fits + fails) // 2
        fits, fails = (count, fails) if _steps_fit(run, outer, count, room, watch) else (fits, count)
    if (last := max(1, fits)) == run.tail.layers:
        return run
    warn(f"joint steps change the last {last} of {config.layers} blocks, as many as fit in memory.", Notice)
    return resolve(config, tokens, settings.replace(joint_last=last), dtype)


def _steps_fit(run: Run, outer: Params, last: int, room: float, watch: Watch) -> bool:
    """Whether the joint steps of a run fit if they change this many of the last blocks."""
    assert run.joint
    steps, settings = run.joint._replace(steps=1, check_every=1), run.settings.replace(joint_last=last)
    run = dataclasses.replace(run, joint=steps, settings=settings)
    dtype = jax.tree.leaves(outer)[0].dtype
    zeros = jax.tree.map(lambda a: _zeros(a.shape[1:], run.dtype or dtype), decoder.shapes(run.tail)["layers"])
    with recording(watch) as dry:
        try:
            pair = streams.start(run.config, outer, run.fitted), streams.start(run.config, outer, run.held_out)
            before = joint.entering(run, pair) if run.first_joint else None
            tail = joint.with_block(run, None, run.first_joint, shard_params(run.pruned, zeros))
            made = joint.make_steps(
                run, outer, tail, joint.ends(run, pair), before, _Sizes(), lambda *_: None, lambda *_: None
            )
            del pair, tail, before
            list(made)
        except RefusedError:
            return False
    return dry.peak[1] <= room


def room_here() -> float:
    """Bytes of a device of this machine that a run may use; infinite if it does not say."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return memory.left() / mesh.mesh_size()  # which CPUs share
    about = device.memory_stats() or {}
    return USABLE * (about.get("bytes_limit", math.inf) - about.get("bytes_in_use", 0))


def _tokens(shape: tuple[int, int], further: TokenBlocks | None = None) -> TokenBlocks:
    return TokenBlocks(_zeros(shape, np.dtype(np.int32)), "", shape[0], None, further)


def _zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)
