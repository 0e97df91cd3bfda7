"""At a remote address, too, a checkpoint is complete or absent, and is read as if it were local."""

import json
from pathlib import Path

import pytest
import stores
from tiny_checkpoints import same, write

from spap_jax.checkpoint import check_output, load, locate_config, save, save_orbax
from spap_jax.checkpoint.output import new_folder
from spap_jax.errors import UserError
from spap_jax.models.model import Model
from spap_jax.storage.files import Folder

OUT = "frail://bucket/runs/out"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write("llama", tmp_path_factory.mktemp("source") / "in"))


def there() -> dict[str, bytes]:
    return stores.contents("/bucket/runs/out")


def put(*names: str) -> None:
    for name in names:
        Folder(OUT).write(name, b"old")


def test_it_arrives_as_it_would_be_here_with_the_config_last(store: type[stores.Frail], model: Model, tmp_path: Path):
    save(model, tmp_path / "out")
    save(model, OUT, files={"spap_report.json": "{}"})
    here = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert there().keys() == here.keys() | {"spap_report.json"}
    assert all(there()[name] == content for name, content in here.items() if name != "spap_files.json")
    sent = [path.removeprefix("/bucket/runs/out/") for what, path in store.done if path.startswith("/bucket/runs/out/")]
    assert sent[0] == "spap_files.json"
    assert sent[-1] == "config.json"
    assert json.loads(there()["spap_files.json"]) == {
        name: len(content) for name, content in there().items() if name != "spap_files.json"
    }
    assert {name.split("/")[3] for name in store.store} == {"out"}
    assert same(load(OUT), model)
    assert load(OUT).source.name == OUT
    got = [path for what, path in store.done if what == "get"]
    assert len(got) == len(set(got))
    assert locate_config(OUT).read_bytes() == here["config.json"]


def test_orbax_folders(store: type[stores.Frail], model: Model):
    save_orbax(model, OUT)
    assert store.done[-1] == ("put", "/bucket/runs/out/config.json")
    assert any(name.startswith("params/") for name in there())
    assert same(load(OUT), model)


def test_what_is_replaced_is_no_checkpoint_meanwhile(store: type[stores.Frail], model: Model):
    save(model, OUT, files={"card.md": "one"})
    store.done.clear()
    with pytest.raises(UserError, match="exists"):
        save(model, OUT)
    assert [each for each in store.done if "/out/" in each[1]] == []
    save(model, OUT, overwrite=True)
    done = [(what, path.removeprefix("/bucket/runs/out/")) for what, path in store.done if "/out/" in path]
    assert done[0] == ("rm", "config.json")
    assert ("rm", "card.md") in done[: done.index(("put", "spap_files.json"))]
    assert done[-1] == ("copy", "config.json")
    assert "card.md" not in there()


@pytest.mark.parametrize("name", ["model.safetensors", "sub/letter.txt"])
def test_what_was_not_sent_is_never_replaced(name: str, store: type[stores.Frail], model: Model):
    """Neither added files nor changed files of ours are replaced, whether found in the check or at the upload."""
    save(model, OUT)
    put(name)
    before = there()
    with pytest.raises(UserError, match=name):
        save(model, OUT, overwrite=True)
    assert there() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_a_checkpoint_is_made_is_kept(overwrite: bool, store: type[stores.Frail]):
    def fill() -> None:
        with new_folder(OUT, overwrite, needed=0, source=None) as made:
            (made / "config.json").write_text("{}")
            put("letter.txt")

    with pytest.raises(UserError, match=r"exists|is not overwritten"):
        fill()
    assert there() == {"letter.txt": b"old"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_fails_to_arrive_can_be_made_again(
    overwrite: bool, store: type[stores.Frail], model: Model
) -> None:
    if overwrite:
        save(model, OUT)
    store.broken = "copy /bucket/runs/out/model"
    with pytest.raises(UserError, match="on fire"):
        save(model, OUT, overwrite=overwrite)
    with pytest.raises(UserError, match=r"config\.json"):
        load(OUT)
    store.broken = ""
    put("letter.txt")
    with pytest.raises(UserError, match=r"letter\.txt"):
        save(model, OUT, overwrite=True)
    Folder(OUT).remove(["letter.txt"])
    save(model, OUT, overwrite=True)  # all else is recognised as ours
    assert same(load(OUT), model)


def test_refusals_before_any_work(store: type[stores.Frail], model: Model) -> None:
    check_output(OUT, inputs={})
    assert stores.contents("/bucket") == {}
    put("letter.txt")
    with pytest.raises(UserError, match="exists"):
        check_output(OUT, inputs={})
    with pytest.raises(UserError, match=r"letter\.txt"):
        check_output(OUT, overwrite=True, inputs={})
    Folder("frail://bucket/runs").write("file", b"")
    with pytest.raises(UserError, match="is a file"):
        check_output("frail://bucket/runs/file", inputs={})
    store.broken = "put /bucket/other"
    with pytest.raises(UserError, match="login"):
        save(model, "frail://bucket/other/out")
