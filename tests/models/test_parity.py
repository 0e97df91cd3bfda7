"""The ported models compute what the models of transformers compute."""

import copy
import dataclasses
from pathlib import Path

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hf_models import VARIANTS

from spap_jax.models import decoder
from spap_jax.models.config import AttentionKind, Rope
from spap_jax.models.layers import rotary_frequencies
from spap_jax.models.registry import family_of

EXAMPLES = Path(__file__).parents[2] / "examples"
ATOL = 1e-4  # logits are of magnitude 1 to 30

forward = jax.jit(decoder.forward, static_argnames=("config", "dtype"))
extend = jax.jit(decoder.extend, static_argnames="config")


def random_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(batch * 1000 + length).integers(0, 97, (batch, length)).astype(np.int32)


def padded_on_both_sides(batch: int, length: int) -> np.ndarray:
    """Return a mask [B, T] of a full row, followed by rows padded on the left and on the right in turn."""
    valid = np.ones((batch, length), bool)
    for row in range(1, batch):
        pads = min(length - 1, 5 + 7 * row)
        valid[row, slice(pads) if row % 2 else slice(length - pads, None)] = False
    return valid


def logits_of_both(name: str, tokens: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    model = hf_models.hf_model(name)
    config, params = hf_models.port(model)
    ours = forward(config, params, tokens, np.ones(tokens.shape, bool) if valid is None else valid)
    return np.asarray(ours), hf_models.hf_logits(model, tokens, valid)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(name: str) -> None:
    tokens = random_tokens(4, 33)
    for valid in (np.ones(tokens.shape, bool), padded_on_both_sides(4, 33)):
        ours, theirs = logits_of_both(name, tokens, valid)
        assert theirs.std() > 1  # the comparison is not trivial
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours[valid], theirs[valid], rtol=0, atol=ATOL)


@pytest.mark.parametrize(("name", "length"), [("llama_biases", 1), ("opt_350m_like", 7)])
def test_logits_of_short_rows(name: str, length: int) -> None:
    ours, theirs = logits_of_both(name, random_tokens(2, length))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["llama_llama3_rope_v5", "gemma3"])
def test_logits_beyond_one_block_of_queries(name: str) -> None:
    tokens, valid = random_tokens(3, 700), padded_on_both_sides(3, 700)
    ours, theirs = logits_of_both(name, tokens, valid)
    np.testing.assert_allclose(ours[valid], theirs[valid], rtol=0, atol=ATOL)


def test_logits_of_a_trained_model_on_text() -> None:
    folder = EXAMPLES / "llama-stories"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (EXAMPLES / "stories_evaluation.txt").read_text(encoding="utf-8")[:2000]
    tokens = np.asarray(tokenizer(text)["input_ids"][:256], np.int32)[None]
    config, params = hf_models.port(model)
    ours = np.asarray(forward(config, params, tokens, np.ones(tokens.shape, bool)))
    np.testing.assert_allclose(ours, hf_models.hf_logits(model, tokens), rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", VARIANTS)
def test_old_and_new_configs_read_alike(name: str) -> None:
    rewritten_by_transformers = hf_models.hf_model(name).config.to_dict()
    family = family_of(VARIANTS[name])
    assert family.read_config(VARIANTS[name]) == family.read_config(rewritten_by_transformers)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    model = hf_models.hf_model(name)
    config, params = hf_models.port(model)
    declared = decoder.shapes(config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, declared)
    assert sum(array.size for array in jax.tree.leaves(params)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("theta", "head_dim"), [(10000.0, 128), (500000.0, 64), (12345.0, 96)])
def test_rope_frequencies_are_exact_to_the_last_place(theta: float, head_dim: int) -> None:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)  # rounded, as in transformers
    exact = theta ** -exponents.astype(np.float64)
    ours = rotary_frequencies(Rope(theta=theta), head_dim)
    assert (np.abs(ours - exact) / np.spacing(exact.astype(np.float32))).max() < 1.6


@pytest.mark.parametrize(
    "name", ["llama_linear_rope_v4", "llama_llama3_rope_v4", "llama_theta_v4", "mistral_window", "gemma3"]
)
def test_rope_settings_change_the_logits(name: str) -> None:
    """If the settings had no effect, the comparisons above could not detect errors in them."""
    config, params = hf_models.port(hf_models.hf_model(name))
    tokens = random_tokens(4, 33)
    plain = dataclasses.replace(config, attention_kinds=(AttentionKind(Rope()),), layer_kinds=None)
    with_it, without = (forward(c, params, tokens, np.ones(tokens.shape, bool)) for c in (config, plain))
    assert np.abs(with_it - without).max() > 0.5


@pytest.mark.parametrize("name", ["qwen2_one_kv_head", "opt_350m_like", "gemma3"])
def test_extending_a_cache_piece_by_piece(name: str) -> None:
    config, params = hf_models.port(hf_models.hf_model(name))
    tokens = random_tokens(3, 33)
    valid = np.ones(tokens.shape, bool)
    valid[1, :9] = False
    valid[2, :25] = False
    expected = np.asarray(forward(config, params, tokens, valid))
    cache = decoder.empty_cache(config, 3, 40)
    for start, stop in ((0, 11), (11, 22), (22, 33)):
        logits, cache = extend(config, params, tokens[:, start:stop], valid[:, start:stop], cache)
        rows = valid[:, stop - 1]
        np.testing.assert_allclose(logits[rows], expected[rows, stop - 1], rtol=0, atol=ATOL)
    assert int(cache.length) == 33


@pytest.mark.parametrize("name", ["llama_biases", "opt_125m_like"])
def test_bfloat16_is_as_near_as_bfloat16_can_be(name: str) -> None:
    tokens = random_tokens(4, 33)
    model = hf_models.hf_model(name)
    config, params = hf_models.port(model)
    ours = np.asarray(forward(config, params, tokens, np.ones(tokens.shape, bool), jnp.bfloat16).astype(jnp.float32))
    exact = hf_models.hf_logits(model, tokens)
    theirs = hf_models.hf_logits(copy.deepcopy(model).bfloat16(), tokens)
    assert np.isfinite(ours).all()
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.05 * exact.std()
    assert np.sqrt(np.mean((ours - exact) ** 2)) < 2 * np.sqrt(np.mean((theirs - exact) ** 2))


def test_programs_do_not_grow_with_depth() -> None:
    config, _ = hf_models.port(hf_models.hf_model("gemma3"))
    sizes = []
    for layers in (2, 12):
        deep = dataclasses.replace(config, layers=layers, layer_kinds=(0, 1) * (layers // 2))
        params = jax.eval_shape(lambda deep=deep: decoder.init(deep, jax.random.key(0)))
        tokens, valid = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8), jnp.bool)
        cache = jax.eval_shape(lambda deep=deep: decoder.empty_cache(deep, 2, 16))
        programs = forward.lower(deep, params, tokens, valid), extend.lower(deep, params, tokens, valid, cache)
        sizes.append([program.as_text().count(" = ") for program in programs])
    assert sizes[0] == sizes[1]
    assert min(sizes[0]) > 50
