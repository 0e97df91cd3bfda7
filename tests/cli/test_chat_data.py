"""Conversations and first tokens on the command line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import CALIBRATION, QUICK, STORIES, TEMPLATE, spap, succeed

import spap_jax

TURNS = ("user", "Tell me a story about a dog"), ("assistant", "Once upon a time there was a little dog named Max.")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(STORIES, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return tmp_path / "chat"


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    rows = [{"messages": [{"role": role, "content": f"{words} {n}"} for role, words in TURNS]} for n in range(100)]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_perplexity_is_of_what_the_assistant_wrote_and_says_so(model: Path, talk: Path, capsys):
    said = succeed(capsys, "eval", model, "--data", talk, "--sequence-length", 64)
    blocks = spap_jax.load_tokens(talk, tokenizer=model, sequence_length=64, sequences=None, role="evaluation")
    assert blocks.mask is not None
    assert f"counting the {blocks.mask[:, 1:].sum()} tokens that the assistant wrote" in said.out
    value = spap_jax.perplexity(spap_jax.load(model), blocks)
    assert float(re.findall(r"^perplexity ([\d.]+)", said.out)[0]) == pytest.approx(value, abs=1e-3)


def test_every_sequence_begins_with_the_first_token_if_asked(tmp_path: Path, capsys):
    judged, pruned = tmp_path / "judged.txt", tmp_path / "pruned"
    judged.write_text(Path(CALIBRATION).read_text("utf-8")[-2000:], "utf-8")
    words = ["--data", CALIBRATION, "--eval", judged, "--bos", *QUICK, "--method", "magnitude"]
    succeed(capsys, "prune", STORIES, "--output", pruned, *words)
    assert (pruned / "spap_report.json").read_text().count("begin with <s>") == 2
    assert "begin with <s>" in spap(capsys, "eval", pruned, "--data", judged, "--bos").out
