"""Several sparsities in one command give the same outputs as one command for each."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import QUICK, left, sentence, spap, succeed, tiny, token_file


@pytest.fixture
def words(tmp_path: Path) -> tuple[object, ...]:
    ids = token_file(tmp_path / "ids.npy")
    return ("prune", tiny(tmp_path / "in"), "--data", ids, "--eval", ids, *QUICK)


def test_each_is_as_if_it_were_made_alone(words: tuple[object, ...], tmp_path: Path, capsys):
    words = (*words, "--method", "magnitude")
    (tmp_path / "settings.toml").write_text("sparsity = [0.25, 0.5]\n")
    said = succeed(capsys, *words, "--output", tmp_path / "all", "--config", tmp_path / "settings.toml")
    assert left(tmp_path / "all") == ["sparsity-0.25", "sparsity-0.5"]
    assert said.err.count("measuring perplexity before pruning") == 1
    assert said.err.count("reading ") == 2  # the shapes for all, and the weights for the perplexity
    assert [line for line in said.err.splitlines() if line.startswith("sparsity")] == [
        "sparsity 0.25, 1 of 2 ...",
        "sparsity 0.5, 2 of 2 ...",
    ]
    assert [line for line in said.err.splitlines() if line.startswith("wrote")] == [
        f"wrote {tmp_path / 'all' / name}" for name in left(tmp_path / "all")
    ]
    for sparsity in ("0.25", "0.5"):
        alone, together = tmp_path / sparsity, tmp_path / "all" / f"sparsity-{sparsity}"
        succeed(capsys, *words, "--output", alone, "--sparsity", sparsity)
        for name in ("model.safetensors", "config.json", "README.md"):
            assert (together / name).read_bytes() == (alone / name).read_bytes()
        one, other = read_report(alone), read_report(together)
        assert other["settings"] == one["settings"]
        assert other["settings"]["sparsity"] == float(sparsity)
        assert other["extras"]["perplexity"] == one["extras"]["perplexity"]
        assert [layer["kept"] for layer in other["layers"]] == [layer["kept"] for layer in one["layers"]]


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "spap_report.json").read_text())


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        ("0.25,0.250", "both leave"),
        ("0.25,1.5", "--sparsity"),
        ("0.25,0.001", "nothing to remove"),
    ],
)
def test_all_are_looked_at_before_any_is_made(
    sparsity: str, expected: str, words: tuple[object, ...], tmp_path: Path, capsys
):
    assert expected in sentence(spap(capsys, *words, "--output", tmp_path / "out", "--sparsity", sparsity))
    assert left(tmp_path) == ["ids.npy", "in"]
