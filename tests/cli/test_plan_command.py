"""``spap plan``: from a config alone to tables, a sentence, and a file."""

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
from commands import STORIES, left, sentence, spap, tiny

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that contains only a config.json."""
    (tmp_path / "model").mkdir()
    shutil.copy(CONFIGS / "llama-3.1-8b.json", tmp_path / "model" / "config.json")
    return tmp_path / "model"


def test_a_mesh_that_is_too_small(folder: Path, tmp_path: Path, capsys):
    said = spap(capsys, "plan", folder, "--mesh", "v5e-4", "--joint-blocks", "0", "--json", tmp_path / "plan.json")
    assert said.code == 0
    assert said.out.startswith(f"{folder}: 29.9 % of the MLP channels removed, 128 sequences of 2048 tokens\n")
    assert "\nv5e-4: it does not fit: a device needs " in said.out
    assert "It would fit with --joint-blocks 16, or with --effort low, or with " in said.out
    found = json.loads((tmp_path / "plan.json").read_text())
    [planned] = found["plans"]
    assert not planned["fits"]
    assert found["weight_bytes"] == 2
    assert planned["verdict"] in said.out
    for phase in planned["phases"]:
        assert f"\n{phase['name']} " in said.out
    assert planned["seconds"] == pytest.approx(sum(phase["seconds"] for phase in planned["phases"]))
    assert max(sum(parts.values()) for parts in planned["device_memory_bytes"].values()) > planned["usable_bytes"]
    assert "\u2026" not in said.out  # nothing is truncated


def test_settings_are_those_of_pruning(folder: Path, capsys):
    words = ("--joint-passes", "0", "--sparsity", "0.5", "--sequences", "64", "--sequence-length", "1024")
    said = spap(capsys, "plan", folder, "--mesh", "v5e-8", *words)
    assert said.out.startswith(f"{folder}: 50 % of the MLP channels removed, 64 sequences of 1024 tokens\n")
    assert "\nv5e-8: it fits: a device needs at most " in said.out
    assert "joint" not in said.out


def test_training_is_planned_too(folder: Path, tmp_path: Path, capsys):
    words = ("--mesh", "h100x8", "--finetune", "full", "--steps", "30", "--json", tmp_path / "plan.json")
    said = spap(capsys, "plan", folder, *words)
    assert said.code == 0
    assert said.out.startswith(f"{folder}: 29.9 % of the MLP channels removed, then 30 steps of spap finetune, 128 seq")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["training"]["full"], found["training"]["steps"]) == (True, 30)
    assert found["training"]["moment_dtype"] == "float32"  # spap prune's default is another one
    assert [phase["name"] for phase in found["plans"][0]["phases"]] == ["steps", "checks"]


def test_several_meshes_are_compared_where_none_is_named(folder: Path, capsys):
    said = spap(capsys, "plan", folder)
    fits = {line.split()[0]: line.split()[-3] for line in said.out.splitlines() if " x " in line}
    assert fits == {"v5e-8": "yes", "v5p-64": "yes", "h100x8": "yes"}


def test_weights_that_are_there_are_those_that_are_counted(tmp_path: Path, capsys):
    weights = tiny(tmp_path / "in") / "model.safetensors"
    (length,) = struct.unpack("<Q", weights.read_bytes()[:8])
    words = ("--mesh", "v5e-1", "--sequence-length", "64", "--json", tmp_path / "plan.json")
    assert spap(capsys, "plan", tmp_path / "in", *words).code == 0
    [planned] = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert planned["read_bytes"] == weights.stat().st_size - 8 - length


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--mesh", "k80x8"), "there is no mesh 'k80x8': name one like v5e-8 or h100x8"),
        (("--mesh", "v5e-7"), "there is no mesh 'v5e-7': TPU v5e comes as v5e-1, v5e-4, v5e-8, v5e-16, "),
        (("--sequences", "0"), "--sequences must be at least 1"),
        (("--sequence-length", "-5"), "--sequence-length and --sequences must be at least 1"),
        (("--sequence-length", "513"), "model's 512 positions"),
        (("--sparsity", "0.001"), "nothing to remove"),
        (("--allocation", "global"), "a plan is made for layers of one width"),
        (("--compile",), "--compile compiles for one mesh: name it too"),
        (("--compile", "--mesh", "h100x8"), "--compile needs the compiler for NVIDIA GPUs to compile for h100x8"),
        (("--json", "no/x.json"), "no/x.json cannot be written"),
    ],
)
def test_refusals(words: tuple[str, ...], expected: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "jax_cuda12_plugin", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "jax_cuda13_plugin", None)
    assert expected in sentence(spap(capsys, "plan", STORIES, *words))
    assert left(tmp_path) == []


def test_a_hub_id_of_which_the_config_is_cached(folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """The cache has the layout of the hub's client; it contains only the config, and there is no network."""
    repo = tmp_path / "hub" / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    shutil.copy(folder / "config.json", repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    said = spap(capsys, "plan", "owner/name", "--mesh", "h100x8")
    assert (said.code, "h100x8: it fits" in said.out) == (0, True), said.err
    said = sentence(spap(capsys, "plan", "owner/other"))
    assert said.startswith("the file config.json of the hub model owner/other is not on this machine and the hub ")
