"""A fingerprint tells whether a checkpoint has changed."""

import os
import shutil
from pathlib import Path

import pytest
from tiny_checkpoints import write

from spap_jax.checkpoint import load, save_orbax
from spap_jax.checkpoint.fingerprint import fingerprint


def flip(file: Path, place: int) -> None:
    """Changes a bit of one byte, counted from the end if negative; a second time restores it."""
    with file.open("r+b") as opened:
        opened.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        [byte] = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("orbax", [False, True])
def test_a_fingerprint_is_of_the_content(orbax: bool, tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "in", shard="40KB")
    paths = [folder / "config.json", *folder.glob("*.safetensors")]
    if orbax:
        save_orbax(load(folder), tmp_path / "orbax")
        folder = tmp_path / "orbax"
        paths = [max((folder / "params").rglob("*"), key=lambda file: file.stat().st_size)]
    first = fingerprint(folder)
    assert fingerprint(shutil.copytree(folder, tmp_path / "copy")) == first
    for path in paths:
        flip(path, -1)
        assert fingerprint(folder) != first
        flip(path, -1)
    assert fingerprint(folder) == first


def test_a_long_file_is_looked_at_from_end_to_end(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "in")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 30)  # sparse, so it takes no space
    first = fingerprint(folder)
    for place in (0, -1):
        flip(folder / "model.safetensors", place)
        assert fingerprint(folder) != first
        flip(folder / "model.safetensors", place)
    assert fingerprint(folder) == first
