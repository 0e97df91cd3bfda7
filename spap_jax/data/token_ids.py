"""Token ids as a user gives them, checked against a model."""

from pathlib import Path
from typing import Any

import numpy as np

from spap_jax.data.tokens import ids_of, mask_of
from spap_jax.errors import UserError
from spap_jax.models import DecoderConfig
from spap_jax.models.decoder import check_length
from spap_jax.numerics import is_concrete


def token_blocks(tokens: Any, config: DecoderConfig) -> Any:
    """Returns token ids [B, T] as int32, checked against the model; of traced ids, only shape and dtype are checked.

    Raises:
        UserError: not a block of token ids, too long for the model's positions, or ids outside the vocabulary.
    """
    blocks = ids_of(tokens)
    if isinstance(blocks, str | Path):
        raise UserError(
            f"tokens must be whole numbers [B, T], not the text {str(blocks)[:40]!r}: spap.load_tokens makes them of a "
            "file, a data set or a list of texts."
        )
    if is_concrete(blocks):
        try:
            blocks = np.asarray(blocks)
        except (TypeError, ValueError) as error:  # lengths differ, or a tensor of another library is on a device
            raise UserError(
                "tokens must be whole numbers [B, T] in the memory of the host, with all sequences of the same length."
            ) from error
    if blocks.ndim != 2 or 0 in blocks.shape or not np.issubdtype(blocks.dtype, np.integer):
        raise UserError(f"tokens must be whole numbers [B, T], not {blocks.dtype} {list(blocks.shape)}.")
    mask = mask_of(tokens)
    if mask is not None and (mask.shape != blocks.shape or mask.dtype != bool):
        raise UserError(
            f"the mask of tokens {list(blocks.shape)} must be bool of that shape, not {mask.dtype} {list(mask.shape)}."
        )
    check_length(config, blocks.shape[1])
    if is_concrete(blocks) and (blocks.min() < 0 or blocks.max() >= config.vocabulary):
        raise UserError(
            f"token ids go from {blocks.min()} to {blocks.max()}, outside the model's vocabulary of "
            f"{config.vocabulary}: make them with the tokenizer of this model."
        )
    return blocks.astype(np.int32)
