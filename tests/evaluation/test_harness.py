"""The lm-evaluation-harness adapter, compared with the harness's own transformers backend on the same checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, config
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models import huggingface

import spap_jax as spap
from spap_jax.evaluation.harness import HarnessModel
from spap_jax.evaluation.tasks import choose_tasks, run_tasks, split_of

torch.set_num_threads(1)  # waiting threads compete for the cores

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "examples" / "llama-stories"
TASKS = ROOT / "examples" / "tasks"
STORY = (ROOT / "examples" / "stories_evaluation.txt").read_text("utf-8")


TASK_NAMES = ["hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "openbookqa"]
CHOICES = {"text": ["the big dog", "a ball", "a red cat", "mom"], "label": ["A", "B", "C", "D"]}
QUESTION = {"question": "Who was happy", "choices": CHOICES, "answerKey": "C"}
DATA: dict[str, list[dict[str, Any]]] = {
    "hellaswag/none/validation": [
        {"ctx_a": "Lily saw a dog.", "ctx_b": "the dog", "activity_label": "Play", "endings": [*"abcd"], "label": label}
        for label in "013"
    ],
    "piqa/plain_text/validation": [
        {"goal": "Play", "sol1": "Take a ball.", "sol2": "Eat.", "label": n} for n in (0, 1)
    ],
    "winogrande/winogrande_xl/validation": [
        {"sentence": "Tom had a ball and _ was happy.", "option1": "Tom", "option2": "the dog", "answer": n}
        for n in "12"
    ],
    "allenai/ai2_arc/ARC-Easy/validation": [QUESTION, QUESTION | {"answerKey": "A"}],
    "ai2_arc/ARC-Challenge/validation": [QUESTION],
    "super_glue/boolq/validation": [
        {"passage": "Tom has a cat.", "question": "has Tom a cat", "label": n} for n in (0, 1)
    ],
    "openbookqa/main/test": [{"question_stem": "The cat is", "choices": CHOICES, "answerKey": "D"}],
}
"""Data sets as a folder has them: with or without an owner, and only some splits."""


@pytest.fixture(scope="module", params=["bos", "no bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, as it is, and with a tokenizer that adds no BOS token and the full stop as an end token."""
    if request.param == "bos":
        return STORIES
    copy = shutil.copytree(STORIES, tmp_path_factory.mktemp("harness") / "model")
    stop = json.loads((copy / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]["."]
    for name, changes in (
        ("tokenizer.json", {"post_processor": None}),
        ("tokenizer_config.json", {"bos_token": None}),
        ("generation_config.json", {"eos_token_id": [2, stop]}),
    ):
        content = json.loads((copy / name).read_text("utf-8"))
        (copy / name).write_text(json.dumps(content | changes), "utf-8")
    return copy


@pytest.fixture(scope="module")
def ours(folder: Path) -> HarnessModel:
    return HarnessModel(spap.load(folder), batch_tokens=1024)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> TemplateLM:
    backend: Any = huggingface.HFLM
    return backend(pretrained=str(folder), device="cpu", batch_size=1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", str)  # it starts pip to list all packages
    monkeypatch.chdir(ROOT)


def requests(kind: Any, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


PAIRS = (
    ("Once upon a time", " there was a little girl"),
    ("Once upon a time ", "there was a little girl"),
    ("Once upon a time  \n", "there"),
    ("One day, Lily saw a", " big"),
    ("", "Once upon a time"),
    ("", "<s>Once upon a time"),
    ("<s>Once upon a time, there was a", " little"),
    ("Once upon a time, there was a", " little girl named Lily."),
    (STORY[:3000], " The end."),
    (STORY[3000:5000], STORY[5000:5600]),
)


def test_the_two_tokenizers_differ(ours: HarnessModel, folder: Path) -> None:
    """If the tokenizers were alike, half of these tests would test nothing."""
    assert (ours.prefix_token_id, ours.tok_encode("Once")[0] == 1) == ((1, True) if folder == STORIES else (2, False))


def test_loglikelihood(ours: HarnessModel, theirs: TemplateLM) -> None:
    """Cover trailing spaces in a context, an empty context, an explicit BOS token, and a context that is too long."""
    found, expected = (model.loglikelihood(requests("loglikelihood", *PAIRS)) for model in (ours, theirs))
    assert len(ours.tok_encode(STORY[:3000])) > ours.max_length
    assert {greedy for _, greedy in expected} == {True, False}
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=1e-5, atol=1e-3)


def test_loglikelihood_rolling(ours: HarnessModel, theirs: TemplateLM) -> None:
    """Cover texts of one token, within one window, of exactly one window, and of several."""
    whole = ours.tokenizer.decode(ours.tokenizer.encode(STORY[:3000], add_special_tokens=False)[: ours.max_length])
    asked = requests("loglikelihood_rolling", ("Once",), (STORY[:500],), (whole,), (STORY[:4000],))
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked), rtol=1e-6, atol=1e-3
    )


def test_generate_until(ours: HarnessModel, theirs: TemplateLM, folder: Path) -> None:
    """Cover stops at a string of several tokens, within a token, at an end token, at the limit, and long contexts."""
    start = "Once upon a time, there was a"
    asked = requests(
        "generate_until",
        (start, {"until": [" named"], "max_gen_toks": 40}),
        (start, {"until": ["irl", "One day"], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0}),
        (start, {"until": "\n", "max_gen_toks": 40}),
        ("The end", {"until": ["</s>"], "max_gen_toks": 60}),
        (STORY[:3000], {"until": ["."], "max_gen_toks": 40}),
        (STORY[3000:3050].rstrip(), {"until": ["."], "max_gen_toks": 40}),
        (start, {"max_gen_toks": 33}),
    )
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked)
    assert len({*found}) > 4
    assert " named" not in found[0]
    assert found[-1].count(".") == (2 if folder == STORIES else 1)


def test_predictions_that_overflow(tmp_path: Path) -> None:
    model = spap.load(STORIES)
    overflowing = model.replace(params=model.params | {"head": jax.tree.map(lambda a: a + 1e38, model.params["head"])})
    with pytest.raises(spap.UserError, match="log-likelihood"):
        HarnessModel(overflowing).loglikelihood(requests("loglikelihood", ("One day", " a girl")))


def test_texts_of_no_tokens() -> None:
    seen = []
    ours = HarnessModel(spap.load(STORIES), watch=lambda *what: seen.append(what))
    assert ours.loglikelihood_rolling([]) == []
    assert seen == []


def test_a_tokenizer_without_a_beginning(tmp_path: Path) -> None:
    copy = shutil.copytree(STORIES, tmp_path / "model")
    content = json.loads((copy / "tokenizer_config.json").read_text("utf-8"))
    (copy / "tokenizer_config.json").write_text(json.dumps(content | {"bos_token": None, "eos_token": None}), "utf-8")
    with pytest.raises(spap.UserError, match="token"):
        HarnessModel(spap.load(copy))


@pytest.mark.parametrize("folder", ["bos"], indirect=True)
class TestTasks:
    """Tests that need only one of the two tokenizers."""

    @pytest.mark.parametrize(
        ("kind", "arguments", "expected"),
        [
            ("loglikelihood", ("Once", STORY[:3000]), "512 positions"),
            ("generate_until", ("Once", {"max_gen_toks": 512}), "512 tokens"),
            ("generate_until", ("Once", {"num_beams": 4, "until": []}), "num_beams"),
            ("generate_until", ("Once", {"do_sample": True, "temperature": 0.5}), "do_sample"),
        ],
    )
    def test_requests_that_cannot_be_met(self, kind: str, arguments: tuple, expected: str, ours: HarnessModel) -> None:
        with pytest.raises(spap.UserError, match=expected):
            getattr(ours, kind)(requests(kind, arguments))

    def test_the_bundled_task_and_perplexities(self, ours: HarnessModel, theirs: TemplateLM, tmp_path: Path) -> None:
        bundled = yaml.safe_load((TASKS / "stories_cloze" / "stories_cloze.yaml").read_text("utf-8"))
        rolling = {
            "task": "stories_rolling",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{story}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        }
        both = [bundled, {name: bundled[name] for name in ("dataset_path", "dataset_kwargs", "test_split")} | rolling]
        for task in both:
            (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task), "utf-8")
        chosen = choose_tasks(["stories_cloze", "stories_rolling"], tmp_path)
        found, expected = (run_tasks(model, chosen, limit=12)["results"] for model in (ours, theirs))
        assert found.keys() == {*chosen.names}
        for task in chosen.names:
            numbers = {name: value for name, value in expected[task].items() if isinstance(value, float)}
            assert {name: found[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
        assert 0 < found["stories_cloze"]["acc_norm,none"] < 1
        assert 0 < found["stories_rolling"]["bits_per_byte,none"] < 2

    def test_data_in_a_folder_give_answers_as_of_the_harness_itself(
        self, ours: HarnessModel, theirs: TemplateLM, tmp_path: Path
    ) -> None:
        """The seven usual tasks; ARC has no test split here, so its validation split is judged."""
        for name, rows in DATA.items():
            Dataset.from_list([row | {"id": str(number)} for number, row in enumerate(rows)]).save_to_disk(
                tmp_path / name
            )
        chosen = choose_tasks(TASK_NAMES, task_data=tmp_path)
        found, expected = (run_tasks(model, chosen, limit=3, samples=True) for model in (ours, theirs))
        for task in TASK_NAMES:
            for one, other in zip(found["samples"][task], expected["samples"][task], strict=True):
                assert (one["arguments"], one["acc"]) == (other["arguments"], other["acc"])
                scores, right = (np.array([answer for [answer] in each["resps"]], float) for each in (one, other))
                np.testing.assert_allclose(scores, right, rtol=1e-4, atol=1e-3)
        assert {split_of(found, task) for task in TASK_NAMES} == {"validation", "test"}
        assert found["n-samples"]["hellaswag"] == {"original": 3, "effective": 3}
        with pytest.raises(spap.UserError, match="sciq"):
            run_tasks(ours, choose_tasks(["sciq"], task_data=tmp_path))
