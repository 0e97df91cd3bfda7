"""What training tells: a record at every look at the held-out sequences, and the whole."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import jax

from spap_jax.checkpoint.locate import public_name
from spap_jax.pruning.report import data_account, versions
from spap_jax.settings import FinetuneSettings

FORMAT = 1
"""Of the JSON; another number when a field changes its name or meaning."""


@dataclass(frozen=True)
class Check:
    """A look at the held-out sequences. Losses are in nats per token.

    Attributes:
        step: Steps made by then.
        losses: Of these, those since the last look: the loss of each, on its own sequences and before it was made.
        held_out: Loss on the held-out sequences.
        taken: Whether it is the least so far, so that these weights are kept.
    """

    step: int
    losses: tuple[float, ...]
    held_out: float
    taken: bool


@dataclass(frozen=True)
class FinetuneReport:
    """What a training run did: enough to repeat it and to judge it.

    Attributes:
        settings: Every setting, with the rank and the learning rate that the defaults mean.
        model: Name of what was trained.
        teacher: Name of the model whose predictions were to be met; None where the text was.
        objective: What the losses are: "next token" or "divergence from the teacher".
        data: What the tokens were: description, shape, hash.
        trained_parameters: Numbers that were trained.
        checks: A record at every look at the held-out sequences; the first before any step.
        versions: Of the libraries that computed it.
        seconds: Time of the training.
        extras: What the command line adds: perplexities, peak memory.
    """

    settings: dict[str, Any]
    model: str
    teacher: str | None
    objective: str
    data: dict[str, Any]
    trained_parameters: int
    checks: tuple[Check, ...]
    versions: dict[str, str]
    seconds: float
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def kept(self) -> Check:
        """The look whose weights are the result."""
        return [check for check in self.checks if check.taken][-1]

    @property
    def held_out(self) -> dict[str, float]:
        """Loss on the held-out sequences before and after."""
        return {"before": self.checks[0].held_out, "after": self.kept.held_out}

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [loss for check in self.checks for loss in check.losses]

    def to_json(self) -> str:
        """As ``spap_finetune.json`` stores it."""
        shown = {"format": FORMAT, "held_out": self.held_out, "kept_step": self.kept.step}
        return json.dumps(shown | dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"


def new_finetune_report(
    settings: FinetuneSettings,
    names: tuple[str, str | None],
    tokens: Any,
    trained: Any,
    checks: tuple[Check, ...],
    seconds: float,
) -> FinetuneReport:
    """Puts a report together.

    Args:
        settings: The run's.
        names: What the user called the model and its teacher; the report holds no path.
        tokens: An array [B, T], or ``TokenBlocks`` with a description and a hash.
        trained: The arrays that were trained.
        checks: All looks at the held-out sequences.
        seconds: Time of the training.
    """
    used = {"lora_rank": None if settings.full else settings.rank, "learning_rate": settings.rate}
    return FinetuneReport(
        settings=dataclasses.asdict(settings) | used,
        model=public_name(names[0]),
        teacher=names[1] and public_name(names[1]),
        objective="next token" if names[1] is None else "divergence from the teacher",
        data=data_account(tokens),
        trained_parameters=sum(array.size for array in jax.tree.leaves(trained)),
        checks=checks,
        versions=versions(),
        seconds=seconds,
    )
