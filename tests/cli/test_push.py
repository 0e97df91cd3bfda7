"""``spap push`` against a local hub."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Said, left, sentence, spap, tiny, token_file
from fake_hub import serving

from spap_jax.cli import main

SECRET = "hf_abcdefghijklmnopqrstuvwxyz12345678"
REPO = "owner/tiny-pruned"
Command = Callable[..., Said]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client, which uploads


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("push")
    tokens = token_file(work / "tokens.npy")
    words = ["prune", tiny(work / "in"), "--data", tokens, "--output", work / "out", "--method", "magnitude"]
    assert main([str(word) for word in (*words, "--sequence-length", 64, "--sequences", 16)]) == 0
    return work / "out"


def sent(folder: Path) -> list[str]:
    """Returns the files of a folder that are uploaded: all except the manifest."""
    return [name for name in left(folder) if name != "spap_files.json"]


@pytest.fixture
def command(ask_hub: Callable[..., None], capsys, caplog) -> Command:
    """A function that runs a command with a hub."""

    def run(*words: object, endpoint: str) -> Said:
        ask_hub(endpoint, SECRET)
        said = spap(capsys, *words)
        assert SECRET not in said.out + said.err + caplog.text
        return said

    return run


def test_the_folder_arrives_in_one_commit(command: Command, pruned: Path):
    with serving() as hub:
        hub.models[REPO], hub.there = True, (".gitattributes",)  # a repository that its owner has just made
        (pruned / ".unfinished").write_text("not to be sent")
        said = command("push", pruned, REPO, "--private", endpoint=hub.endpoint)
        (pruned / ".unfinished").unlink()
    assert said.code == 0, said.err
    assert said.out == f"{hub.endpoint}/{REPO}\n"
    assert hub.tokens == {SECRET}
    assert (hub.created["organization"], hub.created["name"]) == tuple(REPO.split("/"))
    assert hub.created["visibility"] == "private"
    (files,) = hub.commits
    assert sorted(files) == sent(pruned)
    card = (files.pop("README.md") or b"").decode()
    assert all(content == (pruned / name).read_bytes() for name, content in files.items())
    written = (pruned / "README.md").read_text()
    assert card == written.replace('"PATH"', f'"{REPO}"') != written


def test_a_model_that_was_there_goes_with_the_same_commit(command: Command, pruned: Path):
    """It has no config.json: not only models of transformers are in the way."""
    old = ("adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "params/d/0",
           "pytorch_model.bin", "spap_source.json", "tokenizer.model")  # fmt: skip
    with serving() as hub:
        hub.there = (".gitattributes", *old, "model.safetensors", "notes.md", "unet/model.safetensors")
        hub.models[REPO] = False
        refused = command("push", pruned, REPO, endpoint=hub.endpoint)
        assert f"hf://{REPO} exists, with {', '.join(old[:3])}, ...: name another repository" in sentence(refused)
        refused = command("push", pruned, REPO, "--overwrite", "--private", endpoint=hub.endpoint)
        assert f"hf://{REPO} is public, and what is uploaded to it would be" in sentence(refused)
        assert not hub.commits
        hub.models[REPO] = True
        said = command("push", pruned, REPO, "--overwrite", "--private", endpoint=hub.endpoint)
    assert said.code == 0, said.err
    (files,) = hub.commits
    assert {name for name, content in files.items() if content is None} == set(old)
    assert sorted(files.keys() - set(old)) == sent(pruned)


@pytest.mark.parametrize("name", ["name", "hf://a b/c", "gs://bucket/pruned"])
def test_a_name_is_looked_at_first(name: str, capsys):
    said = sentence(spap(capsys, "push", "no", name))
    assert said.startswith(f"{name} names no repository of the hub: give ")


def test_without_a_token(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """It is said first: the hub is not asked, which here cannot be reached."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    said = sentence(spap(capsys, "push", pruned, REPO))
    assert "uploading needs a hub token, and there is none: run hf auth login" in said


def test_in_offline_mode(pruned: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    said = sentence(spap(capsys, "push", pruned, REPO))
    assert "the hub http://127.0.0.1:9 cannot be reached (HF_HUB_OFFLINE is set)" in said


def test_without_network(command: Command, pruned: Path):
    said = sentence(command("push", pruned, REPO, endpoint="http://127.0.0.1:9"))
    assert "the hub http://127.0.0.1:9 cannot be reached" in said
    assert "refused" in said


@pytest.mark.parametrize("refused", ["/api/repos/create", f"/api/models/{REPO}/commit"])
def test_a_hub_that_refuses_and_repeats_the_token(refused: str, command: Command, pruned: Path):
    with serving(refused) as hub:
        said = command("push", pruned, REPO, endpoint=hub.endpoint)
    assert hub.tokens == {SECRET}
    assert said.code == 2
    assert f"{REPO} could not be uploaded (" in said.err.splitlines()[-1]  # bars of the hub's client are before it
    assert not hub.commits


def test_what_is_not_sent(pruned: Path, tmp_path: Path, capsys):
    for place in (pruned.parent / "in", tmp_path, tmp_path / "no"):
        assert "model card" in sentence(spap(capsys, "push", place, REPO))
    (shutil.copytree(pruned, tmp_path / "cut") / "model.safetensors").unlink()
    assert "model.safetensors" in sentence(spap(capsys, "push", tmp_path / "cut", REPO))


def test_an_output_is_no_repository_of_the_hub(pruned: Path, capsys):
    """It would be public: what is uploaded is said by a command of its own."""
    said = sentence(spap(capsys, "convert", pruned, "--to", "orbax", "--output", f"hf://{REPO}"))
    assert "spap push" in said
