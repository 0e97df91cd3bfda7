"""Which windows of a text are used, and a warning about those that are learned from and measured on."""

import numpy as np
import pytest
from data_cases import JOINED, TEXTS, VOCABULARY, WORDS, read, refused, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from spap_jax import SpapWarning
from spap_jax.data import tokens
from spap_jax.data.tokens import POOL, _chunks, warn_of_overlap

BOS = VOCABULARY - 1


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 200), length=st.integers(1, 20), seed=st.integers(0, 2**32 - 1), data=st.data())
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


@settings(max_examples=30, deadline=None)
@given(pieces=st.lists(st.text(max_size=30)), size=st.integers(1, 25))
def test_chunks_depend_on_the_text_alone(pieces, size):
    text = "".join(pieces)
    assert list(_chunks(pieces, size)) == [text[start : start + size] for start in range(0, len(text), size)]


def test_the_seed_decides_the_draw():
    first = read(WORDS, seed=3)
    assert first.sha256 == read(WORDS, seed=3).sha256 != read(WORDS, seed=4).sha256
    assert first.description == "the given array: 7 of 30 windows of 10 tokens, seed 3"


def test_a_smaller_calibration_set_is_the_beginning_of_a_larger_one():
    np.testing.assert_array_equal(read(WORDS, sequences=3).tokens, read(WORDS, sequences=9).tokens[:3])


def gemmas(tokenizer):
    """Returns the same tokenizer as one of the class of Gemma's."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return type("GemmaTokenizerFast", (type(loaded),), {})(tokenizer_object=loaded.backend_tokenizer, bos_token="<s>")


@pytest.mark.parametrize("sequences", [None, 4])
def test_windows_begin_with_the_first_token_of_a_text(tokenizer, sequences):
    windows = read(TEXTS, tokenizer, bos=True, role="evaluation", sequences=sequences).tokens
    assert len(windows) == (sequences or len(WORDS) // 9)
    np.testing.assert_array_equal(windows[:, 0], BOS)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), WORDS[: 9 * len(windows)])


def test_a_named_set_has_the_first_token_in_each_window_alone(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    blocks = read(f"wikitext2:{path}", tokenizer, bos=True, role="evaluation", sequences=None)
    np.testing.assert_array_equal(
        blocks.tokens, read(TEXTS, tokenizer, bos=True, role="evaluation", sequences=None).tokens
    )
    assert blocks.description == "wikitext2:a.parquet: 33 of 33 windows of 10 tokens that begin with <s>"


def test_calibration_and_its_further_windows_begin_with_the_first_token(tokenizer):
    blocks = read(TEXTS, tokenizer, bos=True)
    assert blocks.further is not None
    both = np.concatenate([blocks.tokens, blocks.further.tokens])
    np.testing.assert_array_equal(both[:, 0], BOS)
    assert {*map(bytes, both[:, 1:].astype("<i4"))} == {*map(bytes, WORDS[: 9 * 33].reshape(-1, 9).astype("<i4"))}


def test_gemma_alone_needs_the_first_token(tokenizer):
    gemma = gemmas(tokenizer)
    np.testing.assert_array_equal(read(TEXTS, gemma).tokens, read(TEXTS, tokenizer, bos=True).tokens)
    np.testing.assert_array_equal(read(TEXTS, gemma, bos=False).tokens, read(TEXTS, tokenizer).tokens)
    np.testing.assert_array_equal(read(WORDS, gemma).tokens, read(WORDS).tokens)  # token ids stay as they are
    assert "<s>" not in read(TEXTS, tokenizer).description


def test_first_tokens_that_cannot_be(tokenizer):
    alone = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer
    assert "names no beginning-of-text token" in refused(TEXTS, alone, bos=True)
    assert "need room for text: give sequence_length=2" in refused(TEXTS, tokenizer, bos=True, sequence_length=1)
    assert "leave out bos" in refused(WORDS, tokenizer, bos=True)


def test_all_of_a_long_sequence_is_used():
    ids = np.arange(4 * 35).reshape(4, 35)
    blocks = read(ids, sequence_length=10, sequences=None, role="evaluation")
    np.testing.assert_array_equal(blocks.tokens, ids[:, :30].reshape(12, 10))
    drawn = read(ids, sequence_length=10, sequences=12)
    assert {*drawn.tokens[:, 0]} == {*blocks.tokens[:, 0]}


@pytest.mark.parametrize(("copies", "said"), [(1, "3 of 30 windows"), (2, "3 of the first 30 windows")])
def test_what_was_not_read_is_told(copies: int, said: str, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokens, "CHUNK", len(JOINED))
    found = read([JOINED + " "[: copies - 1]] * copies, tokenizer, sequences=3)
    assert said in found.description


def test_text_that_is_measured_on_after_it_was_learned_from():
    text = np.arange(64).reshape(8, 8)
    with pytest.warns(SpapWarning, match="^3 of the 4 sequences that are learned from are also measured on"):
        warn_of_overlap(text[[0, 7, 2, 4]], text[1:])
    warn_of_overlap(text[:4], text[4:])
    warn_of_overlap(text, None)
