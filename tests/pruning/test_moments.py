"""Second moments match float64 however the tokens are chunked, and no activation outlives its chunk."""

import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruning_cases import CHANNELS, one_layer, tiny

from spap_jax.pruning import moments
from spap_jax.pruning.layer import error_by_moments
from spap_jax.solver.alternating import Tokens, Weights


def random_tokens(chunks: int, size: int) -> Tokens:
    rng = np.random.default_rng(1)
    residual, target = rng.normal(size=(2, chunks * size, 32)).astype(np.float32) + 0.5
    return Tokens(*(jnp.asarray(a.reshape(chunks, size, 32)) for a in (residual, residual + target)))


def hidden64(kind: str, layer: dict, x: np.ndarray) -> np.ndarray:
    """Compute the hidden channels in float64, written out for the two kinds of MLP."""
    layer = jax.tree.map(lambda array: np.asarray(array, np.float64), layer)
    mlp, norm = layer["mlp"], layer["mlp_norm"]
    if kind.startswith("opt"):
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
        return np.maximum(x @ mlp["up"] + mlp["up_bias"], 0)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * norm["scale"]
    gate, up = x @ mlp["gate"] + mlp.get("gate_bias", 0), x @ mlp["up"] + mlp.get("up_bias", 0)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize(("variant", "correction"), [("llama", 1.0), ("llama_biases", 0.3), ("opt_125m_like", 0.3)])
def test_moments_are_those_of_float64(variant: str, correction: float):
    model, tokens = tiny(variant), random_tokens(4, 75)
    layer = one_layer(model, 1)
    found = moments.accumulate(model.config, layer, tokens, correction)
    h = hidden64(variant, layer, np.asarray(tokens.residual, np.float64).reshape(300, 32))
    own = h @ np.asarray(layer["mlp"]["down"], np.float64) + np.asarray(layer["mlp"].get("down_bias", 0), np.float64)
    missing = np.asarray(tokens.target, np.float64).reshape(300, 32)
    y = own + correction * (missing - own)
    expected = {"hidden_mean": h.mean(axis=0), "target_mean": y.mean(axis=0), "variance": h.var(axis=0)}
    centred = "bias" in variant or variant.startswith("opt")
    assert model.config.mlp_bias == centred
    if centred:
        h, y = h - h.mean(axis=0), y - y.mean(axis=0)
    expected |= {"gram": h.T @ h / 300, "cross": h.T @ y / 300, "target_power": (y**2).sum() / 300}
    expected["weight"] = np.asarray(layer["mlp"]["down"])
    for name, array in expected.items():
        ours = getattr(found, name) if name in found._fields else getattr(found.problem, name)
        np.testing.assert_allclose(ours, array, rtol=0, atol=2e-6 * max(1, np.abs(array).max()), err_msg=name)


@pytest.mark.parametrize("variant", ["llama", "opt_125m_like"])
def test_errors_by_moments_are_those_of_float64(variant: str):
    model, tokens, rng = tiny(variant), random_tokens(4, 75), np.random.default_rng(2)
    layer, kept = one_layer(model, 1), np.arange(3, CHANNELS, 2)
    down, biases = rng.normal(size=(2, len(kept), 32)).astype(np.float32), rng.normal(size=(2, 32)).astype(np.float32)
    given = biases if model.config.mlp_bias else [None, None]
    stages = [Weights({}, jnp.asarray(v), b if b is None else jnp.asarray(b)) for v, b in zip(down, given, strict=True)]
    h = hidden64(variant, layer, np.asarray(tokens.residual, np.float64).reshape(300, 32))
    own = h @ np.asarray(layer["mlp"]["down"], np.float64) + np.asarray(layer["mlp"].get("down_bias", 0), np.float64)
    y = 0.7 * own + 0.3 * np.asarray(tokens.target, np.float64).reshape(300, 32)
    outputs = [h[:, kept] @ v + (b if model.config.mlp_bias else 0) for v, b in zip(down, biases, strict=True)]
    expected = [((y - each) ** 2).sum() / (y**2).sum() for each in outputs]
    seen = moments.accumulate(model.config, layer, tokens, 0.3)
    by_moments = [error_by_moments(seen, model.config.mlp_bias, jnp.asarray(kept), each) for each in stages]
    np.testing.assert_allclose(by_moments, expected, rtol=1e-5)


def test_moments_do_not_depend_on_the_chunks():
    model = tiny("opt_125m_like")
    one, *others = (
        moments.accumulate(model.config, one_layer(model, 0), random_tokens(chunks, 240 // chunks))
        for chunks in (1, 3, 240)
    )
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5), one, other)


def test_only_products_of_moments_are_made_of_three():
    """Check what is asked of accelerators: CPUs compute all of them in float32."""
    model = tiny("llama")
    text = moments.accumulate.lower(model.config, one_layer(model, 0), random_tokens(4, 75), 0.5).as_text()
    passes = re.findall(r"dot_general.*num_primitive_operations = (\d)", text)
    assert passes.count("3") == 2  # Gram and cross moments
    assert set(passes) == {"1", "3"}
    assert len(passes) == text.count("dot_general")


def test_no_activation_outlives_its_chunk():
    model = tiny("llama")

    def scratch(chunks: int, size: int) -> int:
        shape = jax.ShapeDtypeStruct((chunks, size, 32), jnp.float32)
        compiled = moments.accumulate.lower(
            model.config, one_layer(model, 0), Tokens(cast(Any, shape), cast(Any, shape))
        ).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    few, many = scratch(2, 64), scratch(64, 64)
    assert few == many
    assert many < 64 * 64 * CHANNELS * 4 / 2  # half of what all activations would take
    assert scratch(2, 640) > few + 500 * CHANNELS * 4  # one chunk's activations are counted
