"""The store of an unfinished run: its output, what another process finds, and that nothing of a user's is lost."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stores
from tiny_checkpoints import raw_tensors, write

from spap_jax.checkpoint import Reader, load, store, weight_files
from spap_jax.checkpoint.store import FolderStore, resume_folder
from spap_jax.errors import NotFiniteError, UserError

RUN = {"seed": 1, "model": "a" * 64}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(write("llama", tmp_path_factory.mktemp("dense") / "model"))


def opened(dense: Reader, output: Any, identity: Any = RUN, **options: Any) -> FolderStore:
    return FolderStore(output, identity, dense.config, dense.source, dense.dtypes, **options)


def device(layer: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), layer)


def make(dense: Reader, output: Any, identity: Any = RUN, files: Any = None, **options: Any) -> None:
    with opened(dense, output, identity, **options) as kept:
        kept.outer(dense.outer())
        for i in range(dense.config.layers):
            kept.put(i, device(dense.layer(i)), {"layer": i})
        kept.finish(files or {"README.md": "card"})
        kept.remove()


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("at", ["disk", "address"])
def test_the_output_has_the_bits_of_the_source(
    dense: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: bool, at: str
) -> None:
    frail = stores.begin()
    if not joined:
        monkeypatch.setattr(weight_files, "JOINED_BYTES", 0)
    output = tmp_path / "out" if at == "disk" else "frail://bucket/out"
    make(dense, output)
    if at == "address":
        assert {name.split("/")[2] for name in frail.store} == {"out"}
        for name, content in stores.contents("/bucket/out").items():
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / name).write_bytes(content)
    assert raw_tensors(tmp_path / "out") == raw_tensors(dense.source.folder)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if joined else dense.config.layers + 1)
    load(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    listed = json.loads((tmp_path / "out" / "spap_files.json").read_bytes())
    assert {"tokenizer.json", "config.json", "README.md"} < listed.keys()
