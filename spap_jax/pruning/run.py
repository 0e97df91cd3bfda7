"""A pruning run: all that its result depends on, decided once, when model, tokens, settings and mesh are known."""

import dataclasses
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from spap_jax.data.tokens import TokenBlocks, check_counted, concatenated, further_of, ids_of, mask_of
from spap_jax.errors import UserError, option, warn
from spap_jax.models import FAMILIES, DecoderConfig, Params
from spap_jax.parallel import mesh, placement
from spap_jax.parallel.program import program
from spap_jax.parallel.sequences import Sequences, chunked, fitted_of
from spap_jax.pruning import reduce
from spap_jax.quantities import percent_text
from spap_jax.report.schema import Sparsities, Sparsity
from spap_jax.settings import EFFORTS, LARGE, PruneSettings
from spap_jax.solver.alternating import RoundSchedule
from spap_jax.solver.methods import update_used
from spap_jax.training.loop import StepSchedule

_RIDGE = {"alternate": 1e-2}
"""Ridge of the solved weights by update, relative to each channel's energy; 1e-4 elsewhere, as in papers of others. The
larger one generalises better from little text ("Target" in ``docs/method.md``).
"""

_CORRECTION = {"alternate": 0.5}
"""Share of the errors of earlier blocks that an MLP also corrects, by update; all of them elsewhere."""

_MULTIPLES = ((8192, 64), (1024, 8))
"""What the kept width of MLPs with at least this many channels is a multiple of, so that devices have whole tiles."""

_JOINT_RATE = 5.8
"""The largest joint step on all blocks, times the width and the number of blocks: the more inputs and blocks there are,
the further one step moves the predictions.
"""

_TAIL_RATE, _TAIL_LIMIT = 0.06, 0.002
"""The largest joint step on the last g blocks alone, times the square root of the width and g^(2/3), and its limit."""

_STEP_TOKENS, _STEP_RATE = 2048, 0.03
"""Tokens of one optimizer step of an alternating round, and its size relative to the weights it changes."""

_LEAST_STEPS = 32
"""Least number of joint steps that several devices share the text in; fewer, larger ones would not lead as far."""

_CHECKS = 8
"""Largest number of measurements on held-out tokens between joint steps."""

_SERVED_BY = (2, 4, 8)
"""Usual numbers of devices among which servers divide the heads; fewer heads than devices are repeated."""

_NEARLY_ALL = 0.9
"""Fraction of removed channels above which a warning is given."""


class Dense(NamedTuple):
    """A dense model, block by block.

    Attributes:
        outer: Its parameters outside the blocks; arrays or values that are read lazily, as in a block.
        read_layer: Returns the parameters of a block by its number.
    """

    config: DecoderConfig
    outer: Params
    read_layer: Callable[[int], Params]

    def blocks(self, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, Params]]:
        """Yields blocks with their numbers, on the devices, each at its own width; a thread reads the next meanwhile.

        Raises:
            UserError: a block cannot be read; raised when its turn has come.
        """
        numbers = [*(range(self.config.layers) if numbers is None else numbers)]
        with ThreadPoolExecutor(1, "reading") as reader:
            following = (reader.submit(placement.read, self.read_layer(number)) for number in numbers)
            coming = next(following, None)
            for index in numbers:
                assert coming is not None
                layer = jax.block_until_ready(placement.shard_params(self.config, coming.result()))
                coming = next(following, None)  # now, so that the host holds one block at a time
                yield index, reduce.resized(layer, self.config.of_layer(index).intermediate)
                del layer


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A pruning run; `resolve` makes one.

    Attributes:
        settings: The settings; those that depend on the model or the tokens have their values.
        held_out: The calibration sequences that nothing is fitted to; there may be none.
        update: How the kept weights are updated: "none", "bias", "refit" or "alternate".
        ridge: Pull of the solved weights towards the dense ones, relative to each channel's energy.
        correction: Share of the errors of earlier blocks that the update of an MLP also corrects.
        rounds: The alternating rounds in a layer; None without.
        joint: The joint steps after the last block; None without.
        dtype: Data type of the pruned blocks; None for that of the dense ones.
    """

    config: DecoderConfig
    pruned: DecoderConfig
    settings: PruneSettings
    fitted: Sequences
    held_out: Sequences
    update: str
    ridge: float
    correction: float
    rounds: RoundSchedule | None
    joint: StepSchedule | None
    dtype: str | None = None

    @property
    def judged(self) -> Sequences:
        """The sequences on which joint steps are measured: the held-out ones, if there are any."""
        return self.held_out if self.held_out.real else self.fitted

    @property
    def tail(self) -> DecoderConfig:
        """The pruned decoder's last blocks alone, which joint steps change."""
        assert self.settings.joint_last
        return self.pruned.last(self.settings.joint_last)

    @property
    def first_joint(self) -> int:
        """Number of the first pruned block that joint steps change; that of blocks without such steps."""
        return self.pruned.layers - (self.tail.layers if self.joint else 0)

    @property
    def blocks(self) -> list[int]:
        """Numbers of the dense blocks that stay, in the order of the pruned ones."""
        return kept_blocks(self.config, self.settings)

    def narrow(self, index: int) -> DecoderConfig:
        """The pruned decoder's config for the block that stays of the dense block ``index``."""
        return self.pruned.of_layer(self.blocks.index(index))

    @property
    def fewer_heads(self) -> DecoderConfig:
        """The dense decoder with as many heads as the pruned one."""
        return self.config.with_kv_heads(self.pruned.kv_heads)

    def key(self, purpose: str, index: int | jax.Array) -> jax.Array:
        """Returns the random key of a layer or sequence for one purpose, such as "rounds"."""
        return _key(np.uint32(self.settings.seed), np.uint32(zlib.crc32(purpose.encode())), index)


@program
def _key(seed: jax.Array, purpose: jax.Array, index: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), index)


def resolve(
    config: DecoderConfig, tokens: np.ndarray | TokenBlocks, settings: PruneSettings, dtype: str | None = None
) -> Run:
    """Returns the run that prunes a model, on the devices of ``mesh.use_mesh``, and warns of settings without effect.

    Args:
        config: The dense decoder.
        tokens: Calibration sequences [B, T]; the mask of those of ``load_tokens`` says which predictions count in the
            joint steps.
        dtype: Data type of the pruned blocks; by default that of the dense ones.

    Raises:
        UserError: there is nothing to remove, or no prediction counts.
    """
    count, length = ids_of(tokens).shape
    effort, update = EFFORTS[settings.effort], update_used(settings)
    pruned = pruned_config(config, settings)
    last = min(settings.joint_last or effort.last or pruned.layers, pruned.layers)
    steps = max(1, round(effort.round_passes * count * length / _STEP_TOKENS))
    rounds = RoundSchedule(settings.rounds, steps, min(_STEP_TOKENS, count * length), _STEP_RATE)
    settings = settings.replace(
        sparsity=settings.channel_sparsity,
        round_to=multiple_of(settings, config.intermediate),
        joint_passes=_passes(config, settings, count * length),
        joint_last=last,
    )
    reading = joint_sequences(config, settings, count, length)
    fitted, held_out = _divided(tokens, settings, reading)
    return Run(
        config, pruned, settings, fitted, held_out, update,
        ridge=_RIDGE.get(update, 1e-4),
        correction=_CORRECTION.get(update, 1.0),
        rounds=rounds if update == "alternate" and settings.rounds else None,
        joint=_joint_schedule(pruned, settings, reading, held_out.real or fitted.real, length) if reading else None,
        dtype=dtype,
    )  # fmt: skip


def joint_sequences(config: DecoderConfig, settings: PruneSettings, count: int, length: int) -> int:
    """Returns how many sequences joint steps read, of ``count`` calibration sequences and further ones; 0 without."""
    passes = _passes(config, settings, count * length)
    return max(1, round(passes * fitted_of(count, settings.held_out))) if passes else 0


def _passes(config: DecoderConfig, settings: PruneSettings, tokens: int) -> float:
    """Returns how often joint steps read as much text as the calibration text."""
    effort = EFFORTS[settings.effort]
    if update_used(settings) != "alternate":
        return 0.0
    if settings.joint_passes is not None:
        return settings.joint_passes
    weights = config.layers * config.width * (4 * config.width + 3 * config.intermediate)  # about
    return min(effort.passes, max(1.0, effort.text * max(1.0, LARGE / weights) / tokens))


def _divided(tokens: np.ndarray | TokenBlocks, settings: PruneSettings, reading: int) -> tuple[Sequences, Sequences]:
    """Divides calibration sequences, and further ones for joint steps, into fitted and held-out ones, in chunks."""
    own, mask, further = ids_of(tokens), mask_of(tokens), further_of(tokens)
    most = max(1, settings.batch_tokens // own.shape[1])
    asked = fitted_of(len(own), settings.held_out)
    if reading and mask is not None:
        check_counted(mask[:asked], "the calibration sequences that are fitted")
        if asked < len(own):
            check_counted(mask[asked:], "the calibration sequences that are held out")
    parts = [(own[:asked], None if mask is None else mask[:asked])]
    if further is not None and (more := reading - asked) > 0:
        parts.append((further.tokens[:more], None if further.mask is None else further.mask[:more]))
    fitted, counted = concatenated(parts)
    held_out = chunked(own[asked:], most, None if mask is None else mask[asked:])
    return chunked(fitted, most, counted), held_out


def _joint_schedule(
    config: DecoderConfig, settings: PruneSettings, reading: int, judged: int, length: int
) -> StepSchedule:
    """Returns the joint steps; several devices make fewer on the same text, of as many sequences as there are devices.

    Steps of n times as many sequences are larger by the square root of n.
    """
    effort, last = EFFORTS[settings.effort], settings.joint_last
    assert last
    tail_rate = min(_TAIL_LIMIT, _TAIL_RATE / (config.width**0.5 * last ** (2 / 3)))
    rate = _JOINT_RATE / (config.layers * config.width) if last == config.layers else tail_rate
    alone = min(reading, max(1, effort.tokens // length))
    batch = max(alone, min(mesh.data_size(), reading // _LEAST_STEPS))
    rate *= (batch / alone) ** 0.5
    steps = max(1, round(reading / batch))
    checks = max(1, round(min(_CHECKS, effort.measured * reading / judged)))
    return StepSchedule(steps, rate, batch, -(-steps // checks), settings.batch_tokens, (settings.seed, 0))


def kept_blocks(config: DecoderConfig, settings: PruneSettings) -> list[int]:
    """Returns the numbers of the blocks that stay.

    Raises:
        UserError: a block that is to be dropped is not there, or is the first or the last one.
    """
    numbers = range(1, config.layers - 1)
    if wrong := [number for number in settings.drop_blocks if number not in numbers]:
        raise UserError(
            f"{option('drop_blocks')} names block {wrong[0]}: blocks are counted from 0, and the first and the last "
            f"one of {config.layers} stay, so name some from 1 to {config.layers - 2}."
        )
    return [number for number in range(config.layers) if number not in settings.drop_blocks]


def multiple_of(settings: PruneSettings, channels: int) -> int:
    """Returns what the kept width of an MLP is a multiple of."""
    return settings.round_to or next((multiple for least, multiple in _MULTIPLES if channels >= least), 1)


def pruned_config(config: DecoderConfig, settings: PruneSettings) -> DecoderConfig:
    """Returns the config of the decoder pruned from ``config``: fewer blocks, narrower, biases if the update adds them.

    Every layer loses the same fraction of its channels, as in the allocation "uniform"; "global" starts from it.

    Raises:
        UserError: nothing is removed, also by rounding, or no stock loader would accept the number of heads.
    """
    multiple, sparsity = multiple_of(settings, config.intermediate), settings.channel_sparsity
    pruned = config.of_blocks(kept_blocks(config, settings))
    keep = [reduce.kept_width(width, sparsity, multiple) if sparsity else width for width in pruned.layer_widths]
    if not (sparsity or settings.attention_sparsity or settings.drop_blocks):
        raise UserError(f"nothing to remove: give a {option('sparsity')} above 0.")
    for kept, width in zip(keep, pruned.layer_widths, strict=True):
        if sparsity and kept == width:
            raise UserError(
                f"nothing to remove: {option('sparsity', sparsity)} of {width} channels, rounded to a "
                f"multiple of {multiple}, keeps all of them; raise {option('sparsity')} or lower "
                f"{option('round_to')}."
            )
    added = update_used(settings) == "bias"
    if added and "output" in config.norms:
        raise UserError(
            "the update 'bias' adds a constant to the MLP's output, and the norm that follows it in this model divides "
            f"by another number for every token: use {option('update', 'none')} or {option('update', 'refit')}."
        )
    pruned = dataclasses.replace(pruned.with_widths(keep), mlp_bias=config.mlp_bias or added)
    return pruned.with_kv_heads(_kept_kv_heads(config, settings.attention_sparsity))


def sparsities(config: DecoderConfig, pruned: DecoderConfig, settings: PruneSettings) -> Sparsities:
    """Computes the fractions that pruning ``config`` to ``pruned`` removes; widths and heads are rounded.

    Channels and heads are counted in the blocks that stay.
    """
    stay = config.of_blocks(kept_blocks(config, settings))
    channels = 1 - sum(pruned.layer_widths) / sum(stay.layer_widths)
    heads = 1 - pruned.kv_heads / config.kv_heads
    return Sparsities(
        Sparsity(settings.channel_sparsity, channels),
        Sparsity(settings.attention_sparsity, heads),
        config.layers - pruned.layers,
    )


def warn_of_settings(config: DecoderConfig, settings: PruneSettings, asked: Collection[str] | None = None) -> None:
    """Warns of rounding that changes the sparsity noticeably, and of settings without effect.

    ``asked`` has the names of the settings that were asked for; by default, of those without their default value.
    """
    pruned = pruned_config(config, settings)
    found = sparsities(config, pruned, settings)
    sparsity = settings.channel_sparsity
    stay = f"{pruned.intermediate} of {config.intermediate} stay in a layer"
    if found.channels.missed:
        warn(
            f"sparsity {sparsity} removes {percent_text(found.channels.achieved)} of the MLP channels: "
            f"{stay}, rounded to a multiple of {multiple_of(settings, config.intermediate)}."
        )
    if found.channels.achieved > _NEARLY_ALL:
        warn(
            f"sparsity {sparsity} removes nearly all MLP channels ({stay}): little of what the model can do "
            "is left, so choose a lower one unless that is what you want to see."
        )
    if found.heads.missed:
        warn(
            f"attention sparsity {settings.attention_sparsity} removes {percent_text(found.heads.achieved)} of heads, "
            f"which stay whole: {pruned.kv_heads} of {config.kv_heads} key/value heads are left in a layer."
        )
    if lost := undivided(config.kv_heads, pruned.kv_heads):
        warn(
            f"{pruned.kv_heads} key/value heads are left in a layer: servers that divided the dense model's "
            f"{config.kv_heads} among {' or '.join(map(str, lost))} devices cannot divide these."
        )
    if config.in_tower:
        warn(
            "only the part of the model that reads and writes text is pruned, on text alone: what that does to how "
            "it reads images is not measured."
        )
    for names, why in _without_effect(settings):
        unusual = [name for name in names if getattr(settings, name) != getattr(PruneSettings, name)]
        changed = [option(name) for name in unusual if asked is None or name in asked]
        if changed:
            warn(f"{', '.join(changed)} {'has' if len(changed) == 1 else 'have'} no effect: {why}.")


def undivided(heads: int, kept: int) -> list[int]:
    """Returns the usual numbers of devices among which servers divided the heads, but cannot divide those kept."""
    return [count for count in _SERVED_BY if heads % count == 0 and kept % count and count % kept]


def _without_effect(settings: PruneSettings) -> list[tuple[tuple[str, ...], str]]:
    joint = ("joint_text_weight", "joint_last")
    if (update := update_used(settings)) != "alternate":
        names = ("effort", "rounds", "joint_passes", *joint)
        return [(names, f"the update {update} has no rounds and no joint steps")]
    if settings.joint_passes == 0:
        names = joint if settings.rounds else ("effort", *joint)
        return [(names, "there are no joint steps")]
    return []


def _kept_kv_heads(config: DecoderConfig, sparsity: float) -> int:
    if sparsity == 0:
        return config.kv_heads
    keep = reduce.kept_width(config.kv_heads, sparsity, 1)
    FAMILIES[config.family].check_heads(config, keep)
    if keep == config.kv_heads:
        name = option("attention_sparsity")
        advice = f"leave {name} out" if keep == 1 else f"raise {name}"
        raise UserError(
            f"nothing to remove: {option('attention_sparsity', sparsity)} of {keep} key/value "
            f"{'head' if keep == 1 else 'heads'}, rounded, keeps all of them; {advice}."
        )
    return keep
