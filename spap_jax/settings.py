"""The settings of each command: one definition that the command line, TOML files and Python read."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from spap_jax.errors import UserError, option

EffortName = Literal["low", "default", "high"]
Allocation = Literal["uniform", "global"]
Method = Literal["spap", "random", "magnitude", "wanda", "flap", "fasp", "obs", "osscar"]
Update = Literal["own", "none", "bias", "refit", "alternate"]
Schedule = Literal["sequential", "parallel"]

OWN = "own"
"""Name of data: the text that the model of a command writes itself."""

SPARSITY = 0.3
"""Fraction of the MLP channels that is removed if nothing says otherwise."""

SEQUENCES, LENGTH = 128, 512
"""Number of texts that a model writes, and of tokens in each, if nothing says otherwise."""

Count = Annotated[int, Meta(ge=1, lt=2**31)]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]
NotNegative = Annotated[float, Meta(ge=0, lt=2.0**100)]
Positive = Annotated[float, Meta(gt=0, lt=2.0**100)]
Share = Annotated[float, Meta(ge=0, le=1)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
ProperFraction = Annotated[float, Meta(gt=0, lt=1)]


class Effort(NamedTuple):
    """What an effort means where no setting says otherwise.

    Attributes:
        passes: Text in the joint steps, as a multiple of the calibration text that was asked for.
        text: Number of tokens in the joint steps, where these are fewer than the passes, but at least one pass. A model
            with fewer than ``LARGE`` weights reads more in proportion: its steps take less time, and one pass does not
            do.
        last: Number of blocks at the end of the model that joint steps change; None for all.
        tokens: Tokens in a joint step. Little text goes further in small steps.
        measured: Largest number of tokens that are measured between joint steps, as a share of those of the steps.
            Where few blocks move, a measurement takes longer beside a step.
        round_passes: Passes over the calibration tokens in the optimizer steps of one alternating round.
        worth: Fraction of the error of a layer that alternating rounds have to take off.
        trials: Number of layers in a row after which there are no more rounds if they do not.
    """

    passes: float
    text: int
    last: int | None
    tokens: int
    measured: float
    round_passes: float
    worth: float
    trials: int


EFFORTS: dict[EffortName, Effort] = {
    "low": Effort(1, 0, 3, 512, measured=0.08, round_passes=0.5, worth=0.2, trials=1),
    "default": Effort(4, 2**18, None, 2048, measured=0.25, round_passes=2, worth=0.1, trials=2),
    "high": Effort(16, 2**21, None, 2048, measured=0.25, round_passes=4, worth=0.1, trials=2),
}

LARGE = 100_000_000
"""Weights in the blocks of a model that reads no more text than its effort says."""


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1; True, an integer in Python, is not."""
    return _fits(value, Count)


def is_seed(value: Any) -> bool:
    """Whether a value is a whole number that a random key can be made of."""
    return _fits(value, Seed)


def _fits(value: Any, kind: Any) -> bool:
    value = value.item() if hasattr(value, "item") else value
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return value == value  # nan is in every range


def _range(kind: Any) -> str:
    """Describes the values that the type of a setting allows."""
    if type(None) in get_args(kind):
        return _range(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind is bool:
        return "True or False"
    if kind is str:
        return "a text"
    if get_origin(kind) is tuple:
        return f"some of {_range(get_args(kind)[0])}"
    [meta] = kind.__metadata__
    bounds = {"at least": meta.ge, "above": meta.gt, "at most": meta.le, "below": meta.lt}
    words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    return f"{'a whole number' if kind.__origin__ is int else 'a number'}, {words}"


class _Settings:
    """Base class of settings: checks ranges on construction, and makes copies with changes."""

    def __post_init__(self) -> None:
        """Converts numpy numbers, which JSON does not accept, to Python numbers, and checks the ranges.

        Raises:
            UserError: a value is out of its range; the message names all of them.
        """
        wrong = []
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if hasattr(value, "item"):
                object.__setattr__(self, name, value := value.item())
            if isinstance(value, list | range):
                object.__setattr__(self, name, value := tuple(value))
            if not _fits(value, kind):
                wrong.append(f"{option(name)} must be {_range(kind)}, not {value!r}")
        if wrong:
            raise UserError("; ".join(wrong) + ".")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed.

        Raises:
            UserError: a name is not a setting, or a value is out of range.
        """
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        if unknown := sorted(set(changes) - set(known)):
            raise UserError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(known)}.")
        return type(self)(**(known | changes))


@dataclass(frozen=True)
class PruneSettings(_Settings):
    """How to prune. Every field is an option of ``spap prune`` and a key of its TOML file.

    Attributes:
        sparsity: Fraction of the MLP channels to remove from every layer. By default 0.3, or 0 with drop_blocks.
        target: Size or speed to reach: 0.8 (of the parameters), params=100M, bytes=200MB, speed=1.3x or
            speed=1.3x@prefill. By default none.
        drop_blocks: Numbers of whole blocks to remove, from 1 to the last but one. By default none.
        attention_sparsity: Fraction of the key/value heads to remove, with their query heads. Not for OPT and OLMo.
        allocation: "uniform": one width for all layers. "global": a width for each layer, which only SPAP-JAX loads.
        round_to: Keep a multiple of this number of channels. By default 64 for MLPs of 8192 or more, 8 from 1024 on.
        method: How channels are chosen: by our method, "spap", or as another one does.
        update: How the weights that stay are updated; "own": as in the paper of the method.
        schedule: "parallel": channels of several layers are chosen at once, on the dense stream.
        seed: Seed of all random choices.
        held_out: Fraction of the calibration sequences that nothing is fitted to, and that guard against overfitting.
        effort: How much time and memory to spend on quality.
        rounds: Alternating rounds in each layer; 0 keeps the refit. Layers stop making them once they gain little.
        joint_passes: Text in the joint steps that end the run, per calibration text; 0: none. By default by effort.
        joint_text_weight: Weight of the text's next token beside the dense model's predictions in joint steps. Above 0
            the model also adapts to the text.
        joint_last: Number of blocks at the end of the model that joint steps change. By default as many as fit.
        batch_tokens: Tokens that pass through a block at once; fewer need less memory.
    """

    sparsity: Fraction | None = None
    target: str | None = None
    drop_blocks: tuple[Count, ...] = ()
    attention_sparsity: Fraction = 0.0
    allocation: Allocation = "uniform"
    round_to: Count | None = None
    method: Method = "spap"
    update: Update = "own"
    schedule: Schedule = "sequential"
    seed: Seed = 0
    held_out: Fraction = 0.0625
    effort: EffortName = "default"
    rounds: Annotated[int, Meta(ge=0, lt=2**31)] = 1
    joint_passes: NotNegative | None = None
    joint_text_weight: Share = 0.0
    joint_last: Count | None = None
    batch_tokens: Count = 4096

    @property
    def channel_sparsity(self) -> float:
        """The sparsity, or its default."""
        default = 0.0 if self.drop_blocks else SPARSITY  # not yet decided where there is a target
        return default if self.sparsity is None else self.sparsity


@dataclass(frozen=True)
class FinetuneSettings(_Settings):
    """How to train a pruned model. Every field is an option of ``spap finetune`` and a key of its TOML file.

    Attributes:
        full: Train all weights rather than low-rank updates (LoRA) of the projections.
        lora_rank: Rank of the update of each attention and MLP projection. By default 16; not together with full.
        lora_alpha: Scale of the updates: each is multiplied by alpha / rank before it is added.
        steps: Number of optimizer steps (AdamW).
        learning_rate: Peak learning rate. By default 2e-4, or 2e-5 with full; small models need ten times as much.
        weight_decay: Weight decay of AdamW, relative to the learning rate.
        step_sequences: Number of sequences in the batch of one optimizer step.
        batch_tokens: Tokens that pass through the model at once on each device; fewer need less memory.
        held_out: Fraction of the sequences that is not trained on. The weights with the lowest loss on them are kept.
        check_every: Number of optimizer steps between two measurements on the held-out sequences.
        seed: Seed of all random choices.
    """

    full: bool = False
    lora_rank: Count | None = None
    lora_alpha: Positive = 32.0
    steps: Count = 200
    learning_rate: Positive | None = None
    weight_decay: NotNegative = 0.0
    step_sequences: Count = 16
    batch_tokens: Count = 4096
    held_out: ProperFraction = 0.0625
    check_every: Count = 25
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: a value is out of its range, or both kinds of training are asked for.
        """
        super().__post_init__()
        for name in ("lora_rank", "lora_alpha"):
            if self.full and getattr(self, name) != getattr(FinetuneSettings, name):
                raise UserError(
                    f"{option('full')} trains every weight and {option(name)} only low-rank updates: give one of "
                    "the two."
                )

    @property
    def rank(self) -> int:
        """The given rank, or the default."""
        return 16 if self.lora_rank is None else self.lora_rank

    @property
    def rate(self) -> float:
        """The given learning rate, or the default of the kind of training."""
        default = 2e-5 if self.full else 2e-4
        return default if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class WriteSettings(_Settings):
    """How a model writes text to calibrate on. Every field is an option of ``spap write``.

    Attributes:
        first_words: Words of a paragraph that the model continues.
        sequences: Number of texts or conversations. By default 128, or one for each prompt. Paragraphs and prompts are
            used again if there are fewer.
        length: Most tokens that the model writes in each. By default 512, or what its positions allow.
        temperature: Divides the logits; 1 samples from the model's own predictions, 0 takes the likeliest token.
        seed: Random seed; each sequence has its own key, so batches and devices do not change it, up to rounding.
        batch_tokens: Tokens that a device processes at once, given and new ones; fewer need less memory.
    """

    first_words: Count = 8
    sequences: Count | None = None
    length: Count | None = None
    temperature: NotNegative = 1.0
    seed: Seed = 0
    batch_tokens: Count = 16384
