"""Zero-shot tasks of the lm-evaluation-harness, with the answer to each example, so that models compare in pairs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

import spap_jax as spap
from spap_jax.evaluation.flips import Kept, kept

TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven whose mean papers give."""

COINS = ("boolq", "winogrande")
"""Tasks that a small model answers little better than by chance: the mean is given without them as well."""

CHANCE = (3 * 1 / 2 + 4 * 1 / 4) / len(TASKS)
"""Mean accuracy of who guesses: three of the tasks have two answers to choose from, and four have four."""

LAMBADA = "lambada_openai"

_RESAMPLES = 10_000


class Answers(msgspec.Struct, frozen=True):
    """What a model answered to a task.

    Attributes:
        model: Name of the dense model's folder, or its hub id.
        command: The words after ``spap prune MODEL``, without the output; "" for the dense model.
        task: Name of the task.
        split: Split of its data.
        metric: "acc_norm", accuracy by likelihood for each character of an answer, where the task has it, else "acc".
        limit: Maximum number of examples, from the start of the split; 0 is all.
        right: For each example "1" if it was answered right, else "0".
        chosen: For each example the number of the option that was chosen; empty in older rows.
    """

    model: str
    command: str
    task: str
    split: str
    metric: str
    limit: int
    right: str
    chosen: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies the run that answered: the model, the command, and the number of examples."""
        return self.model, self.command, self.limit

    @property
    def values(self) -> np.ndarray:
        """One value for each example: 1 for a right answer, else 0."""
        return np.frombuffer(self.right.encode(), np.uint8) - ord("0")


def answer(name: str, command: str, model: spap.Model, data: Path, limit: int) -> list[Answers]:
    """Runs the tasks on data in a folder, as of ``spap eval --task-data``; the rest is as in `Answers`."""
    from rich.console import Console

    from spap_jax.evaluation.flips import answers
    from spap_jax.evaluation.harness import HarnessModel
    from spap_jax.evaluation.tasks import choose_tasks, run_tasks, split_of
    from spap_jax.progress import counting

    tasks = choose_tasks((*TASKS, LAMBADA), task_data=data)
    with counting(Console(stderr=True)) as watch:
        results = run_tasks(HarnessModel(model, watch=watch), tasks, limit or None, samples=True)
    found, chosen = [], answers(results)
    for task, samples in results["samples"].items():
        metric = "acc_norm" if "acc_norm" in samples[0] else "acc"
        right = "".join(str(int(each[metric])) for each in sorted(samples, key=lambda each: each["doc_id"]))
        split = split_of(results, task)
        found.append(Answers(name, command, task, split, metric, limit, right, tuple(chosen[task])))
    return found


def accuracy(answers: Sequence[Answers], tasks: Sequence[str] = TASKS) -> float:
    """Returns the mean of the accuracies of one model's answers to some tasks."""
    return float(np.mean([each.values.mean() for each in answers if each.task in tasks]))


def same(ours: Sequence[Answers], dense: Sequence[Answers], field: Literal["right", "chosen"]) -> Kept | None:
    """Counts the examples on which a model is right where the dense one is, or chooses its option, by ``field``.

    BoolQ is left out, which a small model answers nearly always with yes. None if a row lacks the field.
    """
    both = [{each.task: getattr(each, field) for each in one if each.task != "boolq"} for one in (ours, dense)]
    if not all(all(one.values()) for one in both):
        return None
    return Kept(*map(sum, zip(*kept(*both).values(), strict=True)))


def interval(ours: Sequence[Answers], theirs: Sequence[Answers]) -> tuple[float, float]:
    """Returns the 95 % interval of the difference of two mean accuracies: examples are resampled in pairs by task."""
    generator = np.random.default_rng(0)
    other = {each.task: each.values for each in theirs}
    means = []
    for each in ours:
        if each.task in TASKS:
            differences = each.values.astype(int) - other[each.task]
            counts = [np.sum(differences == value) for value in (-1, 0, 1)]
            drawn = generator.multinomial(len(differences), np.array(counts) / len(differences), _RESAMPLES)
            means.append((drawn[:, 2] - drawn[:, 0]) / len(differences))
    low, high = np.percentile(np.mean(means, axis=0), (2.5, 97.5))
    return float(low), float(high)
