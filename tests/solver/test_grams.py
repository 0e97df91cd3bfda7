"""Sums of Gram matrices, of which a CPU computes one half."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spap_jax.backend import traced_for
from spap_jax.numerics import full_precision
from spap_jax.parallel import mesh
from spap_jax.solver import grams


@jax.jit
@full_precision
def gram_of(chunks: jax.Array) -> jax.Array:
    """Computes the sum for chunks [C, N, f]."""
    total, _ = jax.lax.scan(lambda total, h: (grams.added(total, h), None), grams.zeros(chunks.shape[-1]), chunks)
    return grams.whole(total)


@pytest.mark.parametrize("f", [1, 3, 4, 5, 53, 320, 1000, 2048])
def test_the_sum_is_that_of_the_whole_products(f: int):
    """Of the sizes, XLA:CPU does not finish compiling the choice between a matrix and its transpose at the last two."""
    chunks = np.random.default_rng(f).normal(size=(3, 7, f)).astype(np.float32)
    found = np.asarray(gram_of(jnp.asarray(chunks)))
    rows = chunks.reshape(-1, f).astype(np.float64)
    np.testing.assert_allclose(found, rows.T @ rows, rtol=0, atol=1e-5 * len(rows))
    np.testing.assert_array_equal(found, found.T)


def test_a_cpu_computes_less_than_two_thirds():
    chunks = jax.ShapeDtypeStruct((1, 512, 256), jnp.float32)
    half = gram_of.lower(chunks).compile().cost_analysis()["flops"]  # type: ignore[index]
    with traced_for("gpu"):
        all_of_it = gram_of.lower(chunks).compile().cost_analysis()["flops"]  # type: ignore[index]
    assert half < 2 / 3 * all_of_it


def test_rows_that_are_divided_stay_so():
    with mesh.use_mesh(4, 4):
        text = gram_of.lower(jax.ShapeDtypeStruct((1, 8, 64), jnp.float32)).compile().as_text()
    assert "f32[16,64]" in (text or "")
