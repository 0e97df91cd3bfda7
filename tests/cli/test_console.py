"""Tables on a terminal of 80 columns."""

import re

import pytest

from spap_jax.cli import console


def test_names_that_are_too_long_are_not_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Two paths that differ at their ends have to differ in the table."""
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"/a/long/way/down/to/the/folder/of/the/checkpoint-{number}" for number in (1, 2)]
    console.table("speed", ("", *names, "ratio"), [("prefill, tokens/s", "15342.9", "11011.1", "0.718x")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(number in lines[-1] for number in ("15342.9", "11011.1", "0.718x"))
    head = [re.split(r"\s{2,}", line.strip().removesuffix("ratio").strip()) for line in lines[1:-2]]
    assert ["".join(parts) for parts in zip(*head, strict=True)] == names
