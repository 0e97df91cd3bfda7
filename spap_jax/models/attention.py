"""Causal attention, and the one place that chooses how it is computed.

With padding or with a key/value cache it is computed in blocks of scores, on every platform. Otherwise accelerators
have fused kernels, which hold no scores: the splash attention of Pallas on TPUs, and cuDNN's on NVIDIA GPUs, for half
precision. ``backend.platform`` says for which platform a program is traced.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh

from spap_jax.backend import one_device, platform

QUERY_BLOCK = 128
"""Minimum number of queries per block; the attention scores of one block are held at once."""

MOST_BLOCKS = 8
"""Maximum number of query blocks in a sequence: each block is compiled separately."""

_TILES = (512, 256, 128)
"""Tokens of a tile of the TPU's kernel, of which one has to divide the sequence; larger tiles are faster."""


_TILED = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
"""What that kernel tiles, forward and backward."""


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None = None,
    offset: jax.Array | int = 0,
    window: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Computes softmax attention of each query over the valid keys up to its own index.

    Args:
        q: [B, T, n, h].
        k: [B, m, S, h], and so is v.
        valid: [B, S], which keys may be attended to; None for all.
        offset: Index of the first query among the keys; only if it is a Python integer are later keys skipped.
        window: Number of keys that a query attends to, counting back from its own index; None for all.
        cap: Scores s become cap * tanh(s / cap), which no fused kernel here computes; None for scores as they are.

    Returns:
        [B, T, n, h].
    """
    fused = None
    if cap is None and valid is None and isinstance(offset, int) and offset == 0 and q.shape[1] == k.shape[2]:
        fused = _fused(platform(), q.dtype, q.shape[1], q.shape[3], window)
    if fused is not None:
        return on_own_heads(fused, q, k, v)
    valid = jnp.ones((k.shape[0], k.shape[2]), bool) if valid is None else valid
    return in_blocks(q, k, v, valid, offset, window, cap)


def _fused(
    platform: str, dtype: jnp.dtype, length: int, head_dim: int, window: int | None
) -> Callable[..., jax.Array] | None:
    """Returns the fused kernel of a platform; None if it has none that accepts such sequences and heads."""
    if platform == "cuda" and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128:
        return functools.partial(by_jax, implementation="cudnn", window=window)
    accepted = platform == "tpu" and dtype != jnp.float16 and splash_accepts(length, head_dim)
    if accepted and _division_is_known():  # which starts the devices of this machine where there is no mesh
        return functools.partial(splash, window=window)
    return None


def _division_is_known() -> bool:
    """Whether the traced program says how devices divide it: the compiler cannot partition fused kernels."""
    return (get_abstract_mesh().size or 1) > 1 or one_device.value or jax.device_count() == 1


def on_own_heads(kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes ``kernel(q, k, v)``, which the compiler cannot partition, on each device's own heads.

    Shapes are as in `causal_attention`. Every device computes all heads if the mesh axis "model" does not divide the
    key/value heads.
    """
    mesh = get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not free:
        return kernel(q, k, v)
    share = "model" if "model" in free and k.shape[1] % mesh.shape["model"] == 0 else None
    queries, keys = PartitionSpec(None, None, share), PartitionSpec(None, share)
    own = jax.shard_map(kernel, in_specs=(queries, keys, keys), out_specs=queries, axis_names=free, check_vma=False)
    return own(q, k, v)


def splash_accepts(length: int, head_dim: int) -> bool:
    """Whether the TPU's kernel accepts sequences of a length, and heads of a width."""
    return length % min(_TILES) == 0 and head_dim in (64, 128)


def by_jax(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: Literal["xla", "cudnn"], window: int | None = None
) -> jax.Array:
    """Causal attention by ``jax.nn.dot_product_attention``; arguments as in `causal_attention`."""
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    local = None if window is None else (window - 1, 0)  # keys on both sides of a query's own
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation=implementation)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, interpret: bool = False) -> jax.Array:
    """Causal attention by the splash attention kernel of Pallas for TPUs; arguments as in `causal_attention`.

    The number of queries is a multiple of 128. ``interpret`` makes the kernel work on every platform.
    """
    return _at_default_precision(functools.partial(_splash, window=window, interpret=interpret), q, k, v)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, interpret: bool) -> jax.Array:
    # Imported here, since only TPUs need it and the import takes a while.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, length, heads, head_dim = q.shape
    tile = next(size for size in _TILES if length % size == 0)
    sizes: Any = {f"block_{name}": tile for name in _TILED}
    if window is None:
        each = splash_attention_mask.CausalMask((length, length))
    else:
        each = splash_attention_mask.LocalMask((length, length), (window - 1, 0), offset=0)
    mask = splash_attention_mask.MultiHeadMask([each] * heads)
    kernel: Any = splash_attention_kernel.make_splash_mha_single_device(
        mask, block_sizes=splash_attention_kernel.BlockSizes(**sizes), interpret=interpret
    )
    scaled = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)  # the kernel does not scale the scores
    return jax.vmap(kernel)(scaled.swapaxes(1, 2), k, v).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at_default_precision(kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes a kernel and its gradient at the device's default precision, the only one that all data types have."""
    with jax.default_matmul_precision("default"):
        return kernel(q, k, v)


def _forward(kernel: Callable[..., jax.Array], *qkv: jax.Array) -> tuple[jax.Array, Any]:
    with jax.default_matmul_precision("default"):
        return jax.vjp(kernel, *qkv)


def _backward(kernel: Callable[..., jax.Array], pull_back: Any, gradient: jax.Array) -> Any:
    with jax.default_matmul_precision("default"):
        return pull_back(gradient)


_at_default_precision.defvjp(_forward, _backward)


def in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    offset: jax.Array | int,
    window: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Computes `causal_attention` a block of queries at a time, without a fused kernel."""
    (batch, length, heads, head_dim), groups = q.shape, k.shape[1]
    queries = q.reshape(batch, length, groups, heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
    # Gradients recompute the scores one group at a time: if stored, they would dominate peak memory.
    attend = jax.checkpoint(functools.partial(_attend, offset=offset, window=window, cap=cap))
    if length == 1:
        out = jax.vmap(jax.vmap(attend, in_axes=(0, 0, 0, None)))(queries, k, v, valid)
    else:
        by_group = (queries, k, v, jnp.repeat(valid[:, None], groups, axis=1))
        # A CPU processes one group of heads at a time, whose scores fit its cache; other devices process all groups of
        # a sequence, so that the heads can be sharded over several devices.
        size = 1 if platform() == "cpu" else groups
        by_group = jax.tree.map(lambda a: a.reshape(batch * groups // size, size, *a.shape[2:]), by_group)
        out = jax.lax.map(lambda some: jax.vmap(attend)(*some), by_group)
    return out.reshape(batch, heads, length, head_dim).swapaxes(1, 2)


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Returns start and end (exclusive) of each block of queries of a sequence; keys from the end on are skipped."""
    block = max(QUERY_BLOCK, -(-length // MOST_BLOCKS))
    return [(first, min(first + block, length)) for first in range(0, length, block)]


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    offset: jax.Array | int,
    window: int | None,
    cap: float | None,
) -> jax.Array:
    """Attends with the query heads of one key/value head. q: [g, T, h], k and v: [S, h], valid: [S] -> [g, T, h]."""
    (heads, length, head_dim), size = q.shape, k.shape[0]
    out = []
    for first, last in query_blocks(length):
        seen = min(size, offset + last) if isinstance(offset, int) else size
        own, keys = (offset + jnp.arange(first, last))[:, None], jnp.arange(seen)[None, :]
        allowed = valid[None, :seen] & (keys <= own)
        if window is not None:
            allowed = allowed & (keys > own - window)
        # Queries of all heads on one axis, as in `layers.on_one_axis`.
        some = q[:, first:last].reshape(-1, head_dim)
        scores = jnp.einsum("th,sh->ts", some, k[:seen], preferred_element_type=jnp.float32)
        scores = capped(scores * head_dim**-0.5, cap)
        scores = jnp.where(jnp.tile(allowed, (heads, 1)), scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        y = jnp.einsum("ts,sh->th", weights.astype(v.dtype), v[:seen], preferred_element_type=jnp.float32)
        out.append((y / weights.sum(axis=-1, keepdims=True)).astype(q.dtype).reshape(heads, last - first, head_dim))
    return jnp.concatenate(out, axis=1)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """Computes cap * tanh(x / cap); x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
