"""Pruned checkpoints load in stock transformers, in this Python or in the one given with `--old-python PATH`."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import with_groups, write

import spap_jax
from spap_jax.pruning.reduce import take_channels

SCRIPT = Path(__file__).with_name("stock_load.py")
VARIANTS = (
    "llama_llama3_rope_v4",
    "llama_biases",
    "llama_two_kv_heads",
    "qwen2",
    "qwen2_tied",
    "opt_125m_like",
    "opt_350m_like",
    "llama_tied",
    "mistral_window",
)
RECENT = ("qwen3", "gemma2", "gemma3", "olmo2", "olmo3", "smollm3", "granite", "phi3", "glm4", "llama_yarn_v4")
FEWER_HEADS = ("llama_two_kv_heads", "mistral_window", "qwen3", "gemma2", "gemma3", "smollm3", "granite", "glm4")
PRUNED = {"llama_tied": {"method": "flap"}}  # adds biases


def pruned(variant: str, folder: Path, **how: Any) -> Path:
    """Writes a pruned checkpoint with its expected logits."""
    model = spap_jax.load(write(variant, folder / f"{variant}-in"))
    tokens = np.random.default_rng(0).integers(2, 97, (4, 24))
    small = spap_jax.prune(model, tokens, **how).model if how else halved(model, variant in FEWER_HEADS)
    spap_jax.save(small, folder / variant)
    np.save(folder / variant / "tokens.npy", tokens)
    np.save(folder / variant / "logits.npy", spap_jax.logits(small, tokens))
    return folder / variant


def halved(model: spap_jax.Model, heads: bool) -> spap_jax.Model:
    """Halves the MLP channels, and the key/value heads if asked to, without the time that pruning takes."""
    config, layers = model.config, model.params["layers"]
    kept = jnp.arange(0, config.intermediate, 2)
    layers = layers | {"mlp": jax.vmap(lambda mlp: take_channels(model.family, mlp, kept))(layers["mlp"])}
    small = spap_jax.Model(config.narrowed(len(kept)), model.params | {"layers": layers}, model.source)
    return with_groups(small, *range(config.kv_heads // 2)) if heads else small


def load_in(python: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the script in this process, which has imported what it needs, unless another Python is asked for."""
    if python == sys.executable:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *folders])
        runpy.run_path(str(SCRIPT))
        return
    settings = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [python, str(SCRIPT), *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["loaded"] == len(folders)


def test_pruned_checkpoints_in_stock_transformers(tmp_path: Path, pytestconfig, monkeypatch: pytest.MonkeyPatch):
    folders = [pruned(variant, tmp_path, **PRUNED.get(variant, {})) for variant in VARIANTS]
    load_in(str(pytestconfig.getoption("--old-python")), folders, monkeypatch)


@pytest.mark.filterwarnings("ignore:3 key/value heads")
def test_recent_families_and_fewer_heads_in_todays_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """3 heads do not divide the width, and the Qwen2 of transformers 4.46 reads no `head_dim`."""
    fewer = pruned("qwen2", tmp_path, method="wanda", attention_sparsity=0.25)
    folders = [fewer, *(pruned(variant, tmp_path) for variant in RECENT)]
    load_in(sys.executable, folders, monkeypatch)
