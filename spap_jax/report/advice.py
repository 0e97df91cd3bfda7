"""Advice after a pruning run in which some of the work had no effect: a pure function of its report."""

import statistics

from spap_jax.quantities import count_text
from spap_jax.report.schema import PruneReport

TOKENS_PER_CHANNEL = 10
"""Sufficient number of calibration tokens per channel.

With N tokens and k channels, the error of a least-squares fit is lower on the fitted tokens than on others by a factor
of about (N + k) / (N - k).
"""

OVERFIT = 1.5
"""Ratio of held-out to calibration error from which advice is given: that of five tokens per channel."""


def advice(report: PruneReport) -> tuple[str, ...]:
    """Returns a sentence, without full stop, for each kind of work that had no effect; empty after a good run."""
    return (*_few_tokens(report), *_refused_steps(report))


def _few_tokens(report: PruneReport) -> list[str]:
    """Detects channels that fit the calibration text but not the held-out text."""
    ratios = [
        layer.held_out.alternating / layer.calibration.alternating
        for layer in report.layers
        if layer.held_out and layer.calibration.alternating > 0
    ]
    if not ratios or not (ratio := statistics.median(ratios)) >= OVERFIT:  # not if nan
        return []
    read, channels = report.calibration, report.model.intermediate.before
    tokens = (read.sequences + read.further_sequences) * read.sequence_length
    few = f": {count_text(tokens)} tokens are few for {count_text(channels)} channels"
    few = few if tokens < TOKENS_PER_CHANNEL * channels else ""
    return [f"the held-out error is {ratio:.1f} x the calibration's{few}; {_more(report)}"]


def _refused_steps(report: PruneReport) -> list[str]:
    after = report.joint[1:]
    if not after or any(check.taken for check in after):
        return []
    return [
        f"the joint steps were not taken, as predictions came no nearer to the dense model's; {_more(report)}, and "
        "joint_passes=0 saves the time"
    ]


def _more(report: PruneReport) -> str:
    """Recommends a sufficient number of sequences, a power of two, at least twice the number that was read."""
    account = report.calibration
    given = account.sequences + account.further_sequences
    enough = -(-TOKENS_PER_CHANNEL * report.model.intermediate.before // account.sequence_length)
    wanted = 1 << (max(enough, 2 * given) - 1).bit_length()
    return f"{count_text(wanted)} sequences would help"
