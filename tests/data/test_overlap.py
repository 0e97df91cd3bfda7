"""Warnings about text that is used for both calibration or training and evaluation."""

import numpy as np
import pytest

from spap_jax import SpapWarning
from spap_jax.data.tokens import warn_of_overlap


def test_text_that_is_measured_on_after_it_was_learned_from():
    text = np.arange(64).reshape(8, 8)
    with pytest.warns(SpapWarning, match="^3 of the 4 sequences that are learned from are also measured on"):
        warn_of_overlap(text[[0, 7, 2, 4]], text[1:])
    warn_of_overlap(text[:4], text[4:])
    warn_of_overlap(text, None)
