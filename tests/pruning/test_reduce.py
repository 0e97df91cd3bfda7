"""Channels are removed along the right axes, and as many as were asked for."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import CHANNELS, KEPT, chosen_channels, logits, one_layer, random_tokens, tiny, with_mlp

from spap_jax.models.model import Model
from spap_jax.pruning import reduce


@pytest.mark.parametrize("variant", ["llama_biases", "qwen2", "opt_350m_like"])
def test_taking_channels_is_silencing_the_others(variant: str):
    model = tiny(variant)
    kept = chosen_channels(2, KEPT, model.config.layers)
    layers = [one_layer(model, index) for index in range(model.config.layers)]
    layers = [
        layer | {"mlp": reduce.take_channels(model.family, layer["mlp"], k)}
        for layer, k in zip(layers, kept, strict=True)
    ]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    narrow = Model(model.config.narrowed(KEPT), model.params | {"layers": stacked}, model.source)
    down = np.zeros_like(model.params["layers"]["mlp"]["down"])
    for index, k in enumerate(kept):
        down[index, k] = model.params["layers"]["mlp"]["down"][index, k]
    tokens = random_tokens()
    silenced = logits(with_mlp(model, down=jnp.asarray(down)), tokens)
    assert np.abs(silenced - logits(model, tokens)).max() > 1
    np.testing.assert_allclose(logits(narrow, tokens), silenced, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama_biases", "opt_125m_like"])
def test_weights_and_back(variant: str):
    mlp = jax.tree.map(lambda array: array.astype(jnp.bfloat16), one_layer(tiny(variant), 0)["mlp"])
    weights = reduce.to_weights(mlp)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype(jnp.float32)}
    assert weights.bias is not None
    back = reduce.to_mlp(weights, mlp)
    assert back.keys() == mlp.keys()
    for name, array in mlp.items():
        assert back[name].dtype == jnp.bfloat16
        assert np.array_equal(back[name], array)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 60000),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.sampled_from([1, 2, 8, 64, 128, 256]),
)
def test_the_kept_width(width: int, sparsity: float, multiple: int):
    kept = reduce.kept_width(width, sparsity, multiple)
    assert 1 <= kept <= width
    assert kept % multiple == 0 or kept == width
    wanted = (1 - Fraction(sparsity)) * width
    if multiple <= wanted and kept < width:
        assert abs(kept - wanted) <= Fraction(multiple, 2) + Fraction(1, 1000)  # no multiple is nearer
    if wanted < multiple < width:
        assert kept == multiple


@pytest.mark.parametrize(
    ("width", "sparsity", "multiple", "kept"),
    [(CHANNELS, 0.3, 1, KEPT), (320, 0.3, 64, 256), (320, 0.999, 1, 1), (320, 0.3, 512, 320), (11008, 0.3, 128, 7680)],
)
def test_kept_widths(width: int, sparsity: float, multiple: int, kept: int):
    assert reduce.kept_width(width, sparsity, multiple) == kept
