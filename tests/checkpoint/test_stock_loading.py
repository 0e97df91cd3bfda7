"""Pruned checkpoints load in stock transformers, in another Python if `--old-python PATH` names one."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import edit_config, write

import spap_jax

SCRIPT = Path(__file__).with_name("stock_load.py")
VARIANTS = ("llama_llama3_rope_v4", "llama_biases", "qwen2_tied", "opt_125m_like", "opt_350m_like")


def pruned(variant: str, folder: Path) -> Path:
    """A pruned checkpoint with the logits that it should have."""
    model = spap_jax.load(write(variant, folder / f"{variant}-in"))
    tokens = np.random.default_rng(0).integers(2, 97, (4, 24))
    result = spap_jax.prune(model, tokens, sparsity=0.3, rounds=0, penalty_steps=1, swap_rounds=0)
    spap_jax.save(result.model, folder / variant)
    np.save(folder / variant / "tokens.npy", tokens)
    np.save(folder / variant / "logits.npy", spap_jax.logits(result.model, tokens))
    return folder / variant


def load_elsewhere(python: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [python, str(SCRIPT), *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)


def test_pruned_checkpoints_in_stock_transformers(tmp_path: Path, request: pytest.FixtureRequest):
    python = request.config.getoption("--old-python")
    folders = [pruned(variant, tmp_path) for variant in VARIANTS]
    run = load_elsewhere(python, *folders)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["transformers"]
    # A width that the weights do not have is seen: the script compares something.
    edit_config(folders[0], intermediate_size=53)
    assert load_elsewhere(python, folders[0]).returncode != 0
