"""Faults of a checkpoint are reported in one sentence, before any work."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from tiny_checkpoints import edit_config, edit_tensors, state, write, write_bin

from spap_jax.checkpoint import Reader, load, save_orbax, tensors
from spap_jax.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write("llama", tmp_path / "in")


def refusal(folder: Path, read: Callable[[Path], Any] = Reader) -> str:
    """Returns the error message of reading a folder, by default only its headers."""
    with pytest.raises(UserError) as error:
        read(folder)
    return str(error.value)


def test_all_faults_of_the_tensors_are_listed_at_once(folder: Path):
    edit_tensors(
        folder,
        model__norm__weight=None,
        model__layers__1__mlp__up_proj__weight=torch.zeros(54, 32),
        model__layers__0__mlp__up_proj__bias=torch.zeros(53),
        model__layers__2__mlp__down_proj__weight=torch.zeros(32, 53, dtype=torch.int8),
        model__layers__2__self_attn__q_proj__weight=torch.zeros(32, 32, dtype=torch.bfloat16),
    )
    sentence = refusal(folder)
    assert sentence.startswith(f"the weights of {folder} do not fit its config.json: ")
    for part in (
        "tensors are missing (model.norm.weight)",
        "tensors are unexpected (model.layers.0.mlp.up_proj.bias)",
        "shapes are wrong (model.layers.1.mlp.up_proj.weight [54, 32] instead of [53, 32])",
        "dtypes cannot be pruned (quantised, or wider than float32) (model.layers.2.mlp.down_proj.weight i8)",
        "model.layers.0.self_attn.q_proj.weight float32 but model.layers.2.self_attn.q_proj.weight bfloat16",
    ):
        assert part in sentence


def test_a_long_list_is_cut(folder: Path):
    sentence = refusal(edit_config(folder, num_hidden_layers=8))
    assert sentence.count("model.layers.") == 10
    assert "and 35 more" in sentence
    assert len(refusal(edit_config(folder, intermediate_size=60))) < 2000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_are_not_pruned(dtype: torch.dtype, folder: Path):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, **{name: state("llama")[name].to(dtype)})
    assert "dtypes cannot be pruned (quantised, or wider than float32)" in refusal(folder)


@pytest.mark.parametrize(("value", "place"), [(float("nan"), (0, 0)), (-float("inf"), (31, 52))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_single_number_that_is_not_finite(
    dtype: str, value: float, place: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tensors, "_PIECE", 1000)
    name = "model.layers.1.mlp.down_proj.weight"
    folder = write("llama", tmp_path / "in", dtype)
    tensor = state("llama", dtype)[name].clone()
    tensor[place] = value
    reader = Reader(edit_tensors(folder, **{name: tensor}))
    for read in (
        reader.check_finite,
        reader.model,
        lambda: jax.tree.map(np.asarray, (reader.outer(), reader.layer(1))),
    ):
        with pytest.raises(UserError, match=f"the weight {name} holds NaN or infinity"):
            read()


@pytest.mark.parametrize("piece", [100, 1 << 30])
@pytest.mark.parametrize("kind", ["one file", "shards", "torch"])
def test_every_number_is_looked_at_in_pieces_of_any_size(
    kind: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tensors, "_PIECE", piece)
    if kind == "torch":
        folder = write_bin("llama_biases", tmp_path / "in")
    else:
        folder = write("llama_biases", tmp_path / "in", shard="12KB" if kind == "shards" else "1GB")
    seen = []
    Reader(folder).check_finite(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(tensor.nbytes for tensor in state("llama_biases").values()),) * 2
    assert seen == sorted(seen)


def test_a_tensor_stored_twice(tmp_path: Path):
    folder = write("opt_125m_like", tmp_path / "in")
    edit_tensors(folder, decoder__layers__0__fc1__bias=torch.zeros(53))
    assert "model.decoder.layers.0.fc1.bias is stored twice" in refusal(folder)
    sharded = write("llama", tmp_path / "sharded", shard="12KB")
    shards = sorted(sharded.glob("*.safetensors"))
    shutil.copyfile(shards[0], shards[1])
    assert "tensors are missing" in refusal(sharded)


@pytest.mark.parametrize("length", [0, 100, -1])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_files_that_are_cut_off(kind: str, length: int, tmp_path: Path):
    folder = write("llama", tmp_path / "in") if kind == "safetensors" else write_bin("llama", tmp_path / "in")
    path = next(folder.glob(f"*.{kind}"))
    path.write_bytes(path.read_bytes()[:length])
    assert refusal(folder).startswith(f"{path} cannot be read")


def test_files_of_another_kind(folder: Path, tmp_path: Path):
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert refusal(folder) == f"{path} is a Git LFS pointer and not the weights: run `git lfs pull` in its folder."
    path.write_bytes(b"\xff" * 1000)
    assert refusal(folder).startswith(f"{path} cannot be read")
    path.unlink()
    assert "holds no weights: neither model.safetensors nor pytorch_model.bin" in refusal(folder)
    binary = write_bin("llama", tmp_path / "bin") / "pytorch_model.bin"
    for content in ([1, 2], {"model": state("llama")}):
        torch.save(content, binary)
        assert refusal(binary.parent).startswith(f"{binary} holds something other than tensors by name")


def test_torch_files_never_run_code(tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    folder = write_bin("llama", tmp_path / "bin")
    torch.save(state("llama") | {"bomb": Bomb()}, folder / "pytorch_model.bin")
    said = refusal(folder)
    assert said.startswith(
        f"{folder / 'pytorch_model.bin'} cannot be read as weights: it is damaged, or holds more than"
    )
    assert "weights_only" not in said
    assert not (tmp_path / "ran").exists()


def test_indices(tmp_path: Path):
    folder = write("llama", tmp_path / "in", shard="12KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_bytes())
    name, shard = next(iter(content["weight_map"].items()))

    def refused(weight_map: Any) -> str:
        index.write_text(json.dumps({"weight_map": weight_map}))
        return refusal(folder)

    for outside in ("../x.safetensors", "sub/../../x.safetensors", "/etc/passwd", "..\\x.safetensors"):
        assert "outside of its folder" in refused(content["weight_map"] | {name: outside})
    assert "gone.safetensors is missing" in refused(content["weight_map"] | {name: "gone.safetensors"})
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"one.that.no.file.has": shard}}))
    assert load(folder).config.layers == 3
    assert "tensors are missing" in refused({})
    for nonsense in ([], None, "text", {name: 3}):
        assert str(index) in refused(nonsense)
    index.write_text("{")
    assert f"{index} is not an index of weight files" in refusal(folder)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1,}', "\ufeff{}"])
def test_configs_that_are_not_json_objects(text: str, folder: Path):
    (folder / "config.json").write_text(text)
    assert refusal(folder).startswith(f"the config.json of {folder} is not ")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    assert "config.json cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": None, "model_type": None}, "model_type None is not supported"),
        ({"intermediate_size": ...}, "config.json has no intermediate_size"),
        ({"intermediate_size": [53, 40, 53]}, "which must be a positive whole number"),
        ({"num_key_value_heads": 3}, "4 heads for 3 key/value heads"),
    ],
)
def test_configs_that_are_not_supported(changes: dict, sentence: str, folder: Path):
    """Others are refused in tests/models/test_published_configs.py."""
    assert sentence in refusal(edit_config(folder, **changes))


PROGRAM = """
import sys
from spap_jax.checkpoint import load
from spap_jax.errors import UserError
for name in sys.argv[1:]:
    try:
        load(name)
    except UserError as error:
        print(error)
"""


class TestOrbax:
    @pytest.fixture
    def orbax(self, tmp_path: Path) -> Path:
        save_orbax(load(write("llama_tied", tmp_path / "in")), tmp_path / "orbax")
        return tmp_path / "orbax"

    @pytest.mark.parametrize("change", [{"intermediate_size": 54}, {"num_hidden_layers": 2}])
    def test_other_sizes(self, change: dict, orbax: Path):
        assert "where config.json gives [" in refusal(edit_config(orbax, **change), load)

    def test_other_weights(self, orbax: Path):
        assert "holds other weights than its config.json" in refusal(edit_config(orbax, attention_bias=True), load)

    def test_damaged_data(self, orbax: Path, tmp_path: Path):
        places = [shutil.copytree(orbax, tmp_path / name) for name in ("cut", "no manifest", "no metadata")]
        for file in (places[0] / "params" / "ocdbt.process_0" / "d").iterdir():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        (places[1] / "params" / "manifest.ocdbt").unlink()
        (places[2] / "params" / "_METADATA").unlink()
        program = [sys.executable, "-c", PROGRAM, *map(str, places)]  # Orbax's other readers complain on stderr
        run = subprocess.run(program, capture_output=True, text=True)
        for place, sentence in zip(places, run.stdout.splitlines(), strict=True):
            assert sentence.startswith(f"{place / 'params'} cannot be read (")

    def test_its_own_facts(self, orbax: Path):
        (orbax / "spap_source.json").write_text("{}")
        assert refusal(orbax, load).startswith(f"{orbax / 'spap_source.json'} cannot be read")

    def test_not_finite(self, orbax: Path):
        model = load(orbax)
        model.params["layers"]["mlp"]["up"] = model.params["layers"]["mlp"]["up"].at[1, 2, 3].set(float("nan"))
        save_orbax(model, orbax.parent / "other")
        assert "the weight layers/mlp/up" in refusal(orbax.parent / "other", load)


def test_a_model_that_is_replaced_while_it_is_read(folder: Path):
    layer = Reader(folder).layer(0)
    before = np.asarray(layer["mlp"]["up"])
    file = folder / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # as of another file of the same length
    with pytest.raises(
        UserError, match="was replaced while the model was read, and the result would be of both: run the"
    ):
        np.asarray(layer["mlp"]["up"])
    np.testing.assert_array_equal(Reader(folder).layer(0)["mlp"]["up"], before)
