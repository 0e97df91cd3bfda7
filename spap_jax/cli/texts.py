"""The texts of a command: what a model is pruned or trained on, and what perplexity is measured on."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spap_jax.cli import console

if TYPE_CHECKING:
    from spap_jax.data.tokens import TokenBlocks
    from spap_jax.models import DecoderConfig
    from spap_jax.models.model import Model, Source


def read_texts(
    data: str,
    eval: str | None,
    source: "Source",
    config: "DecoderConfig",
    sequences: int,
    sequence_length: int | None,
    bos: bool | None,
    seed: int,
    further: bool,
) -> tuple["TokenBlocks", "TokenBlocks | None"]:
    """Returns the token blocks to prune or train on, and those to measure on; warns of text that is in both.

    ``further`` says whether the further sequences of the data are used as well.
    """
    import numpy as np

    from spap_jax.data.tokens import load_tokens, warn_of_overlap

    common: dict[str, Any] = {
        "tokenizer": source.folder,
        "sequence_length": chosen_length(sequence_length, config),
        "vocabulary": config.vocabulary,
        "bos": bos,
    }
    with console.waiting(f"tokenising {data}"):
        blocks = load_tokens(data, sequences=sequences, seed=seed, role="calibration", **common)
        judged = load_tokens(eval, sequences=None, role="evaluation", **common) if eval else None
    used = [blocks.tokens, *([blocks.further.tokens] if blocks.further and further else [])]
    warn_of_overlap(np.concatenate(used), judged and judged.tokens)
    return blocks, judged


def chosen_length(asked: int | None, config: "DecoderConfig") -> int:
    """Returns the tokens per window: as requested, else the papers' 2048 or as many as the model's positions allow.

    Raises:
        UserError: The requested length exceeds the positions.
    """
    from spap_jax.models.decoder import check_length

    if asked is None:
        return min(2048, config.positions)
    check_length(config, asked)
    return asked


def perplexity_of(
    model: "Model", judged: "TokenBlocks", when: str, also: Callable[[int, int], None] = lambda *_: None
) -> float:
    """Measures perplexity and shows how far it is, to ``also`` as well; ``when`` is "before pruning", for example."""
    from spap_jax.evaluation.perplexity import perplexity

    with console.counting() as watch:

        def measured(done: int, total: int) -> None:
            also(done, total)
            watch(f"measuring perplexity {when}", done, total)

        return perplexity(model, judged.tokens, watch=measured, mask=judged.mask)
