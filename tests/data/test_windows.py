"""Which windows of a text are used."""

import numpy as np
from data_cases import WORDS, read
from hypothesis import given, settings
from hypothesis import strategies as st

from spap_jax.data.loading import POOL
from spap_jax.data.tokenizing import _chunks


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 200), length=st.integers(1, 20), seed=st.integers(0, 2**31), data=st.data())
def test_calibration_draws_each_window_at_most_once(count, length, seed, data):
    total = count * length + data.draw(st.integers(0, length - 1))
    sequences = data.draw(st.integers(1, count))
    stream = np.arange(total)
    blocks = read(stream, sequence_length=length, sequences=sequences, seed=seed)
    starts = blocks.tokens[:, 0]
    np.testing.assert_array_equal(blocks.tokens, starts[:, None] + np.arange(length))
    assert blocks.tokens.shape == (sequences, length)
    assert blocks.available == count
    assert len(set(starts)) == sequences
    assert not np.any(starts % length)
    more = blocks.further
    others = [] if more is None else [*more.tokens[:, 0]]
    assert len(others) == min(count - sequences, (POOL - 1) * sequences)
    assert len({*starts, *others}) == sequences + len(others)
    assert more is None or not np.any(more.tokens[:, 0] % length)
    in_order = read(stream, sequence_length=length, sequences=sequences, seed=seed, role="evaluation")
    assert in_order.further is None
    np.testing.assert_array_equal(in_order.tokens.ravel(), stream[: sequences * length])


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.text(max_size=30)), size=st.integers(1, 25))
def test_chunks_depend_on_the_text_alone(pieces, size):
    text = "".join(pieces)
    assert list(_chunks(pieces, size)) == [text[start : start + size] for start in range(0, len(text), size)]


def test_the_seed_decides_the_draw():
    first, again, other = read(WORDS, seed=3), read(WORDS, seed=3), read(WORDS, seed=4)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.description == "the given array: 7 of 30 windows of 10 tokens, seed 3"
    assert read(WORDS, seed=3, role="evaluation").sha256 == read(WORDS, seed=4, role="evaluation").sha256


def test_a_smaller_calibration_set_is_the_beginning_of_a_larger_one():
    np.testing.assert_array_equal(read(WORDS, sequences=3).tokens, read(WORDS, sequences=9).tokens[:3])
