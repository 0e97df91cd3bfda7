"""A decoder some of whose weights move: the stream after its last block.

Blocks are scanned. Weights may be divided among all devices; those of one block are gathered when its turn comes, and
again in the backward pass, which recomputes what is inside a block and holds only the stream between blocks, or the
outputs of projections as well (`REMAT`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spap_jax.models import DecoderConfig, Params, decoder
from spap_jax.numerics import sliced, to_slice
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import gather_params
from spap_jax.settings import Remat
from spap_jax.training import lora

REMAT: dict[Remat, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a block keeps for its backward pass, which computes the rest again: nothing but its input, or the outputs of its
projections as well. Weights that were gathered are never kept."""


class Student(NamedTuple):
    """A decoder inside a jitted program.

    Attributes:
        config: Its sizes and switches.
        frozen: The parameter tree; a part that moves in all blocks may be absent.
        moved: The moving parts of the tree, which take the place of those in ``frozen``. Those under ``layers`` may be
            of a range of consecutive blocks. Under ``updates`` are low-rank updates of all blocks (``lora``).
        first: First block of the range.
        scale: Factor of the updates.
        remat: What a block keeps for its backward pass; see `REMAT`.
    """

    config: DecoderConfig
    frozen: Params
    moved: Params
    first: int = 0
    scale: float = 1.0
    remat: Remat = "full"


def outer(student: Student, dtype: Any, predicts: bool = True) -> Params:
    """Gathers the weights outside the blocks, matrices in ``dtype``; an embedding that is no head stays apart.

    Args:
        student: The decoder.
        dtype: Data type of matrices.
        predicts: Whether predictions are made with these weights; otherwise the head is left out.
    """
    names = ("embed", "head") if predicts else ("embed",)
    parts = {name: (student.moved if name in student.moved else student.frozen)[name] for name in names}
    whole = gather_params(student.config, parts, dtype)
    if "embed" in student.moved:  # gradients are summed over groups of tokens and over devices: in float32
        whole = jax.tree.map(lambda a: a.astype(jnp.float32), whole)
    apart = {} if student.config.tied and predicts else {"tokens": parts["embed"]["tokens"]}
    return whole | {"embed": whole["embed"] | apart}


def last_stream(
    student: Student,
    outside: Params,
    tokens: jax.Array,
    dtype: Any,
    merged: bool = False,
    entering: jax.Array | None = None,
) -> jax.Array:
    """Computes the stream after the last block. tokens: [B, T] -> [B, T, d] in ``dtype``.

    Args:
        student: The decoder.
        outside: Its weights outside the blocks, as `outer` returns them.
        tokens: Token ids.
        dtype: Data type of matrices and activations; norms and softmax are float32.
        merged: Whether updates are merged into the weights, in their data type, as they will be written; then there is
            no gradient.
        entering: [B, T, d] the stream before the first block; by default the embedded tokens.
    """
    positions = decoder.positions_in(tokens.shape)
    config, scale = student.config, student.scale
    own, updates = student.moved.get("layers", {}), student.moved.get("updates", {})
    stop = student.first + len(jax.tree.leaves(own)[0]) if own else student.first
    frozen, own = to_slice(student.frozen.get("layers", {})), to_slice(own) if merged else own

    @functools.partial(jax.checkpoint, policy=REMAT[student.remat])
    def block(x: jax.Array, item: tuple[jax.Array, Params, Params]) -> jax.Array:
        number, moved, pairs = item
        x = mesh.constrain_replicated(x)
        layer = sliced(jax.tree.map(lambda stack: stack[number], frozen) | moved)
        if merged:
            layer, pairs = lora.merged(layer, gather_params(config, pairs, jnp.float32), scale), {}
        layer, pairs = gather_params(config, layer, dtype), lora.scaled(gather_params(config, pairs, dtype), scale)
        kind = decoder.reach_of(config, number)
        return mesh.constrain_replicated(decoder.block(config, layer, x, positions, None, kind, updates=pairs))

    # `jax.checkpoint` holds what it is given, so the stream is divided before, and gathered inside.
    def held_divided(x: jax.Array, item: tuple[jax.Array, Params, Params]) -> tuple[jax.Array, None]:
        return block(mesh.divide_along_model(x, axis=1), item), None

    x = decoder.embed(config, outside, tokens, positions, dtype) if entering is None else entering.astype(dtype)
    x = mesh.constrain_replicated(x)
    parts = ((0, student.first, {}), (student.first, stop, own), (stop, config.layers, {}))
    for start, end, moved in parts:
        if start < end:
            # Updates are of all blocks, and so never beside a range of moving blocks.
            x = jax.lax.scan(held_divided, x, (jnp.arange(start, end), moved, updates))[0]
    return x
