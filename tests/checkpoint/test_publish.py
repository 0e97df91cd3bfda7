"""At an address, too, a checkpoint is complete or absent, and is read as if it were here."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
import stores
from tiny_checkpoints import write

from spap_jax.checkpoint import check_output, load, locate_config, save, save_orbax
from spap_jax.checkpoint.publish import publish
from spap_jax.cli import main
from spap_jax.errors import UserError
from spap_jax.model import Model
from spap_jax.remote import Folder, working_folder

OUT = "frail://bucket/runs/out"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[stores.Frail]:
    monkeypatch.setenv("SPAP_CACHE", str(tmp_path / "cache"))
    return stores.begin()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write("llama", tmp_path_factory.mktemp("source") / "in"))


def there() -> dict[str, bytes]:
    return stores.contents("/bucket/runs/out")


def put(*names: str) -> None:
    for name in names:
        Folder(OUT).write(name, b"old")


def same(one: Model, other: Model) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one.params, other.params))


def test_it_arrives_as_it_would_be_here_with_the_config_last(store: type[stores.Frail], model: Model, tmp_path: Path):
    save(model, tmp_path / "out")
    save(model, OUT, files={"spap_report.json": "{}"})
    here = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert there() == here | {"spap_report.json": b"{}"}
    files = [path for what, path in store.done if what == "put" and "/out/" in path and not path.endswith("incomplete")]
    assert files[-1] == "/bucket/runs/out/config.json"
    assert not working_folder(OUT).exists()
    assert same(load(OUT), model)
    assert load(OUT).source.name == OUT
    got = [path for what, path in store.done if what == "get"]
    assert len(got) == len(set(got))
    assert locate_config(OUT).read_bytes() == here["config.json"]


def test_orbax_folders(store: type[stores.Frail], model: Model):
    save_orbax(model, OUT)
    assert store.done[-2:] == [("put", "/bucket/runs/out/config.json"), ("rm", "/bucket/runs/out/incomplete")]
    assert any(name.startswith("params/") for name in there())
    assert same(load(OUT), model)


def test_what_is_replaced_is_no_checkpoint_meanwhile(store: type[stores.Frail], model: Model):
    save(model, OUT)
    put("model-00002-of-00002.safetensors")
    store.done.clear()
    with pytest.raises(UserError, match=f"^{OUT} exists: name another folder, or pass --overwrite"):
        save(model, OUT)
    assert [each for each in store.done if "/out/" in each[1]] == []
    save(model, OUT, overwrite=True)
    done = [(what, path.removeprefix("/bucket/runs/out/")) for what, path in store.done if "/out/" in path]
    assert done[:3] == [("put", "incomplete"), ("rm", "config.json"), ("rm", "model-00002-of-00002.safetensors")]
    assert done[-2:] == [("put", "config.json"), ("rm", "incomplete")]
    assert "model-00002-of-00002.safetensors" not in there()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_upload_that_fails_can_go_on(overwrite: bool, store: type[stores.Frail], model: Model, capsys):
    if overwrite:
        save(model, OUT)
    store.broken = "put /bucket/runs/out/model"
    with pytest.raises(UserError) as raised:
        save(model, OUT, overwrite=overwrite)
    said = str(raised.value)
    assert said.startswith(
        f"{OUT} cannot be written (the store is on fire): check the address, the login and the network;"
    )
    assert "config.json" not in there()
    with pytest.raises(UserError, match=r"is no checkpoint: it has no config.json"):
        load(OUT)
    store.broken = ""
    told = re.search("the checkpoint is complete on this machine, and `(.*)` goes on from there", said)
    assert told
    assert same(load(working_folder(OUT)), model)
    command = shlex.split(told[1])
    assert command[0] == "spap"
    assert main(command[1:]) == 0
    assert capsys.readouterr().out == f"{OUT}\n"
    assert same(load(OUT), model)
    assert "incomplete" not in there()


def test_refusals_before_any_work(store: type[stores.Frail], tmp_path: Path):
    assert check_output(OUT) == working_folder(OUT)
    assert stores.contents("/bucket") == {}
    put("letter.txt")
    with pytest.raises(UserError, match="exists"):
        check_output(OUT)
    with pytest.raises(UserError, match=r"is not a model checkpoint .*, so it is not overwritten"):
        check_output(OUT, overwrite=True)
    Folder("frail://bucket/runs").write("file", b"")
    with pytest.raises(UserError, match="file is a file and the output is a folder"):
        check_output("frail://bucket/runs/file")
    with pytest.raises(UserError, match="names no folder in a bucket: add one, as in frail://bucket/pruned"):
        check_output("frail://bucket/")
    store.broken = "put /bucket/other"
    with pytest.raises(UserError, match=r"cannot be written .*: check the address, the login and the network"):
        check_output("frail://bucket/other/out")


def test_hidden_files_stay(store: type[stores.Frail], tmp_path: Path):
    for name in ("config.json", ".secret"):
        (tmp_path / name).write_text("{}")
    assert publish(tmp_path, OUT) == OUT
    assert there() == {"config.json": b"{}"}
