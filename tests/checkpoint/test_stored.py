"""A stored weight is that of the model that is read as a whole."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_checkpoints import write, write_bin

from spap_jax.checkpoint import Reader


@pytest.mark.parametrize("kind", [write, write_bin])
@pytest.mark.parametrize("variant", ["llama_biases", "opt_350m_like"])
def test_a_layer_alone_is_that_of_the_stack(variant: str, kind: Any, tmp_path: Path):
    reader = Reader(kind(variant, tmp_path / "in", "bfloat16"))
    model = reader.model()
    stored = reader.outer() | {"layers": reader.layer(1)}
    whole = model.params | {"layers": jax.tree.map(lambda a: a[1], model.params["layers"])}
    for array, expected in zip(jax.tree.leaves(stored), jax.tree.leaves(whole), strict=True):
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected))
