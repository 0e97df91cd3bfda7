"""The functions that a pruning run compiles, lowered for abstract arrays (``jax.ShapeDtypeStruct``)."""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

from spap_jax import devices
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.registry import FAMILIES, family_of
from spap_jax.placement import fully_sharded_spec, param_spec
from spap_jax.planning.workload import Chunks, Workload, workload
from spap_jax.pruning import joint, moments, streams, waves
from spap_jax.pruning import layer as block
from spap_jax.pruning.streams import Streams
from spap_jax.settings import PruneSettings
from spap_jax.solver.alternating import RoundSchedule, Weights
from spap_jax.solver.problem import Problem
from spap_jax.training import lora, step
from spap_jax.training.optimizers import clipped

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 512,
    "hidden_size": 128,
    "word_embed_proj_dim": 128,
    "ffn_dim": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}


def config_of(theirs: dict, **changes: object) -> DecoderConfig:
    theirs = theirs | changes
    return family_of(theirs).read_config(theirs)


def load_of(
    config: DecoderConfig, sequences: int, length: int, count: int, bytes: int = 4, sharers: int = 1, **settings
) -> Workload:
    """Return the workload of a run on CPUs, where attention computes one group of heads at a time."""
    chosen = PruneSettings(sparsity=0.25, held_out=0.5, rounds=2, steps=200)
    chosen = chosen.replace(compute_dtype="float32", moment_dtype="float32").replace(**settings)
    return workload(config, chosen, sequences, length, count, sharers, bytes, config.heads // config.kv_heads)


class Phases:
    """Lowers the functions that a run compiles, for use inside ``described``."""

    def __init__(self, load: Workload):
        self.load = load
        self.dtype = {4: jnp.float32, 2: jnp.bfloat16}[load.weight_bytes]
        dense, narrow = (_parameters(config, self.dtype) for config in (load.dense, load.narrow))
        self.layer, self.small = (jax.tree.map(_unstacked, tree["layers"]) for tree in (dense, narrow))
        self.fitted, self.held_out = (_streams(load, part) for part in load.parts)
        mlp = jax.tree.map(_float32, self.small["mlp"])
        self.weights = Weights(mlp, mlp.pop("down"), mlp.pop("down_bias", None))
        self.fitting = block.Fitting(load.dense, load.narrow, load.settings.fit.correction)
        self.key = _everywhere(jax.eval_shape(lambda: jax.random.key(0)))

    def enter_mlp(self):
        return streams.enter_mlp.lower(self.load.dense, self.layer, self.fitted)

    def leave_mlp(self):
        return streams.leave_mlp.lower(self.load.narrow, self.small, self.fitted)

    def statistics(self):
        tokens = streams.fitting_tokens(self.fitted)
        return moments.accumulate.lower(self.load.dense, self.layer, tokens, self.load.settings.fit.correction)

    def selection(self):
        return block.choose_channels.lower(self.moments(), self.key, **self._search())

    def selection_on_tpu(self):
        traced = block.choose_channels.trace(self.moments(), self.key, **self._search())
        return traced.lower(lowering_platforms=("tpu",))

    def selection_in_waves(self):
        count, search = devices.mesh_size(), self._search()
        everywhere = PartitionSpec(("data", "model"))
        own = jax.tree.map(lambda a: _described((count, *a.shape), spec=everywhere), self.moments())
        return waves.own_choices.lower(own, self.load.dense, self.key, 0, **search)

    def _search(self) -> dict[str, Any]:
        return {"keep": self.load.narrow.intermediate} | block.search_of(self.load.settings)

    def moments(self) -> moments.Moments:
        f, d = self.load.dense.intermediate, self.load.dense.width
        rows = PartitionSpec(devices.row_axes(f) or None)
        gram, cross = _described((f, f), spec=rows), _described((f, d), spec=rows)
        problem = Problem(gram, cross, _described(()), cross)
        return moments.Moments(problem, _described((f,)), _described((d,)), _described((f,)))

    def refit(self):
        chosen = functools.partial(block.choose_channels, **self._search())
        choice = _everywhere(jax.eval_shape(chosen, self.moments(), self.key))
        return block.refit_weights.lower(self.moments(), _described(()), choice.channels.kept, self.weights)

    def closed_form(self):
        tokens = streams.fitting_tokens(self.fitted)
        return block._closed_form.lower(self.fitting, self.layer, tokens, _described(()), self.weights)

    def enter_dense_mlp(self):
        return streams.enter_dense_mlp.lower(self.load.dense, self.layer, self.fitted)

    def recover(self):
        s = self.load.settings
        schedule = RoundSchedule(s.rounds, s.round_steps, s.step_tokens, s.learning_rate)
        start = (self.weights, _described(()))
        tokens = (streams.fitting_tokens(part) for part in (self.fitted, self.held_out))
        return block._recover.lower(self.fitting, schedule, self.layer, *start, *tokens, _described(()), self.key)

    def errors(self):
        tokens = streams.fitting_tokens(self.held_out)
        return block._errors.lower(self.fitting, self.layer, [self.weights], tokens)

    def joint_step(self):
        job, given, moved = self._joint(self.fitted)
        state = jax.eval_shape(job.recipe.optimizer().init, moved)
        state = jax.tree.map(lambda a, spec: _described(a.shape, a.dtype, spec), state, self._specs(state, moved))
        rows = self.load.joint_at_once // self.load.fitted.length * self.load.devices
        passes = self.load.joint_tokens // self.load.joint_at_once
        return step.step.lower(job, given, step.State(moved, state), _batch(passes, rows))

    def joint_check(self):
        job, given, moved = self._joint(self.held_out)
        chunks = self.load.held_out
        written = jax.tree.map(lambda a: _described(a.shape, self.dtype, _spec(a)), moved)
        return step.measure.lower(job, given, written, _batch(chunks.here, chunks.sequences * self.load.devices))

    def training_step(self):
        return step.step.lower(*self._training())

    def _training(self) -> tuple[step.Job, step.Given, step.State, step.Batch]:
        load, training = self.load, self.load.training
        assert training
        student, teacher = (_parameters(config, self.dtype, fully_sharded_spec) for config in (load.narrow, load.dense))
        frozen, moved = {}, student
        if not training.full:
            start = functools.partial(lora.start, rank=training.rank, key=jax.random.key(0))
            frozen, moved = student, {"updates": jax.eval_shape(start, student["layers"])}
            moved = _parts(FAMILIES[load.narrow.family], moved, jnp.float32, fully_sharded_spec)
        moved = jax.tree.map(_float32, moved)
        job = step.Job(load.narrow, step.Recipe(clipped, (1e-4, 10, 0.0)), "float32", teacher=load.dense)
        state = jax.eval_shape(job.recipe.optimizer().init, moved)
        state = jax.tree.map(lambda a, spec: _described(a.shape, a.dtype, spec), state, self._specs(state, moved))
        sequences = step.Sequences(_described((load.fitted.real, 1, load.fitted.length), jnp.int32))
        rows = load.joint_at_once // load.fitted.length * load.devices
        batch = _batch(load.joint_tokens // load.joint_at_once, rows)
        return job, step.Given(frozen, teacher, sequences, load.fitted.real), step.State(moved, state), batch

    def _joint(self, both: Streams) -> tuple[step.Job, step.Given, Any]:
        config, settings = self.load.narrow, self.load.settings
        params = _parameters(config, self.dtype, fully_sharded_spec)
        moved = {"layers": {name: params["layers"][name] for name in joint.moving(settings, params["layers"])}}
        tokens = _described(both.dense.shape[:3], jnp.int32, _spec(both.dense))
        job = step.Job(config, joint.recipe(settings, 10), "float32")
        return job, step.Given(params, None, step.Sequences(tokens, both.dense), 0), jax.tree.map(_float32, moved)

    def _specs(self, state: Any, moved: Any) -> Any:
        """Return the spec of each array of an optimizer state: that of the weight of the same shape."""
        specs = {a.shape: a.sharding.spec for a in jax.tree.leaves(moved) if a.sharding}
        return jax.tree.map(lambda a: specs.get(a.shape, PartitionSpec()), state)


@contextmanager
def described(load: Workload) -> Iterator[Phases]:
    """Yield the functions of a run inside its mesh."""
    with devices.use_mesh(load.devices * load.sharers, load.sharers):
        yield Phases(load)


def _described(shape: tuple[int, ...], dtype=jnp.float32, spec: PartitionSpec = PartitionSpec()) -> Any:  # noqa: B008
    if devices.mesh_size() == 1:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(get_mesh(), spec))


def _batch(passes: int, rows: int) -> step.Batch:
    return step.Batch(_described((passes, rows), jnp.int32), _described((passes, rows)))


def _parameters(config: DecoderConfig, dtype, spec=param_spec) -> Any:
    """Return abstract parameters with their sharding on the mesh."""
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    return _parts(FAMILIES[config.family], shapes, dtype, spec)


def _parts(family: Any, shapes: Any, dtype, spec) -> Any:
    paths = jax.tree.map_with_path(lambda path, a: jax.tree_util.keystr(path, simple=True, separator="/"), shapes)
    return jax.tree.map(lambda a, path: _described(a.shape, dtype, spec(family, path, a.shape)), shapes, paths)


def _unstacked(a: Any) -> Any:
    """Return one layer of an abstract stack."""
    return _described(a.shape[1:], a.dtype, PartitionSpec(*a.sharding.spec[1:]) if a.sharding else PartitionSpec())


def _float32(a: Any) -> Any:
    return _described(a.shape, spec=_spec(a))


def _spec(a: Any) -> PartitionSpec:
    return a.sharding.spec if a.sharding else PartitionSpec()


def _everywhere(tree, dtype=None):
    return jax.tree.map(lambda a: _described(a.shape, dtype or a.dtype), tree)


def _streams(load: Workload, chunks: Chunks) -> Streams:
    shape = (chunks.count, chunks.sequences, chunks.length, load.dense.width)
    stream = _described(shape, spec=PartitionSpec("data") if chunks.divided else PartitionSpec())
    return Streams(stream, stream, stream if load.streams == 3 else None)


def collectives(compiled, count: int) -> Counter[str]:
    """Count bytes a device sends to (all-reduce, reduce-scatter) or gets from (all-gather) each kind of collective."""
    found: Counter[str] = Counter()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for result, kind in re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", compiled.as_text()):
        elements = sum(_elements(dims) for dims in re.findall(r"f32\[([\d,]*)\]", result))
        found[kind] += 4 * elements * (count if kind == "reduce-scatter" else 1)
    return found


def _elements(dims: str) -> int:
    return functools.reduce(lambda a, b: a * int(b), filter(None, dims.split(",")), 1)
