"""Tiny checkpoints as transformers writes them, and helpers that inspect a folder's contents."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hf_models import TOWERS, VARIANTS, hf_model
from safetensors import safe_open

from spap_jax.models.model import Model
from spap_jax.pruning.reduce import take_groups

__all__ = [
    "TOWERS",
    "VARIANTS",
    "edit_config",
    "edit_tensors",
    "raw_tensors",
    "same",
    "same_arrays",
    "state",
    "with_groups",
    "write",
    "write_bin",
]


def state(variant: str, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Returns the tensors that transformers would write."""
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in hf_model(variant).state_dict().items()}
    if (VARIANTS | TOWERS)[variant].get("tie_word_embeddings", True):
        del tensors["lm_head.weight"]
    return tensors


def write(variant: str, folder: Path, dtype: str = "float32", shard: str = "1GB") -> Path:
    """Writes a variant to a folder, with the fields of `VARIANTS` in config.json in an unusual layout."""
    model = copy.deepcopy(hf_model(variant)).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    written = {"architectures": [type(model).__name__], "torch_dtype": dtype, "_name_or_path": "\u00e9 \\"}
    text = json.dumps((VARIANTS | TOWERS)[variant] | written, indent=3, ensure_ascii=False)
    (folder / "config.json").write_bytes(text.replace('": ', '" :  ').replace("\n", "\r\n").encode())
    (folder / "tokenizer.json").write_text('{"stand-in": 1}')
    return folder


def write_bin(variant: str, folder: Path, dtype: str = "float32", shards: int = 1, **options: Any) -> Path:
    """Writes a variant like `write`, with weights in torch's own format."""
    write(variant, folder, dtype)
    (folder / "model.safetensors").unlink()
    tensors = state(variant, dtype)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return folder
    weight_map = {name: f"pytorch_model-{i % shards:05d}-of-{shards:05d}.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def fields(folder: Path) -> list[tuple[str, Any]]:
    """Returns the fields of a folder's config.json in their order."""
    return [*json.loads((folder / "config.json").read_bytes()).items()]


def raw_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns dtype, shape and bytes of every tensor in a folder's safetensors files."""
    raw = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                array = file.get_tensor(name)
                raw[name] = (str(array.dtype), array.shape, array.tobytes())
    return raw


def same_arrays(one: Any, other: Any) -> bool:
    """Returns whether two trees have the same structure, dtypes and bytes."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def same(one: Model, other: Model) -> bool:
    """Returns whether two models have the same config and weights."""
    return one.config == other.config and same_arrays(one.params, other.params)


def with_groups(model: Model, *kept: int) -> Model:
    """Keeps only the given head groups, as pruning would, without the time that it takes."""
    take = jax.vmap(lambda layer: take_groups(model.family, layer, jnp.asarray(kept)))
    layers = model.params["layers"] | {"attention": take(model.params["layers"]["attention"])}
    return Model(model.config.with_kv_heads(len(kept)), model.params | {"layers": layers}, model.source)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Sets fields of config.json; `...` removes one."""
    content = json.loads((folder / "config.json").read_bytes()) | changes
    kept = {name: value for name, value in content.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def edit_tensors(folder: Path, **changes: Any) -> Path:
    """Sets tensors (double underscores stand for dots) in a folder with one weight file; None removes one."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors") | {n.replace("__", "."): v for n, v in changes.items()}
    save_file({n: v for n, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})
    return folder
