"""Layers of different widths: padded in memory, exact in a checkpoint, declared in one field of config.json."""

import copy
import json
from pathlib import Path

import hf_models
import jax
import numpy as np
import pytest
import torch
import transformers
from tiny_checkpoints import edit_config, fields, raw_tensors, same, write

import spap_jax
from spap_jax.checkpoint import Reader, as_stored, load, save, save_orbax
from spap_jax.cli.bench import _measured
from spap_jax.errors import UserError
from spap_jax.evaluation.generation import read
from spap_jax.evaluation.speed import Speed
from spap_jax.models import cost, decoder
from spap_jax.models.model import Source
from spap_jax.report.schema import GenerationWorkload

WIDTHS = (20, 40, 7)
TOKENS = np.random.default_rng(0).integers(2, 97, (4, 16))
VARIANTS = ["llama_biases", "qwen2_tied", "opt_125m_like"]


def narrower(model: spap_jax.Model, widths: tuple[int, ...] = WIDTHS) -> spap_jax.Model:
    """Returns a model with the first channels of each layer."""

    def one(index: int, width: int) -> dict:
        mlp = jax.tree.map(lambda a: a[index], model.params["layers"]["mlp"])
        return decoder.with_channels(decoder.with_channels(mlp, width), max(widths))

    mlps = [one(index, width) for index, width in enumerate(widths)]
    layers = model.params["layers"] | {"mlp": jax.tree.map(lambda *arrays: np.stack(arrays), *mlps)}
    return spap_jax.Model(model.config.with_widths(widths), model.params | {"layers": layers}, model.source)


def hf_logits(variant: str) -> np.ndarray:
    """Returns the logits of transformers' model with the other channels' output weights set to zero."""
    theirs = copy.deepcopy(hf_models.hf_model(variant))
    blocks = theirs.model.decoder.layers if variant.startswith("opt") else theirs.model.layers
    for block, width in zip(blocks, WIDTHS, strict=True):
        down = block.fc2 if variant.startswith("opt") else block.mlp.down_proj
        with torch.no_grad():
            down.weight[:, width:] = 0
    return hf_models.hf_logits(theirs, TOKENS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, tmp_path: Path):
    source = write(variant, tmp_path / "in")
    model = narrower(load(source))
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert same(again, model)
    np.testing.assert_allclose(spap_jax.logits(again, TOKENS), hf_logits(variant), atol=2e-4)
    layer = Reader(tmp_path / "out").layer(2)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a[2], b), model.params["layers"], layer))

    tensors = raw_tensors(tmp_path / "out")
    ups = [
        shape[0] for name, (_, shape, _) in sorted(tensors.items()) if name.endswith(("up_proj.weight", "fc1.weight"))
    ]
    assert ups == [20, 40, 7]
    assert cost.parameters(model.family, model.config).total == sum(np.prod(shape) for _, shape, _ in tensors.values())

    lazy, timed = load(tmp_path / "out", as_stored), Speed((1.0,), (1.0,))
    measured = _measured("out", lazy, timed, GenerationWorkload(1, 4, 1, 1))
    assert measured["bytes"] == sum(len(content) for *_, content in tensors.values())

    save_orbax(again, tmp_path / "orbax")
    save(load(tmp_path / "orbax"), tmp_path / "back")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_one_field_is_added_and_emptied(tmp_path: Path):
    source = write("llama", tmp_path / "in")
    before = dict(fields(source))
    save(narrower(load(source)), tmp_path / "out")
    added = before | {"intermediate_size": 40, "spap_intermediate_sizes": [20, 40, 7]}
    assert fields(tmp_path / "out") == [*added.items()]
    save(narrower(load(tmp_path / "out"), (7, 7, 7)), tmp_path / "one")
    emptied = added | {"intermediate_size": 7, "spap_intermediate_sizes": None}
    assert fields(tmp_path / "one") == [*emptied.items()]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    ours = spap_jax.logits(load(tmp_path / "one"), TOKENS)
    np.testing.assert_allclose(ours, hf_models.hf_logits(theirs, TOKENS), atol=2e-4)


def test_stock_transformers_refuses_it(tmp_path: Path):
    """The size mismatch is an error; a model that loaded would compute something else."""
    save(narrower(load(write("llama", tmp_path / "in"))), tmp_path / "out")
    with pytest.raises(RuntimeError, match="size"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_weights_beyond_a_layers_width_are_not_lost(tmp_path: Path):
    model = narrower(load(write("llama", tmp_path / "in")))
    model.params["layers"]["mlp"]["gate"][2, 5, 30] = 1
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.gate_proj\.weight "):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("widths", [[20, 40], [20, 39, 7], [53, 0, 7], [53, 20.0, 7], 53])
def test_widths_that_no_model_has(widths: object, tmp_path: Path):
    folder = edit_config(write("llama", tmp_path / "in"), spap_intermediate_sizes=widths)
    with pytest.raises(UserError, match=r"spap_intermediate_sizes = .* positive whole number for each of the 3 layers"):
        load(folder)


def test_tensors_that_do_not_fit_the_widths(tmp_path: Path):
    save(narrower(load(write("llama", tmp_path / "in"))), tmp_path / "out")
    widths = json.loads((tmp_path / "out" / "config.json").read_text())["spap_intermediate_sizes"]
    edit_config(tmp_path / "out", spap_intermediate_sizes=[widths[0], widths[1], widths[2] + 1])
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.down_proj\.weight \[32, 7\] instead of \[32, 8\]"):
        load(tmp_path / "out")


def test_unstacked_for_speed_each_layer_is_as_wide_as_it_needs():
    config, params = hf_models.port(hf_models.hf_model("llama"))
    mlp = decoder.with_channels(params["layers"]["mlp"], 100)
    filled = params | {"layers": params["layers"] | {"mlp": mlp}}
    wide, apart = decoder.unstacked(config.with_widths((53, 100, 60)), filled)
    assert wide.layer_widths == (64, 128, 64)
    assert [layer["mlp"]["up"].shape[1] for layer in apart["layers"]] == [64, 128, 64]
    valid = np.ones(TOKENS.shape, bool)
    logits, _ = read(wide, apart, TOKENS, valid, TOKENS.shape[1], "float32")
    expected = spap_jax.logits(spap_jax.Model(config, params, Source("llama", None, "")), TOKENS)[:, -1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
