"""Weights at an address: only the wanted bytes are asked for, and nothing of them is stored on this machine."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import stores
from tiny_checkpoints import same, same_arrays, write

from spap_jax.checkpoint import Reader, load, locate
from spap_jax.checkpoint.fingerprint import fingerprint
from spap_jax.checkpoint.side_files import SOURCE
from spap_jax.errors import UserError
from spap_jax.parallel import mesh
from spap_jax.parallel.placement import shard_params
from spap_jax.storage.files import Folder

ADDRESS = "frail://bucket/in"


@pytest.fixture
def store(store: type[stores.Frail], tmp_path: Path) -> type[stores.Frail]:
    """A store with a tiny model in several files, which is also in the test's folder."""
    folder = write("llama_two_kv_heads", tmp_path / "in", "bfloat16", shard="20KB")
    assert len([*folder.glob("*.safetensors")]) > 2
    stores.upload(folder, ADDRESS)
    return store


def headers() -> dict[str, bytes]:
    """The header of each weight file in the store, without the 8 bytes of its length."""
    contents = {path: file.getvalue() for path, file in stores.Frail.store.items() if path.endswith(".safetensors")}
    return {path: content[8 : 8 + int.from_bytes(content[:8], "little")] for path, content in contents.items()}


def file_of(name: str) -> str:
    """The weight file in the store that holds a tensor."""
    [path] = [path for path, header in headers().items() if name in json.loads(header)]
    return path


def test_the_same_model_and_no_copy_of_it(store: type[stores.Frail], tmp_path: Path):
    model = load(ADDRESS)
    assert same(model, load(tmp_path / "in"))
    cached = locate(ADDRESS)
    assert model.source.folder == cached
    assert sorted(file.name for file in cached.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    assert not [path for what, path in store.done if what == "get" and path.endswith(".safetensors")]


def test_headers_take_two_requests_each(store: type[stores.Frail]):
    reader = Reader(locate(ADDRESS))
    ends = {path: 8 + len(header) for path, header in headers().items()}
    expected = [(path, 0, 8) for path in ends] + [(path, 8, end) for path, end in ends.items()]
    assert sorted(store.asked) == sorted(expected)
    assert reader.at_address


def test_a_process_asks_for_its_bytes_once(store: type[stores.Frail]):
    reader = Reader(locate(ADDRESS))
    store.asked.clear()
    with mesh.use_mesh(4, 2):
        placed = shard_params(reader.config, reader.layer(0))
    assert sum(stop - start for _, start, stop in store.asked) == sum(a.nbytes for a in jax.tree.leaves(placed))


def test_long_tensors_are_read_in_pieces(store: type[stores.Frail], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spap_jax.checkpoint.ranged._PIECE", 1000)
    assert same(load(ADDRESS), load(tmp_path / "in"))
    assert max(stop - start for _, start, stop in store.asked if start > 8) == 1000


def test_a_store_that_fails_while_weights_are_read(store: type[stores.Frail], tmp_path: Path):
    reader = Reader(locate(ADDRESS))
    store.failures = 2
    assert same_arrays(reader.layer(0), Reader(tmp_path / "in").layer(0))
    store.broken = "range"
    with pytest.raises(UserError) as raised:
        np.asarray(reader.layer(0)["attention"]["q"])
    assert str(raised.value).startswith("frail://bucket/in/model-0000")
    assert str(raised.value).endswith(
        "cannot be read (the store is on fire): check the address, the login and the network."
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is missing"),
        (b"version https://git-lfs.github.com/spec/v1", "is no safetensors file"),
        (b"\x08" + 7 * b"\0" + b'{"a":[]}', "is no safetensors file"),
        (
            b"\x3a" + 7 * b"\0" + b'{"a": {"dtype": "F32", "shape": [2],"data_offsets":[0,8]}}1234567',
            "is no safetensors file (it ends before a)",
        ),
    ],
)
def test_damaged_files(content: bytes, said: str, store: type[stores.Frail]):
    name = file_of("model.norm.weight").rpartition("/")[2]
    Folder(ADDRESS).write(name, content) if content else Folder(ADDRESS).remove([name])
    with pytest.raises(UserError) as raised:
        load(ADDRESS)
    assert str(raised.value).startswith(f"{ADDRESS}/{name} {said}")


def test_a_note_that_a_store_offers_is_not_followed(store: type[stores.Frail], tmp_path: Path):
    """Of an Orbax folder all files are downloaded: none of them may send the reader to another address."""
    note = json.dumps({"address": ADDRESS, "files": Folder(ADDRESS).files()}, default=str)
    planted = Folder("frail://bucket/planted")
    for name in ("spap_weights.json", "note", "files/note"):
        planted.write(name, note.encode())
    planted.write("config.json", (tmp_path / "in" / "config.json").read_bytes())
    planted.write(SOURCE, b"{}")
    store.asked.clear()
    with pytest.raises(UserError, match="holds no weights"):
        load(planted.address)
    assert not store.asked


def test_another_class_of_storage_is_no_other_model(store: type[stores.Frail], monkeypatch: pytest.MonkeyPatch):
    """Google's stores move what is read, or has not been for long, to another class, and say so in several fields."""
    ls: Any = store.ls
    told = {"generation": "1", "storageClass": "NEARLINE", "metageneration": "1"}

    monkeypatch.setattr(store, "ls", lambda *words, **how: [about | told for about in ls(*words, **how)])
    reader, first = Reader(locate(ADDRESS)), fingerprint(locate(ADDRESS))
    told |= {"storageClass": "STANDARD", "metageneration": "2"}
    reader.check_unchanged()
    assert fingerprint(locate(ADDRESS)) == first
    told["generation"] = "2"
    with pytest.raises(UserError, match="was replaced or removed while it was read"):
        reader.check_unchanged()


def test_weights_that_are_replaced_while_they_are_read_are_noticed(store: type[stores.Frail]):
    reader, first = Reader(locate(ADDRESS)), fingerprint(locate(ADDRESS))
    reader.check_unchanged()
    assert fingerprint(locate(ADDRESS)) == first
    path = file_of("model.norm.weight")
    name = path.rpartition("/")[2]
    Folder(ADDRESS).write(name, store.store[path].getvalue())  # the same bytes, at another time
    with pytest.raises(UserError, match=rf"in/{name} was replaced or removed while it was read"):
        reader.check_unchanged()
    assert fingerprint(locate(ADDRESS)) != first
