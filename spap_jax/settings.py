"""The settings of a run: frozen, validated when built, the same for the command line, TOML files and notebooks."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin

from spap_jax.errors import UserError, option

EffortName = Literal["low", "default", "high"]
Allocation = Literal["uniform", "global"]
Method = Literal["spap", "random", "magnitude", "wanda", "flap", "fasp", "obs", "osscar"]
Update = Literal["own", "none", "bias", "refit", "alternate"]
Schedule = Literal["sequential", "parallel"]
JointWeights = Literal["mlp", "block"]
FloatDtype = Literal["float32", "bfloat16"]
Remat = Literal["full", "dots"]


class Effort(NamedTuple):
    """What an effort means where no setting says otherwise.

    Attributes:
        passes: How many times as much text joint steps read as was asked for.
        text: Number of tokens in the joint steps, where these are fewer than the passes, but at least one pass. A model
            with fewer than ``_LARGE`` weights reads more in proportion: its steps take less time, and one pass does not
            do.
        last: Number of blocks at the end of the model that joint steps change; None for all. What three take is less
            than what the solver takes for one.
        tokens: Tokens in a joint step. Little text goes further in small steps.
        text_weight: Largest weight of the text's own tokens in joint steps. A few steps gain most by them; with many,
            the predictions would drift away.
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
    text_weight: float
    measured: float
    round_passes: float
    worth: float
    trials: int


EFFORTS: dict[EffortName, Effort] = {
    "low": Effort(1, 0, 3, 512, text_weight=0.7, measured=0.08, round_passes=0.5, worth=0.2, trials=1),
    "default": Effort(4, 2**18, None, 2048, text_weight=0.3, measured=0.25, round_passes=2, worth=0.1, trials=2),
    "high": Effort(16, 2**21, None, 2048, text_weight=0.3, measured=0.25, round_passes=4, worth=0.1, trials=2),
}

_TEXT_WEIGHT = 7 / 3
"""Weight of the text's own tokens in joint steps by default, relative to the fraction that is removed. They pull the
predictions away from the dense model's, the more so the less there is to repair."""

_MULTIPLES = ((8192, 64), (1024, 8))
"""For MLPs with as many channels or more, what the kept width is a multiple of by default. Accelerators hold and
multiply matrices in tiles of 8 rows or 16 bytes: a joint step on LLaMA-3.1-8B needs 13.1 GB of each of 8 TPU v5e chips
with the 10 035 channels that 30 % leave, and 11.3 GB with 10 032. Eight devices that share the weights of a large model
should each have such a multiple: on LLaMA-3.1-70B a step needs 14.5 GB of a chip with 20 072 channels, and 12.0 GB with
20 096."""


class Fit(NamedTuple):
    """How closely weights are fitted to the calibration text."""

    ridge: float
    correction: float


_ALTERNATING, _REFITTING = Fit(ridge=1e-2, correction=0.5), Fit(ridge=1e-4, correction=1.0)
"""The first generalises better from little text, for models that were trained on much ("Target" in ``docs/method.md``);
the second is that of other methods' papers, with the errors of earlier blocks corrected as well."""

_LARGE = 100_000_000
"""Weights in the blocks of a model that reads no more text than its effort says; SmolLM2-135M is the smallest."""

_JOINT_RATE = 5.8
"""The largest joint step on all blocks, times the width and the number of blocks. The more inputs a projection has, and
the more blocks move the stream, the further one step moves the predictions: 0.01 is a good step for 6 blocks of width
96, and much too large for 30 blocks of width 576, where 0.0004 is good."""

_TAIL_RATE, _TAIL_LIMIT = 0.12, 0.004
"""The largest joint step on the last g blocks alone, times the square root of the width and g^(2/3), and its limit.
What these change passes through few others, and there are few steps: for the last three of 30 blocks of width 576,
0.0024 is better than 0.0018, and for those of 18 blocks of width 640 (Gemma 3 270M) 0.0014 is a little better than
0.0024; 0.004 is good for the last one alone and for the last three of 6 blocks of width 96, where 0.006 is too
large."""


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number of at least ``least``; True and False, integers in Python, are not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class _Range(NamedTuple):
    """The values that a setting may have: a test of one, and the same in words."""

    fits: Callable[[Any], bool]
    words: str

    def __repr__(self) -> str:
        """Shows the words, for the signature in the help of the class."""
        return self.words


_Whole = Annotated[int, _Range(functools.partial(is_count, least=0), "a whole number of at least 0")]
_Count = Annotated[int, _Range(is_count, "a whole number of at least 1")]
_Positive = Annotated[float, _Range(lambda v: _number(v) and 0 < v < math.inf, "positive")]
_NotNegative = Annotated[float, _Range(lambda v: _number(v) and 0 <= v < math.inf, "at least 0")]
_Share = Annotated[float, _Range(lambda v: _number(v) and 0 <= v <= 1, "between 0 and 1")]
_Fraction = Annotated[float, _Range(lambda v: _number(v) and 0 <= v < 1, "a fraction of at least 0 and below 1")]
_ProperFraction = Annotated[
    float, _Range(lambda v: _number(v) and 0 < v < 1, "a fraction between 0 and 1, both excluded")
]


def _range(kind: Any) -> _Range:
    """The values that the type of a setting allows."""
    if type(None) in get_args(kind):
        fits, words = _range(get_args(kind)[0])
        return _Range(lambda value: value is None or fits(value), words)
    if kind is bool:
        return _Range(lambda value: isinstance(value, bool), "True or False")
    if get_origin(kind) is Literal:
        return _Range(lambda value: value in get_args(kind), f"one of {', '.join(get_args(kind))}")
    return kind.__metadata__[0]


_FLOAT32 = (2.0**-126, 2.0**128)
"""The smallest positive normal number of float32, and the smallest power of 2 that is too large."""


def _beyond(name: str, value: Any) -> str:
    """The fault of a number that programs on devices cannot represent; empty if they can.

    They count in int32. JAX makes the same random numbers from seeds that differ by a multiple of 2**32.
    """
    if isinstance(value, int) and value >= 2 ** (bits := 32 if name == "seed" else 31):
        return f"{option(name)} must be below 2**{bits}, not {value}"
    if isinstance(value, float) and value and not _FLOAT32[0] <= value < _FLOAT32[1]:
        return f"{option(name)} must be a number that float32 can hold, not {value}"
    return ""


class _Settings:
    """Base class of settings: checks ranges on construction, and makes copies with changes."""

    def __post_init__(self) -> None:
        """Converts numpy numbers, which JSON does not accept, to Python numbers, and checks the ranges.

        Raises:
            UserError: a value is out of its range; the message names all of them.
        """
        wrong = []
        for field in fields(self):  # type: ignore[arg-type]
            name, value, (fits, words) = field.name, getattr(self, field.name), _range(field.type)
            if isinstance(value, Real) and (plain := getattr(value, "item", None)):
                object.__setattr__(self, name, value := plain())
            wrong.append(_beyond(name, value) if fits(value) else f"{option(name)} must be {words}, not {value!r}")
        if any(wrong):
            raise UserError("; ".join(filter(None, wrong)) + ".")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed.

        Raises:
            UserError: a name is not a setting, or a value is out of range.
        """
        known = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        if unknown := sorted(set(changes) - set(known)):
            raise UserError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(known)}.")
        return type(self)(**(known | changes))


@dataclass(frozen=True)
class PruneSettings(_Settings):
    """How to prune. Every field is an option of ``spap prune`` and a key of its TOML file.

    Attributes:
        sparsity: Fraction of the MLP channels to remove from every layer, between 0 and 1.
        attention_sparsity: Fraction of the key/value heads to remove from every layer, each with the query heads that
            read it. 0 leaves attention as it is. Not available for OPT and OLMo 2.
        allocation: Widths of the layers. "uniform": all layers get the same width, as stock tools require. "global":
            the total is at most the same, and each layer gets a width according to what its channels contribute to the
            predictions; only SPAP-JAX loads the result.
        round_to: Round the width that is kept to a multiple of this number. By default 64 for MLPs of 8192 channels or
            more and 8 for those of 1024 or more, since matrices of other widths take accelerators more memory and time,
            and 1 for smaller ones. 256 suits every quantisation format of llama.cpp as well.
        method: How channels are chosen: by this project's method, "spap", or as another one does: "random",
            "magnitude", "wanda" (Wanda-sp), "flap", "fasp", "obs" (ZipLM) or "osscar".
        update: How the remaining weights are updated. "own": as in the paper of the method. "none": not at all (random,
            magnitude, wanda). "bias": the output bias makes up for the mean of the removed channels (flap). "refit":
            the output projection is solved for in closed form (fasp, obs, osscar). "alternate": refit, then alternating
            rounds and joint steps (spap).
        schedule: "sequential": the channels of a layer are chosen on the activations that the already pruned layers
            produce, and all devices work on that layer. "parallel": they are chosen on the dense model's activations,
            and each device, or group of devices that share the weights, works on a layer of its own.
        seed: Seed of all random choices.
        ridge: Strength of the pull of the solved weights towards the dense ones, relative to each channel's energy.
            By default 0.01 if the update is "alternate", and 0.0001 otherwise.
        correction: Share of the errors of earlier blocks that the update of an MLP also corrects. 0 reproduces the
            dense MLP's output for the pruned stream, and 1 restores the dense stream. Most of these errors are noise to
            an MLP: the less text there is, the better it fits them there, and the worse elsewhere. Where a norm follows
            the MLP (Gemma 3, OLMo 2), only what small changes of its output can repair is repaired, and with 1 nothing.
            By default 0.5 if the update is "alternate", and 1 otherwise.
        penalty: Weight of the penalty on a removed channel, relative to the channel's energy.
        penalty_stages: Number of stages in which the number of penalised channels grows from 0 to the number removed.
        swap_rounds: Largest number of rounds of exact swaps that follow the choice of channels by spap and osscar; 0
            makes no swaps.
        held_out: Fraction of the calibration sequences that nothing is fitted to, and that guard against overfitting.
        effort: How much time and memory to spend on quality. "low": one pass of joint steps over the calibration text,
            on the last three blocks, so that the others are in memory one at a time; rounds of half a pass. "default":
            joint steps on all blocks, on 4 times as much text, to which blocks are fitted as well, but on at most 2^18
            tokens unless more were asked for; rounds of 2 passes. "high": joint steps on 16 times as much text, but on
            at most 2^21 tokens unless more were asked for; rounds of 4 passes. Models of less than 100 million weights
            may have more tokens. What is given as a setting of its own takes precedence.
        sampled: Number of sequences that the dense model writes for each calibration sequence, continuing its first
            tokens, and that are fitted as well, if there is little text. The dense model has to fit in memory.
        rounds: Number of alternating rounds of the update "alternate": optimizer steps on the inner projections, then
            the output projection in closed form. 0 keeps the result of the refit. Once the rounds have lowered the
            errors of two layers in a row by less than a tenth, or at low effort that of one layer by less than a fifth,
            all later layers keep it too.
        steps: Optimizer steps on the inner projections in one round. By default effort decides.
        step_tokens: Tokens in the minibatch of one optimizer step of a round.
        learning_rate: Size of an optimizer step in a round, relative to the root mean square of the weights it changes.
        joint_passes: Amount of text in the joint steps that end the update "alternate", as a multiple of the
            calibration text that was asked for, and of what the model wrote: optimizer steps on all blocks together
            that bring the model's predictions nearer to the dense model's. They read other sequences of the calibration
            data as well, to which blocks are fitted too, and each several times if there are too few. All blocks that
            they change have to fit in memory. By default effort decides.
        joint_text_weight: Weight, from 0 to 1, of the text's own next token in what joint steps fit; the rest is that
            of the dense model's predictions. With more, perplexity falls further, and predictions stay less like the
            dense model's; 0 uses these alone. By default 7/3 of the fraction that is removed, of the channels or of the
            heads, but at most 0.3, or 0.7 at low effort.
        joint_weights: What joint steps change. "block": all weights of the blocks. "mlp": the MLPs alone, which takes
            less memory, and gains less in models that were trained on much text.
        joint_last: Number of blocks at the end of the model that joint steps change; they begin with the stream before
            these, so that they take no time for the others. By default all, but only the last three at low effort.
        joint_blocks: Number of consecutive blocks that joint steps adjust together, lowered to the next number that
            divides the number of all blocks; 0 adjusts all of them. What they change takes 12 bytes for each weight,
            or 16 with moments in float32, which includes the gradient and Adam's moments, divided among all devices.
            By default as many as a plan says the devices have memory for.
        joint_tokens: Tokens in the minibatch of one joint step, in whole sequences. Each of several devices takes one
            sequence at least; there are as many steps as on one device, so that the text is read several times.
            By default 2048, or 512 at low effort.
        joint_learning_rate: Largest size of a joint step, relative to the root mean square of the weights it changes,
            or to each scale of a norm. It rises over the first tenth of the steps and then falls linearly to zero.
            By default 5.8 divided by the model's width and its number of blocks; on the last g blocks alone 0.12
            divided by the square root of the width and by g^(2/3), and at most 0.004. Where the held-out loss rises far
            above that at the start, steps begin again from the best weights, half as large.
        batch_tokens: Tokens that pass through a block at once; fewer need less memory.
        stream_dtype: Data type in which the activations of all tokens are stored between two blocks: "float32", or
            "bfloat16", which takes half the memory.
        moment_dtype: Data type in which the moments of Adam are stored in joint steps: "float32", or "bfloat16", which
            takes half the memory.
        compute_dtype: Data type of matrices and activations inside the joint steps; sums, norms, softmax and losses are
            float32, and so is everything else. By default "bfloat16", but "float32" on a CPU.
        remat: What the backward pass of a joint step computes again. "full": all that is inside a block. "dots": not
            the outputs of its projections, which are held instead, for all blocks that change; fewer operations, more
            memory. By default "dots" if only the last blocks change, which are few, and else "full".
    """

    sparsity: _ProperFraction = 0.3
    attention_sparsity: _Fraction = 0.0
    allocation: Allocation = "uniform"
    round_to: _Count | None = None
    method: Method = "spap"
    update: Update = "own"
    schedule: Schedule = "sequential"
    seed: _Whole = 0
    ridge: _Positive | None = None
    correction: _Share | None = None
    penalty: _Positive = 100.0
    penalty_stages: _Count = 40
    swap_rounds: _Whole = 8
    held_out: _Fraction = 0.0625
    effort: EffortName = "default"
    sampled: _Whole = 0
    rounds: _Whole = 1
    steps: _Count | None = None
    step_tokens: _Count = 2048
    learning_rate: _Positive = 0.03
    joint_passes: _NotNegative | None = None
    joint_text_weight: _Share | None = None
    joint_weights: JointWeights = "block"
    joint_last: _Count | None = None
    joint_blocks: _Whole | None = None
    joint_tokens: _Count | None = None
    joint_learning_rate: _Positive | None = None
    batch_tokens: _Count = 4096
    stream_dtype: FloatDtype = "float32"
    moment_dtype: FloatDtype = "bfloat16"
    compute_dtype: FloatDtype | None = None
    remat: Remat | None = None

    @property
    def passes(self) -> float:
        """The given value of ``joint_passes``, or the effort's."""
        return EFFORTS[self.effort].passes if self.joint_passes is None else self.joint_passes

    @property
    def text_weight(self) -> float:
        """The given value of ``joint_text_weight``, or what follows from effort and sparsity."""
        if self.joint_text_weight is not None:
            return self.joint_text_weight
        return min(EFFORTS[self.effort].text_weight, _TEXT_WEIGHT * max(self.sparsity, self.attention_sparsity))

    @property
    def fit(self) -> Fit:
        """The given ridge and correction, and the update's values for those that were not given."""
        alternates = self.update == "alternate" or (self.method, self.update) == ("spap", "own")
        meant = _ALTERNATING if alternates else _REFITTING
        given = Fit(self.ridge, self.correction)  # type: ignore[arg-type]
        return Fit(*(other if value is None else value for value, other in zip(given, meant, strict=True)))

    def multiple(self, channels: int) -> int:
        """The given value of ``round_to``, or the default for MLPs with a number of channels."""
        return self.round_to or next((multiple for least, multiple in _MULTIPLES if channels >= least), 1)

    def resolved(self, layers: int, width: int, channels: int, tokens: int) -> Self:
        """A copy in which every setting that depends on the model or the calibration text has its value.

        Args:
            layers: Number of blocks, L.
            width: Width of the model, d.
            channels: Number of channels of an MLP, f.
            tokens: Number of calibration tokens.
        """
        passes, effort = self.passes, EFFORTS[self.effort]
        if self.joint_passes is None and passes:
            weights = layers * width * (4 * width + 3 * channels)  # about
            text = effort.text * max(1.0, _LARGE / weights)
            passes = min(passes, max(1.0, text / tokens))
        last = min(self.joint_last or effort.last or layers, layers)
        tail_rate = min(_TAIL_LIMIT, _TAIL_RATE / (width**0.5 * last ** (2 / 3)))
        rate = _JOINT_RATE / (layers * width) if last == layers else tail_rate
        return self.replace(
            **self.fit._asdict(),
            round_to=self.multiple(channels),
            joint_passes=passes,
            joint_last=last,
            joint_text_weight=self.text_weight,
            joint_tokens=self.joint_tokens or effort.tokens,
            steps=self.steps or max(1, round(effort.round_passes * tokens / self.step_tokens)),
            step_tokens=min(self.step_tokens, tokens),
            remat=self.remat or ("full" if last == layers else "dots"),
            joint_learning_rate=self.joint_learning_rate or rate,
        )


@dataclass(frozen=True)
class FinetuneSettings(_Settings):
    """How to train a pruned model. Every field is an option of ``spap finetune`` and a key of its TOML file.

    Attributes:
        full: Train all weights rather than low-rank updates (LoRA) of the projections.
        lora_rank: Rank of the update of each attention and MLP projection. By default 16; not together with full.
        lora_alpha: Scale of the updates: each is multiplied by alpha / rank before it is added.
        steps: Number of optimizer steps (AdamW).
        learning_rate: Peak learning rate. It rises over the first tenth of the steps and then falls linearly to
            zero. By default 2e-4, or 2e-5 with full. Models of a few million weights need about ten times as much,
            which is to be given. Where the held-out loss rises far above that at the start, steps begin again from the
            best weights, half as large.
        weight_decay: Weight decay of AdamW, relative to the learning rate.
        step_sequences: Number of sequences in the batch of one optimizer step.
        batch_tokens: Tokens that pass through the model at once on each device; fewer need less memory. The gradients
            of a step are summed over as many passes as its sequences need.
        held_out: Fraction of the sequences that is not trained on. The weights with the lowest loss on them are kept.
        check_every: Number of optimizer steps between two measurements on the held-out sequences.
        seed: Seed of all random choices.
        moment_dtype: Data type in which the moments of Adam are stored: "float32", or "bfloat16", which takes half the
            memory, but loses small changes of the second moments, which decay by only a thousandth in a step.
        compute_dtype: Data type of matrices and activations inside the steps; sums, norms, softmax and losses are
            float32. By default "bfloat16", but "float32" on a CPU.
        remat: What the backward pass of a step computes again. "full": all that is inside a block. "dots": not the
            outputs of its projections, which are held instead, for all blocks; fewer operations, more memory.
    """

    full: bool = False
    lora_rank: _Count | None = None
    lora_alpha: _Positive = 32.0
    steps: _Count = 200
    learning_rate: _Positive | None = None
    weight_decay: _NotNegative = 0.0
    step_sequences: _Count = 16
    batch_tokens: _Count = 4096
    held_out: _ProperFraction = 0.0625
    check_every: _Count = 25
    seed: _Whole = 0
    moment_dtype: FloatDtype = "float32"
    compute_dtype: FloatDtype | None = None
    remat: Remat = "full"

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
