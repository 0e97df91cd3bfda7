"""The list of a run's programs, compared with what runs compile: the same functions, for arrays of the same shapes."""

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest
from loads import LLAMA, config_of

from spap_jax.data.tokens import new_blocks
from spap_jax.models import DecoderConfig, Params, decoder
from spap_jax.models.model import Model, Source
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import layer_to_host
from spap_jax.planning.programs import Program, programs
from spap_jax.planning.workload import workload
from spap_jax.pruning.pipeline import prune_layers
from spap_jax.pruning.predictions import get_layer
from spap_jax.pruning.run import resolve
from spap_jax.pruning.sampling import with_samples
from spap_jax.settings import FinetuneSettings, PruneSettings
from spap_jax.training import train

SMALL = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
SETTINGS = PruneSettings(
    sparsity=0.25, held_out=0.25, rounds=1, steps=2, step_tokens=16, batch_tokens=32, joint_tokens=64, joint_passes=1
)
JOINT = {"method": "magnitude", "update": "alternate", "rounds": 0}
"""Little but joint steps."""

APART = {"joint_last": 2, "joint_blocks": 1, "joint_weights": "block"}
"""Joint steps on one block after the other."""

LENGTH = 16

Lowered = set[tuple[str, str]]
"""Names of programs, with the shapes of the arrays that they use."""


@contextmanager
def recorded() -> Iterator[Lowered]:
    """Yield a set that contains what was lowered inside, when the block is left."""
    found: Lowered = set()
    handler = logging.Handler()
    handler.emit = lambda record: _keep(record, found)
    logger = logging.getLogger("jax._src.interpreters.pxla")
    spreads, logger.propagate = logger.propagate, False
    jax.clear_caches()  # what was lowered before would not be lowered again
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = spreads


def _keep(record: logging.LogRecord, found: Lowered) -> None:
    if str(record.msg).startswith("Compiling %s with"):
        name, shapes, *_ = record.args  # type: ignore[misc]
        found.add((str(name), str(shapes)))


def ours() -> set[str]:
    """Return the names of all functions that the package compiles."""
    compiled: Any = type(jax.jit(lambda: None))
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("spap_jax")]
    return {f"jit({each.__name__})" for module in modules for each in vars(module).values() if type(each) is compiled}


def described(program: Program) -> tuple[str, str]:
    """Return a program's name and the shapes of the arrays that it uses, as ``recorded`` has them."""
    lowering = program.lowered()._lowering
    return lowering._name, str(tuple(lowering.compile_args["global_in_avals"]))


def check(run: Callable[[], None], planned: Iterable[Program]) -> None:
    with recorded() as ran:
        run()
    listed, mine = {described(each) for each in planned}, ours()  # what the run has traced is not traced again
    assert listed
    assert {each for each in ran if each[0] in mine} == listed


@functools.cache
def random_params(config: DecoderConfig) -> Params:
    return jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))


@pytest.mark.parametrize(
    ("count", "sharers", "changes"),
    [
        (1, 1, {"sampled": 1, "attention_sparsity": 0.5, "batch_tokens": 64, "sequences": 13}),
        (1, 1, JOINT | APART | {"vocab_size": 6000, "stream_dtype": "bfloat16"}),
        (4, 2, {"method": "flap", "round_to": 2}),
        (4, 2, {"schedule": "parallel", "joint_passes": 0}),
        (4, 1, {"schedule": "parallel", "method": "flap"}),
    ],
    ids=[
        "samples, fewer heads, padding",
        "joint steps apart, a shortlist",
        "biases, divided weights",
        "waves",
        "biases in waves",
    ],
)
def test_pruning(count: int, sharers: int, changes: dict):
    changes = dict(changes)
    sequences, vocabulary = changes.pop("sequences", 16), changes.pop("vocab_size", SMALL["vocab_size"])
    config, settings = config_of(LLAMA, **SMALL | {"vocab_size": vocabulary}), SETTINGS.replace(**changes)
    tokens = np.arange(sequences * LENGTH, dtype=np.int32).reshape(sequences, LENGTH) % config.vocabulary
    params = random_params(config)
    blocks = new_blocks(tokens, "", len(tokens), further=new_blocks(np.tile(tokens, (4, 1)), "", len(tokens)))

    def run() -> None:
        given = with_samples(blocks, lambda: Model(config, params, Source("tiny", None, "{}")), settings)
        outer = {name: params[name] for name in ("embed", "head")}
        resolved = resolve(config, outer, lambda i: get_layer(params["layers"], i), given, settings)
        for each in prune_layers(resolved):
            for _, layer in each.final:
                layer_to_host(resolved.narrow, layer)

    with mesh.use_mesh(count, sharers):
        check(run, programs(workload(config, settings, sequences, LENGTH, count // sharers, sharers)))


@pytest.mark.parametrize("full", [False, True], ids=["updates", "all weights"])
def test_training(full: bool):
    config = config_of(LLAMA, **SMALL)
    training = FinetuneSettings(full=full, steps=2, step_sequences=4, held_out=0.25, batch_tokens=32)
    load = workload(config, SETTINGS, 16, LENGTH, 2, training=training)
    tokens = np.arange(16 * LENGTH, dtype=np.int32).reshape(16, LENGTH) % config.vocabulary
    teacher, model = (
        Model(each, random_params(each), Source(name, None, "{}"))
        for name, each in (("dense", load.dense), ("narrow", load.narrow))
    )

    def run() -> None:
        for _ in train.finetune_stages(model, tokens, teacher, training):
            pass

    with mesh.use_mesh(2):
        check(run, programs(load))
