"""Texts and tokenizers passed as objects give the same tokens as files and folders."""

from pathlib import Path

import datasets
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from data_cases import TEXTS, WORDS, read, refused

ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
GIVEN = {
    "a list": lambda: TEXTS,
    "a generator": lambda: iter(TEXTS),
    "an array": lambda: np.array(TEXTS),
    "rows": lambda: ROWS,
    "a data set": lambda: datasets.Dataset.from_list(ROWS),
    "a column": lambda: datasets.Dataset.from_list(ROWS)["text"],
    "a data set that is streamed": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "splits": lambda: {"test": ["no"], "train": TEXTS},
    "splits of a data set": lambda: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
}


@pytest.mark.parametrize("case", GIVEN)
def test_texts_in_memory(case: str, tokenizer: Path):
    blocks = read(GIVEN[case](), tokenizer, role="calibration")
    np.testing.assert_array_equal(blocks.tokens, read(WORDS).tokens)
    name = "the given data set (train split)" if "splits" in case else "the given text"
    assert blocks.description == f"{name}: 7 of 30 windows of 10 tokens, seed 0"


def test_tokenizer_objects(tokenizer: Path):
    expected = read(TEXTS, tokenizer).tokens
    plain = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    for given in (plain, transformers.PreTrainedTokenizerFast(tokenizer_object=plain)):
        np.testing.assert_array_equal(read(TEXTS, given).tokens, expected)


@pytest.mark.parametrize(
    "ids", [WORDS.tolist(), WORDS.reshape(-1, 10).tolist(), range(300)], ids=["flat", "rows", "range"]
)
def test_lists_of_numbers_and_arrays_of_jax_are_token_ids(ids):
    for given in (ids, jnp.asarray(ids)):
        np.testing.assert_array_equal(read(given).tokens, read(np.asarray(ids)).tokens)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"words": "a"}], 'no column "text"'),
        (["a", 3], "row 2"),
        (iter([[1, 2]]), "row 1"),
        ([], "token ids"),
        ([[1, 2, 3], [4, 5]], "token ids"),
        ({"test": ["a"]}, "no split train"),
    ],
)
def test_texts_that_are_none(data, words: str, tokenizer: Path):
    assert words in refused(data, tokenizer)


class Encoding:
    """A tokenizer of another library, such as tiktoken."""

    def encode(self, text: str) -> list[int]:
        return [len(text)]


@pytest.mark.parametrize("given", [3, str.split, Encoding()])
def test_tokenizers_that_are_none(given):
    assert "is no tokenizer" in refused(TEXTS, given)
