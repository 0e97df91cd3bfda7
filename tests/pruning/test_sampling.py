"""Text sampled from the dense model: by its own predictions, continuing calibration text, and never held out."""

import jax
import numpy as np
import pytest
from pruning_cases import SETTINGS, random_tokens, tiny

from spap_jax import api
from spap_jax.errors import UserError
from spap_jax.evaluation.generation import generate
from spap_jax.parallel import mesh
from spap_jax.pruning import sampling
from spap_jax.pruning.run import calibration_chunks
from spap_jax.pruning.sampling import PROMPT, sample, with_samples
from spap_jax.settings import PruneSettings

TOKENS = random_tokens(0, 128, 16)


def test_it_goes_on_from_parts_of_the_calibration():
    told = []
    found = sample(tiny("llama"), TOKENS, 3, 0, lambda *so_far: told.append(so_far))
    prompt = 16 // PROMPT
    assert found.shape == (384, 16)
    assert found.dtype == np.int32
    for time in range(3):
        mine = found[128 * time : 128 * (time + 1), :prompt]
        np.testing.assert_array_equal(mine, TOKENS[:, prompt * time : prompt * (time + 1)])
    assert told[0] == (0, 384)
    assert told[-1] == (384, 384)
    np.testing.assert_array_equal(found, sample(tiny("llama"), TOKENS, 3, 0))
    assert (found != sample(tiny("llama"), TOKENS, 3, 1)).any()


def test_any_number_of_sequences_is_spread_over_the_devices(monkeypatch: pytest.MonkeyPatch):
    alone, made = sample(tiny("llama"), TOKENS[:7], 1, 0), []
    monkeypatch.setattr(
        sampling, "generate", lambda *given, **more: made.append(len(given[1])) or generate(*given, **more)
    )
    with mesh.use_mesh(4):
        np.testing.assert_array_equal(sample(tiny("llama"), TOKENS[:7], 1, 0), alone)
    assert made == [8]


def test_samples_begin_with_the_token_that_all_sequences_begin_with():
    tokens = np.insert(TOKENS[:4, 1:], 0, 7, axis=1)
    found = sample(tiny("llama"), tokens, 2, 0)
    np.testing.assert_array_equal(found[:, 0], 7)
    np.testing.assert_array_equal(found[4:, 1], tokens[:, 16 // PROMPT + 1])


def test_tokens_are_drawn_as_the_model_predicts_them():
    """The mean negative log-likelihood of sampled tokens is the mean entropy of the predictions."""
    model = tiny("llama")
    found = sample(model, TOKENS, 4, 0)
    log_p = np.asarray(jax.nn.log_softmax(api.logits(model, found)), np.float64)[:, 1:-1]
    likelihood = np.take_along_axis(log_p, found[:, 2:, None], axis=-1)
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    spread = likelihood.std() / np.sqrt(likelihood.size)
    assert abs(-likelihood.mean() - entropy.mean()) < 5 * spread
    assert entropy.mean() < np.log(97) - 20 * spread  # other tokens would be detected


def test_what_was_written_is_fitted_and_never_held_out():
    settings = SETTINGS.replace(sampled=2, rounds=0, held_out=0.25)
    told = api.prune(tiny("llama"), TOKENS, settings=settings).report.calibration
    assert (told.sequences, told.sequence_length) == (384, 16)
    assert "token ids from memory, and 2 for each that the model wrote" in told.description
    fitted, held_out = calibration_chunks(np.arange(384 * 16).reshape(384, 16), settings)
    assert held_out.tokens.min() == fitted.tokens.max() + 1 == (384 - 32) * 16


@pytest.mark.parametrize(("count", "times", "share"), [(128, 9, 0.25), (25, 6, 0.1)])
def test_what_is_held_out_is_not_continued(count: int, times: int, share: float):
    tokens, settings = TOKENS[:count].copy(), PruneSettings(sampled=times, held_out=share)
    written = np.arange(count * 16 * (1 + times)).reshape(-1, 16)
    held_out = calibration_chunks(written, settings)[1].real
    tokens[-held_out:, ::2] = 96  # the tokens that prompts begin with
    tokens[:-held_out][tokens[:-held_out] == 96] = 0
    found = with_samples(tokens, lambda: tiny("llama"), settings).tokens
    np.testing.assert_array_equal(found[times * count :], tokens)
    assert (found[: times * count, : 16 // PROMPT] != 96).all()


def test_a_single_sequence_is_continued():
    assert with_samples(TOKENS[:1], lambda: tiny("llama"), PruneSettings(sampled=1)).tokens.shape == (2, 16)


def test_a_first_word_that_only_copies_of_one_sequence_share_is_part_of_it_alone():
    """Of two sequences one is held out, and the other is continued in its place as well."""
    found = with_samples(TOKENS[:2], lambda: tiny("llama"), PruneSettings(sampled=2)).tokens
    prompt = 16 // PROMPT
    np.testing.assert_array_equal(found[2:4, :prompt], [TOKENS[0, prompt : 2 * prompt]] * 2)


def test_a_single_token_is_not_gone_on_from():
    with pytest.raises(UserError, match="nothing to sample: give longer ones, or sampled=0"):
        sample(tiny("llama"), TOKENS[:, :1], 1, 0)
