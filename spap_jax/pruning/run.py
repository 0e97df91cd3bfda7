"""A pruning run as one value: everything that its result is a function of, resolved once for all its stages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spap_jax.data.tokens import TokenBlocks, check_counted, concatenated, further_of, ids_of, mask_of
from spap_jax.models import DecoderConfig, Params
from spap_jax.parallel.sequences import Sequences, chunked, fitted_of
from spap_jax.pruning.narrow import pruned_config
from spap_jax.pruning.waves import Choices
from spap_jax.report.schema import Check, LayerReport
from spap_jax.settings import PruneSettings
from spap_jax.solver.methods import update_used


class Step(NamedTuple):
    """A step of a run: a block was pruned, or joint steps were made and measured.

    Attributes:
        report: The step's report.
        kept: Returns what a later run continues from: the block's parameters, or what this process's devices hold of
            the state of the joint steps, on the host. Call it in every process, before ``final`` is read
            and before the next step.
        final: Blocks that no later step changes, by number, on the devices; every process has to run through them,
            once.
        fresh: Whether this run made the step.
    """

    report: LayerReport | Check
    kept: Callable[[], Params]
    final: Iterable[tuple[int, Params]] = ()
    fresh: bool = True


class Begun(NamedTuple):
    """The steps of an earlier run: the entire state that later steps depend on.

    The streams are not stored. The same programs recompute them from the finished blocks, which takes two forward
    passes; storing them after every block would take longer, and more space than the blocks. No random state is stored
    either: every step folds the seed with its number.

    Attributes:
        reports: Reports of all the steps, in order.
        read: Returns what the step with a number kept: of the pruned blocks, and of the last joint step. All processes
            have to call it.
    """

    reports: Sequence[LayerReport | Check]
    read: Callable[[int], Params]


NOTHING = Begun((), {}.__getitem__)
"""The steps of a run that has not begun."""


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A pruning run; `resolve` makes one.

    Attributes:
        config: The dense decoder.
        narrow: The pruned decoder.
        outer: The dense decoder's parameters outside the blocks; arrays or values that are read lazily, as in a block.
        read_layer: Returns the parameters of a dense block by its number.
        settings: The settings, in which every value that depends on the model or the tokens is resolved.
        fitted: The calibration tokens that are fitted, divided among the devices.
        held_out: The calibration tokens that are held out; there may be none.
        joint_sequences: Number of sequences that joint steps read, repetitions included; 0 if there are no such steps.
        choices: Channel selections of the parallel schedule.
        begun: The steps of an earlier run with the same values. The result is the same as without.
    """

    config: DecoderConfig
    narrow: DecoderConfig
    outer: Params
    read_layer: Callable[[int], Params]
    settings: PruneSettings
    fitted: Sequences
    held_out: Sequences
    joint_sequences: int
    choices: Choices
    begun: Begun = NOTHING

    @property
    def jointly(self) -> bool:
        """Whether joint steps follow the last block."""
        return self.joint_sequences > 0

    @property
    def tail(self) -> DecoderConfig:
        """The pruned decoder's last blocks alone, which joint steps change."""
        assert self.settings.joint_last
        return self.narrow.last(self.settings.joint_last)

    @property
    def tail_start(self) -> int:
        """Number of the first block that joint steps change; L without such steps."""
        return self.config.layers - self.tail.layers if self.jointly else self.config.layers


def resolve(
    config: DecoderConfig,
    outer: Params,
    read_layer: Callable[[int], Params],
    tokens: np.ndarray | TokenBlocks,
    settings: PruneSettings,
    narrow: DecoderConfig | None = None,
    choices: Choices | None = None,
) -> Run:
    """Returns the run that prunes a model, on the devices of ``devices.use_mesh``; see `Run`.

    Args:
        config: The dense decoder.
        outer: Its parameters outside the blocks.
        read_layer: Returns the parameters of a dense block by its number.
        tokens: Calibration token blocks [B, T]; of those of ``load_tokens``, the mask says which predictions count in
            the joint steps.
        settings: The pruning settings.
        narrow: The pruned decoder, all of whose layers lose the same fraction. By default that of `pruned_config`.
        choices: Channel selections, shared with runs that differ only in sparsity. By default this run has its own.

    Raises:
        UserError: there is nothing to remove.
    """
    blocks = ids_of(tokens)
    settings = settings.resolved(config.layers, config.width, config.intermediate, blocks.size)
    narrow = narrow or pruned_config(config, settings)
    fitted, held_out = calibration_chunks(tokens, settings)
    steps = joint_sequences(settings, len(blocks))
    choices = choices or Choices([narrow.intermediate])
    return Run(config, narrow, outer, read_layer, settings, fitted, held_out, steps, choices)


def calibration_chunks(tokens: np.ndarray | TokenBlocks, settings: PruneSettings) -> tuple[Sequences, Sequences]:
    """Divides calibration sequences into those that are fitted and those that are held out, in chunks.

    Joint steps read text again only if there is no other, since they gain little from it. Their streams of further
    windows are there for all blocks, which are fitted to these as well: a fit to more text is better on other text.
    Samples are never held out.
    """
    further, mask = further_of(tokens), mask_of(tokens)
    own = ids_of(tokens)
    most = max(1, settings.batch_tokens // own.shape[1])
    asked = fitted_of(len(own), held_out_part(settings))
    read = joint_sequences(settings, len(own))
    more = read - asked
    if read and mask is not None:
        check_counted(mask[:asked], "the calibration sequences that are fitted")
        if asked < len(own):
            check_counted(mask[asked:], "the calibration sequences that are held out")
    parts = [(own[:asked], None if mask is None else mask[:asked])]
    if further is not None and more > 0:
        parts.append((further.tokens[:more], None if further.mask is None else further.mask[:more]))
    held_out = chunked(own[asked:], most, None if mask is None else mask[asked:])
    fitted, counted = concatenated(parts)
    return chunked(fitted, most, counted), held_out


def joint_sequences(settings: PruneSettings, sequences: int) -> int:
    """Returns how many sequences joint steps read, repetitions included; 0 if there are no such steps.

    Args:
        settings: The pruning settings.
        sequences: Number of calibration sequences, held-out ones included.
    """
    passes = settings.passes if update_used(settings) == "alternate" else 0
    return max(1, round(passes * fitted_of(sequences, held_out_part(settings)))) if passes else 0


def held_out_part(settings: PruneSettings) -> float:
    """Returns the held-out fraction of all sequences, including sampled ones, which come first."""
    return settings.held_out / (1 + settings.sampled)
