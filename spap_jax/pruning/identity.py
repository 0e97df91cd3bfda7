"""What the result of a run depends on."""

import dataclasses
import hashlib
from typing import Any

from spap_jax.data.tokens import TokenBlocks
from spap_jax.report.account import computing
from spap_jax.settings import PruneSettings


def prune_identity(
    model: str, blocks: TokenBlocks, judged: TokenBlocks | None, dtype: str | None, settings: PruneSettings
) -> dict[str, Any]:
    """Returns everything that the result of ``spap prune`` depends on, by name; a run resumes only if all are equal.

    Args:
        model: Fingerprint of the dense checkpoint.
        judged: Tokens on which perplexity is measured; None if it is not.
        dtype: Data type to which the weights are converted; None if they are not.
    """
    how = dataclasses.asdict(settings)
    texts = "".join(each.sha256 for each in (blocks, blocks.further) if each)
    read = hashlib.sha256(texts.encode()).hexdigest()
    tokens = {"calibration": read, "sequence length": blocks.tokens.shape[1]}
    output = {"evaluation": judged and judged.sha256, "dtype": dtype}
    return how | {"model": model} | tokens | output | computing()
