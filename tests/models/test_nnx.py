"""A model as an NNX module: the same logits, the same training, and the way back to the bit."""

import dataclasses
from pathlib import Path

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spap_jax as spap
from spap_jax.models import FAMILIES, decoder
from spap_jax.models.model import UNKNOWN, Source

TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 97)
VARIANTS = ("llama_tied", "qwen2", "qwen3", "qwen3_vl", "mistral_window", "ministral3", "gemma2", "gemma3",
            "olmo2", "olmo3", "smollm3", "granite", "phi3", "glm4", "opt_350m_like")  # fmt: skip


def model_of(variant: str, dtype: str = "float32") -> spap.Model:
    config, params = hf_models.port(hf_models.hf_model(variant))
    arrays = jax.tree.map(lambda array: jnp.asarray(array, dtype), params)
    return spap.Model(config, arrays, Source(variant, Path(), "{}"))


def check_equal(given: spap.Model, wanted: spap.Model) -> None:
    """Check that the arrays of two models are the same bits, in the same tree."""
    assert jax.tree.structure(given.params) == jax.tree.structure(wanted.params)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_every_family_is_here() -> None:
    assert {model_of(variant).config.family for variant in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_to_the_bit_and_the_way_back(variant: str) -> None:
    model = model_of(variant)
    module = nnx.merge(*nnx.split(spap.to_nnx(model)))
    assert len(jax.tree.leaves(nnx.state(module, nnx.Param))) == len(jax.tree.leaves(model))  # a tied embedding is one
    assert module.blocks["mlp"]["down"].shape == model.params["layers"]["mlp"]["down"].shape
    for valid in (None, np.arange(9) > np.array([[-1], [3]])):
        expected = jax.jit(decoder.forward, static_argnums=0)(model.config, model.params, TOKENS, valid)
        np.testing.assert_array_equal(nnx.jit(lambda module, *given: module(*given))(module, TOKENS, valid), expected)
    check_equal(spap.from_nnx(module, like=model), model)


def test_a_step_is_that_of_optax_on_the_tree() -> None:
    model, optimizer = model_of("llama_tied"), optax.adamw(1e-3)

    def loss(logits: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()

    @nnx.jit
    def step(module: nnx.Module, state: nnx.Optimizer) -> None:
        state.update(module, nnx.grad(lambda module: loss(module(TOKENS)))(module))

    @jax.jit
    def expected(params: dict) -> dict:
        gradient = jax.grad(lambda params: loss(decoder.forward(model.config, params, TOKENS, None)))(params)
        return optax.apply_updates(params, optimizer.update(gradient, optimizer.init(params), params)[0])  # type: ignore[return-value]

    module = spap.to_nnx(model, policy=jax.checkpoint_policies.everything_saveable)
    step(module, nnx.Optimizer(module, optimizer, wrt=nnx.Param))
    trained = spap.from_nnx(module, like=model)
    check_equal(model, model_of("llama_tied"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), trained.params, expected(model.params))
    assert np.abs(trained.params["embed"]["tokens"] - model.params["embed"]["tokens"]).max() > 5e-4
    assert trained.source.weights_folder is None  # a teacher from the folder is another model
    assert spap.from_nnx(module, like=jax.jit(lambda model: model)(model)).source == UNKNOWN


def test_parameters_keep_their_dtype_and_activations_have_another() -> None:
    model = model_of("qwen3", "bfloat16")
    module, rounded = spap.to_nnx(model), spap.to_nnx(model, jnp.bfloat16)
    check_equal(spap.from_nnx(rounded, like=model), model)
    exact, other = module(TOKENS), rounded(TOKENS)
    assert 0 < np.abs(exact - other).max() < 0.05 * np.abs(exact).max()
    nnx.update(module, jax.tree.map(lambda array: array.astype(jnp.float32), nnx.state(module)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(spap.from_nnx(module, like=model))} == {"float32"}


def test_modules_that_do_not_fit() -> None:
    model = model_of("llama")
    for other in (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), spap.to_nnx(model_of("llama_tied"))):
        with pytest.raises(spap.UserError, match=type(other).__name__):
            spap.from_nnx(other, like=model)
    another = dataclasses.replace(model.config, norm_eps=0.1)
    with pytest.raises(spap.UserError, match="NnxDecoder"):
        spap.from_nnx(spap.to_nnx(model), like=model.replace(config=another))
    for change in (lambda array: array[:, :, 1:], lambda array: array.astype(jnp.int8)):
        module = spap.to_nnx(model)
        module.blocks["mlp"]["up"] = nnx.Param(change(model.params["layers"]["mlp"]["up"]))
        with pytest.raises(spap.UserError, match="layers/mlp/up"):
            spap.from_nnx(module, like=model)
    module = spap.to_nnx(model)
    del module.head["weight"]
    with pytest.raises(spap.UserError, match="head/weight"):
        spap.from_nnx(module, like=model)
    with pytest.raises(spap.UserError, match="name of a model"):
        spap.to_nnx("a folder")  # type: ignore[arg-type]
