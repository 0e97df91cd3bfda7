"""Additional calibration text, sampled from the dense model itself.

Joint steps fit the pruned model's predictions to the dense model's on text like the calibration text; the more text,
the less they overfit. Samples of the dense model follow its own distribution of text, in any amount.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spap_jax.data.tokens import concatenated, further_of, ids_of, mask_of, new_blocks
from spap_jax.errors import UserError, option
from spap_jax.evaluation.generation import generate, keys_of
from spap_jax.models.model import Model
from spap_jax.numerics import step_dtype
from spap_jax.parallel.mesh import data_size
from spap_jax.parallel.placement import shard_params
from spap_jax.parallel.sequences import division, fitted_of
from spap_jax.pruning.run import held_out_part
from spap_jax.report.account import data_account
from spap_jax.settings import PruneSettings

PROMPT = 8
"""Prompts are one of this many equal parts of a calibration sequence."""

_TOKENS = 32_768
"""Maximum number of tokens that a device generates at once, with their keys and values in memory."""


def sample(
    model: Model, tokens: np.ndarray, times: int, seed: int, watch: Callable[[int, int], None] = lambda *_: None
) -> np.ndarray:
    """Samples sequences from a model at temperature 1, on all devices; all processes must call this.

    Each sequence has its own random key, so that the samples do not depend on the number of devices.

    Args:
        model: The dense model.
        tokens: Calibration sequences [B, T].
        times: Number of samples per calibration sequence; each continues from another part of it.
        seed: Random seed.
        watch: Called with the number of sequences written and the total.

    Returns:
        [times B, T] int32; the first T / 8 tokens of each come from a calibration sequence.

    Raises:
        UserError: the sequences are too short to serve as prompts.
    """
    length = tokens.shape[1]
    prompt = max(1, length // PROMPT)
    if length < 2:
        raise UserError(f"sequences of one token leave nothing to sample: give longer ones, or {option('sampled', 0)}.")
    parts = [tokens[:, start : start + prompt] for start in range(0, length - prompt + 1, prompt)]
    several = (tokens != tokens[0]).any()  # copies of one say nothing of how others begin
    if several and (tokens[:, 0] == tokens[0, 0]).all():  # the beginning-of-text token, which samples need too
        parts = [np.concatenate([tokens[:, :1], part[:, 1:]], axis=1) for part in parts]
    prompts = np.concatenate([parts[time % len(parts)] for time in range(times)])
    number = len(prompts)
    count, size = batches(number, length, data_size())
    filled = np.minimum(np.arange(count * size), number - 1)  # one program generates all
    prompts, keys = prompts[filled], keys_of(jax.random.key(seed), filled)
    model = model.replace(params=shard_params(model.config, model.params))
    dtype, together, written = step_dtype(), data_size() * size, []
    for start in range(0, number, together):
        watch(start, number)
        some, drawn = prompts[start : start + together], keys[start : start + together]
        written.append(generate(model, some, length - prompt, temperature=1.0, key=drawn, eos=(), pad=0, dtype=dtype))
    watch(number, number)
    return np.concatenate(written)[:number]


def batches(count: int, length: int, devices: int) -> tuple[int, int]:
    """Returns the number of batches in which ``count`` sequences are generated, on all devices, and their size."""
    return division(count, max(1, _TOKENS // length), devices)


def with_samples(
    tokens: Any,
    model: Callable[[], Model],
    settings: PruneSettings,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> Any:
    """Prepends samples of the dense model to the calibration tokens, as configured in the settings; see `sample`.

    They continue the sequences that are fitted, and none that is held out. All processes must call this.

    Args:
        tokens: Sequences [B, T], or `TokenBlocks`.
        model: Returns the dense model.
        settings: Settings with the number of samples per sequence and the seed.
        watch: As in `sample`.

    Returns:
        `TokenBlocks` [(1 + times) B, T]; the unchanged ``tokens`` if there is nothing to sample.

    Raises:
        UserError: as in `sample`.
    """
    times = settings.sampled
    if not times:
        return tokens
    blocks = np.asarray(ids_of(tokens), np.int32)
    # Prompts are fitted with what continues them, so none may be of a held-out sequence, unless there is no other.
    fitted = fitted_of((1 + times) * len(blocks), held_out_part(settings)) - times * len(blocks)
    sources = blocks[np.arange(len(blocks)) % max(1, fitted)]
    written = sample(model(), sources, times, settings.seed, watch)
    both, mask = concatenated([(written, None), (blocks, mask_of(tokens))])  # of what the model wrote, all counts
    words = f"{data_account(tokens).description}, and {times} for each that the model wrote"
    return new_blocks(both, words, len(both), mask, further_of(tokens))
