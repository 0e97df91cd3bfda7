"""The texts of a command: what a model is pruned or trained on, and what perplexity is measured on."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from spap_jax.cli import console

if TYPE_CHECKING:
    from spap_jax.data.tokens import TokenBlocks
    from spap_jax.models import DecoderConfig
    from spap_jax.models.model import Model, Source


class Texts(NamedTuple):
    """The texts that a command was asked to use.

    Attributes:
        data: Name of the data to prune or train on.
        eval: Name of the data on which to measure perplexity, if any.
        sequences: Number of sequences drawn from the data.
        sequence_length: Tokens in a sequence or window; None leaves it to the model.
        bos: Whether each begins with the tokenizer's beginning-of-text token; None leaves it to the tokenizer.
    """

    data: str
    eval: str | None
    sequences: int
    sequence_length: int | None
    bos: bool | None

    def read(
        self, source: "Source", config: "DecoderConfig", *, seed: int, further: bool
    ) -> tuple["TokenBlocks", "TokenBlocks | None"]:
        """Returns the token blocks to prune or train on, and those to measure on; warns of text that serves no purpose.

        Args:
            source: Where the model, and so its tokenizer, is from.
            seed: Seed of the choice of sequences.
            further: Whether the further sequences of the data are used as well.
        """
        import numpy as np

        from spap_jax.data.tokens import load_tokens, warn_of_overlap, warn_of_repetition

        common: dict[str, Any] = {
            "tokenizer": source.folder,
            "sequence_length": chosen_length(self.sequence_length, config),
            "vocabulary": config.vocabulary,
            "bos": self.bos,
        }
        with console.waiting(f"tokenising {self.data}"):
            blocks = load_tokens(self.data, sequences=self.sequences, seed=seed, role="calibration", **common)
            judged = load_tokens(self.eval, sequences=None, role="evaluation", **common) if self.eval else None
        warn_of_repetition(blocks.tokens, self.data)
        used = [blocks.tokens, *([blocks.further.tokens] if blocks.further and further else [])]
        warn_of_overlap(np.concatenate(used), judged and judged.tokens)
        return blocks, judged


def chosen_length(asked: int | None, config: "DecoderConfig") -> int:
    """Returns the tokens per window: as requested, else the papers' 2048 or as many as the model's positions allow.

    Raises:
        UserError: The requested length exceeds the positions, or is below one token.
    """
    from spap_jax.errors import UserError
    from spap_jax.models.decoder import check_length

    if asked is None:
        return min(2048, config.positions)
    if asked < 1:
        raise UserError("--sequence-length and --sequences must be at least 1: give positive whole numbers")
    check_length(config, asked)
    return asked


def perplexity_of(
    model: "Model", judged: "TokenBlocks", when: str, also: Callable[[int, int], None] = lambda *_: None
) -> float:
    """Measures perplexity, and shows the progress.

    Args:
        when: What the progress calls it: "before pruning".
        also: Called with the progress as well.
    """
    from spap_jax.evaluation.perplexity import perplexity

    with console.counting() as watch:

        def measured(done: int, total: int) -> None:
            also(done, total)
            watch(f"measuring perplexity {when}", done, total)

        return perplexity(model, judged.tokens, watch=measured, mask=judged.mask)
