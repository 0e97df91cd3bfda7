"""Pruned checkpoints in Tunix: `--tunix-python PATH` is a Python created by `make clients-check`."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import hf_model

import spap_jax as spap

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "continue_in_tunix.py"
STORIES = EXAMPLES / "llama-stories"


@pytest.fixture(params=["llama", "qwen2"])
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    if request.param == "llama":
        shutil.copytree(STORIES, folder)
    else:
        hf_model("qwen2").save_pretrained(folder)
    return folder


def trained(request: pytest.FixtureRequest, *words: object) -> subprocess.CompletedProcess[str]:
    command = [request.config.getoption("--tunix-python"), SCRIPT, *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_a_pruned_model_is_trained_and_comes_back(dense: Path, tmp_path: Path, request: pytest.FixtureRequest):
    """The divergences that Tunix finds are ours: it computes the same predictions, before and after."""
    model = spap.load(dense)
    tokens = np.random.default_rng(0).integers(0, model.config.vocabulary, (32, 32))
    pruned = spap.prune(model, tokens, sparsity=0.5, method="magnitude").model
    spap.save(pruned, tmp_path / "pruned")
    np.save(tmp_path / "tokens.npy", tokens)
    places = [tmp_path / name for name in ("pruned", "dense", "tokens.npy", "trained")]
    done = trained(request, *places, "--steps", 10, "--learning-rate", 1e-3)
    assert done.returncode == 0, done.stderr
    said: Any = re.search(r"held out: ([\d.]+) before, ([\d.]+) after", done.stdout)
    before, after = map(float, said.groups())
    assert before == pytest.approx(spap.divergence(model, pruned, tokens[-4:]), abs=2e-4)
    assert after == pytest.approx(spap.divergence(model, spap.load(tmp_path / "trained"), tokens[-4:]), abs=2e-4)
    assert after < before


def test_what_tunix_does_not_compute_is_refused(tmp_path: Path, request: pytest.FixtureRequest):
    shutil.copytree(STORIES, tmp_path / "scaled")
    config = json.loads((STORIES / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "llama3"
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config))
    done = trained(request, tmp_path / "scaled", tmp_path / "scaled", "none.npy", tmp_path / "out")
    assert done.returncode == 1
    assert "Tunix computes no rotary embedding of the type llama3" in done.stderr
