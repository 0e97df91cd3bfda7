"""The sizes of a run: what one device has to do, and how much of it is divided among the devices.

Follows ``spap_jax/devices.py``: sequences are spread in whole chunks, evenly or not at all; the tokens or sequences of
a minibatch likewise. Heads, channels and vocabulary are divided among those devices that share the weights, where their
numbers allow it; everything else is the same on every device.
"""

import dataclasses
import math
from dataclasses import dataclass

from spap_jax.baselines import update_used
from spap_jax.errors import UserError
from spap_jax.models.config import DecoderConfig
from spap_jax.numerics import storage
from spap_jax.pruning import streams
from spap_jax.pruning.pipeline import held_out_part, pruned_config, together
from spap_jax.pruning.sampling import at_once
from spap_jax.settings import PruneSettings


@dataclass(frozen=True)
class Chunks:
    """Sequences in chunks [C, B, T] that pass through a block at once.

    Attributes:
        count: C, on all devices together.
        sequences: B.
        length: T.
        devices: Over how many devices they would be spread.
    """

    count: int
    sequences: int
    length: int
    devices: int

    @property
    def divided(self) -> bool:
        """Whether each device has as many chunks as any other; else each has all of them."""
        return self.devices > 1 and self.count > 0 and self.count % self.devices == 0

    @property
    def here(self) -> int:
        """Chunks on one device."""
        return self.count // self.devices if self.divided else self.count

    @property
    def size(self) -> int:
        """Tokens of one chunk."""
        return self.sequences * self.length

    @property
    def tokens(self) -> int:
        """Tokens on one device."""
        return self.here * self.size

    def share(self, drawn: int) -> int:
        """What one device computes of so many tokens or sequences of a minibatch."""
        return drawn // self.devices if self.divided and drawn % self.devices == 0 else drawn


@dataclass(frozen=True)
class Workload:
    """A run of pruning.

    Attributes:
        dense: The decoder.
        narrow: What becomes of it.
        settings: How.
        fitted: Sequences that are fitted.
        held_out: Those that only judge.
        weight_bytes: Bytes of a stored weight.
        heads_at_once: Query heads whose attention scores are held at once.
        sharers: Among how many devices the weights are divided.
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
        """Fitted and held out."""
        return self.fitted, self.held_out

    @property
    def devices(self) -> int:
        """Over how many devices the sequences are spread."""
        return self.fitted.devices

    @property
    def mine(self) -> "Workload":
        """The same with the part of the decoder that one of the devices has."""
        parts = {name: _part(getattr(self, name), self.sharers) for name in ("dense", "narrow")}
        return dataclasses.replace(self, sharers=1, **parts)

    @property
    def tokens(self) -> int:
        """Tokens on one device."""
        return self.fitted.tokens + self.held_out.tokens

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number of a stream, as it is kept."""
        return storage(self.settings.stream_dtype).itemsize

    @property
    def judged(self) -> Chunks:
        """What judges the sweeps."""
        return self.held_out if self.held_out.count else self.fitted

    @property
    def fewer_heads(self) -> bool:
        """Whether attention is pruned as well."""
        return self.narrow.kv_heads < self.dense.kv_heads

    @property
    def alternates(self) -> bool:
        """Whether the weights are recovered by alternating rounds (and sweeps)."""
        return update_used(self.settings) == "alternate"

    @property
    def refits(self) -> bool:
        """Whether the output projection is solved for."""
        return update_used(self.settings) in ("refit", "alternate")

    @property
    def stages(self) -> int:
        """Weights on the way to the result whose errors are told: of the channels chosen, and of their refit."""
        return {"none": 0, "bias": 1, "refit": 1, "alternate": 2}[update_used(self.settings)]

    @property
    def sweeps(self) -> int:
        """Sweeps over the model."""
        return self.settings.decided.sweeps if self.alternates else 0

    @property
    def together(self) -> int:
        """Blocks that a sweep adjusts together."""
        return together(self.narrow.layers, self.settings)

    @property
    def after(self) -> float:
        """Blocks behind those that a sweep adjusts, on average."""
        return (self.narrow.layers - self.together) / 2

    @property
    def written(self) -> int:
        """Sequences that the dense model writes."""
        sampled = self.settings.decided.sampled
        return sum(part.count * part.sequences for part in self.parts) * sampled // (1 + sampled)

    @property
    def written_at_once(self) -> int:
        """How many of them."""
        return at_once(max(1, self.written), self.fitted.length)

    @property
    def in_waves(self) -> bool:
        """Whether channels are chosen on the dense stream, a layer on each device."""
        return self.settings.schedule == "parallel"

    @property
    def solved_here(self) -> float:
        """Of the layers, the part whose channels a device chooses."""
        return math.ceil(self.dense.layers / (self.devices * self.sharers)) / self.dense.layers if self.in_waves else 1

    @property
    def batch(self) -> int:
        """Tokens of a minibatch of the alternating rounds."""
        return min(self.settings.step_tokens, self.fitted.count * self.fitted.size)

    @property
    def step_sequences(self) -> int:
        """Sequences of a minibatch of the sweeps."""
        most = self.fitted.count * self.fitted.sequences
        return min(max(1, self.settings.step_tokens // self.fitted.length), most)


def _part(config: DecoderConfig, sharers: int) -> DecoderConfig:
    """What one of so many devices has of a decoder."""
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
    """The run that prunes a model with calibration sequences [sequences, length].

    Args:
        config: The dense decoder.
        settings: How.
        sequences: How many sequences there are, beside those that the model writes.
        length: Their tokens.
        devices: Over how many devices they are spread.
        sharers: Among how many devices the weights are divided.
        weight_bytes: Bytes of a stored weight.
        heads_at_once: As in `Workload`; where absent all heads, as on accelerators. A CPU takes one group.

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
    fitted, chunk = streams.split(sequences, held_out_part(settings), most, devices)
    # As the pipeline chunks what is held out.
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
