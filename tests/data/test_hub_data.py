"""Data sets on the hub, read in fresh processes, since the hub's libraries read the environment only once."""

import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_cases import JOINED, TEXTS, VOCABULARY, WORDS, json_lines, read, refused, write_parquet

from spap_jax import hub
from spap_jax.data import NAMED

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
    """Returns the result or error of `load_tokens`, with a separate cache and an unreachable hub."""
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
    begun = [VOCABULARY - 1, *WORDS] if role == "evaluation" else WORDS  # evaluation as in papers: one beginning token
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
    """The few responses of the hub that reading a data set needs; every data set contains the same files."""

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
