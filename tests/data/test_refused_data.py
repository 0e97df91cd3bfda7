"""Error messages for all faults of data or a tokenizer."""

import gzip

import numpy as np
import pytest
from data_cases import JOINED, WORDS, refused, write_parquet

from spap_jax import UserError

BROKEN = {
    "empty.txt": (b"", "is empty"),
    "latin.txt": ("w1 caf\xe9".encode("latin-1"), "is not UTF-8"),
    "bad.jsonl": (b'{"text": "w1"}\n{"text": oops}\n', "is not valid JSON at line 2, column 10"),
    "bad_list.json": (b'[\n{"text": "w1"},\n{"text" oops}]\n', "is not valid JSON at line 3"),
    "column.jsonl": (b'{"body": "w1", "id": 3}', 'has no column "text" but body, id'),
    "number.jsonl": (b'{"text": "w1"}\n{"text": 5}', "row 2 of .* is no text"),
    "nothing.jsonl": (b'{"text": null}', "holds no text"),
    "half.jsonl": (b'{"text": "w1 \\ud800"}', "is not valid Unicode"),
    "plain.txt.gz": (b"w1 w2", "cannot be read .Not a gzipped file"),
    "cut.txt.gz": (gzip.compress(JOINED.encode())[:50], "cannot be read .Compressed file ended"),
    "cut.parquet": (b"PAR1" + bytes(100), r"cut\.parquet is a broken parquet file"),
    "zeros.parquet": (b"PAR1" + bytes(100) + b"PAR1", r"zeros\.parquet cannot be read"),
    "zip.npy": (b"PK\x03\x04", "holds no plain array"),
    "large.npy": (
        b"\x93NUMPY\x01\0v\0{'descr': '<i8', 'fortran_order': False, 'shape': (10**15,), }",
        "holds no plain array",
    ),
    "deep.json": (b"[" * 100_000, "cannot be read at line 1 .maximum recursion"),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", "cannot be read at line 1 .Exceeds the limit"),
    "table.csv": (b"text\nw1", r"is of an unsupported type: use one of \.txt, \.jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name, tmp_path, tokenizer):
    content, sentence = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name, tokenizer)
    assert name in message
    with pytest.raises(UserError, match=sentence):
        raise UserError(message)


@pytest.mark.parametrize(
    ("columns", "said"),
    [({"body": ["w1"], "title": ["w2"]}, 'no column "text" but body, title'), ({"text": []}, "holds no text")],
)
def test_parquet_without_texts(columns, said, tmp_path, tokenizer, caplog):
    assert said in refused(write_parquet(tmp_path / "a.parquet", columns), tokenizer)
    assert not caplog.records


@pytest.mark.parametrize("name", ["no.txt", "no.json.gz", "./no", "~/no"])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(name, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    assert "is not there: check the path" in refused(name, tokenizer)


def test_a_folder_is_no_file(tmp_path, tokenizer):
    assert "not a file" in refused(tmp_path, tokenizer)
    assert "not a file" in refused(str(tmp_path), tokenizer)


def test_a_name_of_nothing(tokenizer):
    assert "name wikitext2, c4, a hub data set owner/name" in refused("wikitext3", tokenizer)
    assert len(refused("A text in place of its name. " * 20, tokenizer)) < 250


@pytest.mark.parametrize("array", [np.array(["a"], object), np.ones(50), np.ones((2, 30, 1), int), np.array(3)])
def test_arrays_that_are_no_token_ids(array, tmp_path):
    assert ("needs a tokenizer" if array.dtype == object else "give whole token ids") in refused(array)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    message = refused(tmp_path / "a.npy")
    assert ("holds no plain array" if array.dtype == object else "give whole token ids") in message


def test_an_archive_is_no_array(tmp_path):
    np.savez(tmp_path / "a.npz", WORDS)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    assert "holds no plain array" in refused(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("data", "changes", "sentence"),
    [
        (np.arange(35), {}, "make 3 windows of 10, not the 7 asked for"),
        (np.arange(8), {"sequences": 2}, "make 0 windows of 10, not the 2 asked for"),
        (np.ones((3, 10), int), {}, "token ids [3, 10], which make 3 windows of 10, not the 7"),
        (np.ones((9, 8), int), {}, "which make 0 windows of 10, not the 7"),
        (WORDS, {"vocabulary": 20}, "token id 37, outside the model's vocabulary of 20"),
        (-WORDS, {}, "token id -37, outside"),
        (WORDS, {"sequences": 0}, "must be at least 1"),
        (WORDS, {"sequences": True}, "give positive whole numbers"),
        (WORDS, {"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        (WORDS, {"role": "calib"}, "there is no role 'calib': tokens are for 'calibration' or 'evaluation'"),
    ],
)
def test_what_was_asked_for_is_not_there(data, changes, sentence):
    assert sentence in refused(data, **changes)


def test_text_needs_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text(JOINED)
    assert "is text and needs a tokenizer" in refused(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "Couldn't instantiate"),
        ({"tokenizer.json": "{oops"}, "Expecting property name"),
        ({"config.json": '{"model_type": "opt"}'}, "it has no vocabulary"),
    ],
)
def test_folders_without_a_tokenizer(files, reason, tmp_path):
    (tmp_path / "a.txt").write_text(JOINED)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    message = refused(tmp_path / "a.txt", folder)
    assert f"the tokenizer {folder} cannot be loaded ({reason}" in message
    assert "tokenizer.json" in message


@pytest.mark.parametrize("name", ["./no", "/no/no"])
def test_a_tokenizer_folder_that_is_not_there(name, tmp_path):
    (tmp_path / "a.txt").write_text(JOINED)
    assert f"the tokenizer {name} cannot be loaded (there is no such folder)" in refused(tmp_path / "a.txt", name)
