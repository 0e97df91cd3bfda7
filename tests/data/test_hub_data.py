"""Data sets on the hub and in its caches."""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import JOINED, TEXTS, VOCABULARY, WORDS, json_lines, read, refused, write_parquet
from servers import Handler, running

from spap_jax.data.sources import NAMED, Role
from spap_jax.data.tokens import load_tokens
from spap_jax.errors import UserError
from spap_jax.storage import files

FIT: Role = "calibration"
JUDGE: Role = "evaluation"
Ask = Callable[..., None]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _no_retries(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    said = [record.getMessage() for record in caplog.get_records("call")]
    assert not any("Retry" in each for each in said), "the slow retries of the hub's client were entered"


def results(*requests: tuple[str, Path | str, Any]) -> list[Any]:
    """Return what `load_tokens` makes of data, tokenizers and roles: tokens and a description, or an error's words."""
    found: list[Any] = []
    for data, tokenizer, role in requests:
        try:
            blocks = load_tokens(data, tokenizer=tokenizer, sequence_length=10, sequences=7, role=role)
            found.append((blocks.tokens.tolist(), blocks.description))
        except UserError as error:
            found.append(str(error))
    return found


def test_a_hub_out_of_reach_is_said_at_once_and_local_files_need_none(ask_hub: Ask, tmp_path, tokenizer, monkeypatch):
    ask_hub(NOWHERE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(JOINED)
    write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    *messages, no_tokenizer, (tokens, _) = results(
        ("wikitext2", tokenizer, FIT),
        ("owner/name:config", tokenizer, FIT),
        ("a.txt", "owner/model", FIT),
        ("a.parquet", tokenizer, FIT),
    )
    for message in messages:
        assert f"is not on this machine and the hub {NOWHERE} cannot be reached" in message
        assert message.endswith("name a local .txt, .jsonl, .json, .parquet or .npy file instead")
    assert no_tokenizer.startswith("the tokenizer owner/model is not on this machine and the hub")
    assert tokens == read(WORDS).tokens.tolist()
    here = {path.name for path in tmp_path.iterdir()}
    assert here <= {"a.txt", "a.parquet", "hub"}, "no clutter in the working folder"


def test_offline_mode_is_named_as_the_reason():
    """These processes are in it; see ``environment.py``."""
    with pytest.raises(UserError, match=r"\(HF_HUB_OFFLINE is set\)"):
        files.require_hub("it", "go on")


def test_files_in_the_hub_cache_are_read_without_the_hub(ask_hub: Ask, tmp_path, tokenizer):
    ask_hub(NOWHERE)
    roles: tuple[Role, ...] = (FIT, JUDGE)
    cases: list[tuple[str, Role]] = [(name, role) for name in ("c4", "wikitext2") for role in roles]
    for name, role in cases:
        named, (_, file) = NAMED[name], NAMED[name].files[role]
        repo = f"datasets--{named.repo.replace('/', '--')}"
        path = tmp_path / "hub" / "hub" / repo / "snapshots" / named.revision / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".parquet"):
            write_parquet(path, {"text": TEXTS})
        else:
            path.write_bytes(gzip.compress(json_lines(TEXTS)))
    found = results(*((name, tokenizer, role) for name, role in cases))
    for (name, role), (tokens, description) in zip(cases, found, strict=True):
        begun = [VOCABULARY - 1, *WORDS] if role == JUDGE else WORDS  # evaluation as in papers: one beginning token
        assert tokens == read(np.array(begun), role=role).tokens.tolist()
        assert description.startswith(f"{name} ({NAMED[name].files[role][0]} split): 7 of 30 windows")


def test_a_local_copy_of_a_named_set_that_is_not_there(tmp_path, tokenizer):
    assert "no.parquet is not there: check the path" in refused(f"wikitext2:{tmp_path / 'no.parquet'}", tokenizer)


def test_what_the_datasets_library_has_cached_is_read_without_the_hub(ask_hub: Ask, tmp_path, tokenizer):
    from datasets.packaged_modules.json.json import Json

    (tmp_path / "source.jsonl").write_bytes(json_lines(TEXTS))
    parts = (("owner/name", "default"), ("owner/parts", "one"))
    for repo, config in parts:
        builder = Json(
            cache_dir=str(tmp_path / "builder"),
            dataset_name=repo.split("/")[1],
            config_name=config,
            hash="1",
            data_files={"train": [str(tmp_path / "source.jsonl")]},
        )
        target = tmp_path / "hub" / "datasets" / repo.replace("/", "___") / config / "0.0.0" / "1"
        builder.download_and_prepare(str(target))
    ask_hub(NOWHERE)
    fitted = ("owner/name:default", "owner/name", "owner/parts:one")
    open_ones = ("owner/name:default", tokenizer, JUDGE), ("owner/parts", tokenizer, FIT)
    *found, message, unnamed = results(*((data, tokenizer, FIT) for data in fitted), *open_ones)
    for data, (tokens, description) in zip(fitted, found, strict=True):
        assert tokens == read(WORDS).tokens.tolist()
        assert description.startswith(f"{data} (train split): 7 of 30 windows")
    assert "has no split test or validation or test_sft for evaluation, but train" in message
    assert "owner/parts is not on this machine" in unnamed


HUB_FILES = {
    "train.jsonl": json_lines(TEXTS),
    NAMED["c4"].files["calibration"][1]: gzip.compress(json_lines(TEXTS)),
}


class Hub(Handler):
    """The few responses of the hub that reading a data set needs; every data set contains the same files."""

    commit = NAMED["c4"].revision

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        file = path.partition("/resolve/")[2].partition("/")[2]
        listing = [{"type": "file", "path": "train.jsonl", "size": len(HUB_FILES["train.jsonl"]), "oid": "0" * 40}]
        about = {"id": "owner/name", "sha": self.commit, "private": False, "tags": [], "downloads": 0, "siblings": []}
        if file in HUB_FILES:
            etag = f'"{hashlib.md5(HUB_FILES[file]).hexdigest()}"'
            self.answer(200, HUB_FILES[file], {"ETag": etag, "X-Repo-Commit": self.commit})
        elif file:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(200, json.dumps(listing if "/tree/" in path else about).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})


def test_a_data_set_of_the_hub_is_streamed_and_a_short_name_is_downloaded_once(ask_hub: Ask, tokenizer):
    short = ("c4", tokenizer, FIT)
    with running(Hub) as endpoint:
        ask_hub(endpoint)
        *found, message = results(short, ("owner/name", tokenizer, FIT), ("owner/name:no", tokenizer, FIT))
    ask_hub(NOWHERE)
    found += results(short)
    for name, (tokens, description) in zip(("c4", "owner/name", "c4"), found, strict=True):
        assert tokens == read(WORDS).tokens.tolist()
        assert description.startswith(f"{name} (train split): 7 of 30 windows")
    assert message.startswith("the hub data set owner/name cannot be read (BuilderConfig 'no' not found")


def test_a_data_set_of_several_parts_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = ["configs:", *(f"- {{config_name: {name}, data_files: {name}.jsonl}}" for name in ("all", "few"))]
    (tmp_path / "README.md").write_text("\n".join(["---", *parts, "---", ""]))
    for name in ("all", "few"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(files, "require_hub", lambda *_: None)
    with pytest.raises(
        UserError, match=rf"^the hub data set {tmp_path} has the parts all, few: name one, as in .*:PART\.$"
    ):
        files.hub_splits(str(tmp_path), None, remedy="")
