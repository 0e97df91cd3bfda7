"""``spap eval --tasks``: the bundled task end to end, up to the JSON file, and refusals."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import EXAMPLES, STORIES, apart, sentence, spap, succeed, without
from datasets import Dataset, config
from safetensors.numpy import load_file, save_file

from spap_jax.evaluation import tasks

TASKS = EXAMPLES / "tasks"
WORDS = ("eval", STORIES, "--tasks", "stories_cloze")


@pytest.fixture(autouse=True)
def _at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", str)  # it starts pip to list all packages
    monkeypatch.chdir(EXAMPLES.parent)


def with_changes(folder: Path, **changes: object) -> Path:
    """Writes a folder with the bundled task, with some fields changed."""
    task = yaml.safe_load((TASKS / "stories_cloze" / "stories_cloze.yaml").read_text("utf-8"))
    folder.mkdir()
    (folder / "task.yaml").write_text(yaml.safe_dump(task | changes), "utf-8")
    return folder


def test_the_table_and_the_json_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    said = succeed(capsys, *WORDS, "--task-path", TASKS, "--limit", "6", "--json", found)
    assert "log-likelihoods ..." in said.err
    lines = said.out.splitlines()
    assert lines[0].startswith(f"{STORIES}, the first 6 examples of each; ")
    assert lines[1].split() == ["task", "split", "examples", "metric", "value", "stderr"]
    read = json.loads(found.read_text())
    numbers = read["results"]["stories_cloze"]
    for line, metric in zip(lines[3:], ("acc", "acc_norm"), strict=True):
        value, error = numbers[f"{metric},none"], numbers[f"{metric}_stderr,none"]
        assert line.split() == ["stories_cloze", "test", "6", metric, f"{value:.4f}", f"{error:.4f}"]
    assert (read["n-samples"]["stories_cloze"], read["n-shot"]) == (
        {"original": 100, "effective": 6},
        {"stories_cloze": 0},
    )
    assert read["versions"] == {"stories_cloze": 1.0}
    assert (
        read["spap"].items()
        >= {"model": "llama-stories", "tasks": ["stories_cloze"], "task_path": "tasks", "limit": 6}.items()
    )
    assert {"jax", "transformers", "spap-jax"} <= read["spap"]["versions"].keys()
    assert read["lm_eval_version"]


def test_answers_beside_those_of_the_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, found = shutil.copytree(STORIES, tmp_path / "other"), tmp_path / "found.json"
    tensors = load_file(other / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {down: 0 * tensors[down]}, other / "model.safetensors", metadata={"format": "pt"})
    words = ("eval", other, "--tasks", "stories_cloze", "--task-path", TASKS, "--limit", "40")
    said = succeed(capsys, *words, "--dense", STORIES, "--json", found)
    read = json.loads(found.read_text())
    same = read["spap"]["same_answers"]["stories_cloze"]
    accuracies = [each["stories_cloze"]["acc_norm,none"] for each in (read["results"], read["spap"]["dense_results"])]
    assert (same["examples"], read["spap"]["dense"]) == (40, "llama-stories")
    assert same["interval"][0] < same["share"] <= 1 - abs(accuracies[0] - accuracies[1])
    assert said.out.splitlines()[-1].split()[:3] == ["stories_cloze", "40", f"{100 * same['share']:g}"]
    assert "samples" not in read


def test_data_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"goal": "Play", "sol1": "Take a ball.", "sol2": "Eat.", "label": number % 2} for number in range(4)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "piqa" / "plain_text" / "validation")
    said = succeed(capsys, "eval", STORIES, "--tasks", "piqa", "--task-data", tmp_path)
    assert said.out.splitlines()[3].split()[:4] == ["piqa", "validation", "4", "acc"]
    assert "--task-data" in sentence(spap(capsys, "eval", STORIES, "--tasks", "piqa", "--task-data", tmp_path / "no"))


def test_a_standard_error_by_resampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The resampling runs in this process and prints nothing among the results."""
    metric = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    changes = {"output_type": "loglikelihood", "doc_to_target": "{{choices[label]}}", "doc_to_choice": None}
    folder = with_changes(tmp_path / "tasks", **changes, metric_list=[metric])
    said = succeed(capsys, *WORDS, "--task-path", folder, "--limit", "6")
    _, _, _, line = said.out.splitlines()
    *described, value, error = line.split()
    assert described == ["stories_cloze", "test", "6", "perplexity"]
    assert float(value) > 1
    assert float(error) > 0


def test_the_bundled_examples_are_what_their_script_makes(tmp_path: Path) -> None:
    """The four choices of every example are distinct."""
    folder = TASKS / "stories_cloze"
    before = (folder / "stories_cloze.jsonl").read_bytes()
    copy = tmp_path / "tasks" / "stories_cloze"
    copy.mkdir(parents=True)
    (copy / "make.py").write_bytes((folder / "make.py").read_bytes())
    (tmp_path / "stories_evaluation.txt").write_bytes((EXAMPLES / "stories_evaluation.txt").read_bytes())
    subprocess.run([sys.executable, copy / "make.py"], check=True)
    assert (copy / "stories_cloze.jsonl").read_bytes() == before
    examples = [json.loads(line) for line in before.splitlines()]
    assert {len(set(example["choices"])) for example in examples} == {4}
    story = " ".join((EXAMPLES / "stories_evaluation.txt").read_text("utf-8").split())
    assert all(f"{each['story']} {each['choices'][each['label']]}" in story for each in examples)


@pytest.fixture
def without_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the tasks that come with the harness, which are looked through as well: to read them takes seconds."""
    monkeypatch.setattr(tasks, "Tasks", functools.partial(tasks.Tasks, include_defaults=False))


def test_an_unknown_task(without_defaults: None, capsys: pytest.CaptureFixture[str]) -> None:
    said = sentence(spap(capsys, "eval", STORIES, "--tasks", "stories_close,arc_eazy", "--task-path", TASKS))
    assert "stories_close" in said
    assert "stories_cloze" in said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset_path": "owner/name", "dataset_kwargs": {}}, "not on this machine"),
        ({"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, "no.jsonl"),
        ({"test_split": "dev"}, "dev"),
        ({"unsafe_code": True}, "not safe"),
    ],
)
def test_a_task_that_cannot_be_run(
    changes: dict, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = spap(capsys, *WORDS, "--task-path", with_changes(tmp_path / "tasks", **changes))
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[-1].startswith("spap: ")
    assert expected in said.err.splitlines()[-1]


@pytest.mark.slow
def test_a_hub_out_of_reach_is_said_at_once(tmp_path: Path) -> None:
    folder = with_changes(tmp_path / "tasks", dataset_path="owner/name", dataset_kwargs={})
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    err = apart(*WORDS, "--task-path", folder, **hub).err
    assert "the data of stories_cloze is not on this machine and the hub http://127.0.0.1:9 cannot be reached" in err
    assert "Retry" not in err, "the slow retries of the hub's client were entered"


def test_only_another_part_of_its_data_is_in_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tmp_path / "cache" / "owner___name" / "one" / "0.0.0" / "1"
    part.mkdir(parents=True)
    (part / "dataset_info.json").write_text('{"config_name": "one"}')
    folder = with_changes(tmp_path / "tasks", dataset_path="owner/name", dataset_name="other", dataset_kwargs={})
    said = spap(capsys, *WORDS, "--task-path", folder)
    assert "not on this machine" in said.err.splitlines()[-1]


def test_without_the_harness() -> None:
    assert "spap-jax[eval]" in sentence(without("lm_eval", "eval", STORIES, "--tasks", "piqa"))
