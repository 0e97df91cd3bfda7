"""Token blocks [B, T], and where they came from."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spap_jax.errors import UserError


@dataclass(frozen=True, eq=False, repr=False)
class TokenBlocks:
    """Token blocks and where they came from.

    Attributes:
        tokens: int32 [B, T].
        description: Short description of the data and of how the windows were chosen.
        sha256: SHA-256 of the bytes of `tokens` (little-endian int32, row by row), and of those of `mask`, if any.
        available: Number of windows of T tokens to choose from.
        mask: bool [B, T], True on the tokens whose predictions count, such as those that the assistant wrote in
            conversations; None if all count.
        further: For calibration, other windows of the same data, which are for pruning with joint steps as well; None
            if the data hold no more.
    """

    tokens: np.ndarray
    description: str
    sha256: str
    available: int
    mask: np.ndarray | None = None
    further: "TokenBlocks | None" = None

    def __repr__(self) -> str:
        return f"TokenBlocks({list(self.tokens.shape)}, {self.description!r}, sha256 {self.sha256[:8]}...)"


def ids_of(tokens: Any) -> Any:
    """Returns the token ids [B, T] of `TokenBlocks`; what else is given are the ids."""
    return getattr(tokens, "tokens", tokens)


def mask_of(tokens: Any) -> np.ndarray | None:
    """Returns the mask [B, T] of `TokenBlocks`; None for those without one, and for arrays of token ids."""
    return tokens.mask if isinstance(tokens, TokenBlocks) else None


def check_counted(mask: np.ndarray | None, which: str) -> None:
    """Checks that a mask [B, T] lets a prediction count; each sequence has T - 1, none of its first token.

    Raises:
        UserError: It lets none count.
    """
    if mask is not None and not mask[:, 1:].any():
        raise UserError(f"the mask lets no prediction of {which} count: give sequences in which some do.")


def further_of(tokens: Any) -> TokenBlocks | None:
    """Returns the further windows of `TokenBlocks`; None for those without, and for arrays of token ids."""
    return tokens.further if isinstance(tokens, TokenBlocks) else None


def concatenated(parts: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Concatenates blocks [B, T] and their masks, of which None lets all tokens count, as it does in the result."""
    tokens, masks = zip(*parts, strict=True)
    if all(mask is None for mask in masks):
        return np.concatenate(tokens), None
    marked = (np.ones(own.shape, bool) if mask is None else mask for own, mask in zip(tokens, masks, strict=True))
    return np.concatenate(tokens), np.concatenate([*marked])


def new_blocks(
    tokens: np.ndarray,
    description: str,
    available: int,
    mask: np.ndarray | None = None,
    further: TokenBlocks | None = None,
) -> TokenBlocks:
    """Returns token blocks [B, T] with their hash."""
    tokens = np.ascontiguousarray(tokens, dtype="<i4")
    sha256 = hashlib.sha256(tokens.tobytes() + (b"" if mask is None else mask.tobytes())).hexdigest()
    return TokenBlocks(tokens, description, sha256, available, mask, further)
