"""Answers to tasks, as the harness scores them, and how many of two models' are the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from spap_jax import load
from spap_jax.evaluation.flips import Kept, answers, kept

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_answer_is_right_where_the_harness_says_so() -> None:
    """With normalised and with plain likelihoods: the option is the target's where its score is 1, else another."""
    harness, tasks = (
        pytest.importorskip("spap_jax.evaluation.harness"),
        pytest.importorskip("spap_jax.evaluation.tasks"),
    )
    chosen = tasks.choose_tasks(["stories_cloze"], EXAMPLES / "tasks")
    model = harness.HarnessModel(load(EXAMPLES / "llama-stories"))
    results: dict[str, Any] = tasks.run_tasks(model, chosen, 30, samples=True)
    plain = json.loads(json.dumps(results, default=str))  # another copy
    for sample in plain["samples"]["stories_cloze"]:
        del sample["acc_norm"]
    scores = {}
    for metric, found in (("acc_norm", results), ("acc", plain)):
        samples = sorted(found["samples"]["stories_cloze"], key=lambda each: each["doc_id"])
        scores[metric] = [each[metric] for each in samples]
        right = [
            answer == int(each["target"]) for answer, each in zip(answers(found)["stories_cloze"], samples, strict=True)
        ]
        assert right == scores[metric]
    assert scores["acc_norm"] != scores["acc"]


def test_answers_without_options() -> None:
    """Most likely words count by whether they are the right ones, text as it is, and a text's likelihood not at all."""

    def samples(*responses: Any) -> list[dict[str, Any]]:
        return [
            {"doc_id": at, "filter": "none", "filtered_resps": one} for at, one in reversed([*enumerate(responses)])
        ]

    found = {
        "words": samples([(-1.0, True)], [(-2.0, False)]),
        "text": [*samples(["4"], ["5"]), {"doc_id": 0, "filter": "other", "filtered_resps": ["no"]}],
        "likelihood": samples([-3.0]),
    }
    assert answers({"samples": found, "configs": {}}) == {"words": [1, 0], "text": ["4", "5"]}


def test_shares() -> None:
    found = kept({"a": [0, 1, 2, 0], "b": []}, {"a": [0, 1, 1, 1], "b": []})
    assert found == {"a": Kept(2, 4)}
    assert found["a"].share == 0.5


@pytest.mark.parametrize(("same", "examples"), [(0, 3), (3, 3), (97, 100), (500, 1000)])
def test_the_interval_is_wilsons(same: int, examples: int) -> None:
    theirs = binomtest(same, examples).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(Kept(same, examples).interval, (theirs.low, theirs.high), atol=1e-4)
