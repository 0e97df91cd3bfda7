"""Answers that two models give alike, which tell a smaller change than accuracy does: arXiv 2407.09141.

A pruned model may answer as many questions right as before, and others than before. Each of those counts here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_DEVIATIONS = 1.96
"""Standard deviations on each side of a normal distribution's mean that hold 95 % of it."""


class Kept(NamedTuple):
    """How many of some answers are the same from two models."""

    same: int
    examples: int

    @property
    def share(self) -> float:
        """Part of the answers."""
        return self.same / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share, Wilson's: it stays between 0 and 1, and holds for few examples."""
        more = _DEVIATIONS**2 / self.examples
        middle = self.share + more / 2
        side = math.sqrt(more * (self.share * (1 - self.share) + more / 4))
        return max(0.0, (middle - side) / (1 + more)), min(1.0, (middle + side) / (1 + more))


def kept(ours: Mapping[str, Sequence[Any]], theirs: Mapping[str, Sequence[Any]]) -> dict[str, Kept]:
    """Counts the same answers by task; see `answers`."""
    pairs = {task: list(zip(own, theirs[task], strict=True)) for task, own in ours.items() if own}
    return {task: Kept(sum(one == other for one, other in both), len(both)) for task, both in pairs.items()}


def answers(results: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns the answer to each example by task, in the order of examples, from results with samples.

    It is the number of the option that is chosen; where there are no options, whether the most likely words are the
    right ones; and where the model writes, what it writes. A task without answers, such as the perplexity of a text,
    is left out.
    """
    found = {}
    for task, samples in results["samples"].items():
        delimiter = results["configs"].get(task, {}).get("target_delimiter") or ""
        ordered = sorted(samples, key=lambda each: each["doc_id"])
        each = [_answer(one, len(delimiter)) for one in ordered if one["filter"] == samples[0]["filter"]]
        if None not in each:
            found[task] = each
    return found


def _answer(sample: Mapping[str, Any], delimiter: int) -> int | str | None:
    responses = sample["filtered_resps"]
    if isinstance(responses[0], str):
        return responses[0]
    if not isinstance(responses[0], Sequence):
        return None
    if len(responses) == 1:
        return int(responses[0][1])
    likelihoods = np.array([float(response[0]) for response in responses])
    if "acc_norm" in sample:  # by likelihood for each character, where the task counts so
        likelihoods /= [max(1, len(words) - delimiter) for _, words in sample["arguments"]]
    return int(likelihoods.argmax())
