"""The sizes of a run: the work of one device, and how much of it is divided among the devices.

This follows ``spap_jax/devices.py``: sequences are sharded in whole chunks, evenly or not at all, and so are the tokens
or sequences of a minibatch. Heads, channels and vocabulary are sharded over the devices that share the weights, if
their numbers allow it, and the rows of second moments and of the solver over all devices; the rest is replicated.
"""

import dataclasses
import math
from dataclasses import dataclass

from spap_jax.baselines import update_used
from spap_jax.errors import UserError
from spap_jax.models.config import DecoderConfig
from spap_jax.numerics import storage
from spap_jax.pruning import joint, streams
from spap_jax.pruning.pipeline import held_out_part, pruned_config
from spap_jax.pruning.sampling import at_once
from spap_jax.settings import PruneSettings


@dataclass(frozen=True)
class Chunks:
    """Sequences in chunks [C, B, T]; a chunk passes through a block at once.

    Attributes:
        count: C, on all devices together.
        sequences: B.
        length: T.
        devices: Number of devices over which the chunks are spread if they can be divided.
    """

    count: int
    sequences: int
    length: int
    devices: int

    @property
    def divided(self) -> bool:
        """Whether the chunks are divided evenly among the devices; otherwise each device has all of them."""
        return self.devices > 1 and self.count > 0 and self.count % self.devices == 0

    @property
    def here(self) -> int:
        """Number of chunks on one device."""
        return self.count // self.devices if self.divided else self.count

    @property
    def size(self) -> int:
        """Number of tokens of one chunk."""
        return self.sequences * self.length

    @property
    def tokens(self) -> int:
        """Number of tokens on one device."""
        return self.here * self.size

    def share(self, drawn: int) -> int:
        """Number of a minibatch's tokens or sequences that one device computes, out of ``drawn``."""
        return drawn // self.devices if self.divided and drawn % self.devices == 0 else drawn


@dataclass(frozen=True)
class Workload:
    """A pruning run.

    Attributes:
        dense: Config of the dense decoder.
        narrow: Config of the pruned decoder.
        settings: Settings of the run.
        fitted: Calibration sequences that are fitted.
        held_out: Held-out calibration sequences.
        weight_bytes: Bytes of a stored weight.
        heads_at_once: Number of query heads whose attention scores are held at once.
        sharers: Number of devices over which the weights are sharded.
    """

    dense: DecoderConfig
    narrow: DecoderConfig
    settings: PruneSettings
    fitted: Chunks
    held_out: Chunks
    weight_bytes: int
    heads_at_once: int
    sharers: int

    @property
    def parts(self) -> tuple[Chunks, Chunks]:
        """The fitted and the held-out sequences."""
        return self.fitted, self.held_out

    @property
    def devices(self) -> int:
        """Number of devices over which the sequences are spread."""
        return self.fitted.devices

    def sharing_rows(self, rows: int) -> int:
        """Number of devices over which the rows of a matrix are sharded: see ``devices.by_rows``."""
        return next(count for count in (self.devices * self.sharers, self.sharers, 1) if rows % count == 0)

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
    def alternates(self) -> bool:
        """Whether the weights are recovered by alternating rounds (and joint steps)."""
        return update_used(self.settings) == "alternate"

    @property
    def refits(self) -> bool:
        """Whether the output projection is solved for."""
        return update_used(self.settings) in ("refit", "alternate")

    @property
    def stages(self) -> int:
        """Number of intermediate results whose errors are reported: the selected channels, and their refit."""
        return {"none": 0, "bias": 1, "refit": 1, "alternate": 2}[update_used(self.settings)]

    @property
    def groups(self) -> list[joint.Group]:
        """The groups of blocks that joint steps adjust together; none without such steps."""
        if not self.alternates:
            return []
        fitted = self.fitted
        return joint.groups(
            self.narrow.layers, fitted.count * fitted.sequences, fitted.length, self.settings, self.devices
        )

    @property
    def joint_steps(self) -> int:
        """Number of joint steps."""
        return sum(group.schedule.steps for group in self.groups)

    @property
    def joint_checks(self) -> int:
        """Number of measurements in the joint steps."""
        return joint.number_of_checks(self.groups) if self.groups else 0

    @property
    def together(self) -> int:
        """Number of blocks that joint steps adjust together."""
        return joint.together(self.narrow.layers, self.settings)

    @property
    def joint_tokens(self) -> int:
        """Number of tokens of a joint step that one device computes."""
        sequences = self.groups[0].schedule.sequences if self.groups else 1
        return -(-sequences // self.devices) * self.fitted.length

    @property
    def joint_at_once(self) -> int:
        """Number of those that pass through the model at once."""
        length = self.fitted.length
        own = self.joint_tokens // length
        return streams.largest_divisor(own, max(1, self.settings.batch_tokens // length)) * length

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element inside joint steps; on accelerators two by default."""
        return 4 if self.settings.compute_dtype == "float32" else 2

    @property
    def written(self) -> int:
        """Number of sequences that the dense model generates on one device."""
        sampled = self.settings.decided.sampled
        count = sum(part.count * part.sequences for part in self.parts) * sampled // (1 + sampled)
        return count if count % self.devices else count // self.devices

    @property
    def written_at_once(self) -> int:
        """Number of sequences that one device generates at once."""
        return at_once(max(1, self.written), self.fitted.length)

    @property
    def in_waves(self) -> bool:
        """Whether channels are chosen on the dense stream, a layer on each device."""
        return self.settings.schedule == "parallel"

    @property
    def solved_here(self) -> float:
        """Fraction of the layers whose channels one device chooses."""
        return math.ceil(self.dense.layers / (self.devices * self.sharers)) / self.dense.layers if self.in_waves else 1

    @property
    def batch(self) -> int:
        """Number of tokens in a minibatch of the alternating rounds."""
        return min(self.settings.step_tokens, self.fitted.count * self.fitted.size)


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
    heads_at_once: int | None = None,
) -> Workload:
    """Returns the workload of pruning a model with calibration sequences [sequences, length].

    Args:
        config: Config of the dense decoder.
        settings: Settings of the run.
        sequences: Number of calibration sequences, without those that the model generates.
        length: Number of tokens of each sequence.
        devices: Number of devices over which the sequences are spread.
        sharers: Number of devices over which the weights are sharded.
        weight_bytes: Bytes of a stored weight.
        heads_at_once: See `Workload`. By default all heads, as on accelerators; a CPU processes one group at a time.

    Raises:
        UserError: there is nothing to remove, or layers differ in width.
    """
    if config.widths or settings.allocation != "uniform":
        raise UserError(
            "a plan is made for layers of one width, which this model does not have or --allocation global does not "
            "keep: plan a model with one width, with --allocation uniform."
        )
    most = max(1, settings.batch_tokens // length)
    sequences *= 1 + settings.decided.sampled
    settings = settings.resolved(config.layers, config.width, sequences * length)
    fitted, chunk = streams.split(sequences, held_out_part(settings), most, devices)
    # The pipeline chunks held-out sequences in the same way.
    held = sequences - fitted
    rest = held // devices if held % devices == 0 else held
    held_chunk = streams.largest_divisor(rest, chunk) if rest else 1
    return Workload(
        dense=config,
        narrow=pruned_config(config, settings),
        settings=settings,
        fitted=Chunks(fitted // chunk, chunk, length, devices),
        held_out=Chunks(held // held_chunk, held_chunk, length, devices),
        weight_bytes=weight_bytes,
        heads_at_once=config.heads if heads_at_once is None else heads_at_once,
        sharers=sharers,
    )
