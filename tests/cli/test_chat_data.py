"""Conversations, mixtures and first tokens on the command line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import CALIBRATION, QUICK, STORIES, TEMPLATE, sentence, spap

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
    said = spap(capsys, "eval", model, "--data", talk, "--sequence-length", 64)
    assert said.code == 0, said.err
    blocks = spap_jax.load_tokens(talk, tokenizer=model, sequence_length=64, sequences=None, role="evaluation")
    assert blocks.mask is not None
    assert f"counting the {blocks.mask[:, 1:].sum()} tokens that the assistant wrote" in said.out
    value = spap_jax.perplexity(spap_jax.load(model), blocks)
    assert float(re.findall(r"^perplexity ([\d.]+)", said.out)[0]) == pytest.approx(value, abs=1e-3)


def test_every_sequence_begins_with_the_first_token_if_asked(tmp_path: Path, capsys):
    judged, pruned = tmp_path / "judged.txt", tmp_path / "pruned"
    judged.write_text(Path(CALIBRATION).read_text("utf-8")[-2000:], "utf-8")
    words = ["--data", CALIBRATION, "--eval", judged, "--bos", *QUICK, "--method", "magnitude"]
    said = spap(capsys, "prune", STORIES, "--output", pruned, *words)
    assert said.code == 0, said.err
    assert (pruned / "spap_report.json").read_text().count("begin with <s>") == 2
    assert "begin with <s>" in spap(capsys, "eval", pruned, "--data", judged, "--bos").out


def test_an_output_is_kept_apart_from_every_part_of_a_mixture(model: Path, talk: Path, tmp_path: Path, capsys):
    inside = tmp_path / "texts"
    inside.mkdir()
    shutil.copy(CALIBRATION, inside / "a.txt")
    data = f"{talk}:0.25,{inside / 'a.txt'}:0.75"
    said = spap(capsys, "prune", model, "--data", data, "--output", inside, "--overwrite", *QUICK)
    assert "contains the data (part 2)" in sentence(said)
