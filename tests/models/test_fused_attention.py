"""The implementations of attention agree, and one place chooses among them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

from spap_jax.backend import traced_for
from spap_jax.models.attention import by_jax, causal_attention, on_own_heads, splash
from spap_jax.parallel import mesh

LENGTH, HEADS, GROUPS, WIDTH = 256, 4, 2, 64


def arrays(dtype=jnp.float32, length: int = LENGTH) -> list[jax.Array]:
    """Return queries [B, T, n, h], keys and values [B, m, T, h]."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, length, HEADS, WIDTH), *[(2, GROUPS, length, WIDTH)] * 2
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(attention: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array):
    weights = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def loss(*qkv: jax.Array):
        out = attention(*qkv)
        return (out * weights).sum(), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    "fused", [functools.partial(by_jax, implementation="xla"), functools.partial(splash, interpret=True)]
)
def test_fused_kernels_agree_with_blocks_of_scores(fused: Callable[..., jax.Array], window: int | None):
    (_, out), gradients = with_gradients(functools.partial(fused, window=window), *arrays())
    (_, expected), wanted = with_gradients(functools.partial(causal_attention, window=window), *arrays())
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for mine, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def operations(platform: str, q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None = None) -> str:
    with traced_for(platform), mesh.use_mesh(1):
        return str(jax.make_jaxpr(causal_attention)(q, k, v, valid))


def test_a_program_that_may_be_divided_unseen_has_no_kernel_that_cannot_be():
    """As that of ``spap.loss`` of a model on several TPUs, which learns it from the arrays."""
    with traced_for("tpu"):
        assert "pallas_call" not in str(jax.make_jaxpr(causal_attention)(*arrays()))
        with mesh.use_mesh(8, 2):
            assert "pallas_call" in str(jax.make_jaxpr(causal_attention)(*arrays()))


def test_the_platform_and_the_precision_choose():
    half = arrays(jnp.bfloat16)
    assert "pallas_call" in operations("tpu", *half)
    assert "pallas_call" in operations("tpu", *arrays())
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        operations("cuda", *half)
    everywhere = ("cpu", "gpu", "tpu", "cuda")
    blocks = {name: operations(name, *arrays()) for name in everywhere if name != "tpu"}
    assert not any("pallas_call" in text for text in blocks.values())
    assert blocks["gpu"] == blocks["cuda"] != blocks["cpu"]  # all heads at once, or a group at a time
    padded = {name: operations(name, *half, valid=jnp.ones((2, LENGTH), bool)) for name in everywhere}
    assert padded["gpu"] == padded["tpu"] == padded["cuda"]
    assert "pallas_call" not in operations("tpu", *arrays(jnp.bfloat16, 96))


@pytest.mark.parametrize("sharers", [2, 4])
def test_a_device_computes_its_own_heads(sharers: int):
    """A kernel cannot be partitioned by the compiler; key/value heads that cannot be divided are replicated."""
    attention: Any = functools.partial(by_jax, implementation="xla")
    expected = attention(*arrays())
    with mesh.use_mesh(2 * sharers, sharers):
        share = "model" if sharers == GROUPS else None
        place = NamedSharding(get_mesh(), PartitionSpec(None, share))
        q, k, v = arrays()
        q = jax.device_put(q, NamedSharding(get_mesh(), PartitionSpec(None, None, "model")))
        k, v = jax.device_put((k, v), place)
        compiled: Any = jax.jit(functools.partial(on_own_heads, attention)).lower(q, k, v).compile()
        np.testing.assert_allclose(compiled(q, k, v), expected, atol=2e-6)
        assert f"f32[2,{GROUPS if share is None else 1},{LENGTH},{WIDTH}]" in compiled.as_text()
        assert ("all-gather" in compiled.as_text()) == (share is None)
