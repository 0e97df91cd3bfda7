"""Beginnings of texts of many kinds, which a model continues to write its own calibration text.

What a model writes from nothing follows what it was trained on most: one made for code writes hardly any prose, and
pruned on that it loses prose. The beginnings were written for this project. They are in an order in which the first
ones are of all kinds too.
"""

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from spap_jax.data.chat import encode_prompt, prompts_of


def openings(tokenizer: Any, start: int) -> Iterator[list[int]]:
    """Yields the token ids of each beginning, from the start token on.

    Prompts go through the chat template, and are left out where a tokenizer has none.
    """
    lines = resources.files("spap_jax.data").joinpath("openings.jsonl").read_text("utf-8").splitlines()
    for row in map(json.loads, lines):
        if "text" in row:
            yield [start, *tokenizer(row["text"], add_special_tokens=False)["input_ids"]]
        elif isinstance(getattr(tokenizer, "chat_template", None), str):
            [prompt] = prompts_of([row], "openings")
            ids = list(encode_prompt(tokenizer, prompt))
            yield ids if ids[0] == start else [start, *ids]
