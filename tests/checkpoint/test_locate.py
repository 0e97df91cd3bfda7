"""A user's name for a model resolves to a folder, or to an error message."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from servers import Handler, running
from tiny_checkpoints import write, write_bin

from spap_jax.checkpoint import fetch_side_files, load, locate, locate_config
from spap_jax.checkpoint.side_files import SOURCE
from spap_jax.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets an empty folder as the hub's cache and another as the working directory."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def snapshot(cache: Path, repo: str) -> Path:
    """Creates the folder of a snapshot in the hub's cache."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return root / "snapshots" / COMMIT


def test_folders(cache: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write("llama", cache.parent / "here" / "models" / "a")
    monkeypatch.setenv("HOME", str(cache.parent / "here"))
    for name in (folder, str(folder), "models/a", "./models/a/", "~/models/a", Path("models/a")):
        assert locate(name) == folder
    assert load("models/a").source.name == "models/a"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("~nobody-of-this-name/no", "there is no folder ~nobody-of-this-name/no"),
        ("a/b/c", "there is no folder a/b/c"),
        ("llama", "there is no folder llama"),
        (Path("owner/name"), "there is no folder owner/name"),
        ("models/b", "there is no folder models/b"),
        ("models", "models is no checkpoint: it has no config.json"),
        ("models/a/config.json", "models/a/config.json is a file: name the folder"),
        ("", "has no config.json"),
        ("owner/name", "the model owner/name is not on this machine and the hub .* local folder"),
    ],
)
def test_what_cannot_be_located(name: str | Path, sentence: str, cache: Path):
    write("llama", cache.parent / "here" / "models" / "a")
    with pytest.raises(UserError, match=sentence):
        locate(name)


@pytest.mark.parametrize("name", ["meta-llama/Llama--3.2-1B", "hf://owner/name/sub", "hf://"])
def test_what_no_repository_can_be_called(name: str, cache: Path):
    for find in (locate, locate_config):
        with pytest.raises(UserError, match="names no repository"):
            find(name)


def test_a_model_without_an_owner(cache: Path):
    folder = write("llama", snapshot(cache, "gpt2"))
    assert locate("hf://gpt2") == folder
    assert locate_config("hf://gpt2") == folder / "config.json"


@pytest.mark.parametrize("shard", ["1GB", "12KB"])
def test_a_cached_snapshot_needs_no_network(shard: str, cache: Path):
    folder = write("llama", snapshot(cache, "owner/name"), shard=shard)
    assert locate("owner/name") == folder
    (folder / "tokenizer.json").unlink()
    assert locate("owner/name") == folder
    max(folder.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="the model owner/name is not on this machine"):
        locate("owner/name")


def test_a_cached_orbax_folder_needs_no_network(cache: Path):
    folder = snapshot(cache, "owner/name")
    (folder / "params").mkdir(parents=True)
    for name in ("config.json", SOURCE, "params/_METADATA"):
        (folder / name).write_text("{}")
    assert locate("owner/name") == folder


class Hub(Handler):
    """The parts of the hub that a download needs, with one public model and one gated model."""

    protocol_version = "HTTP/1.1"
    root: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/":
            self.answer(200)
        elif "gated/model" in self.path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "owner/name" not in self.path:
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif "/resolve/" in self.path:
            content = (self.root / self.path.rsplit(f"{COMMIT}/", 1)[1]).read_bytes()
            self.answer(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        else:
            files = [{"type": "file", "rfilename": name, "path": name, "oid": "0", "size": 1} for name in self.names()]
            info = {"id": "owner/name", "modelId": "owner/name", "sha": COMMIT, "siblings": files}
            self.answer(200, json.dumps(files if "/tree/" in self.path else info).encode())

    def names(self) -> list[str]:
        return [str(file.relative_to(self.root)) for file in sorted(self.root.rglob("*")) if file.is_file()]


@pytest.fixture
def hub(ask_hub: Callable[..., None], tmp_path: Path) -> Iterator[None]:
    Hub.root, Hub.asked = tmp_path / "served", []
    with running(Hub) as endpoint:
        ask_hub(endpoint)
        yield


def test_a_download_takes_what_is_needed_and_no_more(hub: None, tmp_path: Path):
    served = write("llama", tmp_path / "served", shard="12KB")
    write_bin("llama", tmp_path / "other")
    shard, index = min(served.glob("model-*")), served / "model.safetensors.index.json"
    other = shard.rename(served / shard.name.replace("model-", "model.safetensors-"))  # as some are published
    index.write_text(index.read_text().replace(shard.name, other.name))
    for name in ("pytorch_model.bin", "README.md", "original/tokenizer.model", "model.fp16-00001-of-00001.safetensors"):
        (served / name).parent.mkdir(exist_ok=True)
        (served / name).write_bytes(b"x")
    (served / "LICENSE").write_text("free")
    found = locate("owner/name")
    asked = len(Hub.asked)
    assert locate("owner/name") == found
    assert len(Hub.asked) == asked  # cached files are not requested again
    for name, problem in (("gated/model", "gated"), ("no/such", "no model no/such")):
        with pytest.raises(UserError, match=problem) as raised:
            locate(name)
        assert "hf_secret" not in str(raised.value)
    needed = {"config.json", "generation_config.json", "tokenizer.json", "LICENSE", "model.safetensors.index.json"}
    needed |= {"README.md", other.name, *(file.name for file in served.glob("model-*.safetensors"))}
    assert {file.name for file in found.iterdir()} == needed
    assert all((found / name).read_bytes() == (served / name).read_bytes() for name in needed)
    assert load(found).config.layers == 3


def test_what_others_left_out_of_the_cache_is_added(hub: None, tmp_path: Path):
    served, beside = write("llama", tmp_path / "served"), ("LICENSE", "README.md", "spap_report.json")
    for name in beside:
        (served / name).write_text(name)
    found = locate("owner/name")
    for name in beside:
        (found / name).unlink()
    assert locate("owner/name") == found
    assert not (found / "LICENSE").exists()
    fetch_side_files("owner/name")
    assert [(found / name).read_text() for name in beside] == [*beside]


def test_nothing_is_added_to_a_cached_model_without_a_network(cache: Path, tmp_path: Path):
    folder = write("llama", snapshot(cache, "owner/name"))
    there = sorted(folder.iterdir())
    for name in ("owner/name", "hf://owner/name", tmp_path, "gs://bucket/model"):
        (tmp_path / "config.json").touch()
        fetch_side_files(name)
    assert sorted(folder.iterdir()) == there


def test_a_download_of_torch_files(hub: None, tmp_path: Path):
    write_bin("llama", tmp_path / "served")
    found = locate("owner/name")
    assert (found / "pytorch_model.bin").is_file()
    (found / "tokenizer.json").unlink()
    assert locate("owner/name") == found
    assert (found / "tokenizer.json").is_file()


def test_a_download_of_an_orbax_folder(hub: None, tmp_path: Path):
    names = ["README.md", "config.json", "params/_METADATA", "params/d/0", "spap_source.json", "tokenizer.json"]
    for name in names:
        (tmp_path / "served" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "served" / name).write_bytes(b"{}")
    found = locate("owner/name")
    assert [str(file.relative_to(found)) for file in sorted(found.rglob("*")) if file.is_file()] == names


def test_no_network_is_said_at_once(ask_hub: Callable[..., None]):
    ask_hub("http://127.0.0.1:9")
    with pytest.raises(UserError, match="owner/name is not on this machine"):
        locate("owner/name")
