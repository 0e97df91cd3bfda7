"""``spap push`` against a hub on this machine."""

from pathlib import Path

import pytest
from commands import Said, left, process, sentence, tiny, token_file
from fake_hub import serving

from spap_jax.cli import main

SECRET = "hf_abcdefghijklmnopqrstuvwxyz12345678"
REPO = "owner/tiny-pruned"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("push")
    tokens = token_file(work / "tokens.npy")
    words = ["prune", tiny(work / "in"), "--calibration", tokens, "--output", work / "out", "--method", "magnitude"]
    assert main([str(word) for word in (*words, "--sequence-length", 64, "--sequences", 16)]) == 0
    return work / "out"


def push(folder: Path, *words: str, endpoint: str, token: str | None = SECRET, **more: str) -> Said:
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder.parent / "hub"), "HF_TOKEN": token or ""}
    hub |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = process("push", folder, *words, **(hub | more))
    out, err = run.communicate(timeout=120)
    assert SECRET not in out + err
    return Said(run.returncode, out, err)


def test_the_folder_arrives_in_one_commit(pruned: Path):
    with serving() as hub:
        (pruned / ".unfinished").write_text("not to be sent")
        said = push(pruned, REPO, "--private", endpoint=hub.endpoint)
        (pruned / ".unfinished").unlink()
    assert said.code == 0, said.err
    assert said.out == f"{hub.endpoint}/{REPO}\n"
    assert hub.tokens == {SECRET}
    assert (hub.created["organization"], hub.created["name"]) == tuple(REPO.split("/"))
    assert hub.created["visibility"] == "private"
    (files,) = hub.commits
    assert sorted(files) == left(pruned)
    card = files.pop("README.md").decode()
    assert all(content == (pruned / name).read_bytes() for name, content in files.items())
    written = (pruned / "README.md").read_text()
    assert card == written.replace('"PATH"', f'"{REPO}"') != written


def test_without_a_token(pruned: Path):
    with serving() as hub:
        said = push(pruned, REPO, endpoint=hub.endpoint, token=None)
    assert "uploading needs a hub token, and there is none: run hf auth login" in sentence(said)
    assert not hub.tokens


@pytest.mark.parametrize(("offline", "reason"), [("1", "HF_HUB_OFFLINE is set"), ("0", "refused")])
def test_without_network(offline: str, reason: str, pruned: Path):
    said = push(pruned, REPO, endpoint="http://127.0.0.1:9", HF_HUB_OFFLINE=offline)
    assert "the hub http://127.0.0.1:9 cannot be reached" in sentence(said)
    assert reason in sentence(said)


@pytest.mark.parametrize("refused", ["/api/repos/create", f"/api/models/{REPO}/commit"])
def test_a_hub_that_refuses_and_repeats_the_token(refused: str, pruned: Path):
    with serving(refused) as hub:
        said = push(pruned, REPO, endpoint=hub.endpoint)
    assert hub.tokens == {SECRET}
    assert f"{REPO} could not be uploaded (" in sentence(said)
    assert "no file there was changed" in sentence(said)
    assert not hub.commits


def test_what_is_not_sent(pruned: Path, tmp_path: Path):
    with serving() as hub:
        said = push(pruned, "no/such/name", endpoint=hub.endpoint)
        assert "no/such/name could not be uploaded" in sentence(said)
        said = push(pruned.parent / "in", REPO, endpoint=hub.endpoint)
        assert f"{pruned.parent / 'in'} has no README.md and no spap_report.json" in sentence(said)
    assert not hub.commits
