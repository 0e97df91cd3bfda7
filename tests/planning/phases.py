"""The functions that a run compiles, on arrays that are only described."""

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
from spap_jax.models.registry import family_of
from spap_jax.planning.workload import Chunks, Workload, workload
from spap_jax.pruning import layer as block
from spap_jax.pruning import moments, reduce, streams, sweeps
from spap_jax.pruning.streams import Streams
from spap_jax.settings import PruneSettings
from spap_jax.solver.alternating import Schedule
from spap_jax.solver.problem import Problem

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


def load_of(config: DecoderConfig, sequences: int, length: int, count: int, bytes: int = 4, **settings) -> Workload:
    """A run on CPUs, which take one group of heads at a time."""
    chosen = PruneSettings(sparsity=0.25, held_out=0.5).replace(**settings)
    return workload(config, chosen, sequences, length, count, bytes, config.heads // config.kv_heads)


class Phases:
    """Lowers what a run compiles; inside ``described``."""

    def __init__(self, load: Workload):
        self.load = load
        dtype = {4: jnp.float32, 2: jnp.bfloat16}[load.weight_bytes]
        dense, narrow = (
            _everywhere(jax.eval_shape(lambda c=c: decoder.init(c, jax.random.key(0))), dtype)
            for c in (load.dense, load.narrow)
        )
        self.outer = {name: narrow[name] for name in ("embed", "head")}
        self.layers = narrow["layers"]
        self.layer, self.small = (
            jax.tree.map(lambda a: _described(a.shape[1:], a.dtype), tree["layers"]) for tree in (dense, narrow)
        )
        self.fitted, self.held_out = (_streams(load.dense.width, part) for part in load.parts)
        self.weights = _everywhere(jax.eval_shape(reduce.to_weights, self.small["mlp"]))
        self.key = _everywhere(jax.eval_shape(lambda: jax.random.key(0)))

    def enter_mlp(self):
        return streams.enter_mlp.lower(self.load.dense, self.layer, self.fitted)

    def leave_mlp(self):
        return streams.leave_mlp.lower(self.load.narrow, self.small, self.fitted)

    def statistics(self):
        return moments.accumulate.lower(self.load.dense, self.layer, streams.fitting_tokens(self.fitted))

    def selection(self):
        arguments, settings = self._selected()
        return block._select.lower(*arguments, *settings)

    def selection_on_tpu(self):
        arguments, settings = self._selected()
        return block._select.trace(*arguments, *settings).lower(lowering_platforms=("tpu",))

    def _selected(self):
        s = self.load.settings
        settings = (self.load.narrow.intermediate, s.method, s.ridge, s.penalty, s.penalty_steps, s.swap_rounds)
        return (self.moments(), self.key), settings

    def moments(self) -> moments.Moments:
        f, d = self.load.dense.intermediate, self.load.dense.width
        problem = Problem(_described((f, f)), _described((f, d)), _described(()), _described((f, d)))
        return moments.Moments(problem, _described((f,)), _described((d,)), _described((f,)))

    def refit(self):
        arguments, (keep, *settings) = self._selected()
        chosen = functools.partial(
            block._select,
            keep=keep,
            **dict(zip(("method", "ridge", "penalty", "steps", "rounds"), settings, strict=True)),
        )
        system, polished = _everywhere(jax.eval_shape(chosen, *arguments))
        return block.update_weights.lower("refit", self.moments(), system, polished.kept, self.weights)

    def recover(self):
        s = self.load.settings
        schedule = Schedule(s.rounds, s.steps, s.step_tokens, s.learning_rate)
        tokens = (streams.fitting_tokens(part) for part in (self.fitted, self.held_out))
        return block._recover.lower(self.load.narrow, schedule, self.layer, self.weights, *tokens, s.ridge, self.key)

    def errors(self):
        tokens = (streams.fitting_tokens(part) for part in (self.fitted, self.held_out))
        return block._errors.lower(self.load.narrow, self.layer, self.weights, *tokens)

    def descend(self):
        steps = sweeps.Steps(self.load.settings.sweep_steps, self.load.step_sequences, 0.1)
        return sweeps._descend.lower(self.load.narrow, steps, self.outer, self.layers, 0, self.fitted, self.key)

    def divergence(self):
        return sweeps._divergence.lower(self.load.narrow, self.outer, self.layers, 0, self.small["mlp"], self.held_out)


@contextmanager
def described(load: Workload) -> Iterator[Phases]:
    """The functions of a run on its mesh."""
    with devices.sharing(load.devices):
        yield Phases(load)


def _described(shape: tuple[int, ...], dtype=jnp.float32, spread: bool = False) -> Any:
    if devices.number() == 1:
        return jax.ShapeDtypeStruct(shape, dtype)
    spec = PartitionSpec("data") if spread else PartitionSpec()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(get_mesh(), spec))


def _everywhere(tree, dtype=None):
    return jax.tree.map(lambda a: _described(a.shape, dtype or a.dtype), tree)


def _streams(width: int, chunks: Chunks) -> Streams:
    shape = (chunks.count, chunks.sequences, chunks.length, width)
    stream = _described(shape, spread=chunks.divided)
    return Streams(stream, stream)


def collectives(compiled, count: int) -> Counter[str]:
    """Bytes that a device gives to (all-reduce, reduce-scatter) or gets from (all-gather) each kind of collective."""
    found: Counter[str] = Counter()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for result, kind in re.findall(rf"= (\S.*?) ({kinds})(?:-start)?\(", compiled.as_text()):
        elements = sum(_elements(dims) for dims in re.findall(r"f32\[([\d,]*)\]", result))
        found[kind] += 4 * elements * (count if kind == "reduce-scatter" else 1)
    return found


def _elements(dims: str) -> int:
    return functools.reduce(lambda a, b: a * int(b), filter(None, dims.split(",")), 1)
