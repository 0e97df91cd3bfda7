"""The data sets with a short name: where their files are, and how papers measure perplexity on them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spap_jax.data.texts import Piece, is_file, joined
from spap_jax.storage.location import public_name

Role = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Protocol:
    """How rows are joined to one text, and the text is tokenised.

    Attributes:
        between: Separator between two rows.
        rows: Number of rows to read, from the first; None reads all.
        special_tokens: Whether the tokenizer adds its special tokens, if it has any, once to the text.
        windows: Number of windows to use, from the first; None uses all.
    """

    between: str = "\n\n"
    rows: int | None = None
    special_tokens: bool = False
    windows: int | None = None

    def join(self, rows: Iterable[Any], name: str) -> Iterator[Piece]:
        """Yields the joined text of the rows in pieces, or their conversations."""
        return joined(islice(rows, self.rows), name, self.between)


@dataclass(frozen=True)
class NamedSet:
    """A data set with a short name.

    Attributes:
        repo: Its hub repository.
        config: Its configuration on the hub.
        revision: The pinned commit.
        files: Name and file of the split for each role.
        evaluation: How perplexity is measured on it; calibration uses the default protocol.
    """

    repo: str
    config: str
    revision: str
    files: dict[Role, tuple[str, str]]
    evaluation: Protocol


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


def data_file(data: str) -> str | None:
    """The path or address of data, or of the copy of a named set; None for data sets of the hub."""
    short, _, copy = data.partition(":")
    file = copy if short in NAMED else data if is_file(data) else ""
    return file or None


def data_name(data: str | Path) -> str:
    """The public name of data: its name on the hub, or the name of a file without its path."""
    short, colon, copy = str(data).partition(":")
    if short in NAMED:
        return f"{short}{colon}{copy and public_name(copy)}"
    return public_name(data) if isinstance(data, Path) or is_file(data) else data
