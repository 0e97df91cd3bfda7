"""A text with its tokens, and helpers that read it or expect an error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spap_jax import UserError
from spap_jax.data.tokens import TokenBlocks, load_tokens

VOCABULARY = 40
TEXTS = [f"w{i % 37} w{i % 11} w{i % 5} w{i % 29} w{i % 7}" for i in range(60)]
JOINED = "\n\n".join(TEXTS)
WORDS = np.array([int(word[1:]) + 1 for word in JOINED.split()])  # the tokens that the fixture `tokenizer` gives


def read(data, tokenizer: Any = None, **changes) -> TokenBlocks:
    options = {"sequence_length": 10, "sequences": 7, "role": "calibration"} | changes
    return load_tokens(data, tokenizer=tokenizer, **options)


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def refused(data, tokenizer=None, **changes) -> str:
    with pytest.raises(UserError) as caught:
        read(data, tokenizer, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert ": " in message, "a sentence says what to do after a colon"
    return message
