"""Answers are what the model writes after the template's prompt, whatever the batches and the devices."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import spap_jax as spap
from spap_jax.backend import traced_for
from spap_jax.errors import SpapWarning
from spap_jax.evaluation import sequences
from spap_jax.models.model import Model

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


def test_the_likeliest_answer_is_the_greedy_continuation_up_to_its_end(model: Model):
    found = said(spap.answer(model, PROMPTS, max_new_tokens=40, temperature=0))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.source.folder)
    for prompt, text in zip(PROMPTS, found, strict=True):
        tokens = tokenizer(f"user: {prompt}\nassistant: ", add_special_tokens=False)["input_ids"]
        written = spap.generate(model, np.array([tokens]), 40)[0, len(tokens) :]
        assert text == tokenizer.decode(written, skip_special_tokens=True).partition(".")[0]
        assert text


@pytest.mark.filterwarnings("ignore:.* cut off after")
def test_batches_and_devices_change_no_answer(model: Model):
    asked: dict[str, Any] = {"answers": 3, "max_new_tokens": 20, "seed": 1}
    with pytest.warns(SpapWarning, match="^7 of 12 answers were cut off after 20 tokens, .* a larger max_new_tokens"):
        one = spap.answer(model, PROMPTS, batch_tokens=1, devices=1, **asked)
    assert one == spap.answer(model, PROMPTS, devices=jax.devices(), **asked)
    assert [row["messages"][0]["content"] for row in one] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len(set(said(one))) > 9
    asked["seed"] = 2
    assert said(one) != said(spap.answer(model, PROMPTS, **asked))


@pytest.mark.filterwarnings("ignore:.* cut off after")
def test_an_accelerator_computes_in_the_type_of_the_weights(model: Model, monkeypatch: pytest.MonkeyPatch):
    half = model.replace(params=jax.tree.map(lambda array: array.astype(jnp.bfloat16), model.params))
    kinds, prefill = [], sequences.prefill
    monkeypatch.setattr(
        sequences, "prefill", lambda *given, **more: kinds.append(more["dtype"]) or prefill(*given, **more)
    )
    with traced_for("gpu"):
        assert said(spap.answer(half, PROMPTS[:1], max_new_tokens=8, temperature=0))[0]
    assert kinds == [jnp.bfloat16]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"answers": 0}, "answers must be at least 1, not 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be at least 1, not 1.5"),
        ({"answers": 2, "temperature": 0}, "at temperature 0 all answers to a prompt are the same"),
        ({"temperature": -1}, "temperature is -1.0, but must be 0 or more"),
        ({"devices": 9}, "9 devices are asked for, but JAX sees 8: give devices a number from 1 to 8"),
        ({"max_new_tokens": 510}, "row 1 of the given text has "),
        ({"tokenizer": STORIES}, "conversations need a tokenizer with a chat template"),
    ],
)
def test_refusals(model: Model, settings: dict, words: str):
    with pytest.raises(spap.UserError) as error:
        spap.answer(model, PROMPTS, **settings)
    assert words in str(error.value)
