"""End-to-end runs of the quality benchmark's command, on the bundled model and a few sequences."""

import csv
import math
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import spap_jax as spap
from benchmarks.quality import __main__ as quality
from benchmarks.quality import runs
from benchmarks.quality.cases import EXAMPLES
from benchmarks.quality.methods import QUICK

pytestmark = pytest.mark.usefixtures("optimized")
SMALL = ("--sequences", "4", "--windows", "3", "--sparsity", "0.3")


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", *words])
    quality.app(words, result_action="return_value")


def test_it_writes_everything_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = ("--output", str(tmp_path / "out"))
    words = (*SMALL, "--seed", "0", "1", "--method", "wanda", "--method", "random", *output)
    measured: list[str] = []
    real = runs.measure

    def third_fails(model, run, *rest):
        measured.append(run.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(model, run, *rest)

    monkeypatch.setattr(runs, "measure", third_fails)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # the next command is about the same model
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, *words)
    assert "Runs: 2 of 4." in (tmp_path / "out" / "README.md").read_text("utf-8")
    command(monkeypatch, *words)
    assert [name.partition(", ")[2] for name in measured] == [
        "30%, wanda, seed 0",
        "30%, random, seed 0",
        "30%, wanda, seed 1",  # interrupted
        "30%, wanda, seed 1",
        "30%, random, seed 1",
    ]
    said = capsys.readouterr()
    assert "2 of 4 runs are in" in said.err
    assert "2/2  llama-stories, 30%, random, seed 1: perplexity" in said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "llama-stories.png", "results.csv", "summary.png"
    ]  # fmt: skip
    check_rows(tmp_path / "out" / "results.csv")
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "Runs: 4 of 4." in text
    assert "--seed 0 1 --method wanda --method random --output out" in text
    command(monkeypatch, *SMALL, "--seed", "1", "--method", "magnitude", *output)  # fewer runs than are recorded
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "Runs: 5 of 6." in text
    assert all(f"\n| {method} | " in text for method in ("random", "magnitude", "wanda"))


def check_rows(path: Path) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("wanda", "0"),
        ("random", "0"),
        ("wanda", "1"),
        ("random", "1"),
    ]
    assert {(row["width"], row["calibration_tokens"], row["evaluation_tokens"]) for row in rows} == {
        ("224", "1024", "768")
    }
    assert len({row["dense"] for row in rows}) == 1
    assert len({row["perplexity"] for row in rows}) == 4
    assert float(rows[2]["rise"]) == pytest.approx(math.log(float(rows[2]["perplexity"]) / float(rows[2]["dense"])))
    perplexity, divergence = by_hand(seed=1)
    assert float(rows[2]["perplexity"]) == pytest.approx(perplexity, rel=1e-5)
    assert float(rows[2]["divergence"]) == pytest.approx(divergence, rel=1e-4)


def by_hand(seed: int) -> tuple[float, float]:
    """Compute the perplexity and divergence of wanda's row through the public API, as a notebook would."""
    model = spap.load(EXAMPLES / "llama-stories")
    common: dict[str, Any] = {"tokenizer": EXAMPLES / "llama-stories", "sequence_length": 256}
    text, judged = EXAMPLES / "stories_calibration.txt", EXAMPLES / "stories_evaluation.txt"
    calibration = spap.load_tokens(text, sequences=4, seed=seed, role="calibration", **common)
    windows = spap.load_tokens(judged, sequences=3, role="evaluation", **common)
    smaller = spap.prune(model, calibration, method="wanda", sparsity=0.3, held_out=0.0, seed=seed).model
    return spap.perplexity(smaller, windows), spap.divergence(model, smaller, windows)


def test_quick_prints_a_table_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(quality, "OUTPUT", tmp_path / "out")
    command(monkeypatch, "--quick", *SMALL, "--method", "wanda + refit", "spap, refit only")
    said = capsys.readouterr().out
    assert "of the first" in said
    assert "spap, refit only, rise over that of wanda + refit: median" in said
    assert "target <= 0.70 met in" in said
    assert "2 pruned models in" in said
    assert not list(tmp_path.iterdir())


def test_a_refusal_comes_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(spap.UserError, match="unknown method 'lora'"):
        command(monkeypatch, "--method", "wanda", "lora")
    with pytest.raises(spap.UserError, match="sparsity must be"):
        command(monkeypatch, "--sparsity", "3", "--method", "wanda")


def test_what_is_asked_where_nothing_is_said() -> None:
    every = quality.cells_asked((0.1, 0.2, 0.3), None, quick=False)
    assert {cut for cut, method in every if method == "obs"} == {0.1, 0.2, 0.3}
    assert {cut for cut, method in every if method == "obs + steps"} == {0.3}
    assert {cut for cut, method in every if method == "spap, high effort"} == {0.2, 0.3}
    named = quality.cells_asked((0.1, 0.1), ("obs + steps", "obs"), quick=False)
    assert named == ((0.1, "obs + steps"), (0.1, "obs"))
    assert [method for _, method in quality.cells_asked((0.1,), None, quick=True)] == list(QUICK)
