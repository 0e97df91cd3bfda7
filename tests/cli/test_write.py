"""``spap write``: a file that grows, survives any end of the command, and calibrates."""

import json
import shutil
from pathlib import Path

import pytest
from commands import CALIBRATION, QUICK, STORIES, TEMPLATE, sentence, spap, succeed

from spap_jax.evaluation import writing

WORDS = ("--sequences", 10, "--length", 31, "--batch-tokens", 200)


def interrupt(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Lets the batch of this number be interrupted."""
    generate, left = writing.generate, iter(range(batch))

    def interrupted(*args, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(writing, "generate", interrupted)


def test_what_was_written_is_kept_and_the_same_command_goes_on(tmp_path: Path, capsys, monkeypatch):
    whole, file = tmp_path / "whole.jsonl", tmp_path / "own.jsonl"
    succeed(capsys, "write", STORIES, "--output", whole, *WORDS)
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        said = spap(capsys, "write", STORIES, "--output", file, *WORDS)
    assert said.code == 130
    assert "4 of 10" in said.err
    kept = file.read_bytes()
    assert kept.count(b"\n") == 4
    file.write_bytes(kept[:-30])  # the end of a line is missing
    succeed(capsys, "write", STORIES, "--output", file, *WORDS)
    assert file.read_bytes() == whole.read_bytes()
    said = spap(capsys, "write", STORIES, "--output", file, *WORDS)
    assert "10 texts" in said.out
    assert file.read_bytes() == whole.read_bytes()


def test_a_file_of_something_else_is_refused(tmp_path: Path, capsys):
    file, foreign = tmp_path / "own.jsonl", tmp_path / "foreign.jsonl"
    words = ("write", STORIES, "--output", file, "--data", CALIBRATION, "--length", 8, "--sequences", 2)
    succeed(capsys, *words)
    before = file.read_bytes()
    assert "own.jsonl" in sentence(spap(capsys, *words, "--seed", 1))
    foreign.write_text('{"text": "mine"}')
    assert "foreign.jsonl" in sentence(spap(capsys, "write", STORIES, "--output", foreign))
    assert foreign.read_text() == '{"text": "mine"}'
    assert file.read_bytes() == before
    assert spap(capsys, "write", STORIES, "--output", tmp_path / "none.jsonl", "--batch-tokens", 0).code == 2
    assert not (tmp_path / "none.jsonl").exists()


def test_without_data_the_model_writes_its_own_once(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("SPAP_CACHE", str(tmp_path / "cache"))
    words = ("prune", STORIES, *QUICK, "--method", "magnitude", "--output")
    with monkeypatch.context() as patch:
        interrupt(patch, 0)
        assert spap(capsys, *words, tmp_path / "one").code == 130
    succeed(capsys, *words, tmp_path / "one")
    [file] = (tmp_path / "cache" / "own").iterdir()
    texts = file.read_text("utf-8").splitlines()
    assert len(texts) == 18  # a sixteenth more than 16, and one
    described = json.loads((tmp_path / "one" / "spap_report.json").read_text())["calibration"]["description"]
    assert described.startswith(f"{file.name}: 16 of ")
    interrupt(monkeypatch, 0)  # nothing is written any more
    mixture = f"own:0.5,{CALIBRATION}:0.5"
    succeed(capsys, *words, tmp_path / "two", "--data", mixture, "--sparsity", "0.2")
    described = json.loads((tmp_path / "two" / "spap_report.json").read_text())["calibration"]["description"]
    assert f"{file.name}: 8 of " in described
    assert f"{CALIBRATION.name}: 8 of " in described
    assert file.read_text("utf-8").splitlines() == texts


def test_prompts_are_answered(tmp_path: Path, capsys):
    model, prompts, file = tmp_path / "chat", tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    shutil.copytree(STORIES, model)
    (model / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about {n} dogs"}) + "\n" for n in range(4)), "utf-8")
    succeed(capsys, "write", model, "--prompts", prompts, "--output", file, "--length", 20)
    rows = [json.loads(line)["messages"] for line in file.read_text("utf-8").splitlines()]
    assert [row[0]["content"] for row in rows] == [f"Tell me about {n} dogs" for n in range(4)]
    assert all(row[1]["role"] == "assistant" and row[1]["content"] for row in rows)
    for name in ("own.json", "no/own.jsonl"):
        assert name in sentence(spap(capsys, "write", model, "--output", tmp_path / name))
