"""Checkpoints in published forms: extra files beside the weights, and fields of config.json that are not read."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from commands import CALIBRATION, QUICK, spap, succeed, tiny, token_file
from hf_models import VARIANTS, hf_model

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def of_tiny_size(published: str, variant: str) -> str:
    """Returns the text of a published config.json, with the sizes of a tiny model."""
    theirs = json.loads((CONFIGS / f"{published}.json").read_text())
    sizes = {name: VARIANTS[variant][name] for name in SIZES}
    sizes |= (
        {"num_key_value_heads": VARIANTS[variant]["num_key_value_heads"]} if "num_key_value_heads" in theirs else {}
    )
    return json.dumps(theirs | sizes, indent=2) + "\n"


def llama_1(folder: Path) -> Path:
    """Writes a tiny LLaMA 1 as first converted: torch shards with buffers, and only a tokenizer.model as tokenizer."""
    (folder / "original").mkdir(parents=True)
    tensors = {name: tensor.half() for name, tensor in hf_model("llama").state_dict().items()}
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    weight_map = {name: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(of_tiny_size("llama-1-7b-decapoda", "llama"))

    trained, lines = io.BytesIO(), CALIBRATION.read_text().splitlines()[:200]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, vocab_size=97, model_type="bpe", minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LLaMATokenizer"}')
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("original/consolidated.00.pth", "original/tokenizer.model", "consolidated.safetensors"):
        (folder / name).write_text("not read")
    return folder


def test_a_llama_1_as_it_was_converted_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, text = llama_1(tmp_path / "in"), tmp_path / "text.txt"
    text.write_text(CALIBRATION.read_text()[:10_000])
    said = succeed(capsys, "prune", source, "--output", tmp_path / "out", "--data", text, *QUICK)
    line = f"config.json of {source}: ignoring max_sequence_length, which transformers' LlamaForCausalLM does not read"
    assert said.err.splitlines().count(line) == 1
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not list((tmp_path / "out").glob("*original*")) + list((tmp_path / "out").glob("consolidated*"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.intermediate_size == loaded.model.layers[0].mlp.up_proj.out_features < 53
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 97


def test_a_config_that_says_more_than_is_read_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, written = tiny(tmp_path / "in", "llama_tied"), of_tiny_size("smollm2-135m-instruct", "llama_tied")
    (source / "config.json").write_text(written)
    tokens = token_file(tmp_path / "ids.npy")
    said = succeed(capsys, "prune", source, "--output", tmp_path / "out", "--data", tokens, *QUICK)
    [line] = [line for line in said.err.splitlines() if "ignoring" in line]
    assert "ignoring is_llama_config, rope_interleaved, transformers.js_config, which" in line
    width = json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"]
    expected = written.replace('"intermediate_size": 53', f'"intermediate_size": {width}')
    assert (tmp_path / "out" / "config.json").read_text() == expected != written
    assert line in spap(capsys, "plan", source).err.splitlines()
