"""A round trip through a checkpoint is exact, bit for bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_checkpoints import (
    VARIANTS,
    edit_config,
    edit_tensors,
    fields,
    raw_tensors,
    same,
    same_arrays,
    state,
    write,
    write_bin,
)  # fmt: skip

from spap_jax.checkpoint import Reader, is_orbax, load, save, save_orbax, weight_files
from spap_jax.errors import UserError
from spap_jax.models import decoder
from spap_jax.models.model import Model

DTYPES = ("float32", "bfloat16", "float16")
HALVED = ("llama", "gemma3", "opt_350m_like")
"""Variants that are tried in half precision too, which is the same for every tensor."""


def in_dtypes(*variants: str) -> list[tuple[str, str]]:
    return [(variant, dtype) for variant in variants for dtype in DTYPES if dtype == "float32" or variant in HALVED]


def stock(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Returns the model that transformers loads, and its loading info, whose lists are empty if all is well."""
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder, output_loading_info=True)


def narrowed(model: Model, kept: int) -> Model:
    """Returns the model with its first ``kept`` MLP channels only."""
    config = model.config.narrowed(kept)
    shapes = decoder.shapes(config)
    cut = jax.tree.map(lambda a, s: a[tuple(slice(n) for n in s.shape)], model.params, shapes)
    return Model(config, cut, model.source)


@pytest.mark.parametrize(("variant", "dtype"), in_dtypes(*VARIANTS))
def test_hugging_face_to_jax_and_back(variant: str, dtype: str, tmp_path: Path):
    source = write(variant, tmp_path / "in", dtype)
    model = load(source)
    save(model, tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(source)
    assert raw_tensors(source).keys() == state(variant).keys()
    for name in ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tree_is_what_the_decoder_declares(variant: str, tmp_path: Path):
    reader = Reader(write(variant, tmp_path / "in"))
    model = reader.model()
    shapes = decoder.shapes(model.config)
    assert jax.tree.map(np.shape, model.params) == jax.tree.map(np.shape, shapes)
    assert reader.bytes == sum(array.nbytes for array in jax.tree.leaves(model.params))
    for index in range(model.config.layers):
        assert same_arrays(reader.layer(index), jax.tree.map(lambda a, i=index: a[i], model.params["layers"]))
    assert same_arrays(reader.outer(), {name: model.params[name] for name in ("embed", "head")})


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_transformers_loads_a_narrowed_model(variant: str, tmp_path: Path):
    model = load(write(variant, tmp_path / "in"))
    save(narrowed(model, 40), tmp_path / "out")
    loaded, info = stock(tmp_path / "out")
    assert not any(info.values()), info
    field = model.family.width_field
    assert getattr(loaded.config, field) == 40
    assert fields(tmp_path / "out") == [*(dict(fields(tmp_path / "in")) | {field: 40}).items()]
    ends = ("1.mlp.down_proj.weight", "1.fc2.weight")
    both = (state(variant), loaded.state_dict())
    dense, found = (next(tensor for name, tensor in each.items() if name.endswith(ends)) for each in both)
    assert torch.equal(found, dense[:, :40])


@pytest.mark.parametrize(("variant", "dtype"), in_dtypes("llama_tied", "opt_350m_like"))
def test_shards(variant: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(variant, tmp_path / "in", dtype, shard="12KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    model = load(source)
    monkeypatch.setattr(weight_files, "JOINED_BYTES", 0)
    save(model, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == model.config.layers + 1
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    assert raw_tensors(tmp_path / "out") == raw_tensors(source)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == Reader(source).bytes
    assert index["weight_map"].keys() == raw_tensors(source).keys()
    _, info = stock(tmp_path / "out")
    assert not any(info.values()), info


@pytest.mark.parametrize(("shards", "dtype"), [(1, "float32"), (3, "bfloat16")])
def test_torch_files(shards: int, dtype: str, tmp_path: Path):
    stored = write("llama_biases", tmp_path / "in", dtype)
    model = load(write_bin("llama_biases", tmp_path / "bin", dtype, shards))
    assert same_arrays(model.params, load(stored).params)


def test_old_torch_files_and_old_names(tmp_path: Path):
    expected = load(write("opt_125m_like", tmp_path / "in"))
    folder = write_bin("opt_125m_like", tmp_path / "bin", _use_new_zipfile_serialization=False)
    assert same_arrays(load(folder).params, expected.params)
    bare = {name.removeprefix("model."): tensor for name, tensor in state("opt_125m_like").items()}
    torch.save(bare, folder / "pytorch_model.bin")
    save(load(folder), tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "in")


@pytest.mark.parametrize("others", ["model.", "lm_head."])
def test_names_as_transformers_takes_them_too(others: str, tmp_path: Path):
    """A model that was saved without its head has shorter names, and a tied embedding may be called the head."""
    folder = write("llama_tied", tmp_path / "in")
    expected, tensors = load(folder), state("llama_tied")
    if others == "model.":
        tensors = {name.removeprefix(others): tensor for name, tensor in tensors.items()}
    else:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert same_arrays(load(folder).params, expected.params)
    save(load(folder), tmp_path / "out")
    assert sorted(raw_tensors(tmp_path / "out")) == sorted(state("llama_tied").keys() - {"lm_head.weight"})


def test_torch_tensors_that_are_views(tmp_path: Path):
    dtype = "bfloat16"
    folder = write_bin("llama_tied", tmp_path / "bin", dtype)
    tensors = state("llama_tied", dtype)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    turned = {name: tensor.t().contiguous().t() for name, tensor in tensors.items()}
    assert not turned["lm_head.weight"].is_contiguous()
    torch.save(turned, folder / "pytorch_model.bin")
    assert same_arrays(load(folder).params, load(write("llama_tied", tmp_path / "in", dtype)).params)


WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch())
from spap_jax import checkpoint
from spap_jax.errors import UserError

checkpoint.save(checkpoint.load(sys.argv[1]), sys.argv[3])
try:
    checkpoint.load(sys.argv[2])
except UserError as error:
    print(error)
"""


def test_only_torch_files_need_torch(tmp_path: Path):
    safe, torches = write("llama", tmp_path / "in"), write_bin("llama", tmp_path / "bin")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(safe), str(torches), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "install torch (pip install 'spap-jax[torch]')" in run.stdout
    assert str(torches / "pytorch_model.bin") in run.stdout
    assert raw_tensors(tmp_path / "out") == raw_tensors(safe)


def test_buffers_that_are_recomputed_are_ignored(tmp_path: Path):
    folder = write("llama", tmp_path / "in")
    expected = raw_tensors(folder)
    edit_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    save(load(folder), tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == expected


@pytest.mark.parametrize("variant", ["llama_tied", "opt_125m_like"])
def test_a_tied_head_that_is_stored_is_stored_again(variant: str, tmp_path: Path):
    folder = write(variant, tmp_path / "in", "bfloat16")
    tokens = next(tensor for name, tensor in state(variant, "bfloat16").items() if "embed_tokens" in name)
    edit_tensors(folder, lm_head__weight=tokens.clone())
    model = load(folder)
    assert model.source.head_stored
    assert "weight" not in model.params["head"]
    save(model, tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(folder)
    save_orbax(model, tmp_path / "orbax")
    save(load(tmp_path / "orbax"), tmp_path / "again")
    assert raw_tensors(tmp_path / "again") == raw_tensors(folder)
    changed = tokens.clone()
    changed[0, 0] = -changed[0, 0]
    edit_tensors(folder, lm_head__weight=changed)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        load(folder)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")]
)
def test_casting_is_that_of_torch(stored: str, dtype: str, tmp_path: Path):
    folder = write("qwen2", tmp_path / "in", stored)
    save(load(folder), tmp_path / "out", dtype=dtype)
    written = raw_tensors(tmp_path / "out")
    for name, tensor in state("qwen2", stored).items():
        assert written[name][0] == dtype
        assert written[name][2] == tensor.to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config == json.loads((folder / "config.json").read_bytes()) | {"torch_dtype": dtype}


def test_weights_of_several_dtypes_keep_them(tmp_path: Path):
    folder = write("llama", tmp_path / "in", "bfloat16")
    norms = {name: tensor.float() for name, tensor in state("llama").items() if "norm" in name}
    edit_tensors(folder, **norms)
    save(load(folder), tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(folder)


@pytest.mark.parametrize(("variant", "dtype"), in_dtypes("llama", "qwen2_tied", "opt_350m_like", "opt_no_affine"))
def test_orbax_out_and_back(variant: str, dtype: str, tmp_path: Path):
    source = write(variant, tmp_path / "in", dtype)
    model = load(source)
    save_orbax(narrowed(model, 40), tmp_path / "narrow")
    assert same_arrays(load(tmp_path / "narrow").params, narrowed(model, 40).params)
    save_orbax(model, tmp_path / "orbax")
    shutil.move(tmp_path / "orbax", tmp_path / "elsewhere")
    assert is_orbax(tmp_path / "elsewhere")
    assert not is_orbax(source)
    again = load(tmp_path / "elsewhere")
    assert same(again, model)
    assert again.source.config_text == model.source.config_text
    assert again.source.name == "in"
    save(again, tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(source)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_what_is_written_is_read_by_the_next_version_of_orbax(tmp_path: Path) -> None:
    import orbax.checkpoint.experimental.v1 as v1

    model = load(write("llama", tmp_path / "in", "bfloat16"))
    save_orbax(model, tmp_path / "orbax")
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), model.params)
    assert same_arrays(v1.load(str(tmp_path / "orbax" / "params"), like), model.params)


def test_a_sharded_model_is_written_to_orbax(tmp_path: Path):
    model = load(write("llama", tmp_path / "in"))
    mesh = jax.make_mesh((2,), ("width",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    place = jax.sharding.NamedSharding(mesh, jax.P(None, "width"))
    up = jax.device_put(model.params["layers"]["mlp"]["up"], place)
    params = model.params | {"layers": model.params["layers"] | {"mlp": model.params["layers"]["mlp"] | {"up": up}}}
    save_orbax(Model(model.config, params, model.source), tmp_path / "orbax")
    assert same_arrays(load(tmp_path / "orbax").params, model.params)
    save(Model(model.config, params, model.source), tmp_path / "out")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "in")


def test_a_config_without_a_dtype_stays_so(tmp_path: Path):
    folder = edit_config(write("llama", tmp_path / "in"), torch_dtype=...)
    save(load(folder), tmp_path / "out", dtype="bfloat16")
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_weights_are_as_readable_as_the_other_files(tmp_path: Path):
    save(load(write("llama", tmp_path / "in")), tmp_path / "out")
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.name != "tokenizer.json"
    }
    assert len(set(modes.values())) == 1, modes
