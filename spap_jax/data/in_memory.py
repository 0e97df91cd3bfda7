"""Texts and tokenizers that are passed as objects instead of as the name of a file or folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from numpy.typing import ArrayLike

from spap_jax.errors import UserError

Data = str | Path | ArrayLike | Iterable[Any] | Mapping[str, Iterable[Any]]
"""Data that `load_tokens` accepts: their name, or an object."""

Encode = Callable[[str, bool], Sequence[int]]
"""Returns the token ids of a text; the flag says whether the tokenizer adds its special tokens."""


def rows_of(data: Any) -> Iterable[Any] | None:
    """Returns the texts in an object, or the rows that hold them; None for an array of token ids.

    Args:
        data: Texts, or dicts with a ``text``, in any iterable; or an array, or nested lists of numbers.
    """
    if hasattr(data, "__array__"):
        return data.tolist() if getattr(getattr(data, "dtype", None), "kind", "") in "OU" else None
    if isinstance(data, Sequence):
        return data if len(data) and isinstance(data[0], str | dict) else None
    return data if isinstance(data, Iterable) else None


def encoder_of(tokenizer: Any) -> Encode:
    """Returns the encoding function of a tokenizer object of ``transformers`` or ``tokenizers``.

    Raises:
        UserError: it is not a tokenizer.
    """
    if not hasattr(tokenizer, "encode") or not (callable(tokenizer) or hasattr(tokenizer, "token_to_id")):
        raise UserError(
            f"{type(tokenizer).__name__} is no tokenizer: give a model folder, a hub id, or a tokenizer object of "
            "transformers or of tokenizers."
        )
    if not callable(tokenizer):  # a tokenizer of the library tokenizers, which does not warn of long texts
        return lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids
    call = cast(Callable[..., Mapping[str, Any]], tokenizer)
    quiet = {"return_attention_mask": False, "verbose": False}
    return lambda text, special: call(text, add_special_tokens=special, **quiet)["input_ids"]
