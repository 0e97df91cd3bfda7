"""More calibration text, written by the dense model itself.

The sweeps bring the pruned model's predictions near the dense model's on text like the calibration; the more of it, the
less they learn it by heart. What the dense model writes is such text by its own account, and there is no end of it.
"""

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import jax
import numpy as np

from spap_jax.data import TokenBlocks
from spap_jax.devices import from_leader, leads
from spap_jax.errors import UserError, option
from spap_jax.evaluation.generation import generate
from spap_jax.model import Model
from spap_jax.pruning.report import data_account
from spap_jax.pruning.streams import largest_divisor
from spap_jax.settings import PruneSettings

PROMPT = 8
"""A sequence goes on from one part of this many of a calibration sequence."""

_TOKENS = 32_768
"""That are written at once, with their keys and values in memory."""


def sample(
    model: Model, tokens: np.ndarray, times: int, seed: int, watch: Callable[[int, int], None] = lambda *_: None
) -> np.ndarray:
    """Sequences that a model writes, drawn from its predictions as they are.

    Args:
        model: The dense model.
        tokens: Calibration sequences [B, T].
        times: How many to write for each of them; each goes on from another part of it.
        seed: Of what is drawn.
        watch: Called with how many sequences are written, and of how many.

    Returns:
        [times B, T] int32; the first T / 8 tokens of each are a calibration sequence's.

    Raises:
        UserError: the sequences are too short to be gone on from.
    """
    length = tokens.shape[1]
    prompt = max(1, length // PROMPT)
    if length < 2:
        raise UserError(f"sequences of one token leave nothing to sample: give longer ones, or {option('sampled', 0)}.")
    parts = [tokens[:, start : start + prompt] for start in range(0, length - prompt + 1, prompt)]
    prompts = np.concatenate([parts[time % len(parts)] for time in range(times)])
    size = at_once(len(prompts), length)
    key, written = jax.random.key(seed), []
    dtype = model.params["embed"]["tokens"].dtype
    for start in range(0, len(prompts), size):
        watch(start, len(prompts))
        drawn = jax.random.fold_in(key, start)
        some = prompts[start : start + size]
        written.append(generate(model, some, length - prompt, temperature=1.0, key=drawn, eos=(), pad=0, dtype=dtype))
    watch(len(prompts), len(prompts))
    return np.concatenate(written)


def at_once(count: int, length: int) -> int:
    """How many of so many sequences are written at once: evenly, so that one program writes all."""
    return largest_divisor(count, max(1, _TOKENS // length))


def with_samples(
    tokens: Any,
    model: Callable[[], Model],
    settings: PruneSettings,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> Any:
    """Calibration tokens with what the dense model writes before them, as the settings say; see `sample`.

    Args:
        tokens: Sequences [B, T], or `TokenBlocks`.
        model: Gives the dense model, which the process that leads asks for; all processes have to call this.
        settings: How often, and the seed.
        watch: As in `sample`.

    Returns:
        `TokenBlocks` [(1 + times) B, T]; or what was given, where nothing is to be written.

    Raises:
        UserError: as in `sample`.
    """
    times = settings.decided.sampled
    if not times:
        return tokens
    blocks = np.asarray(getattr(tokens, "tokens", tokens), np.int32)
    written = {"tokens": sample(model(), blocks, times, settings.seed, watch)} if leads() else {}
    both = np.concatenate([from_leader(written)["tokens"], blocks]).astype("<i4")
    words = f"{data_account(tokens)['description']}, and {times} for each that the model wrote"
    return TokenBlocks(both, words, sha256(both.tobytes()).hexdigest(), len(both))
