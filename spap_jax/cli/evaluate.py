"""``spap eval``."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spap_jax.models.config import DecoderConfig


def evaluate(
    model: str,
    /,
    *,
    data: str,
    sequence_length: int | None = None,
    sequences: int | None = None,
    json: Path | None = None,
) -> None:
    """Measure perplexity: exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        model: Folder or hub id of the checkpoint.
        data: wikitext2, c4, a hub data set, a .txt, .jsonl or .parquet file, or a .npy of token ids.
        sequence_length: Tokens in a window; 2048, or what the model's positions allow, where absent.
        sequences: Use the first so many windows; all where absent.
        json: Also write the numbers to this file.
    """
    from spap_jax import checkpoint
    from spap_jax.cli.console import out, waiting
    from spap_jax.cli.json_file import write_json
    from spap_jax.data import load_tokens
    from spap_jax.evaluation.perplexity import perplexity

    with waiting(f"reading {model}"):
        loaded = checkpoint.load(model)
    length = chosen_length(sequence_length, loaded.config)
    with waiting(f"tokenising {data}"):
        blocks = load_tokens(
            data,
            tokenizer=loaded.source.folder,
            sequence_length=length,
            sequences=sequences,
            role="evaluation",
            vocabulary=loaded.config.vocabulary,
        )
    start = time.perf_counter()
    with waiting(f"measuring perplexity on {blocks.tokens.size} tokens"):
        value = perplexity(loaded, blocks.tokens)
    seconds = time.perf_counter() - start
    out.print(f"perplexity {value:.4f}  ({blocks.description}; {seconds:.1f} s)", soft_wrap=True)
    if json is not None:
        result = {
            "model": model,
            "perplexity": value,
            "data": data,
            "description": blocks.description,
            "sha256": blocks.sha256,
            "windows": len(blocks.tokens),
            "sequence_length": length,
            "seconds": seconds,
        }
        write_json(json, result)


def chosen_length(asked: int | None, config: "DecoderConfig") -> int:
    """Tokens in a window: what was asked for, or the papers' 2048, or all that the model's positions allow.

    Raises:
        UserError: more was asked for than the positions allow.
    """
    from spap_jax.evaluation.perplexity import check_length

    if asked is None:
        return min(2048, config.positions)
    check_length(config, asked)
    return asked
