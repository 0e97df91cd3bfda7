"""Warnings about text that repeats itself, and about text used for both calibration or training and evaluation."""

import numpy as np
import pytest

from spap_jax import SpapWarning
from spap_jax.data.tokens import warn_of_overlap, warn_of_repetition


@pytest.mark.parametrize(("different", "words"), [(1, "1 distinct value"), (15, "15 distinct values")])
def test_a_few_tokens_again_and_again(different: int, words: str):
    with pytest.warns(SpapWarning, match=f"^blank.txt gives 1024 tokens with only {words}: they"):
        warn_of_repetition(np.arange(1024).reshape(16, 64) % different, "blank.txt")


@pytest.mark.parametrize("tokens", [np.arange(1024).reshape(16, 64) % 16, np.arange(8)])
def test_few_letters_and_few_tokens_are_none_the_worse(tokens: np.ndarray):
    warn_of_repetition(tokens, "letters.txt")


def test_text_that_is_measured_on_after_it_was_learned_from():
    text = np.arange(64).reshape(8, 8)
    with pytest.warns(SpapWarning, match="^3 of the 4 sequences that are learned from are also measured on"):
        warn_of_overlap(text[[0, 7, 2, 4]], text[1:])
    warn_of_overlap(text[:4], text[4:])
    warn_of_overlap(text, None)
