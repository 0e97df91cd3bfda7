"""The code of the page on NNX runs as it stands: training lowers the loss, and the result is saved."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spap_jax as spap

ROOT = Path(__file__).parents[2]


def test_the_model_as_an_nnx_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "docs" / "training_and_clients.md").read_text("utf-8")
    *_, code = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    exec(code, names)
    first, *_, last = names["losses"]
    assert last < first
    tokens = names["text"].tokens
    np.testing.assert_allclose(names["decoder"](tokens), spap.logits(spap.load("trained"), tokens), atol=1e-4)
