"""Commands whose models, data and outputs are at remote addresses."""

import json
import shutil
from pathlib import Path

import pytest
import stores
from commands import SAVING, left, process, sentence, spap, succeed, tiny, token_file
from test_interrupted import words as pruning

from spap_jax.storage.files import Folder

QUICK = ("--sequences", "16", "--sequence-length", "64", "--method", "magnitude")


@pytest.fixture
def store(store: type[stores.Frail], tmp_path: Path) -> type[stores.Frail]:
    """A store with a tiny model and tokens, which are also in the test's folder."""
    stores.upload(tiny(tmp_path / "in"), "frail://bucket/in")
    Folder("frail://bucket").put("ids.npy", token_file(tmp_path / "ids.npy"))
    return store


def test_a_password_is_not_shown(store: type[stores.Frail], tmp_path: Path, capsys):
    place = "frail://me:secret@bucket"
    stores.upload(tmp_path / "in", f"{place}/in")
    said = spap(capsys, "convert", f"{place}/in", "--to", "orbax", "--output", f"{place}/to")
    assert said.err.splitlines()[-1] == "wrote frail://bucket/to"
    assert "secret" not in said.out + said.err


def test_from_address_to_address(store: type[stores.Frail], tmp_path: Path, capsys):
    there = ("frail://bucket/in", "--data", "frail://bucket/ids.npy", "--output", "frail://bucket/out")
    said = succeed(capsys, "prune", *there, *QUICK, "--sparsity", "0.3,0.5")
    assert said.err.splitlines()[-1] == "wrote frail://bucket/out/sparsity-0.5"
    assert not [path for what, path in store.done if what == "get" and path.endswith(".safetensors")]
    spap(capsys, "prune", tmp_path / "in", "--data", tmp_path / "ids.npy", "--output", tmp_path / "out", *QUICK)
    found = stores.contents("/bucket/out/sparsity-0.3")
    assert sorted(found) == left(tmp_path / "out")
    assert found["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert json.loads(found["spap_report.json"])["model"]["name"] == "in"
    assert not [name for name in stores.contents("/bucket") if ".resume" in name]
    assert not [*(tmp_path / "cache" / "outputs").rglob("*.safetensors")]

    words = ("frail://bucket/out/sparsity-0.3", "--data", "frail://bucket/ids.npy", "--sequence-length", "16")
    assert spap(capsys, "eval", *words).out.startswith("perplexity ")
    steps = ("--sequences", "12", "--steps", "2", "--check-every", "1", "--step-sequences", "4")
    succeed(capsys, "finetune", *words, "--output", "frail://bucket/trained", *steps)
    assert {"spap_finetune.json", "spap_report.json"} < stores.contents("/bucket/trained").keys()
    assert not [name for name in stores.contents("/bucket") if ".resume" in name]

    said = spap(capsys, "prune", *there[:-1], "frail://bucket/trained", *QUICK)
    assert "frail://bucket/trained exists: name another folder" in sentence(said)


def test_a_result_that_was_sent_in_part_is_not_taken_for_a_whole_one(store: type[stores.Frail], tmp_path: Path, capsys):
    """Its report is there, and perhaps not all of its weights: the config comes last."""
    words = ("frail://bucket/in", "--data", "frail://bucket/ids.npy", "--output", "frail://bucket/out", *QUICK)
    store.broken = "copy /bucket/out/config"
    said = spap(capsys, "prune", *words)
    assert said.code == 2
    assert "on fire" in said.err
    assert "spap_report.json" in stores.contents("/bucket/out")
    shutil.rmtree(tmp_path / "cache")  # as on another machine
    store.broken = ""
    succeed(capsys, "prune", *words)
    assert "config.json" in stores.contents("/bucket/out")
    assert not [name for name in stores.contents("/bucket") if ".resume" in name]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_with_its_disk_it_goes_on_elsewhere_to_the_same_bits(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """A run continues from what was uploaded, as after the preemption of a machine."""
    tiny(tmp_path / "in")
    token_file(tmp_path / "ids.npy", sequences=160)
    place = f"file://{tmp_path}/bucket/out"

    monkeypatch.setenv("SPAP_CACHE", str(tmp_path / "cache"))
    succeed(capsys, *pruning(tmp_path, tmp_path / "whole"))
    first = process(*pruning(tmp_path, place), first=SAVING, JAX_NUM_CPU_DEVICES="1")
    assert first.stderr is not None
    assert any(line.startswith("step ") for line in first.stderr)
    first.kill()
    first.communicate()
    assert left(tmp_path / "bucket") == [".out.resume"]
    said = succeed(capsys, *pruning(tmp_path, place))
    assert f"3 of 3 layers are done, kept in {place.replace('/out', '/.out.resume')}" in said.err
    assert sum(line.endswith(" kept") for line in said.err.splitlines()) >= 3
    assert left(tmp_path / "bucket") == ["out"]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "bucket" / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
