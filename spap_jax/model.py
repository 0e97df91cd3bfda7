"""A model as a value: its config, its parameters, and what is needed to write it back as its users know it."""

from dataclasses import dataclass
from pathlib import Path

from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.models.families import Family
from spap_jax.models.registry import FAMILIES


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        name: What the user called it: a folder or a hub id.
        folder: The local folder with its tokenizer and generation files; None for a model made in memory.
        config_text: Its config.json, verbatim. It is written back with nothing but the sizes edited (and biases on the
            MLP switched on, if pruning added them), because every rewriting of a config loses or renames fields that
            some loader reads.
        head_stored: Whether a tied model's checkpoint stores the head beside the embedding all the same.
    """

    name: str
    folder: Path | None
    config_text: str
    head_stored: bool = False


@dataclass(frozen=True)
class Model:
    """A decoder: what ``spap.load`` returns and ``spap.save`` takes.

    Attributes:
        config: Its sizes and switches.
        params: The parameter tree of ``docs/architecture.md``, in the dtype of the checkpoint.
        source: Where it came from.
    """

    config: DecoderConfig
    params: Params
    source: Source

    @property
    def family(self) -> Family:
        """The table of its family."""
        return FAMILIES[self.config.family]
