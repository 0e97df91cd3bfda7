"""Texts and tokenizers that are given as objects, where a file or a folder could be named as well."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from numpy.typing import ArrayLike

from spap_jax.errors import UserError

Data = str | Path | ArrayLike | Iterable[Any] | Mapping[str, Iterable[Any]]
"""What `load_tokens` takes: a name of data, or data."""

Encode = Callable[[str, bool], Sequence[int]]
"""Gives the token ids of a text; the flag says whether the tokenizer adds its special tokens."""


def rows_of(data: Any) -> Iterable[Any] | None:
    """The texts in an object, or the rows of a data set that hold them; None for an array of token ids.

    Args:
        data: Texts, or dicts with a ``text``, in any iterable; or an array, or nested lists of numbers.
    """
    if hasattr(data, "__array__"):
        return data.tolist() if getattr(getattr(data, "dtype", None), "kind", "") in "OU" else None
    if isinstance(data, Sequence):
        return data if len(data) and isinstance(data[0], str | dict) else None
    return data if isinstance(data, Iterable) else None


def encoder_of(tokenizer: Any) -> Encode:
    """The function of a tokenizer of the library ``transformers`` or of the library ``tokenizers``.

    Raises:
        UserError: it is something else.
    """
    if not hasattr(tokenizer, "encode"):
        raise UserError(
            f"{type(tokenizer).__name__} is no tokenizer: give a model folder, a hub id, or a tokenizer object of "
            "transformers or of tokenizers."
        )
    if not callable(tokenizer):  # that of the library tokenizers, which is quiet about long texts
        return lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids
    call = cast(Callable[..., Mapping[str, Any]], tokenizer)
    quiet = {"return_attention_mask": False, "verbose": False}
    return lambda text, special: call(text, add_special_tokens=special, **quiet)["input_ids"]
