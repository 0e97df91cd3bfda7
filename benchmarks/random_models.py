"""Random checkpoints, pruned by the real command in its own process, which reports time and memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spap_jax import checkpoint
from spap_jax.models import decoder, family_of
from spap_jax.models.model import Model, Source


def write_random_model(folder: Path, theirs: dict[str, Any], seed: int = 0) -> None:
    """Writes a checkpoint with random weights.

    Args:
        folder: Folder to write to.
        theirs: Content of its config.json; the weights have the dtype that it names.
        seed: Random seed of the weights.
    """
    config = family_of(theirs).read_config(theirs)
    params = decoder.init(config, jax.random.key(seed))
    source = Source(str(folder), None, json.dumps(theirs, indent=1))
    checkpoint.save(Model(config, params, source), folder, dtype=theirs.get("dtype") or theirs["torch_dtype"])


def pruned_report(folder: Path, theirs: dict[str, Any], sequences: int, length: int, words: list[str]) -> dict:
    """Runs the command on a random checkpoint and random tokens, and returns its report.

    Args:
        folder: An empty folder for the checkpoint, the tokens and the output.
        theirs: Content of the checkpoint's config.json.
        sequences: Number of calibration sequences.
        length: Tokens per sequence.
        words: Further arguments for the command.
    """
    write_random_model(folder / "dense", theirs)
    tokens = np.random.default_rng(0).integers(0, theirs["vocab_size"], (sequences, length))
    np.save(folder / "tokens.npy", tokens.astype(np.int32))
    command = [sys.executable, "-m", "spap_jax", "prune", str(folder / "dense"), "--output", str(folder / "pruned")]
    command += ["--data", str(folder / "tokens.npy"), "--sequences", str(sequences)]
    command += ["--sequence-length", str(length), "--sparsity", "0.3", *words]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((folder / "pruned" / "spap_report.json").read_text(encoding="utf-8"))
