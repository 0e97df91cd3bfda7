"""Conversations, the prompts that begin them, and their tokens with a mask of what the assistant wrote.

A chat template that marks what the assistant writes (``{% generation %}``) gives the mask itself. With any other
template, the assistant's part is what its message adds to the rendering of the messages before it; a greeting, which
has none before it, does not count.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from spap_jax.errors import UserError, first_line

MESSAGES = "messages"
"""Column of a data set that holds conversations."""

PROMPT = "prompt"
"""Column of a data set that holds prompts."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Conversation(NamedTuple):
    """A conversation: its place, for errors, and messages with a "role", a "content" and what else a template reads."""

    place: str
    messages: list[dict[str, Any]]


Encode = Callable[[Conversation], tuple[np.ndarray, np.ndarray]]
"""Returns the token ids [N] of a conversation, and a mask [N], 1 on the tokens that the assistant wrote, else 0."""


def holds_conversation(row: Any) -> bool:
    """Whether a row holds a conversation; one that has a text as well is taken for its text."""
    return isinstance(row, dict) and MESSAGES in row and row.get("text") is None


def conversations(rows: Iterable[Any], name: str) -> Iterator[Conversation]:
    """Yields the conversations of rows, named ``name`` in errors; null ones are skipped.

    Raises:
        UserError: A row holds no conversation.
    """
    for number, row in enumerate(rows, 1):
        place = f"row {number} of {name}"
        if not holds_conversation(row):
            raise UserError(f'{place} has no "{MESSAGES}", which rows before it have: give every row a conversation')
        if row[MESSAGES] is not None:
            yield Conversation(place, _checked(row[MESSAGES], place))


def prompts_of(rows: Iterable[Any], name: str) -> Iterator[Conversation]:
    """Yields the prompts of rows: conversations that end with a message to the model; null ones are skipped.

    Args:
        rows: Texts, or dicts with a "prompt", a text or a list of messages, or with "messages". What the assistant says
            at the end of a conversation is left out.

    Raises:
        UserError: A row holds none.
    """
    for number, row in enumerate(rows, 1):
        place, given = f"row {number} of {name}", row
        if isinstance(row, dict):
            if not row.keys() & {MESSAGES, PROMPT}:
                raise UserError(f'{place} has no "{PROMPT}" or "{MESSAGES}": rename the column with the prompts')
            given = row.get(PROMPT) if row.get(MESSAGES) is None else row[MESSAGES]
        if given is None:
            continue
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else _checked(given, place)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise UserError(f"{place} has no message to answer, only the assistant's: leave it out, or add the user's")
        yield Conversation(place, messages)


def _checked(messages: Any, place: str) -> list[dict[str, Any]]:
    """Returns messages without the empty fields that a table adds, which a template would take for values."""
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if all(isinstance(message.get(key), str) for message in given for key in ("role", "content")):
            return given
    raise UserError(f'{place} is no conversation: give a list of messages, each with a text as "role" and "content"')


def encoder_of(tokenizer: Any) -> Encode:
    """Returns the function that encodes conversations by the chat template of a tokenizer.

    Raises:
        UserError: See `check_template`; or the tokenizer has no positions of its tokens in the text.
    """
    check_template(tokenizer)
    if not tokenizer.is_fast:
        raise UserError(
            f"conversations need a tokenizer that gives the place of each token, and {type(tokenizer).__name__} does "
            "not: save it with a tokenizer.json"
        )
    encode = _encode_marked if _MARKED.search(tokenizer.get_chat_template()) else _encode_compared
    return lambda conversation: encode(tokenizer, conversation)


def check_template(tokenizer: Any) -> None:
    """Checks that a tokenizer has a chat template, and that it is clear which.

    Raises:
        UserError: It has none, or several, none of which is the default.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "conversations need a tokenizer with a chat template, and this one has none: give that of a chat model, or "
            'plain text in a column "text"'
        )
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            "conversations need one chat template, and this tokenizer has several: save it with the one that is meant"
        ) from error


def encode_prompt(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Returns the token ids of a conversation up to where the template lets the assistant answer."""
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    return list(_templated(tokenizer, conversation, conversation.messages, **options)["input_ids"])


def _encode_marked(tokenizer: Any, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
    """Encodes by a template that marks what the assistant writes."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = _templated(tokenizer, conversation, conversation.messages, **options)
    return np.asarray(encoded["input_ids"], np.int64), np.asarray(encoded["assistant_masks"], np.int8)


def _encode_compared(tokenizer: Any, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
    """Encodes by a template that marks nothing. A token belongs to the assistant if a part of it does."""
    text = _templated(tokenizer, conversation, conversation.messages, tokenize=False)
    options = {"return_offsets_mapping": True, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(text, add_special_tokens=False, **options)
    starts, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), np.int8)
    for start, end in _assistant_spans(tokenizer, conversation, text):
        mask |= (starts < end) & (ends > start)
    return np.asarray(encoded["input_ids"], np.int64), mask


def _assistant_spans(tokenizer: Any, conversation: Conversation, text: str) -> Iterator[tuple[int, int]]:
    """Yields start and end in the text of what the assistant writes, without white space after it."""
    messages = conversation.messages
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not number:
            continue
        before = _templated(tokenizer, conversation, messages[:number], tokenize=False, add_generation_prompt=True)
        after = _templated(tokenizer, conversation, messages[: number + 1], tokenize=False)
        if not after.startswith(before) or not text.startswith(after):
            raise UserError(
                f"the chat template renders message {number + 1} in {conversation.place} differently if it is the last "
                "one, so what the assistant writes cannot be told: mark it in the template with {% generation %}, or "
                "give conversations that end with the assistant's first message"
            )
        yield len(before), len(after.rstrip())


def _templated(tokenizer: Any, conversation: Conversation, messages: list[dict[str, Any]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template raises what it likes
        raise UserError(
            f"the chat template does not take {conversation.place} ({first_line(error)}): give it the roles, in the "
            "order, that the model was trained with"
        ) from error
