"""The reports of pruning, training and ``spap bench``, as types that write their JSON files and read them again.

Fields of a file that are not known are ignored. A number that is not finite is null in a file, as JSON has none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from spap_jax.quantities import bytes_text, change_text, count_text, loss_text, percent_text, range_text

FORMAT = 1
"""Version of the JSON formats; incremented when a field changes its name or meaning."""

Count = Annotated[int, msgspec.Meta(ge=0)]
Whole = Annotated[int, msgspec.Meta(gt=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
T = TypeVar("T")

if TYPE_CHECKING:
    Number = float
else:

    class Number(float):
        """A float that may be NaN, which is read from null."""


def parsed(text: bytes, kind: type[T]) -> T:
    """Reads JSON.

    Raises:
        ValueError: it is not JSON of this kind.
    """
    return msgspec.json.decode(text, type=kind, dec_hook=_number)


def converted(tree: Any, kind: type[T]) -> T:
    """Inverts ``dataclasses.asdict``, also after a round trip through JSON."""
    return msgspec.convert(tree, kind, dec_hook=_number)


def _number(kind: type, value: Any) -> Any:
    return kind(math.nan if value is None else value)


def _json(**fields: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(fields, enc_hook=float), indent=1).decode() + "\n"


@dataclass(frozen=True)
class Errors:
    """Relative error ||Y - H V - b||^2 / ||Y||^2 of one layer at the three stages.

    Attributes:
        selection: After removing channels, with dense weights.
        refit: After the closed-form update of the output projection or bias; the same as before if there is none.
        alternating: After alternating minimisation, the error of the result; the same as before if there is none.
    """

    selection: Number
    refit: Number
    alternating: Number

    @property
    def by_stage(self) -> dict[str, float]:
        """The errors by the names of the stages in tables, plots and progress."""
        return {"chosen": self.selection, "refit": self.refit, "adjusted": self.alternating}


@dataclass(frozen=True)
class AttentionReport:
    """Report on the attention of one layer, in the terms of `LayerReport`; ``kept`` are key/value heads, ascending."""

    kept: tuple[Count, ...]
    calibration: Errors
    held_out: Errors | None
    swaps: Count
    improving_swaps: Count
    ridge: float


@dataclass(frozen=True)
class LayerReport:
    """Report on one layer.

    Attributes:
        kept: Channels kept, ascending.
        held_out: Errors on the held-out tokens; None if there are none.
        swaps: Swaps of channels made by the polish.
        improving_swaps: Single swaps that would still lower the refitted error (in the parallel schedule, the error on
            the dense stream); 0 certifies that there is none.
        ridge: Relative ridge used; above the setting if the second moments were too nearly singular for it.
        rounds: Alternating rounds accepted.
        attention: Report on the layer's attention; None if it was left unchanged.
    """

    layer: Count
    kept: tuple[Count, ...]
    calibration: Errors
    held_out: Errors | None
    swaps: Count
    improving_swaps: Count
    ridge: float
    rounds: Count
    seconds: dict[str, float]
    attention: AttentionReport | None = None

    def __post_init__(self) -> None:
        """Raises ValueError if the channels kept are not ascending."""
        if any(low >= high for low, high in zip(self.kept, self.kept[1:], strict=False)):
            raise ValueError("The channels in `kept` do not ascend")


@dataclass(frozen=True)
class Check:
    """A measurement on the held-out sequences, after some steps. Losses are in nats per token.

    Attributes:
        tokens: Number of tokens in these steps.
        losses: Training loss of every step since the previous check, on its own batch and before its update.
        held_out: KL(teacher || model), or without a teacher the loss of the next token, on the held-out sequences; on
            the training sequences if none are held out.
        taken: Whether this is the lowest so far, so that these weights are kept.
        seconds: Duration of the steps since the previous check, and of the check.
        agreement: Fraction of the predictions whose most likely token is the teacher's; None without one.
    """

    step: Count
    tokens: Count
    losses: tuple[Number, ...]
    held_out: Number
    taken: bool
    seconds: float
    agreement: float | None = None

    @property
    def words(self) -> str:
        """What was measured: "divergence 0.0422, same top token 90.4 %", or without a teacher "loss 2.3012"."""
        if self.agreement is None:
            return f"loss {self.held_out:.4f}"
        return f"divergence {self.held_out:.4f}, same top token {percent_text(self.agreement)}"


@dataclass(frozen=True)
class Change:
    """A count before and after."""

    before: Whole
    after: Count


@dataclass(frozen=True)
class Widths:
    """MLP channels of each layer, before and after."""

    before: tuple[Whole, ...]
    after: tuple[Count, ...]

    @property
    def total(self) -> Change:
        """MLP channels of all layers together."""
        return Change(sum(self.before), sum(self.after))


@dataclass(frozen=True)
class Biases:
    """Whether the MLPs have biases, before and after."""

    before: bool
    after: bool


@dataclass(frozen=True)
class PrunedModel:
    """The model that was pruned.

    Attributes:
        name: Its name as given by the user, without a path.
        layers: Number of blocks before.
        intermediate: MLP channels of the widest layer.
        in_tower: Whether it is the decoder of a model that reads more than text, whose other parts are not counted.
    """

    name: str
    architecture: str
    layers: Whole
    intermediate: Change
    widths: Widths
    heads: Change
    kv_heads: Change
    mlp_bias: Biases
    parameters: Change
    mlp_parameters: Change
    in_tower: bool = False

    @property
    def blocks(self) -> Change:
        """Number of blocks before and after."""
        return Change(self.layers, len(self.widths.after))


@dataclass(frozen=True)
class MethodAccount:
    """How channels were selected, and how the kept weights were updated ("own" resolved)."""

    selection: str
    update: str


@dataclass(frozen=True)
class Sparsity:
    """A removed fraction and the requested one."""

    asked: float
    achieved: float

    @property
    def missed(self) -> bool:
        """Whether the two differ by 0.01 or more, so that both have to be reported."""
        return abs(self.achieved - self.asked) >= 0.01

    def of(self, whole: str) -> str:
        """For "the heads": "6.2 % of the heads (30 % asked for)"; without brackets if the two are close."""
        asked = f" ({percent_text(self.asked)} asked for)" if self.missed else ""
        return f"{percent_text(self.achieved)} of {whole}{asked}"


@dataclass(frozen=True)
class Sparsities:
    """Sparsity of the MLP channels and of the attention heads in the blocks that stay, and how many blocks do not."""

    channels: Sparsity
    heads: Sparsity
    blocks: Count = 0

    @property
    def words(self) -> str:
        """What is removed, in words, without what is kept as a whole."""
        parts = [f"{self.blocks} {'block' if self.blocks == 1 else 'blocks'}"] * bool(self.blocks)
        parts += [self.channels.of("the MLP channels")] * (self.channels.achieved > 0)
        parts += [self.heads.of("the attention heads")] * (self.heads.achieved > 0)
        return " and ".join(parts)


@dataclass(frozen=True)
class DataAccount:
    """Calibration or training tokens.

    Attributes:
        sequences: Number of sequences asked for.
        sha256: Hash of the token ids; None for tokens from memory.
        further_sequences: Number of further sequences of the same data that were fitted, for joint steps.
        further_sha256: Hash of the further sequences that the data hold; None if none were fitted.
    """

    sequences: Whole
    sequence_length: Whole
    description: str
    sha256: str | None
    further_sequences: Count = 0
    further_sha256: str | None = None


@dataclass(frozen=True)
class Perplexities:
    """Perplexity before and after, and the data on which it was measured."""

    data: str
    before: Positive
    after: Number


@dataclass(frozen=True)
class Extras:
    """What is known once a run has ended; None if it was not measured.

    Attributes:
        peak_device_bytes: Peak memory of a device of this process, the most of them; None of CPUs.
    """

    bytes: Change | None = None
    perplexity: Perplexities | None = None
    peak_memory_bytes: Count | None = None
    peak_device_bytes: Count | None = None


Row = tuple[str, str, str, str]
"""What was counted or measured: its name, before, after, and the relative change."""


def _row(name: str, before: float, after: float, text: Callable[[Any], str]) -> Row:
    return name, text(before), text(after), change_text(before, after)


@dataclass(frozen=True)
class PruneReport:
    """Report of a run, sufficient to reproduce and to assess it: ``spap_report.json``.

    Attributes:
        settings: Every setting, those that the effort, the model or the calibration text decide with their values.
        sparsity: Fractions of the MLP channels and of the heads that were removed, and those requested.
        joint: How far the pruned model's predictions are from the dense model's: before any joint step, and after some.
        advice: Advice if some of the work had no effect: a sentence each, without full stop.
    """

    settings: dict[str, Any]
    method: MethodAccount
    model: PrunedModel
    sparsity: Sparsities
    calibration: DataAccount
    versions: dict[str, str]
    layers: Annotated[tuple[LayerReport, ...], msgspec.Meta(min_length=1)]
    joint: tuple[Check, ...] = ()
    advice: tuple[str, ...] = ()
    extras: Extras = field(default_factory=Extras)

    def __post_init__(self) -> None:
        """Raises ValueError if a layer, or what it keeps, is not in the model."""
        model = self.model
        for layer in self.layers:
            heads = layer.attention.kept if layer.attention else ()
            parts = (
                ((layer.layer,), model.layers),
                (layer.kept, model.intermediate.before),
                (heads, model.kv_heads.before),
            )
            if any(max(numbers, default=0) >= count for numbers, count in parts):
                raise ValueError(f"Layer {layer.layer} is not in the model, or keeps what the model does not have")

    @property
    def seconds(self) -> dict[str, float]:
        """Time by phase, summed over all layers."""
        phases = dict.fromkeys(phase for layer in self.layers for phase in layer.seconds)
        found = {phase: sum(layer.seconds.get(phase, 0.0) for layer in self.layers) for phase in phases}
        measured = {"joint steps" if len(self.joint) > 1 else "divergence": sum(check.seconds for check in self.joint)}
        return found | (measured if self.joint else {})

    @property
    def one_width(self) -> bool:
        """Whether all layers of the pruned model have the same width, so that stock loaders accept it."""
        return len(set(self.model.widths.after)) == 1

    @property
    def judged(self) -> str:
        """Which tokens joint steps are measured on: "held-out" ones, or "calibration" if none are held out."""
        return "held-out" if all(layer.held_out for layer in self.layers) else "calibration"

    @property
    def kept(self) -> Check | None:
        """The measurement of the weights that were kept; None if there was none."""
        return next((check for check in reversed(self.joint) if check.taken), None)

    @property
    def adapted(self) -> bool:
        """Whether joint steps also adapted the weights to the text, beside the dense model's predictions."""
        return self.settings.get("joint_text_weight", 0) > 0 and len(self.joint) > 1

    @property
    def fewer_heads(self) -> bool:
        """Whether attention heads were removed."""
        return self.model.heads.after < self.model.heads.before

    @property
    def shape(self) -> str:
        """Says what the layers keep: "Every layer keeps 224 of 320 MLP channels"."""
        model, blocks = self.model, self.model.blocks
        layers = "Every layer keeps" if self.one_width else "The layers keep"
        if blocks.after < blocks.before:
            layers = f"{blocks.after} of {blocks.before} blocks stay. {layers}"
        words = f"{layers} {range_text(model.widths.after)} of {range_text(model.widths.before)} MLP channels"
        if self.fewer_heads:
            words += f", {model.heads.after} of {model.heads.before} attention heads"
            words += f" and {model.kv_heads.after} of {model.kv_heads.before} key/value heads"
        return words

    @property
    def rows(self) -> list[Row]:
        """What was counted and measured, before and after, for tables."""
        model, extras = self.model, self.extras
        counts = {"parameters": model.parameters, "MLP parameters": model.mlp_parameters}
        if model.blocks.after < model.blocks.before:
            counts["blocks"] = model.blocks
        counts["MLP channels, all layers"] = model.widths.total
        if self.fewer_heads:
            counts |= {"attention heads of a layer": model.heads, "key/value heads of a layer": model.kv_heads}
        rows = [_row(name, count.before, count.after, count_text) for name, count in counts.items()]
        if extras.bytes:
            rows.append(_row("weights on disk", extras.bytes.before, extras.bytes.after, bytes_text))
        if check := self.kept:
            rows.append((f"divergence (nats), {self.judged} tokens", "0", loss_text(check.held_out), ""))
            if check.agreement is not None:
                rows.append((f"same top token, {self.judged} tokens", "100 %", percent_text(check.agreement), ""))
        if measured := extras.perplexity:
            rows.append(_row("perplexity", measured.before, measured.after, loss_text))
        return rows

    def to_json(self) -> str:
        """Returns the report as in ``spap_report.json``."""
        return _json(format=FORMAT, **vars(self), seconds=self.seconds)


@dataclass(frozen=True)
class FinetuneReport:
    """Report of a training run, enough to repeat and to assess it: ``spap_finetune.json``.

    Attributes:
        settings: All settings, with the defaults of rank and learning rate resolved.
        teacher: Name of the model whose predictions were the target; None if the text was.
        objective: Kind of the losses: "next token" or "divergence from the teacher".
        checks: Records of the evaluations on the held-out sequences; the first is from before any step.
        seconds: Duration of all steps and evaluations, those before an interruption included.
    """

    settings: dict[str, Any]
    model: str
    teacher: str | None
    objective: str
    data: DataAccount
    trained_parameters: Count
    checks: Annotated[tuple[Check, ...], msgspec.Meta(min_length=1)]
    versions: dict[str, str]
    seconds: float
    extras: Extras = field(default_factory=Extras)

    @property
    def steps(self) -> int:
        """Number of steps made."""
        return self.checks[-1].step

    @property
    def kept(self) -> Check:
        """The check whose weights are the result."""
        return [check for check in self.checks if check.taken][-1]

    @property
    def held_out(self) -> dict[str, float]:
        """Loss on the held-out sequences before and after."""
        return {"before": self.checks[0].held_out, "after": self.kept.held_out}

    @property
    def rows(self) -> list[Row]:
        """The held-out loss, and perplexity if it was measured, before and after, for tables."""
        rows = [_row(f"held-out loss ({self.objective})", self.held_out["before"], self.held_out["after"], loss_text)]
        if measured := self.extras.perplexity:
            rows.append(_row("perplexity", measured.before, measured.after, loss_text))
        return rows

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [loss for check in self.checks for loss in check.losses]

    def to_json(self) -> str:
        """Returns the report as in ``spap_finetune.json``."""
        return _json(format=FORMAT, held_out=self.held_out, kept_step=self.kept.step, **vars(self))


@dataclass(frozen=True)
class Ratios:
    """How many times faster the second model is."""

    prefill: Positive
    decode: Positive


@dataclass(frozen=True)
class Measured:
    """A model that ``spap bench`` timed: the name of its folder, and how many parameters it has."""

    model: str
    parameters: Whole


@dataclass(frozen=True)
class GenerationWorkload:
    """The work that ``spap bench`` times.

    Attributes:
        prompt: Number of tokens of each sequence that prefill reads.
        repeats: Number of timed runs; medians are reported.
    """

    batch: Whole = 1
    prompt: Whole = 512
    new: Whole = 32
    repeats: Whole = 7


@dataclass(frozen=True)
class SpeedReport:
    """Speed-ups between two models from ``spap bench``: as measured, and as the arithmetic allows."""

    models: tuple[Measured, Measured]
    workload: GenerationWorkload
    speed_up: Ratios
    by_arithmetic: Ratios
