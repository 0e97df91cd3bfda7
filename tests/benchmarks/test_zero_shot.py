"""Zero-shot tasks of the table of real models: the answers, their mean, its interval, and the page."""

from pathlib import Path

import numpy as np
import pytest
from test_real import row

from benchmarks.real import zero_shot
from benchmarks.real.page import draw, markdown
from benchmarks.real.zero_shot import COINS, LAMBADA, TASKS, Answers, accuracy, answer, interval, same
from benchmarks.shared import EXAMPLES
from spap_jax import load


def answers(command: str, share: float, examples: int = 200) -> list[Answers]:
    """Answers of which a share is right, those of harder examples last."""
    right = "1" * round(share * examples) + "0" * round((1 - share) * examples)
    return [Answers("m", command, task, "validation", "acc", examples, right) for task in (*TASKS, LAMBADA)]


def test_a_model_is_asked_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(zero_shot, "TASKS", ("piqa",))
    asked = [{"goal": "Play", "sol1": "Take a ball.", "sol2": "zq zq zq", "label": label} for label in (0, 1, 0)]
    datasets.Dataset.from_list(asked).save_to_disk(tmp_path / "piqa/plain_text/validation")
    datasets.Dataset.from_list([{"text": "Once upon a time"}]).save_to_disk(tmp_path / "lambada_openai/default/test")
    found = answer("m", "", load(EXAMPLES / "llama-stories"), tmp_path, 2)
    (piqa,) = [each for each in found if each.task == "piqa"]
    assert (piqa.split, piqa.metric, piqa.right, piqa.chosen) == ("validation", "acc_norm", "10", (0, 0))
    (lambada,) = [each for each in found if each.task == LAMBADA]
    assert (lambada.split, lambada.metric, lambada.right) == ("test", "acc", "1")


def test_the_interval_is_of_the_difference_in_pairs():
    """Against the normal approximation; were the answers not paired, it would be three times as wide."""
    ours, theirs = answers("a", 0.6), answers("b", 0.5)
    assert accuracy(ours) - accuracy(theirs) == pytest.approx(0.1)
    low, high = interval(ours, theirs)
    wide = 1.96 * np.sqrt(0.1 * 0.9 / 200 / len(TASKS))
    assert (low, high) == pytest.approx((0.1 - wide, 0.1 + wide), abs=0.003)
    assert interval(ours, ours) == (0, 0)


def test_the_page_compares_with_the_best_peer(tmp_path: Path):
    rows = [row("fasp", 0.5), row("obs", 0.4), row("spap", 0.2)]
    given = [*answers("", 0.9), *answers("fasp", 0.7), *answers("obs", 0.6), *answers("spap", 0.8)]
    page = markdown(rows, given, "python", [])
    cells = [line.split(" | ") for line in page.splitlines() if line.count("|") == len(TASKS) + 8]
    differences = {name.strip("| "): value.strip("| ") for name, *_, value, _, _ in cells}
    assert list(differences) == ["method", "---", "dense", "fasp", "obs", "spap"]
    said = [differences[name].partition(" [")[0] for name in ("dense", "fasp", "obs", "spap")]
    assert said == ["", "", "-10.0", "+10.0"]
    alike = {name.strip("| "): value for name, *_, value, _ in cells}
    assert alike["spap"].partition(" [")[0] == "90.0%"  # of 0.9 right and 0.8 right, all but a tenth
    assert f"boolq (validation, 200, acc), {TASKS[1]}" in page
    assert draw(tmp_path, rows, given) == ["ratios.png", "accuracy.png"]
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_options_may_differ_where_both_are_wrong():
    dense, ours = (
        [Answers("m", command, task, "test", "acc", 3, "100", chosen) for task in ("boolq", "piqa", LAMBADA)]
        for command, chosen in (("", (0, 1, 2)), ("spap", (0, 1, 1)))
    )
    assert same(ours, dense, "right") == (6, 6)
    assert same(ours, dense, "chosen") == (4, 6)
    assert same(ours, answers("", 0.5, 3), "chosen") is None


def test_the_mean_leaves_out_what_it_is_told_to():
    found = [*answers("", 0.5)]
    found[TASKS.index("boolq")] = answers("", 1.0)[TASKS.index("boolq")]
    assert accuracy(found) == pytest.approx((1 + 6 * 0.5) / 7)
    assert accuracy(found, [task for task in TASKS if task not in COINS]) == pytest.approx(0.5)
