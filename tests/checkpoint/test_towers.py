"""Decoders inside models that read images: the decoder is read and written, all else is copied bit for bit."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import TOWERS, edit_config, edit_tensors, fields, raw_tensors, write, write_bin

import spap_jax
from spap_jax.checkpoint import Reader, load, save, save_orbax, weight_files
from spap_jax.errors import UserError
from spap_jax.models.towers import PREFIXES

TEXT = [5, 7]
IMAGE = 90
"""The token that stands for a part of the image in `TOWERS`; each image has four."""


def image(variant: str) -> dict[str, torch.Tensor]:
    """Returns what a processor makes of one random image."""
    generator = torch.Generator().manual_seed(3)
    if variant == "qwen3_vl":
        pixels = torch.randn((16, 3 * 2 * 4 * 4), generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    pixels = {"pixel_values": torch.randn((1, 3, 28, 28), generator=generator)}
    return pixels | ({"image_sizes": torch.tensor([[28, 28]])} if "stral3" in variant else {})


def stock(folder: Path) -> Any:
    """Returns the whole model that transformers loads, without anything missing or left over."""
    auto: Any = transformers.AutoModelForImageTextToText
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def features(model: Any, variant: str) -> list[np.ndarray]:
    """Returns what the model makes of the image before its decoder reads it."""
    with torch.no_grad():
        found = model.get_image_features(**image(variant))
    return [part.numpy() for part in jax.tree.leaves(dict(found)) if isinstance(part, torch.Tensor)]


def generated(model: Any, variant: str) -> list[int]:
    """Returns the tokens with which the model continues a text with an image."""
    tokens = torch.tensor([[*TEXT, 92, *[IMAGE] * 4, 93, *TEXT]])
    extra = {"token_type_ids": (tokens == IMAGE).long()} if variant == "gemma3_tower" else {}
    extra |= {"mm_token_type_ids": (tokens == IMAGE).long()} if variant == "qwen3_vl" else {}
    with torch.no_grad():
        found = model.generate(tokens, **image(variant), **extra, max_new_tokens=8, do_sample=False)
    return found[0, tokens.shape[1] :].tolist()


def renamed(folder: Path) -> Path:
    """Gives the tensors the names that transformers gave them before 4.52."""
    tensors = load_file(folder / "model.safetensors")
    old = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }

    def older(name: str) -> str:
        return next((to + name.removeprefix(new) for new, to in old.items() if name.startswith(new)), name)

    save_file({older(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 80, (4, 24))


@pytest.mark.parametrize("variant", TOWERS)
@pytest.mark.parametrize("joined", [True, False])
def test_the_whole_model_is_as_before_when_nothing_is_removed(
    variant: str, joined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(variant, tmp_path / "in")
    (source / "preprocessor_config.json").write_text("{}")
    if not joined:
        monkeypatch.setattr(weight_files, "JOINED_BYTES", 8000)
    save(load(source), tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(source)
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert (len(list((tmp_path / "out").glob("model-*.safetensors"))) > 5) != joined
    assert generated(stock(tmp_path / "out"), variant) == generated(stock(source), variant)


@pytest.mark.filterwarnings("ignore:only the part of the model that reads")
@pytest.mark.parametrize("variant", TOWERS)
def test_a_pruned_decoder_in_the_whole_model(variant: str, tmp_path: Path) -> None:
    source = write(variant, tmp_path / "in", "bfloat16")
    dense = load(source)
    result = spap_jax.prune(dense, tokens(), sparsity=0.3, attention_sparsity=0.5, effort="low")
    small = result.model
    spap_jax.save(result, tmp_path / "out", dtype="float32")
    assert "pipeline_tag: image-text-to-text\n" in (tmp_path / "out" / "README.md").read_text()
    assert fields(tmp_path / "out")[0][0] == fields(source)[0][0]
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["intermediate_size"], text["num_key_value_heads"]) == (small.config.intermediate, 1)
    whole = stock(tmp_path / "out")
    with torch.no_grad():
        found = whole(input_ids=torch.tensor(tokens())).logits.numpy()
    np.testing.assert_allclose(found, spap_jax.logits(small, tokens()), rtol=0, atol=1e-4)
    before = stock(source).float()
    for one, other in zip(features(whole.to(before.dtype), variant), features(before, variant), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(generated(whole, variant)) == 8


@pytest.mark.parametrize("variant", ["gemma3_tower", "mistral3"])
def test_names_of_older_files(variant: str, tmp_path: Path) -> None:
    source = write(variant, tmp_path / "in")
    new = load(source)
    old = load(renamed(source))
    assert (old.config.prefix, old.config.head_name) == (PREFIXES[1], "language_model.lm_head.weight")
    np.testing.assert_array_equal(spap_jax.logits(new, tokens()), spap_jax.logits(old, tokens()))
    save(old, tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(source)
    stock(tmp_path / "out")


def test_weights_in_the_format_of_torch(tmp_path: Path) -> None:
    source = write_bin("qwen3_vl", tmp_path / "in", shards=2)
    save(load(source), tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(write("qwen3_vl", tmp_path / "same"))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        Reader(folder)
    assert all(part in str(error.value) for part in parts), error.value


def test_checkpoints_without_the_decoder_that_is_meant(tmp_path: Path) -> None:
    source = write("qwen3_vl", tmp_path / "in")
    text = TOWERS["qwen3_vl"]["text_config"]
    refused(edit_config(source, text_config=text | {"model_type": "qwen3"}), "'qwen3'", "qwen3_vl_text")
    refused(edit_config(source, text_config=...), "text_config None")
    edit_config(source, text_config=text)
    tensors = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if "visual" in name}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    refused(source, "holds no text model", *PREFIXES)


def test_a_tensor_of_the_decoder_that_is_missing(tmp_path: Path) -> None:
    source = write("qwen3_vl", tmp_path / "in")
    refused(
        edit_tensors(source, model__language_model__norm__weight=None), "missing (model.language_model.norm.weight)"
    )


def test_what_is_written_needs_the_other_parts(tmp_path: Path) -> None:
    source = write("qwen3_vl", tmp_path / "in")
    model = load(source)
    with pytest.raises(UserError, match="other parts"):
        save_orbax(model, tmp_path / "orbax")
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is gone"):
        save(model, tmp_path / "out")
