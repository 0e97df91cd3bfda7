"""The programs of a run: the only place that says which functions a run compiles, and how often it calls them.

They are the jitted functions of the pipeline and of the engine, also those that only their own file calls, with
described arguments, so that they can be lowered and compiled for devices that are not there. What JAX computes outside
of them (sums of a few numbers, copies, zeros) is left out. Where blocks differ in what they compile (rotary embedding,
window), there is a program for each kind.
``tests/planning/test_programs.py`` compares the list with what runs compile.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from spap_jax.backend import traced_for
from spap_jax.evaluation import generation
from spap_jax.models import DecoderConfig, Params
from spap_jax.parallel import mesh, placement
from spap_jax.parallel.placement import fully_sharded_spec
from spap_jax.parallel.sequences import Sequences
from spap_jax.planning.counted import Work, counted
from spap_jax.planning.described import Arrays, bytes_here, spec_in
from spap_jax.planning.workload import Chunks, Workload
from spap_jax.pruning import heads, joint, layer, moments, predictions, sampling, streams, waves
from spap_jax.pruning.streams import fitting_tokens
from spap_jax.solver.alternating import RoundSchedule
from spap_jax.solver.methods import METHODS, update_used
from spap_jax.training import finetune, loop, lora, step


class Program(NamedTuple):
    """A jitted function as a run calls it.

    Attributes:
        phase: Name of the phase, as in reports.
        function: The function.
        arguments: Its arguments; arrays are described.
        options: Its static keyword arguments.
        times: How often the run calls it.
        beside: Described arrays that the devices hold meanwhile, and that it is not given.
        turns: Maximum number of turns of loops whose end depends on values, by the name of the function repeated.
    """

    phase: str
    function: Any
    arguments: tuple
    options: dict[str, Any]
    times: int
    beside: Any
    turns: dict[str, int] = {}  # noqa: RUF012 (never changed)

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.__name__.lstrip("_")

    def counted(self) -> Work:
        """Traces one call, and counts its work on one device."""
        leaves, structure = jax.tree.flatten((self.arguments, self.options))
        return _counted(self.function, structure, tuple(leaves), tuple(self.turns.items()))

    def lowered(self) -> Any:
        """Lowers the function for the devices of its arguments."""
        return self.function.lower(*self.arguments, **self.options)

    @property
    def given_bytes(self) -> int:
        """Bytes of its arguments on one device, also of those that it does not use."""
        return bytes_here((self.arguments, self.options))

    @property
    def beside_bytes(self) -> int:
        """Bytes on one device of what is held meanwhile."""
        return bytes_here(self.beside)


@functools.cache  # runs that differ in one phase have the same programs in the others
def _counted(function: Any, structure: Any, leaves: tuple, turns: tuple) -> Work:
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]

    def call(*given: Any) -> Any:
        some = iter(given)
        filled = [next(some) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
        arguments, options = structure.unflatten(filled)
        return function(*arguments, **options)

    return counted(jax.make_jaxpr(call)(*arrays), arrays, dict(turns))


def programs(load: Workload, device: Any = None) -> Iterator[Program]:
    """Yields the programs of a run, by phase.

    Args:
        load: The run; the mesh around has to be its mesh.
        device: See ``Arrays``.
    """
    arrays = Arrays(load, device)
    phases = TRAINING if load.training else PRUNING
    for phase, of_phase in phases.items():
        for found in of_phase(arrays):
            yield found._replace(phase=phase)


@functools.cache
def work(load: Workload) -> dict[str, Work]:
    """Counts the work of a run on one device, by phase: of all programs, each as often as it is called.

    They are traced for devices that are only described. Attention is counted as it is computed without a fused kernel,
    in blocks of scores.
    """
    found: dict[str, Work] = {}
    with traced_for("gpu"), _mesh_of(load):
        for program in programs(load):
            found[program.phase] = found.get(program.phase, Work()).plus(program.counted(), program.times)
    return found


def _mesh_of(load: Workload) -> AbstractContextManager:
    if load.devices * load.sharers == 1:
        return nullcontext()
    axes = AbstractMesh((load.devices, load.sharers), (mesh.DATA, "model"), axis_types=(AxisType.Auto,) * 2)
    return use_abstract_mesh(axes)


def _program(
    function: Any, *arguments: Any, times: int, beside: Any = (), turns: dict[str, int] | None = None, **options: Any
) -> Program:
    return Program("", function, arguments, options, times, beside, turns or {})


def _by_kind(config: DecoderConfig, function: Any, *given: Any, beside: Any) -> Iterator[Program]:
    """Yields the program of a function that every block is passed through, one for each kind of block."""
    kinds = Counter(config.attending_like(index) for index in range(config.layers))
    for kind, count in kinds.items():
        yield _program(function, kind, *given, times=count, beside=beside)


def _parts(arrays: Arrays) -> list[tuple[Any, list[Any]]]:
    """The fitted and the held-out streams, each with what is held beside it."""
    parts = [arrays.fitted, *([arrays.held_out] if arrays.load.held_out.count else [])]
    return [(part, [*parts[:n], *parts[n + 1 :], _later(arrays)]) for n, part in enumerate(parts)]


def _later(arrays: Arrays) -> Params:
    """What is held for the joint steps, from the first block on that they change."""
    load = arrays.load
    if not load.groups:
        return {}
    return {
        "blocks": arrays.blocks,
        "entering": (arrays.kept, arrays.streams(load.judged).dense) if load.entered else (),
    }


def _resting(arrays: Arrays) -> list[Any]:
    """What is held while the solver works: the streams, the dense block, and what is held for the joint steps."""
    return [arrays.fitted, arrays.held_out, arrays.block(arrays.load.dense), _later(arrays)]


def streams_programs(arrays: Arrays) -> Iterator[Program]:
    """``pruning/streams.py``: both streams start, enter and leave every block; in waves the dense one goes ahead."""
    load = arrays.load
    embed = arrays.parameters(load.dense)["embed"]
    for chunks in load.parts:
        if chunks.count:
            stored = arrays.streams(chunks).dense.dtype
            yield _program(streams._embed, load.dense, {"embed": embed}, arrays.tokens(chunks), stored, times=1)
    if load.in_waves:
        yield from _ahead(arrays)
    block, small = arrays.block(load.dense), arrays.block(load.narrow)
    for part, beside in _parts(arrays):
        if not load.fewer_heads:
            yield from _by_kind(load.dense, streams.enter_mlp, block, part, beside=beside)
            continue
        yield from _by_kind(load.dense, streams.enter_attention, block, part, beside=beside)
        wide, held = _wide(load), [*beside, block]
        yield from _by_kind(wide, streams.leave_attention, arrays.block(wide), part, beside=held)
    for part, beside in _parts(arrays):
        times = load.narrow.layers
        yield _program(streams.leave_mlp, load.narrow, small, part, times=times, beside=[*beside, block])
    done = load.dense.layers - (load.tail.layers if load.groups else 0)
    if done:  # before any joint steps
        held = [arrays.fitted, arrays.held_out, _later(arrays)]
        yield _program(placement._in_stored_order, load.narrow, small, times=done, beside=held)


def _ahead(arrays: Arrays) -> Iterator[Program]:
    load, block = arrays.load, arrays.block(arrays.load.dense)
    stream = arrays.fitted  # a copy
    beside = [arrays.fitted, arrays.held_out, _kept(arrays), _later(arrays)]
    yield from _by_kind(load.dense, streams.enter_dense_mlp, block, stream, beside=beside)
    yield _program(streams.leave_dense_mlp, load.dense, block, stream, times=load.dense.layers, beside=beside)


def _wide(load: Workload) -> DecoderConfig:
    """The decoder whose MLPs are pruned: it has fewer heads already, if any are removed."""
    return load.dense.with_kv_heads(load.narrow.kv_heads)


def _fittings(load: Workload) -> Counter[layer.Fitting]:
    """What the programs that fit a block are compiled for, and how many blocks each fits."""
    both = [[config.attending_like(index) for index in range(config.layers)] for config in (_wide(load), load.narrow)]
    share = load.settings.fit.correction
    return Counter(layer.Fitting(dense, narrow, share) for dense, narrow in zip(*both, strict=True))


def _own(arrays: Arrays) -> moments.Moments:
    """The moments of a wave, a layer on each group of devices."""
    count, shares = mesh.data_size(), mesh.model_spec(arrays.load.dense.intermediate, 0)

    def one(a: Any) -> Any:
        return arrays.array((count, *a.shape), a.dtype, PartitionSpec(mesh.DATA, *shares[: a.ndim > 1]))

    return jax.tree.map(one, _moments(arrays))


def _kept(arrays: Arrays) -> moments.Moments:
    """The moments of a wave before they are exchanged, some rows of all layers on each device."""
    kept = jax.eval_shape(waves._keep, None, _moments(arrays), 0)
    rows = PartitionSpec(None, ("model", "data"))
    return jax.tree.map(lambda a: arrays.array(a.shape, a.dtype, rows if a.ndim > 2 else PartitionSpec()), kept)


def _moments(arrays: Arrays) -> moments.Moments:
    return arrays.moments(arrays.load.dense.intermediate)


def statistics_programs(arrays: Arrays) -> Iterator[Program]:
    """``pruning/moments.py``: the second moments of every MLP, and of attention if heads are removed."""
    load, dense, later = arrays.load, arrays.load.dense, _later(arrays)
    tokens, block = fitting_tokens(arrays.fitted), arrays.block(dense)
    if load.fewer_heads:
        yield from _attention_statistics(arrays, arrays.fitted, [arrays.held_out, later])
    if load.in_waves:
        beside = [arrays.fitted, arrays.held_out, later]
        yield from _by_kind(dense, moments.accumulate, block, tokens, beside=[*beside, _kept(arrays)])
        kept, seen = _kept(arrays), (_moments(arrays), 0)
        yield _program(waves._keep, None, *seen, times=_waves(load), beside=[*beside, block, tokens])
        rest = _waves(load) * (mesh.data_size() - 1)
        yield _program(waves._keep, kept, *seen, times=rest, beside=[*beside, block, tokens])
        each = jax.tree.leaves(kept)
        for number, array in enumerate(each):
            held = [*beside, *each[:number], *each[number + 1 :]]
            yield _program(waves._exchange, array, dense.intermediate, times=_waves(load), beside=held)
        return
    yield from _mlp_statistics(arrays, [arrays.held_out, later])


def _attention_statistics(arrays: Arrays, part: Any, beside: Any) -> Iterator[Program]:
    dense = arrays.load.dense
    return _by_kind(dense, moments.accumulate_attention, arrays.block(dense), fitting_tokens(part), beside=beside)


def _mlp_statistics(arrays: Arrays, beside: Any) -> Iterator[Program]:
    wide = _wide(arrays.load)
    given = (arrays.block(wide), fitting_tokens(arrays.fitted), arrays.load.settings.fit.correction)
    return _by_kind(wide, moments.accumulate, *given, beside=beside)


def _waves(load: Workload) -> int:
    return -(-load.dense.layers // mesh.data_size())


def selection_programs(arrays: Arrays) -> Iterator[Program]:
    """``pruning/layer.py``, ``waves.py``, ``heads.py``: the choice of channels, and of heads."""
    load, s = arrays.load, arrays.load.settings
    turns = {"turn": s.swap_rounds + 1 if METHODS[s.method].swaps else 1}
    if load.fewer_heads:
        seen, _, _ = _heads(arrays)
        counts = (load.dense.kv_heads, load.narrow.kv_heads)
        given = (seen, arrays.key, *counts, s.method, s.fit.ridge, s.swap_rounds)
        yield _program(heads._select, *given, times=load.dense.layers, beside=_resting(arrays), turns=turns)
    keep, search = load.narrow.intermediate, layer.search_of(s)
    if load.in_waves:
        beside = [arrays.fitted, arrays.held_out, _later(arrays)]
        given = (_own(arrays), load.dense, arrays.key, 0, keep)
        yield _program(waves.own_choices, *given, times=_waves(load), beside=beside, turns=turns, **search)
        return
    given = (_moments(arrays), arrays.key, keep)
    resting = _resting(arrays)
    yield _program(layer.choose_channels, *given, times=load.dense.layers, beside=resting, turns=turns, **search)


def refit_programs(arrays: Arrays) -> Iterator[Program]:
    """``pruning/layer.py``: the output projection or the bias of what is chosen, and the errors before and after."""
    load, times = arrays.load, arrays.load.dense.layers
    resting, ridge = _resting(arrays), arrays.array(())
    if load.fewer_heads:
        yield from _refitted_heads(arrays)
    weights, beside = arrays.weights, [arrays.held_out, _later(arrays)]
    kept = arrays.array((load.narrow.intermediate,), jnp.int32)
    if update_used(load.settings) == "bias":
        given = (arrays.block(load.dense)["mlp"]["down"], arrays.choice, weights)
        yield _program(layer._make_up_for_means, *given, times=times, beside=resting)
    if load.in_waves and load.refits:
        given = (arrays.block(_wide(load)), fitting_tokens(arrays.fitted), ridge, weights)
        for fitting, count in _fittings(load).items():
            yield _program(layer._closed_form, fitting, *given, times=count, beside=beside)
        return
    if load.in_waves:
        yield from _mlp_statistics(arrays, beside)
    elif load.refits:
        yield _program(layer.refit_weights, _moments(arrays), ridge, kept, weights, times=times, beside=resting)
    given = (_moments(arrays), load.dense.mlp_bias, kept, weights)
    yield _program(layer.error_by_moments, *given, times=times * _stages(load), beside=[*resting, weights])


def _stages(load: Workload) -> int:
    """The number of weights of a layer whose errors are measured: the dense ones, and their update."""
    return 1 if update_used(load.settings) == "none" else 2


def _refitted_heads(arrays: Arrays) -> Iterator[Program]:
    load, times, resting = arrays.load, arrays.load.dense.layers, _resting(arrays)
    seen, weights, kept = _heads(arrays)
    if load.refits:
        given = (seen, arrays.array(()), kept, weights)
        yield _program(layer.refit_weights, *given, times=times, beside=resting)
    yield _heads_errors(arrays)


def _heads_errors(arrays: Arrays) -> Program:
    """The errors of the chosen heads and of their update."""
    load = arrays.load
    seen, weights, kept = _heads(arrays)
    times = load.dense.layers * (1 + load.refits)
    given = (seen, load.dense.output_bias, kept, weights)
    return _program(layer.error_by_moments, *given, times=times, beside=_resting(arrays))


def _heads(arrays: Arrays) -> tuple[Any, Any, Any]:
    """The moments of attention, its output projection, and the channels that are kept."""
    load = arrays.load
    seen = arrays.replicated(arrays.moments(load.dense.heads * load.dense.head_dim))
    small = arrays.block(load.narrow)["attention"]
    kept = arrays.array((load.narrow.heads * load.narrow.head_dim,), jnp.int32)
    return seen, arrays.replicated(jax.eval_shape(heads._to_weights, small)), kept


def alternating_programs(arrays: Arrays) -> Iterator[Program]:
    """``pruning/layer.py``: the rounds that recover the weights of an MLP."""
    load, s = arrays.load, arrays.load.settings
    if not load.rounds:
        return
    assert s.steps
    schedule = RoundSchedule(s.rounds, s.steps, s.step_tokens, s.learning_rate)
    for fitting, count in _fittings(load).items():
        given = (fitting, schedule, arrays.block(_wide(load)), arrays.weights, (arrays.array(()), arrays.array(())))
        tokens = [fitting_tokens(part) for part in (arrays.fitted, arrays.held_out)]
        beside = [arrays.weights, _later(arrays)]  # the selected weights
        yield _program(layer._recover, *given, *tokens, arrays.array(()), arrays.key, times=count, beside=beside)


def errors_programs(arrays: Arrays) -> Iterator[Program]:
    """``pruning/layer.py``, ``heads.py``: the errors on the held-out tokens; of attention, by their moments."""
    load = arrays.load
    if not load.held_out.count:
        return
    beside = [arrays.fitted, _later(arrays)]
    if load.fewer_heads:
        yield from _attention_statistics(arrays, arrays.held_out, beside)
        yield _heads_errors(arrays)
    wide, kept = _wide(load), arrays.array((load.narrow.intermediate,), jnp.int32)
    tokens, stages = fitting_tokens(arrays.held_out), [arrays.weights] * _stages(load)
    given = (arrays.block(wide), tokens, load.settings.fit.correction, kept, stages)
    yield from _by_kind(wide, layer.held_out_errors, *given, beside=beside)


def sampling_programs(arrays: Arrays) -> Iterator[Program]:
    """``pruning/sampling.py``: the text that the dense model writes."""
    load = arrays.load
    if not load.samples:
        return
    length, (times, size) = load.fitted.length, load.written
    prompt = max(1, length // sampling.PROMPT)
    padded = -(-prompt // generation.PROMPT_STEP) * generation.PROMPT_STEP
    rows, spec = mesh.data_size() * size, mesh.DATA_SPEC if mesh.data_size() > 1 else PartitionSpec()
    prompts, valid = (arrays.array((rows, padded), dtype, spec) for dtype in (jnp.int32, jnp.bool_))
    keys = arrays.array((rows,), arrays.key.dtype)
    is_end, pad = arrays.array((load.dense.vocabulary,), jnp.bool_), arrays.array((), jnp.int32)
    params, how = arrays.parameters(load.dense), generation.Sampling(temperature=1.0)
    given = (prompts, valid, keys, is_end, pad, length - prompt, how, jnp.dtype(arrays.dtype))
    yield _program(generation._continue, load.dense, params, *given, times=times, turns={"advance": length - prompt})


def joint_step_programs(arrays: Arrays) -> Iterator[Program]:
    """``training/step.py``: the blocks are collected, and joint steps adjust them."""
    load = arrays.load
    if not load.groups:
        return
    block, layers = arrays.block(load.narrow), load.tail.layers
    entering = _later(arrays)["entering"]
    held = [arrays.fitted, arrays.held_out, arrays.block(load.dense), entering]
    yield _program(predictions.set_layer, arrays.blocks, 0, block, times=layers, beside=held)
    held = [arrays.blocks, entering, *([arrays.held_out.dense] if load.held_out.count else [])]
    yield _program(streams.rounded, arrays.fitted.dense, times=1, beside=held)
    if load.entered:
        held = [arrays.fitted.dense, arrays.held_out, arrays.block(load.dense)]
        yield _program(streams.rounded, arrays.fitted.pruned, times=1, beside=held)
    job, frozen, read, judged, moved = _joint(arrays)
    yield from _steps(arrays, job, frozen, read, moved, [judged])
    held = [frozen, _state(arrays, job, moved), read, judged]
    yield _program(joint._block, arrays.blocks, 0, times=layers, beside=held)
    yield _program(placement._in_stored_order, load.narrow, block, times=layers, beside=[arrays.blocks, *held])


def training_step_programs(arrays: Arrays) -> Iterator[Program]:
    """``training/step.py``: the steps of recovery training."""
    job, frozen, read, _, moved = _training(arrays)
    yield from _steps(arrays, job, frozen, read, moved, ())


def _steps(
    arrays: Arrays, job: step.Job, frozen: step.Frozen, read: Sequences, moved: Params, beside: Any
) -> Iterator[Program]:
    """Yields the programs of steps on weights that move, described as they are stored."""
    load = arrays.load
    yield _program(step._in_float32, moved, times=1, beside=[frozen, read, beside])
    batch = arrays.replicated(loop.rows_of(np.arange(load.step_sequences), read, load.settings.batch_tokens))
    state = _state(arrays, job, moved)
    rate = arrays.array((), jnp.float32)
    held = [moved, beside]
    yield _program(step.step, job, frozen, read, state, batch, rate, times=load.joint_steps, beside=held)
    dtypes, held = tuple(a.dtype for a in jax.tree.leaves(moved)), [moved, frozen, read, state, beside]
    yield _program(loop._cast, state.moved, times=load.joint_checks - 1, beside=held, dtypes=dtypes)


def check_programs(arrays: Arrays) -> Iterator[Program]:
    """``training/step.py``: the measurements in joint steps, or in recovery training."""
    load = arrays.load
    if not (load.training or load.groups):
        return
    job, frozen, read, judged, moved = (_training if load.training else _joint)(arrays)
    rows = arrays.replicated(loop.rows_of(np.arange(judged.real), judged, load.settings.batch_tokens))
    held, job = [_state(arrays, job, moved), moved, read], job._replace(recipe=None)
    yield _program(step.measure, job, frozen, judged, moved, rows, times=load.joint_checks, beside=held)


def _state(arrays: Arrays, job: step.Job, moved: Params) -> step.State:
    """Describes the state of the steps; the optimizer's arrays are sharded as the weights that they belong to."""
    full = arrays.cast(moved)
    specs = {a.shape: spec_in(a) for a in jax.tree.leaves(full)}
    state = jax.eval_shape(job.optimizer().init, full)
    state = jax.tree.map(lambda a: arrays.array(a.shape, a.dtype, specs.get(a.shape, PartitionSpec())), state)
    return step.State(full, state)


_Steps = tuple[step.Job, step.Frozen, Sequences, Sequences, Params]


def _joint(arrays: Arrays) -> _Steps:
    """The job of the joint steps, frozen weights, what steps and measurements read, and the weights that move."""
    load = arrays.load
    params = arrays.parameters(load.tail, fully_sharded_spec)
    moved, frozen = {"layers": params["layers"]}, {name: params[name] for name in ("embed", "head")}

    def read(chunks: Chunks, stream: Any) -> Sequences:
        return Sequences(arrays.tokens(chunks), chunks.real, None, stream if load.entered else None, stream)

    judged = read(load.judged, arrays.streams(load.judged).dense)
    job = joint.job(load.tail, load.settings, all_blocks=not load.entered)
    return job, step.Frozen(frozen), read(load.fitted, arrays.kept), judged, moved


def _training(arrays: Arrays) -> _Steps:
    """The same of recovery training, in which the pruned decoder learns from the dense one."""
    load, training = arrays.load, arrays.load.training
    assert training
    student, teacher = (arrays.parameters(config, fully_sharded_spec) for config in (load.narrow, load.dense))
    frozen, moved = {}, student
    if not training.full:
        updates = jax.eval_shape(lambda layers: lora.start(layers, training.rank, jax.random.key(0)), student["layers"])
        frozen, moved = student, arrays.laid_out(load.narrow, {"updates": updates}, jnp.float32)
    job = finetune.job_of(load.narrow, load.dense, training)

    def read(chunks: Chunks) -> Sequences:
        return Sequences(arrays.array((chunks.real, 1, chunks.length), jnp.int32), chunks.real)

    return job, step.Frozen(frozen, teacher), read(load.fitted), read(load.held_out), moved


PRUNING = {
    "sampling": sampling_programs,
    "streams": streams_programs,
    "statistics": statistics_programs,
    "selection": selection_programs,
    "refit": refit_programs,
    "alternating": alternating_programs,
    "errors": errors_programs,
    "joint steps": joint_step_programs,
    "joint checks": check_programs,
}
"""The phases of pruning."""

TRAINING = {"steps": training_step_programs, "checks": check_programs}
"""The phases of recovery training."""
