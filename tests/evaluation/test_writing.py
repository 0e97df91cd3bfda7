"""What a model writes follows its own predictions, whatever the batches and the devices."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers

import spap_jax as spap
from spap_jax.errors import SpapWarning
from spap_jax.evaluation.writing import prepare, settings_for, write_batches
from spap_jax.models.model import Model
from spap_jax.settings import WriteSettings

STORIES = Path(__file__).parents[2] / "examples" / "llama-stories"
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPTS = ["Once upon a time there was a dog", "Tell me", "The cat and the big red ball were in the garden", "Lily"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The bundled model with a template, and with the full stop as another end token."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(STORIES, folder)
    stop = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]["."]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}), "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return spap.load(folder)


def said(rows: list) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def continued(model: Model, text: str, length: int) -> str:
    """Returns the greedy continuation of a text by the simplest loop."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.source.folder)
    given = tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    for _ in range(length):
        tokens = [*tokens, int(np.argmax(spap.logits(model, np.array([tokens]))[0, -1]))]
    return tokenizer.decode(tokens[len(given) :])


def test_the_likeliest_answer_is_the_greedy_continuation_up_to_its_end(model: Model):
    written = said(spap.write(model, prompts=PROMPTS[:2], length=20, temperature=0))
    for prompt, text in zip(PROMPTS, written, strict=False):
        assert text == continued(model, f"user: {prompt}\nassistant: ", 20).partition(".")[0]
        assert text


def test_a_text_continues_its_start_token_or_first_words_and_goes_on_after_an_end(model: Model):
    (row,) = spap.write(model, sequences=1, length=8, temperature=0)
    assert row == {"text": continued(model, "<s>", 8)}
    text = ["too short", f"{PROMPTS[2]} and then it rained\n\n{PROMPTS[0]} who barked"]
    rows = spap.write(model, data=text, first_words=8, length=30, sequences=2, temperature=0)
    for row, words in zip(rows, (PROMPTS[2][: PROMPTS[2].index(" ball") + 10], PROMPTS[0]), strict=True):
        assert row["text"].startswith(words)
        assert row["text"].endswith(continued(model, f"<s>{words}", 30))
        assert "." in row["text"][:-1]


def test_without_data_beginnings_of_all_kinds_are_continued(model: Model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.source.folder)
    writing = prepare(model, WriteSettings(sequences=8, length=4), None, None)
    alone = [beginning == [tokenizer.bos_token_id] for beginning in writing.beginnings]
    assert alone == [number % 4 == 0 for number in range(len(alone))]
    texts = [tokenizer.decode(beginning[1:]) for beginning in writing.beginnings]
    assert len(set(texts)) > 100
    assert any(text.startswith("user: ") and text.endswith("assistant: ") for text in texts)
    assert max(map(len, writing.beginnings)) <= 64
    rows = spap.write(model, sequences=8, length=4)
    assert all(row["text"].startswith(text) for row, text in zip(rows, texts, strict=False))
    plain = prepare(spap.load(STORIES), WriteSettings(), None, None)  # no template
    assert len(plain.beginnings) < len(writing.beginnings)


def test_beginnings_leave_room_in_few_positions(model: Model):
    few = model.replace(config=dataclasses.replace(model.config, positions=40))
    settings = settings_for(few, 2, 512)
    writing = prepare(few, settings, None, None)
    assert 1 < max(map(len, writing.beginnings)) <= 10
    assert max(map(len, writing.beginnings)) + writing.length <= 40


@pytest.mark.filterwarnings("ignore:.* cut off after")
def test_batches_and_devices_change_nothing_and_the_seed_does(model: Model):
    asked: dict[str, Any] = {"prompts": PROMPTS, "sequences": 10, "length": 20, "seed": 1}
    with pytest.warns(SpapWarning, match="cut off after 20"):
        rows = spap.write(model, batch_tokens=1, devices=1, **asked)
    assert rows == spap.write(model, devices=jax.device_count(), **asked)
    assert [row["messages"][0]["content"] for row in rows] == [*PROMPTS, *PROMPTS, *PROMPTS][:10]
    assert len(set(said(rows))) > 7
    asked["seed"] = 2
    assert said(rows) != said(spap.write(model, **asked))


def test_writing_goes_on_with_the_same_rows(model: Model):
    writing = prepare(model, WriteSettings(sequences=10, length=10, batch_tokens=6 * (64 + 10)), None, None)
    batches = list(write_batches(model, writing))
    assert [len(batch) for batch in batches] == [5, 5]  # not 6 and 4, which take as long as twice 6
    assert list(write_batches(model, writing, first=6)) == [batches[1][1:]]
    for other in ({"length": 9}, {"temperature": 0.5}, {"seed": 1}):  # whose rows are not to be mixed with these
        settings = writing.settings.replace(**other)
        assert prepare(model, settings, None, None).digest("") != writing.digest(""), other


@pytest.mark.parametrize(
    ("settings", "noun"),
    [
        ({"sequences": 0}, "sequences"),
        ({"length": 1.5}, "length"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"prompts": PROMPTS[:1], "sequences": 2, "temperature": 0}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"devices": 9}, "devices"),
        ({"length": 510, "prompts": PROMPTS}, "positions"),
        ({"prompts": PROMPTS, "tokenizer": STORIES}, "template"),
        ({"prompts": PROMPTS, "data": PROMPTS}, "both"),
        ({"prompts": []}, "prompts"),
        ({"data": ["w"]}, "first_words"),
        ({"data": [{"messages": [{"role": "user", "content": "Why?"}]}]}, "conversations"),
        ({"data": np.zeros((2, 8), int)}, "token ids"),
    ],
)
def test_refusals(model: Model, settings: dict[str, Any], noun: str):
    with pytest.raises(spap.UserError, match=noun):
        spap.write(model, **settings)
