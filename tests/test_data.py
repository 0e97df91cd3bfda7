"""Token blocks from every form of data, and the sentence for everything that can be wrong with it."""

import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spap_jax import UserError, hub
from spap_jax.data import NAMED, TokenBlocks, _chunks, load_tokens

VOCABULARY = 40
TEXTS = [f"w{i % 37} w{i % 11} w{i % 5} w{i % 29} w{i % 7}" for i in range(60)]
JOINED = "\n\n".join(TEXTS)
WORDS = np.array([int(word[1:]) + 1 for word in JOINED.split()])  # what the tokenizer below makes of it


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a word-level tokenizer: w0 is 1, w1 is 2, ...; it would add <s> if asked for special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0} | {f"w{i}": i + 1 for i in range(VOCABULARY - 2)} | {"<s>": VOCABULARY - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", special_tokens=[("<s>", VOCABULARY - 1)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", model_max_length=16
    ).save_pretrained(folder)
    return folder


def read(data, tokenizer: Path | str | None = None, **changes) -> TokenBlocks:
    options = {"sequence_length": 10, "sequences": 7, "role": "calibration"} | changes
    return load_tokens(data, tokenizer=tokenizer, **options)


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


CONTAINERS = {
    "a.txt": JOINED.encode(),
    "bom.txt": b"\xef\xbb\xbf" + JOINED.encode(),
    "a.txt.gz": gzip.compress(JOINED.encode()),
    "one.jsonl": json_lines([JOINED]),
    "a.jsonl": json_lines(TEXTS),
    "blank.jsonl": json_lines(TEXTS).replace(b"\n", b"\n\n"),
    "null.jsonl": b'{"text": null}\n' + json_lines(TEXTS),
    "a.jsonl.gz": gzip.compress(json_lines(TEXTS)),
    "A.JSONL": json_lines(TEXTS),
    "lines.json": json_lines(TEXTS),
    "lines.json.gz": gzip.compress(json_lines(TEXTS)),
    "list.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "texts.json": json.dumps(TEXTS).encode(),
    "one.json": json.dumps({"text": JOINED}, indent=1).encode(),
}


@pytest.mark.parametrize("name", [*CONTAINERS, "a.parquet"])
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_every_container_of_a_text_gives_the_same_tokens(name, role, tmp_path, tokenizer):
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


def test_the_tokens_are_those_of_the_text_with_blank_lines_between_its_parts(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS))
    whole = AutoTokenizer.from_pretrained(tokenizer)(JOINED, add_special_tokens=False, verbose=False)["input_ids"]
    blocks = read(path, tokenizer, role="evaluation", sequences=None)
    np.testing.assert_array_equal(blocks.tokens.ravel(), whole)


def test_line_ends_are_kept(tmp_path):
    from spap_jax.texts import read_file

    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    assert "".join(read_file(tmp_path / "a.txt")) == "one\r\ntwo\n"  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_timestamps_stay_texts(tmp_path):
    from spap_jax.texts import read_file

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
    monkeypatch.setattr("spap_jax.data.CHUNK", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS) + b"not JSON\n")
    assert read(path, tokenizer, sequences=2).available < len(WORDS) // 10
    with pytest.raises(UserError, match="not valid JSON at line 61"):
        read(path, tokenizer, sequences=None)


def test_special_tokens_come_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("spap_jax.data.CHUNK", 100)
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    tokens = read(f"wikitext2:{path}", tokenizer, role="evaluation", sequences=None).tokens.ravel()
    assert np.flatnonzero(tokens == VOCABULARY - 1).tolist() == [0]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "list.json", "a.parquet"])
def test_local_files_ask_no_network(name, tmp_path, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address) or [])
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, {"text": TEXTS})
    else:
        path.write_bytes(CONTAINERS[name])
    read(path, tokenizer)
    assert asked == []


# Arrays


@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64", ">i8", "uint64"])
def test_npy_and_arrays_of_any_integers(tmp_path, dtype):
    np.save(tmp_path / "a.npy", WORDS.astype(dtype))
    for data in (tmp_path / "a.npy", str(tmp_path / "a.npy"), WORDS.astype(dtype)):
        np.testing.assert_array_equal(read(data).tokens, read(WORDS).tokens)
    assert read(tmp_path / "a.npy").tokens.dtype == np.int32


def test_jax_arrays_and_lists():
    np.testing.assert_array_equal(read(jnp.asarray(WORDS)).tokens, read(WORDS).tokens)
    np.testing.assert_array_equal(read(WORDS.tolist()).tokens, read(WORDS).tokens)


def test_sequences_are_cut_to_their_first_tokens():
    rows = np.arange(60).reshape(4, 15)
    np.testing.assert_array_equal(read(rows, role="evaluation", sequences=None).tokens, rows[:, :10])
    drawn = read(rows, sequences=3).tokens
    assert len({tuple(row) for row in drawn} & {tuple(row[:10]) for row in rows}) == 3


# Windows


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
    in_order = read(stream, sequence_length=length, sequences=sequences, seed=seed, role="evaluation")
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


# Errors


def refused(data, tokenizer=None, **changes) -> str:
    with pytest.raises(UserError) as caught:
        read(data, tokenizer, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert ": " in message, "a sentence says what to do after a colon"
    return message


BROKEN = {
    "empty.txt": (b"", "is empty"),
    "empty.npy": (b"", "is empty"),
    "latin.txt": ("w1 caf\xe9".encode("latin-1"), "is not UTF-8"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', "is not UTF-8"),
    "bad.jsonl": (b'{"text": "w1"}\n{"text": oops}\n', "is not valid JSON at line 2, column 10"),
    "bad.json": (b'{"text": "w1"}\n{"text": oops}\n', "is not valid JSON at line 2, column 10"),
    "bad_list.json": (b'[\n{"text": "w1"},\n{"text" oops}]\n', "is not valid JSON at line 3"),
    "column.jsonl": (b'{"body": "w1", "id": 3}', 'has no column "text" but body, id'),
    "number.jsonl": (b'{"text": "w1"}\n{"text": 5}', "row 2 of .* is no text"),
    "scalar.json": (b"5", "row 1 of .* is no text"),
    "nothing.json": (b"[]", "holds no text"),
    "nothing.jsonl": (b'{"text": null}', "holds no text"),
    "half.jsonl": (b'{"text": "w1 \\ud800"}', "is not valid Unicode"),
    "plain.txt.gz": (b"w1 w2", "cannot be read .Not a gzipped file"),
    "cut.txt.gz": (gzip.compress(JOINED.encode())[:50], "cannot be read .Compressed file ended"),
    "plain.parquet": (b"w1 w2 w3", r"plain\.parquet is not a whole parquet file"),
    "tiny.parquet": (b"w", r"tiny\.parquet is not a whole parquet file"),
    "cut.parquet": (b"PAR1" + bytes(100), r"cut\.parquet is not a whole parquet file"),
    "zeros.parquet": (b"PAR1" + bytes(100) + b"PAR1", r"zeros\.parquet cannot be read"),
    "footer.parquet": (b"PAR1" + b"\1" * 100 + b"PAR1", r"footer\.parquet is a broken parquet file"),
    "text.npy": (b"w1 w2", "holds no plain array"),
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


def test_parquet_without_the_column(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "a.parquet", {"body": ["w1"], "title": ["w2"]})
    assert 'no column "text" but body, title' in refused(path, tokenizer)


@pytest.mark.parametrize("name", ["no.txt", "no.jsonl", "no.json.gz", "no.npy", "no.parquet", "./no", "~/no", "/no/no"])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(name, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    assert "is not there: check the path" in refused(name, tokenizer)


def test_a_folder_is_no_file(tmp_path, tokenizer):
    assert "is a folder, not a file" in refused(tmp_path, tokenizer)
    assert "is a folder, not a file" in refused(str(tmp_path), tokenizer)


def test_a_name_of_nothing(tokenizer):
    assert "name wikitext2, c4, a hub data set owner/name" in refused("wikitext3", tokenizer)


@pytest.mark.parametrize("array", [np.array(["a"], object), np.ones(50), np.ones((2, 30, 1), int), np.array(3)])
def test_arrays_that_are_no_token_ids(array, tmp_path):
    assert "give whole token ids" in refused(array)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    message = refused(tmp_path / "a.npy")
    assert ("holds no plain array" if array.dtype == object else "give whole token ids") in message


def test_an_archive_is_no_array(tmp_path):
    np.savez(tmp_path / "a.npz", WORDS)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    assert "is an .npz archive" in refused(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("data", "changes", "sentence"),
    [
        (
            np.arange(35),
            {},
            "holds 35 tokens, which make 3 windows of 10, but 7 were asked for: "
            "use --sequences 3 or --sequence-length 5 at most, or more text",
        ),
        (np.arange(8), {"sequences": 2}, "make 0 windows of 10, but 2 were asked for: use --sequence-length 4 at most"),
        (np.arange(8), {"sequences": None}, "but 1 were asked for: use --sequence-length 8 at most"),
        (np.arange(3), {}, "asked for: give more text"),
        (
            np.ones((3, 10), int),
            {},
            "holds 30 tokens, which make 3 windows of 10, but 7 were asked for: use --sequences 3",
        ),
        (
            np.ones((9, 8), int),
            {},
            "sequences of 8 tokens, shorter than the 10 asked for: use --sequence-length 8 or less",
        ),
        (WORDS, {"vocabulary": 20}, "token id 37, outside the vocabulary of 20: the tokenizer does not fit the model"),
        (-WORDS, {}, "token id -37, outside"),
        (np.full(100, 2**40), {}, "token id 1099511627776, outside the vocabulary of 2147483648"),
        (WORDS, {"sequences": 0}, "must be at least 1"),
        (WORDS, {"sequence_length": 0}, "must be at least 1"),
    ],
)
def test_what_was_asked_for_is_not_there(data, changes, sentence):
    assert sentence in refused(data, **changes)


def test_the_largest_choices_that_an_error_names_do_work():
    read(np.arange(35), sequences=3)
    read(np.arange(35), sequence_length=5)


def test_too_little_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("w1 w2 w3 w4 w5 w6 w7")
    assert "holds 7 tokens, which make 0 windows of 10" in refused(tmp_path / "a.txt", tokenizer)


# Tokenizers


def test_text_needs_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text(JOINED)
    assert "is text and needs a tokenizer" in refused(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "Couldn't instantiate"),
        ({"tokenizer.json": "{oops"}, "Expecting property name"),
        ({"config.json": '{"model_type": "opt"}'}, "it has no vocabulary"),
        ({"config.json": '{"model_type": "qwen2"}'}, "it has no vocabulary"),
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


# The hub: in fresh processes, because its libraries read the environment once

SCRIPT = """
import json, sys
from spap_jax.data import load_tokens
from spap_jax.errors import UserError
data, tokenizer, role = sys.argv[1:]
try:
    blocks = load_tokens(data, tokenizer=tokenizer, sequence_length=10, sequences=7, role=role)
    print(json.dumps([blocks.tokens.tolist(), blocks.description]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def in_fresh_process(data: str, tokenizer: Path | str, home: Path, role: str = "calibration", **environment: str):
    """What `load_tokens` gives or says, with an own cache and a hub where nothing listens."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    place = {
        "HF_HOME": str(home / "cache"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PYTHONPATH": str(Path(hub.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, data, str(tokenizer), role],
        env=kept | place | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Retry" not in done.stderr, "the slow retries of the hub's client were entered"
    return json.loads(done.stdout)


@pytest.mark.parametrize("data", ["wikitext2", "owner/name:config"])
def test_a_hub_out_of_reach_is_said_at_once(data, tmp_path, tokenizer):
    message = in_fresh_process(data, tokenizer, tmp_path)
    assert "is not on this machine and the hub http://127.0.0.1:9 cannot be reached" in message
    assert message.endswith("name a local .txt, .jsonl, .json, .parquet or .npy file instead")


def test_offline_mode_is_named_as_the_reason(tmp_path, tokenizer):
    assert "(HF_HUB_OFFLINE is set)" in in_fresh_process("owner/name", tokenizer, tmp_path, HF_HUB_OFFLINE="1")


def test_a_tokenizer_of_a_hub_out_of_reach(tmp_path):
    (tmp_path / "a.txt").write_text(JOINED)
    message = in_fresh_process("a.txt", "owner/model", tmp_path)
    assert message.startswith("the tokenizer owner/model is not on this machine and the hub")


def test_local_files_need_no_hub(tmp_path, tokenizer):
    write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    tokens, _ = in_fresh_process("a.parquet", tokenizer, tmp_path)
    assert tokens == read(WORDS).tokens.tolist()
    assert {path.name for path in tmp_path.iterdir()} <= {"a.parquet", "cache"}, "no clutter in the working folder"


@pytest.mark.parametrize(
    ("name", "role"),
    [("c4", "calibration"), ("c4", "evaluation"), ("wikitext2", "calibration"), ("wikitext2", "evaluation")],
)
def test_a_file_in_the_hub_cache_is_read_without_the_hub(name, role, tmp_path, tokenizer):
    named = NAMED[name]
    split, file = named.files[role]
    repo = f"datasets--{named.repo.replace('/', '--')}"
    path = tmp_path / "cache" / "hub" / repo / "snapshots" / named.revision / file
    path.parent.mkdir(parents=True)
    if file.endswith(".parquet"):
        write_parquet(path, {"text": TEXTS})
    else:
        path.write_bytes(gzip.compress(json_lines(TEXTS)))
    tokens, description = in_fresh_process(name, tokenizer, tmp_path, role)
    begun = [VOCABULARY - 1, *WORDS] if role == "evaluation" else WORDS  # as papers evaluate: a beginning token, once
    assert tokens == read(np.array(begun), role=role).tokens.tolist()
    assert description.startswith(f"{name} ({split} split): 7 of 30 windows")


def test_a_local_copy_of_a_named_set_that_is_not_there(tmp_path, tokenizer):
    assert "no.parquet is not there: check the path" in refused(f"wikitext2:{tmp_path / 'no.parquet'}", tokenizer)


@pytest.mark.parametrize("data", ["owner/name:default", "wikitext2"])
def test_what_the_datasets_library_has_cached_is_read_without_the_hub(data, tmp_path, tokenizer):
    from datasets.packaged_modules.json.json import Json

    repo, config = ("Salesforce/wikitext", "wikitext-2-raw-v1") if data == "wikitext2" else ("owner/name", "default")
    (tmp_path / "source.jsonl").write_bytes(json_lines(TEXTS))
    builder = Json(
        cache_dir=str(tmp_path / "builder"),
        dataset_name=repo.split("/")[1],
        config_name=config,
        hash="1",
        data_files={"train": [str(tmp_path / "source.jsonl")]},
    )
    target = tmp_path / "cache" / "datasets" / repo.replace("/", "___") / config / "0.0.0" / "1"
    builder.download_and_prepare(str(target))
    tokens, description = in_fresh_process(data, tokenizer, tmp_path)
    assert tokens == read(WORDS).tokens.tolist()
    assert description.startswith(f"{data} (train split): 7 of 30 windows")
    if data != "wikitext2":
        message = in_fresh_process(data, tokenizer, tmp_path, "evaluation")
        assert "has no split test or validation for evaluation, but train" in message


HUB_FILES = {
    "train.jsonl": json_lines(TEXTS),
    NAMED["c4"].files["calibration"][1]: gzip.compress(json_lines(TEXTS)),
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that reading a data set needs; every data set holds the same files."""

    commit = NAMED["c4"].revision

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        file = path.partition("/resolve/")[2].partition("/")[2]
        listing = [{"type": "file", "path": "train.jsonl", "size": len(HUB_FILES["train.jsonl"]), "oid": "0" * 40}]
        about = {"id": "owner/name", "sha": self.commit, "private": False, "tags": [], "downloads": 0, "siblings": []}
        if file in HUB_FILES:
            self.answer(200, HUB_FILES[file], {"ETag": f'"{hashlib.md5(HUB_FILES[file]).hexdigest()}"'})
        elif file:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(200, json.dumps(listing if "/tree/" in path else about).encode(), {})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": self.commit} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_short_name_is_downloaded_once(endpoint, tmp_path, tokenizer):
    for place in (endpoint, "http://127.0.0.1:9"):
        tokens, description = in_fresh_process("c4", tokenizer, tmp_path, HF_ENDPOINT=place)
        assert tokens == read(WORDS).tokens.tolist()
        assert description.startswith("c4 (train split): 7 of 30 windows")


def test_a_data_set_of_the_hub_is_streamed(endpoint, tmp_path, tokenizer):
    tokens, description = in_fresh_process("owner/name", tokenizer, tmp_path, HF_ENDPOINT=endpoint)
    assert tokens == read(WORDS).tokens.tolist()
    assert description.startswith("owner/name (train split): 7 of 30 windows")
    message = in_fresh_process("owner/name:no", tokenizer, tmp_path, HF_ENDPOINT=endpoint)
    assert message.startswith("the hub data set owner/name cannot be read (BuilderConfig 'no' not found")
