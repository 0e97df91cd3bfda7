"""The training report, with a record of every evaluation on the held-out sequences."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import jax

from spap_jax.checkpoint.locate import public_name
from spap_jax.pruning.prune_report import data_account, versions
from spap_jax.settings import FinetuneSettings
from spap_jax.training.check import Check

FORMAT = 1
"""Version of the JSON format; it changes when a field changes its name or meaning."""


@dataclass(frozen=True)
class FinetuneReport:
    """Report of a training run: enough to repeat and to assess it.

    Attributes:
        settings: All settings, with the defaults of rank and learning rate resolved.
        model: Name of the model that was trained.
        teacher: Name of the model whose predictions were the target; None if the text was.
        objective: Kind of the losses: "next token" or "divergence from the teacher".
        data: The training tokens: description, shape, hash.
        trained_parameters: Number of parameters that were trained.
        checks: Records of the evaluations on the held-out sequences; the first is from before any step.
        versions: Versions of the libraries used.
        seconds: Duration of the training.
        extras: Further values from the command line: perplexities, peak memory.
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
        """The check whose weights are the result."""
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
        """Returns the report as JSON, as stored in ``spap_finetune.json``."""
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
    """Assembles a report.

    Args:
        settings: Settings of the run.
        names: Names of the model and its teacher as the user gave them; the report holds no path.
        tokens: An array [B, T], or ``TokenBlocks`` with a description and a hash.
        trained: The arrays that were trained.
        checks: All evaluations on the held-out sequences.
        seconds: Duration of the training.
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
