"""All file formats of a text, and of token ids, give the same tokens."""

import gzip
import hashlib
import json
import warnings

import numpy as np
import pytest
from data_cases import JOINED, TEXTS, VOCABULARY, WORDS, json_lines, read, write_parquet

from spap_jax import UserError
from spap_jax.data.sources import read_file

CONTAINERS = {
    "a.txt": JOINED.encode(),
    "bom.txt": b"\xef\xbb\xbf" + JOINED.encode(),
    "a.txt.gz": gzip.compress(JOINED.encode()),
    "one.jsonl": json_lines([JOINED]),
    "a.jsonl": json_lines(TEXTS),
    "blank.jsonl": json_lines(TEXTS).replace(b"\n", b"\n\n"),
    "null.jsonl": b'{"text": null}\n' + json_lines(TEXTS),
    "a.jsonl.gz": gzip.compress(json_lines(TEXTS)),
    "lines.json": json_lines(TEXTS),
    "list.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "texts.json": json.dumps(TEXTS).encode(),
    "one.json": json.dumps({"text": JOINED}, indent=1).encode(),
}


@pytest.mark.parametrize("name", [*CONTAINERS, "a.parquet"])
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_every_container_of_a_text_gives_the_same_tokens_without_a_network(
    name, role, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: pytest.fail(f"{address} was asked for"))
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, {"id": list(range(60)), "text": TEXTS})
    else:
        path.write_bytes(CONTAINERS[name])
    blocks = read(path, tokenizer, role=role, vocabulary=VOCABULARY)
    expected = read(WORDS, role=role)
    np.testing.assert_array_equal(blocks.tokens, expected.tokens)
    assert blocks.tokens.dtype == np.int32
    assert blocks.tokens.shape == (7, 10)
    assert blocks.available == len(WORDS) // 10
    assert blocks.sha256 == expected.sha256 == hashlib.sha256(blocks.tokens.astype("<i4").tobytes()).hexdigest()
    assert name in blocks.description


def test_line_ends_are_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    assert "".join(read_file(tmp_path / "a.txt")) == "one\r\ntwo\n"  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_timestamps_stay_texts_with_a_blank_line_between(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["2020-01-01 10:00:00"] * 2))
    assert list(read_file(tmp_path / "a.jsonl")) == ["2020-01-01 10:00:00", "\n\n2020-01-01 10:00:00"]


def test_no_warning_about_a_long_text(tmp_path, tokenizer, caplog):
    import transformers

    (tmp_path / "a.txt").write_text(JOINED)
    transformers.logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path / "a.txt", tokenizer)
    transformers.logging.disable_propagation()
    assert caplog.text == ""


def test_reading_stops_when_there_is_enough(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("spap_jax.data.tokens.CHUNK", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS) + b"not JSON\n")
    assert read(path, tokenizer, sequences=2).available < len(WORDS) // 10
    with pytest.raises(UserError, match="not valid JSON at line 61"):
        read(path, tokenizer, sequences=None)


def test_special_tokens_come_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("spap_jax.data.tokens.CHUNK", 100)
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    tokens = read(f"wikitext2:{path}", tokenizer, role="evaluation", sequences=None).tokens.ravel()
    assert np.flatnonzero(tokens == VOCABULARY - 1).tolist() == [0]


@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64", ">i8", "uint64"])
def test_npy_and_arrays_of_any_integers(tmp_path, dtype):
    np.save(tmp_path / "a.npy", WORDS.astype(dtype))
    for data in (tmp_path / "a.npy", str(tmp_path / "a.npy"), WORDS.astype(dtype)):
        np.testing.assert_array_equal(read(data).tokens, read(WORDS).tokens)
    assert read(tmp_path / "a.npy").tokens.dtype == np.int32


def test_sequences_are_cut_to_their_first_tokens():
    rows = np.arange(60).reshape(4, 15)
    np.testing.assert_array_equal(read(rows, role="evaluation", sequences=None).tokens, rows[:, :10])
    drawn = read(rows, sequences=3).tokens
    assert len({tuple(row) for row in drawn} & {tuple(row[:10]) for row in rows}) == 3
