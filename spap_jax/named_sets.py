"""The data sets that have a short name: where their files are, and how papers measure perplexity on them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spap_jax.remote import base_name
from spap_jax.texts import is_file, joined

Role = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Protocol:
    """How rows become one text, and the text tokens.

    Attributes:
        between: What is put between two rows.
        rows: Only the first so many are read; None reads all.
        special_tokens: Whether the tokenizer adds its special tokens to the text, once, where it has any.
        windows: Only the first so many windows count; None counts all.
    """

    between: str = "\n\n"
    rows: int | None = None
    special_tokens: bool = False
    windows: int | None = None

    def join(self, rows: Iterable[Any], name: str) -> Iterator[str]:
        """The text of the rows in pieces."""
        return joined(islice(rows, self.rows), name, self.between)


@dataclass(frozen=True)
class NamedSet:
    """A data set with a short name.

    Attributes:
        repo: Its hub repository.
        config: Its configuration there.
        revision: The pinned commit.
        files: For each role the split's name and its file.
        evaluation: How perplexity is measured on it; calibration takes the plain protocol.
    """

    repo: str
    config: str
    revision: str
    files: dict[Role, tuple[str, str]]
    evaluation: Protocol

    def protocol(self, role: Role) -> Protocol:
        """How its rows become tokens in a role."""
        return self.evaluation if role == "evaluation" else Protocol()


NAMED = {
    "wikitext2": NamedSet(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        {
            "calibration": ("train", "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
            "evaluation": ("test", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
        },
        Protocol(special_tokens=True),
    ),
    "c4": NamedSet(
        "allenai/c4",
        "en",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {
            "calibration": ("train", "en/c4-train.00000-of-01024.json.gz"),
            "evaluation": ("validation", "en/c4-validation.00000-of-00008.json.gz"),
        },
        Protocol(" ", rows=1100, special_tokens=True, windows=256),
    ),
}
"""The evaluation protocols are those of GPTQ, SparseGPT and Wanda; docs/evaluation.md spells them out."""


def data_name(data: str | Path) -> str:
    """What strangers are told of data: its name on the hub, or a file's own name without the path to it."""
    short, colon, copy = str(data).partition(":")
    if short in NAMED:
        return f"{short}{colon}{copy and base_name(copy)}"
    return base_name(data) if isinstance(data, Path) or is_file(data) else data
