"""Weight files are laid out in advance and filled piece by piece."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_checkpoints import dtypes, raw_tensors, write

from spap_jax.checkpoint import Writer, load, save
from spap_jax.models.model import Model


def test_a_piece_is_on_disk_when_it_has_been_given(tmp_path: Path):
    model = load(write("llama", tmp_path / "in"))
    with Writer(tmp_path / "out", model.config, model.source, dtypes(model)) as writer:
        for index in reversed(range(model.config.layers)):
            writer.layer(index, jax.tree.map(lambda a, i=index: a[i], model.params["layers"]))
        writer.outer(model.params)
        (partial,) = tmp_path.glob(".out.partial-*")
        assert raw_tensors(partial) == raw_tensors(tmp_path / "in")


def test_mixed_dtypes_share_a_file_and_are_aligned(tmp_path: Path):
    folder = write("llama_biases", tmp_path / "in", "bfloat16")
    params = jax.tree.map(lambda a: a, load(folder).params)
    norm = params["layers"]["mlp_norm"]
    norm["scale"] = norm["scale"].astype(np.float32)
    model = Model(load(folder).config, params, load(folder).source)
    save(model, tmp_path / "out")
    written = load(tmp_path / "out").params
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and (a == b).all(), written, params))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    starts = {
        name: t["data_offsets"][0] for name, t in header.items() if name != "__metadata__" and t["dtype"] == "F32"
    }
    assert len(starts) == model.config.layers
    assert not any((8 + length + start) % 4 for start in starts.values())


def test_an_announced_dtype_is_kept(tmp_path: Path):
    model = load(write("llama", tmp_path / "in"))
    with (
        pytest.raises(ValueError, match="has the dtype float32, and float16 was announced"),
        Writer(tmp_path / "out", model.config, model.source, dict.fromkeys(dtypes(model), "float16")) as writer,
    ):
        writer.outer(model.params)
