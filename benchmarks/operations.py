"""Floating-point operations of pruning one layer, by phase, counted by hand from the code that each function names.

Matrix products and factorisations are counted, two operations for each multiplication. What is linear in the
activations (norms, rotary embedding, softmax) is left out.
"""

import math
from dataclasses import dataclass

from spap_jax.models.cost import attended_pairs

GUESTS = 0.25
"""Channels that may return in a step of the selection, for every channel that leaves."""


@dataclass(frozen=True)
class Size:
    """Sizes of the random LLaMA and of its calibration; letters of ``docs/architecture.md``."""

    layers: int = 8
    d: int = 1024
    f: int = 4096
    n: int = 16
    m: int = 4
    vocabulary: int = 1024
    sequences: int = 8
    length: int = 2048


@dataclass(frozen=True)
class Split:
    """Tokens that are fitted and held out, and channels that are kept."""

    fitted: int
    held_out: int
    k: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.fitted + self.held_out


def attention_operations(size: Size) -> float:
    """The attention of a block, for one token."""
    heads = size.d  # n x h
    groups = size.d * size.m // size.n  # m x h
    return 4 * size.d * heads + 4 * size.d * groups + 4 * attended_pairs(size.length) / size.length * heads


def streams_operations(size: Size, split: Split) -> float:
    """``pruning/streams.py``: both streams through attention, one through the dense and one through the narrow MLP."""
    mlps = 6 * size.d * size.f + 6 * size.d * split.k
    return split.tokens * (2 * attention_operations(size) + mlps)


def statistics_operations(size: Size, split: Split) -> float:
    """``pruning/moments.py``: the hidden activations of the fitted tokens, H'H and H'Y."""
    return split.fitted * (4 * size.d * size.f + 2 * size.f**2 + 2 * size.f * size.d)


def selection_operations(size: Size, split: Split, settings: dict) -> float:
    """``solver/problem.py``, ``penalty.py``, ``swap.py``; rounds of swaps that the report does not count are left out.

    Cholesky f^3 / 3; the dense tableau solves for f + d columns at 2 f^2 each; a pivot of b channels costs
    2 f (f + d) b; the tableau of the polish solves for f + d columns of the kept channels.
    """
    f, d, k = size.f, size.d, split.k
    b = math.ceil((f - k) / settings["penalty_steps"])
    moved = (b + 2 * math.ceil(GUESTS * b)) * math.ceil((f - k) / b)
    penalty = f**3 / 3 + 2 * f**2 * (f + d) + 2 * f * (f + d) * moved
    polish = k**3 / 3 + 2 * k**2 * (f + d) + 2 * (f - k) * k * (f - k + d)
    return penalty + polish + 2 * k * (f - k) * d


def refit_operations(size: Size, split: Split) -> float:
    """``solver/problem.py``: Cholesky of the kept channels, and a solve for d columns."""
    return split.k**3 / 3 + 2 * split.k**2 * size.d


def output_operations(size: Size, tokens: int, k: int) -> float:
    """The narrow MLP once over tokens: gate, up, down."""
    return 6 * tokens * size.d * k


def alternating_operations(size: Size, split: Split, settings: dict) -> float:
    """``solver/alternating.py``, all rounds whether taken or not.

    A step multiplies gate and up twice (forward, gradient of the weights) and down three times (that of its input too).
    The closed form passes over the fitted tokens for H, H V, H'H and H'E, factorises and solves. Errors are measured
    over all tokens before the first round and after each.
    """
    d, k, rounds = size.d, split.k, settings["rounds"]
    step = 2 * 7 * d * k * min(settings["step_tokens"], split.fitted)
    passed = split.fitted * (2 * k**2 + 2 * k * d) + output_operations(size, split.fitted, k)
    judged = output_operations(size, split.tokens, k)
    each = settings["steps"] * step + passed + refit_operations(size, split) + judged
    return rounds * each + judged


def sweeps_operations(size: Size, split: Split, settings: dict) -> float:
    """``pruning/sweeps.py``, for the average block of one sweep.

    A step passes its tokens through the block at hand and through those after it, computes these again for the
    gradient, and passes back; the head is applied to both streams and passed back once. The held-out tokens judge, and
    all go on through the block.
    """
    block = attention_operations(size) + output_operations(size, 1, split.k)
    head = 2 * size.d * size.vocabulary
    after = (size.layers - 1) / 2
    tokens = min(max(1, settings["step_tokens"] // size.length) * size.length, split.fitted)
    step = tokens * (3 * (after + 1) * block + 3 * head)
    judged = split.held_out * ((after + 1) * block + 2 * head)
    return settings["sweep_steps"] * step + judged + split.tokens * block


def operations(size: Size, split: Split, settings: dict) -> dict[str, float]:
    """Of one layer, by the report's phases."""
    return {
        "streams": streams_operations(size, split),
        "statistics": statistics_operations(size, split),
        "selection": selection_operations(size, split, settings),
        "refit": refit_operations(size, split),
        "alternating": alternating_operations(size, split, settings),
        "errors": 3 * output_operations(size, split.tokens, split.k),
        "sweeps": sweeps_operations(size, split, settings),
    }
