"""A pruning run as one value: everything that its result is a function of, resolved once for all its stages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spap_jax.data import TokenBlocks, further_of, mask_of
from spap_jax.methods import update_used
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.pruning import streams
from spap_jax.pruning.narrow import pruned_config
from spap_jax.pruning.prune_report import LayerReport
from spap_jax.pruning.streams import Padded
from spap_jax.pruning.waves import Choices
from spap_jax.settings import PruneSettings
from spap_jax.training.check import Check


class Step(NamedTuple):
    """A step of a run: a block was pruned, or joint steps were made and measured.

    Attributes:
        report: The step's report.
        kept: Returns what a later run continues from, on the host: the block's parameters, or what this process's
            devices hold of the state of the joint steps. Call it before the next step.
        final: Blocks that no later step changes, by number; every process has to run through them, once.
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
        joint_text: The tokens that joint steps read; None if they read the fitted ones, or if there are no such steps.
        choices: Channel selections of the parallel schedule.
        begun: The steps of an earlier run with the same values. The result is the same as without.
    """

    config: DecoderConfig
    narrow: DecoderConfig
    outer: Params
    read_layer: Callable[[int], Params]
    settings: PruneSettings
    fitted: Padded
    held_out: Padded
    joint_text: Padded | None
    choices: Choices
    begun: Begun = NOTHING

    @property
    def jointly(self) -> bool:
        """Whether joint steps follow the last block."""
        return joint_sequences(self.settings, self.fitted.real) > 0


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
            the joint steps, which read the further windows.
        settings: The pruning settings.
        narrow: The pruned decoder, all of whose layers lose the same fraction. By default that of `pruned_config`.
        choices: Channel selections, shared with runs that differ only in sparsity. By default this run has its own.

    Raises:
        UserError: there is nothing to remove.
    """
    blocks, mask = tokens.tokens if isinstance(tokens, TokenBlocks) else tokens, mask_of(tokens)
    settings = settings.resolved(config.layers, config.width, blocks.size)
    narrow = narrow or pruned_config(config, settings)
    fitted, held_out = calibration_chunks(blocks, settings, mask)
    choices = choices or Choices([narrow.intermediate])
    return Run(config, narrow, outer, read_layer, settings, fitted, held_out, joint_chunks(tokens, settings), choices)


def calibration_chunks(
    tokens: np.ndarray, settings: PruneSettings, mask: np.ndarray | None = None
) -> tuple[Padded, Padded]:
    """Splits token blocks [B, T] and their mask into calibration and held-out chunks; samples are never held out."""
    most = max(1, settings.batch_tokens // tokens.shape[1])
    fitted = streams.fitted_of(len(tokens), held_out_part(settings))
    first, second = (
        streams.chunked(tokens[part], most, None if mask is None else mask[part])
        for part in (slice(fitted), slice(fitted, None))
    )
    return first, second


def joint_sequences(settings: PruneSettings, fitted: int) -> int:
    """Returns how many sequences joint steps read, with ``fitted`` fitted ones; 0 if there are no such steps."""
    passes = settings.passes if update_used(settings) == "alternate" else 0
    return max(1, round(passes * fitted)) if passes else 0


def joint_chunks(tokens: np.ndarray | TokenBlocks, settings: PruneSettings) -> Padded | None:
    """Returns the sequences that joint steps read: further ones, and fitted ones if these are too few.

    The pruned blocks were fitted to the latter, so that their errors on these are smaller than on any other text, and
    say less of what is to be mended. None if joint steps read the fitted ones alone, or if there are none.
    """
    mask, further = mask_of(tokens), further_of(tokens)
    blocks = tokens.tokens if isinstance(tokens, TokenBlocks) else tokens
    fitted = streams.fitted_of(len(blocks), held_out_part(settings))
    count = joint_sequences(settings, fitted)
    if further is None or not count:
        return None

    def together(more: np.ndarray, own: np.ndarray) -> np.ndarray:
        return np.concatenate([more, own[:fitted]])[:count]

    most = max(1, settings.batch_tokens // blocks.shape[1])
    counted = None if mask is None or further.mask is None else together(further.mask, mask)
    return streams.chunked(together(further.tokens, blocks), most, counted)


def held_out_part(settings: PruneSettings) -> float:
    """Returns the held-out fraction of all sequences, including sampled ones, which come first."""
    return settings.held_out / (1 + settings.sampled)
