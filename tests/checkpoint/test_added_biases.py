"""Biases that an update adds to the MLP: config.json declares them, byte for byte, or the model is not written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import edit_config, fields, raw_tensors, write

import spap_jax
from spap_jax.api import PruneResult
from spap_jax.checkpoint import load, save, save_orbax
from spap_jax.errors import UserError

SENTENCE = r"the config\.json of \w+ has no field for biases on the MLP alone, .*: prune with update='none' or"


def flapped(folder: Path) -> PruneResult:
    tokens = np.random.default_rng(0).integers(2, 97, (8, 16))
    return spap_jax.prune(load(folder), tokens, method="flap", held_out=0.0)


def test_the_field_is_added_and_nothing_else_changes(tmp_path: Path):
    source = write("llama", tmp_path / "in")
    before = fields(source)
    assert "mlp_bias" not in dict(before)
    model = flapped(source).model
    save(model, tmp_path / "out")
    assert fields(tmp_path / "out") == [*(dict(before) | {"intermediate_size": 37, "mlp_bias": True}).items()]
    new = raw_tensors(tmp_path / "out").keys() - raw_tensors(source).keys()
    assert new == {f"model.layers.{i}.mlp.{name}_proj.bias" for i in range(3) for name in ("gate", "up", "down")}
    again = load(tmp_path / "out")
    assert again.config == model.config
    tokens = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(spap_jax.logits(again, tokens), spap_jax.logits(model, tokens))
    save_orbax(model, tmp_path / "orbax")
    assert load(tmp_path / "orbax").config == model.config


def test_a_field_that_says_no_says_yes(tmp_path: Path):
    source = edit_config(write("llama", tmp_path / "in"), mlp_bias=False)
    save(flapped(source).model, tmp_path / "out")
    expected = dict(fields(source)) | {"intermediate_size": 37, "mlp_bias": True}
    assert fields(tmp_path / "out") == [*expected.items()]


@pytest.mark.parametrize("variant", ["qwen2", "opt_no_bias"])
def test_no_place_for_biases(variant: str, tmp_path: Path):
    model = flapped(write(variant, tmp_path / "in")).model
    tokens = np.arange(12).reshape(1, 12)
    following = spap_jax.generate(model, tokens, 1, eos=(), pad=0)[0, -1]  # works in memory
    assert following == np.asarray(spap_jax.logits(model, tokens))[0, -1].argmax()
    for write_out in (save, save_orbax):
        with pytest.raises(UserError, match=SENTENCE):
            write_out(model, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_the_card_and_the_report(tmp_path: Path):
    from spap_jax.report.card import model_card

    report = flapped(write("llama", tmp_path / "in")).report
    card = " ".join(model_card(report).split())
    assert "is as it was but for added biases in the MLP, so stock tools load it" in card
    assert "chosen by the method `flap`; a bias makes up for the mean of those removed (update `bias`)." in card
    assert json.loads(report.to_json())["method"] == {"selection": "flap", "update": "bias"}


@pytest.mark.parametrize(("name", "repo"), [("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"), ("dense", None)])
def test_the_card_names_the_original_as_the_hub_knows_it(name: str, repo: str | None, tmp_path: Path):
    from huggingface_hub import ModelCard

    from spap_jax.report.card import model_card

    report = flapped(write("llama", tmp_path / "in")).report
    card: Any = ModelCard(model_card(dataclasses.replace(report, model=dataclasses.replace(report.model, name=name))))
    assert (card.data.base_model, card.data.library_name) == (repo, "transformers")
    assert card.data.pipeline_tag == "text-generation"
    assert f"Made from `{name}` by SPAP-JAX {spap_jax.__version__}: " in card.text
