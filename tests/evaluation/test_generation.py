"""Generation: the same tokens as transformers, the sampling settings, and invalid inputs."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from spap_jax.backend import traced_for
from spap_jax.errors import UserError
from spap_jax.evaluation.generation import SEGMENT, choose, generate, read, write
from spap_jax.models import decoder
from spap_jax.models.model import Model, Source
from spap_jax.numerics import generation_dtype


def model_of(theirs: transformers.PreTrainedModel) -> Model:
    return Model(*hf_models.port(theirs), Source("test", None, theirs.config.to_json_string(use_diff=False)))


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Return three prompts of 12, 9 and 1 tokens, padded on the left, and their mask."""
    tokens = np.random.default_rng(5).integers(2, 97, (3, 12))
    valid = np.arange(12)[None, :] >= np.array([0, 3, 11])[:, None]
    return np.where(valid, tokens, 0), valid


def hf_generate(
    model: transformers.PreTrainedModel, tokens: np.ndarray, valid: np.ndarray, new: int = 12, **kw: Any
) -> np.ndarray:
    settings = {"eos_token_id": None, "pad_token_id": 0} | kw
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=new, **settings)
    mask = torch.tensor(valid, dtype=torch.long)
    out = model.generate(torch.tensor(tokens), attention_mask=mask, generation_config=config)  # type: ignore[operator]
    pad = settings["pad_token_id"]
    return np.pad(out.numpy(), ((0, 0), (0, tokens.shape[1] + new - out.shape[1])), constant_values=pad)


NEW = 12
"""Number of new tokens, the same in most tests so that they share compiled programs."""


@pytest.mark.parametrize(
    ("name", "new"), [("llama_llama3_rope_v5", SEGMENT + 8), ("qwen2_two_kv_heads", NEW), ("opt_350m_like", NEW)]
)
def test_greedy_tokens_are_those_of_transformers(name: str, new: int) -> None:
    theirs = hf_models.hf_model(name)
    tokens, valid = prompts()
    ours = generate(model_of(theirs), tokens, new, valid=valid, eos=())
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, hf_generate(theirs, tokens, valid, new))


def test_sequences_end_at_different_times() -> None:
    pad = 7
    theirs = hf_models.hf_model("qwen2_two_kv_heads")
    tokens, valid = prompts()
    free = hf_generate(theirs, tokens, valid)[:, 12:]
    ends = (int(free[0, 1]), int(free[1, 4]), int(free[2, 8]))
    expected = hf_generate(theirs, tokens, valid, eos_token_id=list(ends), pad_token_id=pad)
    stops = np.isin(expected[:, 12:], ends).argmax(axis=1)
    assert len(set(stops)) == 3  # all three end at different times
    np.testing.assert_array_equal(generate(model_of(theirs), tokens, NEW, valid=valid, eos=ends, pad=pad), expected)


def test_a_prompt_sees_neither_its_neighbours_nor_its_padding() -> None:
    """Padding takes no positions either: the model has only those that the longest prompt and its new tokens need."""
    theirs = hf_models.hf_model("opt_125m_like")
    config, params = hf_models.port(theirs)
    positions = 12 + NEW
    embed = params["embed"] | {"positions": params["embed"]["positions"][: positions + 2]}
    small = Model(dataclasses.replace(config, positions=positions), params | {"embed": embed}, model_of(theirs).source)
    tokens, valid = prompts()
    together = generate(model_of(theirs), tokens, NEW, valid=valid, eos=())
    for row in range(3):
        alone = generate(small, tokens[row : row + 1, valid[row]], NEW, eos=())
        np.testing.assert_array_equal(alone[0, -NEW:], together[row, -NEW:])


def test_end_and_padding_tokens_come_from_the_files(tmp_path: Path) -> None:
    theirs = hf_models.hf_model("llama_tied")
    tokens, valid = prompts()
    config, params = hf_models.port(theirs)
    free = generate(Model(config, params, Source("test", None, "{}")), tokens, NEW, valid=valid)
    first, other = int(free[0, 14]), int(free[0, 12])

    def end(source: Source, **kw: Any) -> list[int]:
        return generate(Model(config, params, source), tokens, NEW, valid=valid, **kw)[0, 12:].tolist()

    text = json.dumps({"eos_token_id": first})
    assert end(Source("test", None, text))[3:] == [first] * 9
    assert end(Source("test", tmp_path, text))[3:] == [first] * 9  # a folder without generation_config.json
    assert end(Source("test", None, "")) == free[0, 12:].tolist()  # no files at all
    assert end(Source("test", None, json.dumps({"eos_token_id": first, "pad_token_id": 0})))[3:] == [0] * 9
    assert end(Source("test", None, json.dumps({"eos_token_id": first, "pad_token_id": -1})))[3:] == [first] * 9
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, 1], "pad_token_id": 3}))
    assert end(Source("test", tmp_path, text)) == [other] + [3] * 11
    assert end(Source("test", tmp_path, text), eos=first, pad=9)[3:] == [9] * 9
    assert end(Source("test", tmp_path, text), eos=()) == free[0, 12:].tolist()


def test_token_0_can_end_a_sequence() -> None:
    config, params = hf_models.port(hf_models.hf_model("llama_tied"))
    always_0 = jax.tree.map(np.zeros_like, params)
    model = Model(config, always_0, Source("test", None, json.dumps({"eos_token_id": 0, "pad_token_id": 4})))
    tokens, valid = prompts()
    assert generate(model, tokens, NEW, valid=valid)[:, 12:].tolist() == [[0] + [4] * (NEW - 1)] * 3


@pytest.mark.parametrize("name", ["qwen2_one_kv_head", "opt_125m_like"])
def test_steps_equal_the_whole(name: str) -> None:
    """A prompt and further tokens match one forward pass, also in the layout of the weights that is timed."""
    config, params = hf_models.port(hf_models.hf_model(name))
    tokens, valid = (array[:2] for array in prompts())
    expected = decoder.forward(config, params, jnp.asarray(tokens), jnp.asarray(valid))
    wide, apart = decoder.unstacked(config, params)
    assert wide.intermediate % decoder.WIDTH_STEP == 0 < wide.intermediate - config.intermediate
    extend = jax.jit(decoder.extend, static_argnums=0)
    for sizes, tree in ((config, params), (wide, apart)):
        logits, cache = read(sizes, tree, tokens[:, :-2], valid[:, :-2], 12, "float32")
        np.testing.assert_allclose(logits, expected[:, -3], rtol=0, atol=1e-4)
        for i in (10, 11):
            logits, cache = extend(sizes, tree, tokens[:, i : i + 1], np.ones((2, 1), bool), cache)
            np.testing.assert_allclose(logits, expected[:, i], rtol=0, atol=1e-4)


def test_products_are_of_full_precision_and_the_cache_is_updated_in_place() -> None:
    config, params = hf_models.port(hf_models.hf_model("llama_two_kv_heads"))
    tokens = jnp.zeros((2, 8), jnp.int32)
    reading = read.lower(config, params, tokens, tokens == 0, 64, "float32")
    logits, cache = read(config, params, tokens, tokens == 0, 64, "float32")
    arguments = config, 0.0, 3, params, logits, cache, jax.random.split(jax.random.key(0), 2), np.int32(0)
    writing = write.lower(*arguments)
    for program in (reading, writing):
        products = [line for line in program.as_text().splitlines() if "dot_general" in line]
        assert products
        assert all("HIGHEST" in line for line in products)
    text = writing.compile().as_text() or ""
    shape = "f32[{}]".format(",".join(map(str, cache.keys.shape)))
    assert shape in text
    assert not re.findall(re.escape(shape) + r"\S* copy\(", text)
    before = cache.keys.unsafe_buffer_pointer(), cache.values.unsafe_buffer_pointer()
    *_, after = write(*arguments)
    assert (after.keys.unsafe_buffer_pointer(), after.values.unsafe_buffer_pointer()) == before


def test_sampling_is_decided_by_the_key() -> None:
    model = model_of(hf_models.hf_model("llama_tied"))
    tokens, valid = prompts()

    def sample(seed: int) -> list[list[int]]:
        key = jax.random.key(seed)
        return generate(model, tokens, NEW, valid=valid, temperature=1.0, key=key, eos=())[:, 12:].tolist()

    first, again, other = sample(0), sample(0), sample(1)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert len({tuple(row) for row in first}) == 3


def test_keys_may_be_of_the_older_kind_and_one_for_each_prompt() -> None:
    model, (tokens, valid) = model_of(hf_models.hf_model("llama_tied")), prompts()
    sample = functools.partial(generate, model, tokens, NEW, valid=valid, temperature=1.0, eos=())
    new, old = jax.random.split(jax.random.key(0), 3), jax.random.split(jax.random.PRNGKey(0), 3)
    np.testing.assert_array_equal(sample(key=old), sample(key=new))
    np.testing.assert_array_equal(sample(key=jax.random.PRNGKey(1)), sample(key=jax.random.key(1)))
    unusable: Any
    for unusable in (0, jax.random.split(jax.random.key(0), 2)):
        with pytest.raises(UserError, match=r"key must be one random key of jax\.random, or 3 of them"):
            sample(key=unusable)


def test_every_draw_is_a_new_one() -> None:
    """A model with uniform predictions repeats a token only by chance."""
    config, params = hf_models.port(hf_models.hf_model("llama_tied"))
    indifferent = Model(config, jax.tree.map(np.zeros_like, params), Source("test", None, "{}"))
    tokens, valid = prompts()
    drawn = generate(indifferent, tokens, NEW, valid=valid, temperature=1.0, key=jax.random.key(2))[:, 12:]
    assert len(np.unique(drawn)) > 20  # of 36 draws from 97 tokens
    long = generate(indifferent, tokens, 2 * SEGMENT, valid=valid, temperature=1.0, key=jax.random.key(2))[:, 12:]
    assert (long[:, :SEGMENT] == long[:, SEGMENT:]).mean() < 0.1


def test_a_low_temperature_takes_the_likeliest() -> None:
    logits = jax.random.normal(jax.random.key(0), (500, 97))
    keys = jax.random.split(jax.random.key(1), 500)
    np.testing.assert_array_equal(choose(1e-6, logits, keys), logits.argmax(axis=-1))


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    logits = np.array([1.0, -2.0, 0.3, 2.0, -0.5, 1.6])
    expected = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum()
    draws = 20_000
    drawn = choose(0.5, jnp.tile(jnp.asarray(logits), (draws, 1)), jax.random.split(jax.random.key(11), draws))
    counts = np.bincount(np.asarray(drawn), minlength=6)
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi_square < 20.5  # the 99.9% point for five degrees of freedom


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [[1, 2], [3]]}, "prompts must be"),
        ({"tokens": np.zeros((2, 0), int)}, "prompts must be"),
        ({"tokens": [[0.5]]}, "prompts must be"),
        ({"tokens": [[1, 97]]}, "the tokenizer of this model"),
        ({"valid": [[True]]}, "the shape of the prompts"),
        ({"valid": [[True, True, False]]}, "on the left"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 2.0}, "whole number"),
        ({"max_new_tokens": 766}, "768 positions"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0}, "random key"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"tokens": [[1, 2, 3]]} | change
    model = model_of(hf_models.hf_model("llama_tied"))
    with pytest.raises(UserError, match=words):
        generate(model, **arguments)


@pytest.mark.parametrize(
    ("platform", "weights", "expected"),
    [
        ("cpu", "bfloat16", "float32"),
        ("cuda", "float16", "float16"),
        ("tpu", "float16", "bfloat16"),
    ],
)
def test_the_data_type_of_generation(platform: str, weights: str, expected: str) -> None:
    with traced_for(platform):
        assert generation_dtype({"down": jnp.zeros(2, weights)}) == expected
