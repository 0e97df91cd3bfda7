"""Text that says the same again and again is warned of, where it is pruned or trained on."""

import numpy as np
import pytest

from spap_jax import SpapWarning
from spap_jax.repetition import warn_of_repetition


@pytest.mark.parametrize(("different", "words"), [(1, "1 distinct value"), (15, "15 distinct values")])
def test_a_few_tokens_again_and_again(different: int, words: str):
    with pytest.warns(SpapWarning, match=f"^blank.txt gives 1024 tokens with only {words}: they"):
        warn_of_repetition(np.arange(1024).reshape(16, 64) % different, "blank.txt")


@pytest.mark.parametrize("tokens", [np.arange(1024).reshape(16, 64) % 16, np.arange(8)])
def test_few_letters_and_few_tokens_are_none_the_worse(tokens: np.ndarray):
    warn_of_repetition(tokens, "letters.txt")
