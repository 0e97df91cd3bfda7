"""Several data sets mixed by weight."""

from pathlib import Path

import numpy as np
import pytest
from data_cases import read, refused

from spap_jax.data.sources import Share, shares_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with token ids: those of a.npy are below 1000, the others are above."""
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.arange(1000))
    np.save("b,c.npy", np.arange(1000, 2000))
    np.save("d.npy", np.arange(1000, 2000))
    return tmp_path


@pytest.mark.parametrize(
    ("data", "sequences", "first"),
    [
        ("a.npy:0.7,d.npy:0.3", 10, 7),
        ("a.npy:.5,d.npy:.5", 7, 4),
    ],
)
def test_sequences_are_in_proportion(data: str, sequences: int, first: int, folder: Path):
    blocks = read(data, sequences=sequences)
    of_a = blocks.tokens[:, 0] < 1000
    assert (len(blocks.tokens), of_a.sum()) == (sequences, first)
    assert blocks.sha256 == read(data, sequences=sequences).sha256 != read(data, sequences=sequences, seed=1).sha256
    assert blocks.available == 200
    assert blocks.description == (
        f"a.npy: {first} of 100 windows of 10 tokens, seed 0; "
        f"d.npy: {sequences - first} of 100 windows of 10 tokens, seed 0"
    )


def test_further_windows_are_in_proportion_too(folder: Path):
    blocks = read("a.npy:0.75,d.npy:0.25", sequences=40)  # of a.npy, 70 windows are left for 30 drawn
    assert blocks.further is not None
    starts = blocks.further.tokens[:, 0]
    assert ((starts < 1000).sum(), (starts >= 1000).sum()) == (70, 23)
    assert 20 < (starts[:40] < 1000).sum() < 40
    assert len({*starts, *blocks.tokens[:, 0]}) == 133
    assert read("a.npy:10,d.npy:1", sequences=110).further is None


def test_the_parts_are_shuffled(folder: Path):
    of_a = read("a.npy:1,d.npy:1", sequences=40).tokens[:, 0] < 1000
    assert 0 < of_a[:20].sum() < 20


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("c4", [("c4", 1)]),
        ("b,c.npy", [("b,c.npy", 1)]),
        ("c4:a.npy:0.5,owner/name:config:1", [("c4:a.npy", 0.5), ("owner/name:config", 1)]),
        ("gs://bucket/a.txt:2,C:\\b.txt:1.5", [("gs://bucket/a.txt", 2), ("C:\\b.txt", 1.5)]),
    ],
)
def test_names(data: str, parts: list, folder: Path):
    assert shares_of(data) == [Share(*part) for part in parts]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("a.npy:0.5,b,c.npy:0.5", "'b' has no weight"),
        ("a.npy:1,a.npy:2", "named twice"),
        ("a.npy:1,d.npy:100", "none of 7 sequences"),
    ],
)
def test_refusals(data: str, words: str, folder: Path):
    assert words in refused(data)


def test_a_mixture_is_not_evaluated_on(folder: Path):
    assert "to evaluate, name each data set by itself" in refused("a.npy:1,d.npy:1", role="evaluation")
