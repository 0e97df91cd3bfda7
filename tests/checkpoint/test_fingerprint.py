"""A fingerprint tells whether a checkpoint has changed."""

import shutil
from pathlib import Path

from tiny_checkpoints import write

from spap_jax.checkpoint import load, save_orbax
from spap_jax.checkpoint.fingerprint import fingerprint


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "in", shard="40KB")
    first = fingerprint(folder)
    assert fingerprint(shutil.copytree(folder, tmp_path / "copy")) == first
    for path in (folder / "config.json", *folder.glob("*.safetensors")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert fingerprint(folder) != first
        path.write_bytes(content)
    assert fingerprint(folder) == first


def test_a_fingerprint_of_an_orbax_folder(tmp_path: Path) -> None:
    save_orbax(load(write("llama", tmp_path / "in")), tmp_path / "orbax")
    first = fingerprint(tmp_path / "orbax")
    copy = shutil.copytree(tmp_path / "orbax", tmp_path / "copy")
    assert fingerprint(copy) == first
    largest = max((copy / "params").rglob("*"), key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(copy) != first


def test_a_long_file_is_looked_at_from_end_to_end(tmp_path: Path) -> None:
    folder = write("llama", tmp_path / "in")
    long = folder / "model.safetensors"
    with long.open("r+b") as file:
        file.truncate(1 << 30)  # sparse, so it takes no space
    first = fingerprint(folder)
    for place in (0, (1 << 30) - 1):
        with long.open("r+b") as file:
            file.seek(place)
            before = file.read(1)
            file.seek(place)
            file.write(bytes([before[0] ^ 1]))
        assert fingerprint(folder) != first
        with long.open("r+b") as file:
            file.seek(place)
            file.write(before)
    assert fingerprint(folder) == first
