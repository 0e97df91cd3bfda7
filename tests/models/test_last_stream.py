"""The stream that perplexity and divergence are computed from."""

import re
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spap_jax.models import Decoder, decoder

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9)).astype(np.int32)
VARIANTS = ("llama_two_kv_heads", "gemma3", "opt_350m_like")


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_takes_no_whole_weights_in_float32(variant: str) -> None:
    """Also not on a CPU, whose compiler would convert all of a bfloat16 stack before the loop over the blocks."""
    config, params = hf_models.port(hf_models.hf_model(variant))
    stored = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    stream: Any = jax.jit(decoder.last_stream, static_argnums=0).lower(config, stored, TOKENS).compile()
    stacks = {"{},{},{}".format(*a.shape) for a in jax.tree.leaves(params["layers"]["mlp"]) if a.ndim == 3}
    assert not stacks & set(re.findall(r"f32\[([\d,]+)\]", stream.as_text()))
    whole = Decoder(config).apply({"params": stored}, TOKENS, logits=False)
    np.testing.assert_allclose(stream(stored, TOKENS), whole, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
