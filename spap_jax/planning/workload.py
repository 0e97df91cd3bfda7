"""The sizes of a run: the work of one device, and how much of it is divided among the devices.

This follows ``parallel/mesh.py``: sequences are padded and sharded in whole chunks, and the tokens or sequences of a
minibatch are sharded evenly or not at all. Heads, channels and vocabulary are sharded over the devices that share the
weights, if their numbers allow it, and the rows of second moments and of the solver over all devices; the rest is
replicated.
"""

import dataclasses
from dataclasses import dataclass

from spap_jax.data.tokens import POOL
from spap_jax.errors import UserError
from spap_jax.models import DecoderConfig
from spap_jax.models.attention import splash_accepts
from spap_jax.numerics import storage
from spap_jax.parallel.sequences import division, fitted_of
from spap_jax.planning.accelerators import Platform
from spap_jax.pruning import joint
from spap_jax.pruning.narrow import pruned_config
from spap_jax.pruning.run import held_out_part, joint_sequences
from spap_jax.pruning.sampling import batches
from spap_jax.settings import FinetuneSettings, PruneSettings
from spap_jax.solver.methods import update_used
from spap_jax.training.loop import StepSchedule


@dataclass(frozen=True)
class Chunks:
    """Sequences in chunks [C, B, T]; a chunk passes through a block at once.

    Attributes:
        count: C, on all devices together.
        sequences: B.
        length: T.
        devices: Number of devices over which the chunks are spread.
        real: Number of sequences that are no padding.
    """

    count: int
    sequences: int
    length: int
    devices: int
    real: int

    @property
    def divided(self) -> bool:
        """Whether there are several devices, which the chunks are divided among."""
        return self.devices > 1 and self.count > 0

    @property
    def size(self) -> int:
        """Number of tokens of one chunk."""
        return self.sequences * self.length

    @property
    def tokens(self) -> int:
        """Number of tokens on one device."""
        return self.count // self.devices * self.size

    def share(self, drawn: int) -> int:
        """Number of a minibatch's tokens or sequences that one device computes, out of ``drawn``."""
        return drawn // self.devices if self.divided and drawn % self.devices == 0 else drawn


@dataclass(frozen=True)
class Workload:
    """A pruning run, or a run of recovery training on the pruned decoder, with the dense one as the teacher.

    Attributes:
        dense: Config of the dense decoder.
        narrow: Config of the pruned decoder.
        settings: Settings of the run; of training, those that it shares with pruning.
        fitted: Calibration sequences that are fitted, or training sequences.
        held_out: Held-out sequences.
        further: Number of fitted sequences beside those asked for, if the data hold as many as joint steps can read.
        joint_sequences: Number of sequences that joint steps read, repetitions included.
        weight_bytes: Bytes of a stored weight.
        sharers: Number of devices over which the weights are sharded.
        platform: The platform that programs are compiled for.
        training: The other settings of recovery training; None if the run prunes.
    """

    dense: DecoderConfig
    narrow: DecoderConfig
    settings: PruneSettings
    fitted: Chunks
    held_out: Chunks
    further: int
    joint_sequences: int
    weight_bytes: int
    sharers: int
    platform: Platform
    training: FinetuneSettings | None = None

    @property
    def parts(self) -> tuple[Chunks, Chunks]:
        """The fitted and the held-out sequences."""
        return self.fitted, self.held_out

    @property
    def devices(self) -> int:
        """Number of devices over which the sequences are spread."""
        return self.fitted.devices

    def sharing_rows(self, rows: int) -> int:
        """Number of devices over which the rows of a matrix are sharded: see ``devices.row_axes``.

        In waves each group of devices that share the weights has a matrix of its own.
        """
        everywhere = [] if self.in_waves else [self.devices * self.sharers]
        return next(count for count in (*everywhere, self.sharers, 1) if rows % count == 0)

    @property
    def mine(self) -> "Workload":
        """The same workload with only the part of the decoder that one device holds."""
        parts = {name: _part(getattr(self, name), self.sharers) for name in ("dense", "narrow")}
        return dataclasses.replace(self, sharers=1, **parts)

    @property
    def tokens(self) -> int:
        """Number of tokens on one device."""
        return self.fitted.tokens + self.held_out.tokens

    @property
    def streams(self) -> int:
        """Number of streams held: dense, pruned, and the desired output if a norm follows it."""
        return 3 if "output" in self.dense.norms else 2

    @property
    def aimed(self) -> bool:
        """Whether the dense MLP's output for the pruned stream is computed, for a correction below 1."""
        return "output" not in self.dense.norms and self.settings.fit.correction < 1

    @property
    def heads_at_once(self) -> int:
        """Number of query heads whose attention scores are held at once; 0 with the fused kernel of TPUs.

        That of GPUs is for half precision, which streams do not have.
        """
        if self.platform == "cpu":
            return self.dense.heads // self.dense.kv_heads
        fused = self.platform == "tpu" and splash_accepts(self.fitted.length, self.dense.head_dim)
        return 0 if fused else self.dense.heads

    @property
    def stream_bytes(self) -> int:
        """Bytes of a stored element of a stream."""
        return storage(self.settings.stream_dtype).itemsize

    @property
    def judged(self) -> Chunks:
        """The sequences on which joint steps are measured."""
        return self.held_out if self.held_out.count else self.fitted

    @property
    def fewer_heads(self) -> bool:
        """Whether attention is pruned as well."""
        return self.narrow.kv_heads < self.dense.kv_heads

    @property
    def refits(self) -> bool:
        """Whether the output projection is solved for."""
        return update_used(self.settings) in ("refit", "alternate")

    @property
    def rounds(self) -> int:
        """Number of alternating rounds in a layer; that they may end early, no plan knows."""
        return self.settings.rounds if update_used(self.settings) == "alternate" else 0

    @property
    def tail(self) -> DecoderConfig:
        """The blocks of the pruned decoder that joint steps change, or training."""
        return self.narrow if self.training else self.narrow.last(self.settings.joint_last or self.narrow.layers)

    @property
    def entered(self) -> bool:
        """Whether joint steps begin with the pruned model's stream before the blocks that they change."""
        return bool(self.groups) and self.tail.layers < self.narrow.layers

    @property
    def groups(self) -> list[StepSchedule]:
        """The joint steps; none without such steps."""
        sequences = self.joint_sequences, self.judged.real
        if not self.joint_sequences:
            return []
        return [joint.schedule(*sequences, self.fitted.length, self.settings, self.devices)]

    @property
    def joint_steps(self) -> int:
        """Number of joint steps, or of steps of training."""
        return self.training.steps if self.training else sum(group.steps for group in self.groups)

    @property
    def joint_checks(self) -> int:
        """Number of measurements in the joint steps, or in training."""
        if self.training:
            return 1 - -self.training.steps // self.training.check_every
        return 1 + self.groups[0].checks if self.groups else 0

    @property
    def together(self) -> int:
        """Number of blocks that joint steps adjust together, or training."""
        return self.tail.layers

    @property
    def step_sequences(self) -> int:
        """Number of sequences of a joint step, or of a step of training."""
        return self.training.step_sequences if self.training else self.groups[0].sequences

    @property
    def joint_at_once(self) -> int:
        """Number of tokens of such a step that pass through the model at once on one device."""
        length = self.fitted.length
        most = max(1, self.settings.batch_tokens // length)
        return division(self.step_sequences, most, self.devices)[1] * length

    @property
    def predicted(self) -> int:
        """Number of tokens of the vocabulary whose logits are computed in joint steps, or in training."""
        return self.narrow.vocabulary

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element inside joint steps, or steps of training."""
        return 4 if self.platform == "cpu" else 2

    @property
    def moment_bytes(self) -> int:
        """Bytes of one of Adam's moments in joint steps, or in training."""
        return 4 if self.training else 2

    @property
    def samples(self) -> int:
        """Number of sequences that the dense model generates."""
        sampled = self.settings.sampled
        return (sum(part.real for part in self.parts) - self.further) * sampled // (1 + sampled)

    @property
    def written(self) -> tuple[int, int]:
        """How often each device generates such sequences, and how many at once."""
        count, size = batches(self.samples, self.fitted.length, self.devices)
        return count // self.devices, size

    @property
    def in_waves(self) -> bool:
        """Whether channels are chosen on the dense stream, a layer on each group of devices that share the weights."""
        return self.settings.schedule == "parallel"


def _part(config: DecoderConfig, sharers: int) -> DecoderConfig:
    """Returns the part of a decoder that each of ``sharers`` devices holds."""
    sizes = {name: getattr(config, name) for name in ("vocabulary", "intermediate", "heads", "kv_heads")}
    return dataclasses.replace(config, **{name: n if n % sharers else n // sharers for name, n in sizes.items()})


def workload(
    config: DecoderConfig,
    settings: PruneSettings,
    sequences: int,
    length: int,
    devices: int = 1,
    sharers: int = 1,
    weight_bytes: int = 4,
    platform: Platform = "gpu",
    training: FinetuneSettings | None = None,
) -> Workload:
    """Returns the workload of pruning a model with calibration sequences [sequences, length], or of training after it.

    Args:
        config: Config of the dense decoder.
        settings: Settings of the run.
        sequences: Number of calibration sequences, without those that the model generates.
        length: Number of tokens of each sequence.
        devices: Number of devices over which the sequences are spread.
        sharers: Number of devices over which the weights are sharded.
        weight_bytes: Bytes of a stored weight.
        platform: The platform that programs are compiled for.
        training: Settings of recovery training of the pruned model towards the dense one, on these sequences; None to
            plan the pruning.

    Raises:
        UserError: there is nothing to remove, or layers differ in width.
    """
    if config.widths or settings.allocation != "uniform":
        raise UserError(
            "a plan is made for layers of one width, which this model does not have or --allocation global does not "
            "keep: plan a model with one width, with --allocation uniform."
        )
    most, pool = max(1, settings.batch_tokens // length), (POOL - 1) * sequences
    sequences *= 1 if training else 1 + settings.sampled
    settings = settings.resolved(config.layers, config.width, config.intermediate, sequences * length)
    fitted = fitted_of(sequences, training.held_out if training else held_out_part(settings))
    steps = 0 if training else joint_sequences(settings, sequences)
    further = max(0, min(steps - fitted, pool))

    def chunks(count: int) -> Chunks:
        number, size = division(count, most, devices)
        return Chunks(number, size, length, devices, count)

    return Workload(
        dense=config,
        narrow=pruned_config(config, settings),
        settings=settings,
        fitted=chunks(fitted + further),
        held_out=chunks(sequences - fitted),
        further=further,
        joint_sequences=steps,
        weight_bytes=weight_bytes,
        sharers=sharers,
        platform=platform,
        training=training,
    )


def number_of_joint_steps(config: DecoderConfig, settings: PruneSettings, shape: tuple[int, int]) -> int:
    """Returns the joint steps on calibration sequences of a shape, those that the model wrote included."""
    even = dataclasses.replace(config, widths=None), settings.replace(allocation="uniform")
    return workload(*even, shape[0] // (1 + settings.sampled), shape[1]).joint_steps
