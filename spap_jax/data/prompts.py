"""Prompts for a model to answer: messages by themselves, or conversations up to the last message to the model."""

from collections.abc import Iterable, Iterator
from typing import Any

from spap_jax.data.conversations import COLUMN as MESSAGES
from spap_jax.data.conversations import Conversation, checked_messages
from spap_jax.data.in_memory import Data
from spap_jax.data.sources import open_data
from spap_jax.errors import UserError

COLUMN = "prompt"
"""Column of a data set that holds prompts; one that holds conversations serves as well."""


def load_prompts(data: Data) -> list[Conversation]:
    """Reads prompts: conversations that end with a message to the model.

    Args:
        data: The path or address of a .jsonl, .json or .parquet file, a hub data set (its training split), or an
            object: rows in any iterable. A row is a text, or has a ``prompt``, a text or a list of messages, or has
            ``messages``. Of a conversation, what the assistant says at its end is left out.

    Raises:
        UserError: The data cannot be read, or hold something else.
    """
    name, content, *_ = open_data(data, "calibration", prompts_of)
    found = [piece for piece in content if isinstance(piece, Conversation)]
    if not found:
        raise UserError(
            f'{name} holds no prompts: give rows with a "{COLUMN}" or with "{MESSAGES}", as in a .jsonl file'
        )
    return found


def prompts_of(rows: Iterable[Any], name: str) -> Iterator[Conversation]:
    """Yields the prompts of rows; see `load_prompts`. Null ones are skipped.

    Raises:
        UserError: A row holds none.
    """
    for number, row in enumerate(rows, 1):
        place = f"row {number} of {name}"
        if isinstance(row, dict) and not row.keys() & {MESSAGES, COLUMN}:
            columns = ", ".join(map(str, row)) or "none"
            raise UserError(f'{place} has no column "{COLUMN}" or "{MESSAGES}" but {columns}: rename that with prompts')
        given = row
        if isinstance(row, dict):  # a table that holds both has null in one of them
            given = row.get(COLUMN) if row.get(MESSAGES) is None else row[MESSAGES]
        if given is not None:
            yield Conversation(place, _asked(given, place))


def _asked(given: Any, place: str) -> list[dict[str, Any]]:
    """Returns the messages up to the last one to the model."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages = checked_messages(given, place)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"{place} has no message to answer, only the assistant's: leave it out, or add the user's")
    return messages
