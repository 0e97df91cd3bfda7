"""A slice of a stored weight equals that slice of the full array, and nothing else of the file is read."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from stored_in_processes import free_port
from tiny_checkpoints import edit_tensors, state, write, write_bin

from spap_jax.checkpoint import Reader
from spap_jax.errors import UserError


def half(array: Any, axis: int, second: bool) -> tuple[slice, ...]:
    """Returns the slices of the first or the second half along an axis."""
    middle = array.shape[axis] // 2
    cut = slice(middle, array.shape[axis]) if second else slice(0, middle)
    return tuple(cut if i == axis else slice(None) for i in range(len(array.shape)))


@pytest.mark.parametrize("kind", [write, write_bin])
@pytest.mark.parametrize("variant", ["llama_biases", "opt_350m_like"])
def test_halves_make_the_whole(variant: str, kind: Any, tmp_path: Path):
    reader = Reader(kind(variant, tmp_path / "in", "bfloat16"))
    model = reader.model()
    stored = reader.outer() | {"layers": reader.layer(1)}
    whole = model.params | {"layers": jax.tree.map(lambda a: a[1], model.params["layers"])}
    for (path, array), expected in zip(jax.tree.leaves_with_path(stored), jax.tree.leaves(whole), strict=True):
        expected = np.asarray(expected)
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        for axis, letter in enumerate(reader.family.letters(jax.tree_util.keystr(path, simple=True, separator="/"))):
            if letter != "h":
                index = half(expected, axis, second=True)
                np.testing.assert_array_equal(array[index], expected[index])


def test_what_is_not_contiguous_in_the_file_is_no_part(tmp_path: Path):
    q = Reader(write("llama", tmp_path / "in")).layer(0)["attention"]["q"]
    with pytest.raises(ValueError, match="no contiguous part"):
        q[:, :, 1:]


def test_a_part_knows_nothing_of_the_rest(tmp_path: Path):
    """A NaN in the second half of the channels does not prevent reading the first half."""
    name = "model.layers.0.mlp.down_proj.weight"
    damaged = state("llama")[name].clone()
    damaged[:, 40] = float("nan")
    folder = edit_tensors(write("llama", tmp_path / "in"), **{name: damaged})
    down = Reader(folder).layer(0)["mlp"]["down"]
    assert np.isfinite(down[half(down, 0, second=False)]).all()
    with pytest.raises(UserError, match=f"the weight {name} holds NaN or infinity"):
        down[half(down, 0, second=True)]


@pytest.mark.slow
def test_each_process_reads_its_own_part(tmp_path: Path):
    """Two processes shard the weights: only the process with the damaged head reports it."""
    name = "model.layers.0.self_attn.q_proj.weight"
    damaged = state("llama")[name].clone()
    damaged[-1] = torch.nan  # in the last head
    folder = edit_tensors(write("llama", tmp_path / "in"), **{name: damaged})
    script, port = Path(__file__).with_name("stored_in_processes.py"), free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(port), str(i)], stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert "reads its part" in said[0]
    assert f"the weight {name} holds NaN" in said[1]
