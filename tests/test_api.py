"""What a notebook does: load, prune, measure, save; and what stock loaders make of the result."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from hf_models import hf_logits

import spap_jax as spap
from spap_jax.api import PruneResult

EXAMPLES = Path(__file__).parents[1] / "examples"
STORIES = EXAMPLES / "llama-stories"
QUICK = spap.PruneSettings(round_to=64, rounds=1, steps=5, sweeps=0)


@functools.cache
def stories() -> spap.Model:
    return spap.load(STORIES)


@functools.cache
def evaluation() -> np.ndarray:
    data = EXAMPLES / "stories_evaluation.txt"
    return spap.load_tokens(data, tokenizer=STORIES, sequence_length=64, sequences=8, role="evaluation").tokens


@functools.cache
def pruned() -> PruneResult:
    data = EXAMPLES / "stories_calibration.txt"
    blocks = spap.load_tokens(data, tokenizer=STORIES, sequence_length=64, sequences=16, role="calibration")
    return spap.prune(stories(), blocks, settings=QUICK, sparsity=0.2)


def torch_model(folder: Path) -> Any:
    loader: Any = transformers.AutoModelForCausalLM
    model, told = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_logits_are_those_of_transformers():
    theirs = hf_logits(torch_model(STORIES), evaluation())
    np.testing.assert_allclose(spap.logits(stories(), evaluation()), theirs, rtol=0, atol=1e-4)


def test_padding_is_masked():
    tokens = evaluation()[:2].copy()
    mask = np.ones_like(tokens)
    mask[0, :9] = 0
    expected = np.asarray(spap.logits(stories(), tokens, mask))
    tokens[0, :9] = 7
    np.testing.assert_array_equal(np.asarray(spap.logits(stories(), tokens, mask))[0, 9:], expected[0, 9:])
    assert np.abs(np.asarray(spap.logits(stories(), tokens))[0, 9:] - expected[0, 9:]).max() > 1e-2


def test_perplexity_is_that_of_torch():
    tokens = torch.tensor(evaluation(), dtype=torch.long)
    with torch.no_grad():
        logits = torch_model(STORIES)(tokens).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
    expected = float(loss.exp())
    assert spap.perplexity(stories(), evaluation()) == pytest.approx(expected, rel=1e-4)
    assert spap.perplexity(stories(), evaluation(), batch_tokens=3 * 64) == pytest.approx(expected, rel=1e-4)


def test_a_notebook(tmp_path: Path):
    """Load, prune, measure, save, and load the result with stock tools."""
    model, result = stories(), pruned()
    assert model.config.intermediate == 320
    assert result.model.config.intermediate == 256
    assert result.report.model["intermediate"] == {"before": 320, "after": 256}
    assert result.report.calibration["description"].endswith("seed 0")
    sizes = [sum(array.size for array in jax.tree.leaves(m.params)) for m in (model, result.model)]
    assert sizes[0] - sizes[1] == 6 * 3 * 96 * 64
    before, after = (spap.perplexity(m, evaluation()) for m in (model, result.model))
    assert before < after < 2 * before

    spap.save(result.model, tmp_path / "out", files={"spap_report.json": result.report.to_json()})
    with pytest.raises(spap.UserError, match="out exists"):
        spap.save(result.model, tmp_path / "out")
    theirs = torch_model(tmp_path / "out")
    assert theirs.config.intermediate_size == 256
    ours = spap.logits(result.model, evaluation())
    np.testing.assert_allclose(ours, hf_logits(theirs, evaluation()), rtol=0, atol=1e-4)
    prompt = torch.tensor(evaluation()[:1, :8], dtype=torch.long)
    written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert written.shape[1] > 8
    assert int(written[0, 8]) == int(np.asarray(ours)[0, 7].argmax())
    reloaded = spap.load(tmp_path / "out")
    np.testing.assert_array_equal(spap.logits(reloaded, evaluation()), ours)


BAD_TOKENS = {
    "fractions": (np.zeros((2, 8)), "must be whole numbers"),
    "truth values": (np.zeros((2, 8), bool), "must be whole numbers"),
    "one sequence": (np.zeros(8, int), r"whole numbers \[B, T\], not int64 \[8\]"),
    "none": (np.zeros((0, 8), int), "must be whole numbers"),
    "ragged": ([[1, 2], [3]], "must be whole numbers"),
    "negative": (np.full((2, 8), -1), "from -1 to -1, outside the model's vocabulary of 512"),
    "the vocabulary's size": (np.full((2, 8), 512), "from 512 to 512, outside"),
    "too long": (np.zeros((2, 513), int), "sequences of 513 tokens do not fit the model's 512 positions"),
}


@pytest.mark.parametrize("use", [spap.prune, spap.logits, spap.perplexity])
@pytest.mark.parametrize("case", BAD_TOKENS)
def test_tokens_that_are_none(case: str, use):
    tokens, sentence = BAD_TOKENS[case]
    with pytest.raises(spap.UserError, match=sentence):
        use(stories(), tokens)


def test_the_last_id_and_the_last_position_are_allowed():
    assert np.isfinite(spap.logits(stories(), np.full((1, 512), 511))).all()


def test_perplexity_takes_blocks_and_needs_a_prediction():
    blocks = spap.load_tokens(evaluation(), tokenizer=None, sequence_length=64, sequences=8, role="evaluation")
    assert spap.perplexity(stories(), blocks) == spap.perplexity(stories(), evaluation())
    with pytest.raises(spap.UserError, match="at least two tokens"):
        spap.perplexity(stories(), np.zeros((2, 1), int))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sparsty": 0.2}, "unknown setting sparsty; the settings are sparsity, "),
        ({"sparsity": 1}, "sparsity must be a fraction between 0 and 1"),
        ({"sparsity": float("nan")}, "sparsity must be"),
        ({"sparsity": "0.3"}, "sparsity must be"),
        ({"ridge": float("inf")}, "ridge must be positive"),
        ({"rounds": -1, "steps": 0}, "rounds must be .*; steps must be"),
        ({"method": "lora"}, "method must be one of spap, random, magnitude, wanda, flap, fasp, obs, osscar"),
        ({"update": "tune"}, "update must be one of own, none, bias, refit, alternate, not 'tune'"),
        ({"round_to": 512}, "nothing to remove"),
    ],
)
def test_settings_that_are_none(changes: dict, sentence: str):
    with pytest.raises(spap.UserError, match=sentence):
        spap.prune(stories(), evaluation(), **changes)


def test_settings_are_a_value():
    settings = spap.PruneSettings(sparsity=0.5)
    assert settings.replace(sparsity=0.2) == spap.PruneSettings(sparsity=0.2)
    assert settings.sparsity == 0.5
    assert set(spap.__all__) <= set(dir(spap))
    with pytest.raises(AttributeError, match="no attribute 'pruned'"):
        _ = spap.pruned  # pyright: ignore[reportAttributeAccessIssue]
