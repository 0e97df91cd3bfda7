"""Prompts are read from texts, from a column of prompts and from conversations."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_cases import write_parquet

from spap_jax.data.prompts import load_prompts
from spap_jax.errors import UserError

ASKED = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
AGAIN = {"role": "user", "content": "And why that?"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ("Why?", [ASKED]),
        ({"prompt": "Why?", "id": 3}, [ASKED]),
        ({"prompt": [ASKED | {"name": None}]}, [ASKED]),
        ({"messages": [ASKED, ANSWER], "prompt": "no"}, [ASKED]),
        ({"messages": None, "prompt": "Why?"}, [ASKED]),
        ({"messages": [ASKED, ANSWER, AGAIN]}, [ASKED, ANSWER, AGAIN]),
        ({"messages": [ASKED, ANSWER, AGAIN, ANSWER, ANSWER]}, [ASKED, ANSWER, AGAIN]),
    ],
)
def test_a_prompt_ends_with_a_message_to_the_model(row: Any, messages: list):
    assert [each.messages for each in load_prompts([row])] == [messages]


def test_files_hold_prompts(tmp_path: Path):
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Why?", "How?")), "utf-8")
    table = write_parquet(tmp_path / "a.parquet", {"text": ["", "", ""], "prompt": ["Why?", None, "How?"]})
    for path in (lines, table):
        assert [each.messages[0]["content"] for each in load_prompts(str(path))] == ["Why?", "How?"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "holds no prompts"),
        ([{"prompt": None}], "holds no prompts"),
        ([{"text": "Why?"}], 'row 1 of the given text has no column "prompt" or "messages" but text'),
        (["Why?", {"messages": [ANSWER]}], "row 2 of the given text has no message to answer"),
        ([{"messages": []}], "row 1 of the given text is no conversation"),
        ([{"prompt": 3}], "row 1 of the given text is no conversation"),
    ],
)
def test_refusals(rows: list, words: str):
    with pytest.raises(UserError) as error:
        load_prompts(rows)
    assert words in str(error.value)


def test_plain_text_is_no_prompt(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Why?", "utf-8")
    with pytest.raises(UserError, match=r"a.txt holds no prompts: give rows with"):
        load_prompts(tmp_path / "a.txt")
