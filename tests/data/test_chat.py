"""Conversations become tokens by the tokenizer's chat template, with a mask of what the assistant wrote; prompts."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tokenizers
import transformers
from data_cases import read, refused, write_parquet

from spap_jax.data.chat import prompts_of
from spap_jax.data.sources import read_file
from spap_jax.data.tokens import TokenBlocks
from spap_jax.errors import UserError

START, END = "<|im_start|>", "<|im_end|>"
WORDS = [START, END, "system", "user", "assistant", *(f"w{i}" for i in range(30))]

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nw0<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nw0<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_ALONE = CHATML.replace("m.content +", "(m.content if loop.last else 'w1') +")


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def row(number: int) -> dict[str, Any]:
    """Return a row of four messages, or of three for every other number."""
    words = [f"w{(number + i) % 30} w{(3 * number + i) % 30} w{i}" for i in range(4)]
    roles = ["system", "user", "assistant"] if number % 2 else ["user", "assistant", "user", "assistant"]
    return {"id": number, "messages": [message(*each) for each in zip(roles, words, strict=False)]}


ROWS = [row(number) for number in range(20)]


def written(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids and the mask that ChatML means."""
    ids, mask = [], []
    for each in rows:
        given = each["messages"]
        for one in given if given[0]["role"] == "system" else [message("system", "w0"), *given]:
            words = one["content"].split()
            ids += [START, one["role"], *words, END]
            mask += [False, False, *[one["role"] == "assistant"] * (len(words) + 1)]
    return np.array([WORDS.index(word) for word in ids]), np.array(mask)


def chat(template: str | dict[str, str] | None = CHATML) -> transformers.PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, additional_special_tokens=[START]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["compared", "marked"])
def test_tokens_and_mask(template: str):
    ids, mask = written(ROWS)
    blocks = read(ROWS, chat(template), role="evaluation", sequences=None)
    count = len(ids) // 10
    np.testing.assert_array_equal(blocks.tokens, ids[: 10 * count].reshape(-1, 10))
    mask = mask[: 10 * count].reshape(-1, 10)
    np.testing.assert_array_equal(blocks.mask, mask)
    counted = mask[:, 1:].sum()  # nothing predicts the first token of a window
    windows = f"{count} of {count} windows of 10 tokens"
    assert blocks.description == (f"the given text: {windows}, counting the {counted} tokens that the assistant wrote")


def test_the_first_token_of_windows_of_conversations_does_not_count():
    tokenizer = chat()
    tokenizer.bos_token = START
    ids, mask = written(ROWS)
    blocks = read(ROWS, tokenizer, bos=True, role="evaluation", sequences=4)
    assert blocks.mask is not None
    np.testing.assert_array_equal(blocks.tokens[:, 0], WORDS.index(START))
    np.testing.assert_array_equal(blocks.tokens[:, 1:].ravel(), ids[1:37])  # the text begins with that token itself
    np.testing.assert_array_equal(blocks.mask[:, 1:].ravel(), mask[1:37])
    assert not blocks.mask[:, 0].any()


def in_jsonl(folder: Path) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in ROWS), "utf-8")
    return path


GIVEN = {
    "JSON lines": in_jsonl,
    "parquet": lambda folder: write_parquet(folder / "a.parquet", {name: [r[name] for r in ROWS] for name in ROWS[0]}),
    "a data set": lambda _: datasets.Dataset.from_list(ROWS),
    "a split for chat": lambda _: datasets.DatasetDict({"test_sft": datasets.Dataset.from_list(ROWS)}),
    "empty columns": lambda _: [{"messages": [m | {"tool_calls": None} for m in r["messages"]]} for r in ROWS],
    "null": lambda _: [*ROWS, {"messages": None}],
}


@pytest.mark.parametrize("case", GIVEN)
def test_every_container_gives_the_same_conversations(case: str, tmp_path: Path):
    template = CHATML.replace("m.content +", "m.content + (' w29' if 'tool_calls' in m else '') +")
    options = {"role": "evaluation", "sequences": 5}
    blocks, expected = (read(data, chat(template), **options) for data in (GIVEN[case](tmp_path), ROWS))
    np.testing.assert_array_equal(blocks.tokens, expected.tokens)
    np.testing.assert_array_equal(blocks.mask, expected.mask)


def test_a_greeting_does_not_count():
    """It has no message before it, without which templates render nothing."""
    greeted = [{"messages": [message("assistant", "w1 w2"), *each["messages"]]} for each in ROWS if each["id"] % 2 == 0]
    ids, mask = written(greeted)
    greeting = np.flatnonzero(ids == WORDS.index("system"))[:, None] + np.arange(5, 8)
    mask[greeting] = False
    blocks = read(greeted, chat(), role="evaluation", sequences=None, sequence_length=len(ids))
    np.testing.assert_array_equal(blocks.tokens[0], ids)
    assert blocks.mask is not None
    np.testing.assert_array_equal(blocks.mask[0], mask)


def test_calibration_draws_windows_in_which_the_assistant_writes():
    long = [message("user", " ".join(["w7"] * 25)), message("assistant", "w8")]
    rows = [{"messages": long} for _ in range(100)]
    blocks = read(rows, chat())
    assert blocks.mask is not None
    assert blocks.mask[:, 1:].any(axis=1).all()
    assert (blocks.tokens[blocks.mask] != WORDS.index("w7")).all()
    same = read(rows, chat())
    assert same.sha256 == blocks.sha256 != read(rows, chat(), seed=1).sha256


def test_all_of_a_text_counts_beside_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    in_jsonl(tmp_path)
    np.save(tmp_path / "b.npy", np.full(200, 34))
    monkeypatch.chdir(tmp_path)
    blocks = read("a.jsonl:0.6,b.npy:0.4", chat(), sequences=10)
    assert blocks.mask is not None
    of_b = (blocks.tokens == 34).all(axis=1)
    assert of_b.sum() == 4
    assert blocks.mask[of_b].all()
    assert not blocks.mask[~of_b].all()


def test_the_hash_depends_on_the_mask():
    tokens = np.arange(20).reshape(2, 10)
    masks = [None, np.ones((2, 10), bool), np.eye(2, 10, dtype=bool)]
    assert len({TokenBlocks(tokens, "", 2, mask).sha256 for mask in masks}) == 3


@pytest.mark.parametrize(
    ("rows", "template", "noun"),
    [
        (ROWS, None, "chat template"),
        (ROWS, LAST_ALONE, "message 2 in row 1"),
        (ROWS, "{{ raise_exception('no system') }}", "no system"),
        ([{"messages": [{"role": "user"}]}], CHATML, "row 1"),
        ([*ROWS[:2], {"text": "w0"}], CHATML, "row 3"),
        ([{"messages": [message("user", "w0")]}] * 50, CHATML, "assistant"),
        (ROWS, {"a": CHATML, "b": CHATML}, "several"),
        ([{"messages": [message("user", "\ud800")]}], CHATML, "Unicode"),
    ],
)
def test_refusals(rows: list, template: str | dict[str, str] | None, noun: str):
    assert noun in refused(rows, chat(template))


ASKED, ANSWER, AGAIN = message("user", "Why?"), message("assistant", "Because."), message("user", "And why that?")


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ("Why?", [ASKED]),
        ({"prompt": "Why?", "id": 3}, [ASKED]),
        ({"prompt": [ASKED | {"name": None}]}, [ASKED]),
        ({"messages": [ASKED, ANSWER], "prompt": "no"}, [ASKED]),
        ({"messages": [ASKED, ANSWER, AGAIN, ANSWER, ANSWER]}, [ASKED, ANSWER, AGAIN]),
    ],
)
def test_a_prompt_ends_with_a_message_to_the_model(given: Any, messages: list):
    assert [each.messages for each in prompts_of([given, {"prompt": None}], "the text")] == [messages]


def test_files_hold_prompts(tmp_path: Path):
    table = write_parquet(tmp_path / "a.parquet", {"text": ["", "", ""], "prompt": ["Why?", None, "How?"]})
    conversations: Any = read_file(table, prompts_of)
    assert [each.messages[0]["content"] for each in conversations] == ["Why?", "How?"]


@pytest.mark.parametrize("given", [{"text": "Why?"}, {"messages": [ANSWER]}, {"prompt": 3}])
def test_rows_without_a_prompt_are_refused(given: dict):
    with pytest.raises(UserError, match="row 2"):
        list(prompts_of(["Why?", given], "the text"))
