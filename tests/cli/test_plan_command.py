"""``spap plan``: from a config alone to a table, a sentence, and a file."""

import json
import shutil
from pathlib import Path

import pytest
from commands import STORIES, left, sentence, spap, succeed

QUICK = ("--sequences", "16", "--sequence-length", "64", "--joint-passes", "0", "--rounds", "0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that contains only a config.json."""
    (tmp_path / "model").mkdir()
    shutil.copy(STORIES / "config.json", tmp_path / "model" / "config.json")
    return tmp_path / "model"


def test_a_plan_for_this_machine(folder: Path, tmp_path: Path, capsys):
    said = succeed(capsys, "plan", folder, *QUICK, "--sparsity", "0.5", "--json", tmp_path / "plan.json")
    assert said.out.startswith(f"{folder}: 50 % of the MLP channels removed, 16 sequences of 64 tokens\n")
    assert "this machine: it fits" in said.out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"]
    for name, program in found["programs"].items():
        assert f"\n{name} " in said.out
        assert 0 < program["memory"] < found["room"]
    assert left(tmp_path) == ["model", "plan.json"]


@pytest.mark.parametrize(
    ("words", "noun"),
    [
        (("--mesh", "k80x8"), "k80x8"),
        (("--mesh", "v5e-7"), "v5e-1, v5e-4, v5e-8"),
        (("--mesh", "v5p-7"), "v5p-8"),
        (("--sequences", "0"), "--sequences"),
        (("--sequence-length", "-5"), "--sequence-length"),
        (("--sequence-length", "513"), "512 positions"),
        (("--sparsity", "0.001"), "nothing to remove"),
        (("--json", "no/x.json"), "no/x.json"),
    ],
)
def test_refusals(words: tuple[str, ...], noun: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert noun in sentence(spap(capsys, "plan", STORIES, *words))
    assert left(tmp_path) == []


def test_a_hub_id_of_which_the_config_is_cached(folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """The cache has the layout of the hub's client; it contains only the config, and there is no network."""
    repo = tmp_path / "hub" / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    shutil.copy(folder / "config.json", repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    said = spap(capsys, "plan", "owner/name", *QUICK)
    assert (said.code, "it fits" in said.out) == (0, True), said.err
    assert "owner/other" in sentence(spap(capsys, "plan", "owner/other"))
