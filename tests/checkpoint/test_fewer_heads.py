"""Models with fewer heads: config.json declares it in fields that stock loaders read, or the model is not written."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import edit_config, fields, same, with_groups, write

import spap_jax
from spap_jax.checkpoint import load, save, save_orbax
from spap_jax.errors import UserError

TOKENS = np.random.default_rng(0).integers(2, 97, (8, 16))


def test_the_heads_are_edited_and_their_width_is_added(tmp_path: Path):
    source = write("qwen2_two_kv_heads", tmp_path / "in")
    before = dict(fields(source))
    assert "head_dim" not in before
    model = with_groups(load(source), 1)
    save(model, tmp_path / "out")
    changed = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    assert fields(tmp_path / "out") == [*(before | changed).items()]
    assert same(load(tmp_path / "out"), model)


def test_there_and_back_and_pruned_again(tmp_path: Path):
    """The model's config gives the head width, but no number of key/value heads."""
    source = edit_config(write("llama", tmp_path / "in"), head_dim=8)
    save(with_groups(load(source), 0, 3), tmp_path / "once")
    save_orbax(load(tmp_path / "once"), tmp_path / "orbax")
    save(load(tmp_path / "orbax"), tmp_path / "back")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    once = load(tmp_path / "back")
    twice = spap_jax.prune(once, TOKENS, attention_sparsity=0.5, method="wanda").model
    assert [(c.heads, c.kv_heads, c.head_dim) for c in (once.config, twice.config)] == [(2, 2, 8), (1, 1, 8)]
    save(twice, tmp_path / "twice")
    model = load(tmp_path / "twice")
    assert same(model, twice)
    written = spap_jax.generate(model, TOKENS, 4, eos=(), pad=0)
    expected = np.asarray(spap_jax.logits(model, written))[:, 15:-1].argmax(axis=-1)
    np.testing.assert_array_equal(written[:, 16:], expected)


@pytest.mark.parametrize(
    ("variant", "sentence"), [("opt_125m_like", "are square"), ("llama", "3 does not"), ("olmo2", "of all heads")]
)
def test_no_stock_loader_would_take_them(variant: str, sentence: str, tmp_path: Path):
    model = load(write(variant, tmp_path / "in"))
    small = dataclasses.replace(model, config=model.config.with_kv_heads(3))
    for write_out in (save, save_orbax):
        with pytest.raises(UserError, match=sentence):
            write_out(small, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["in"]
