"""``spap finetune`` as several real processes on one machine."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hf_models import hf_model
from several import run_together, together, weights

from spap_jax.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and tokens."""
    folder = tmp_path_factory.mktemp("given")
    hf_model("llama").save_pretrained(folder / "in")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 97, (16, 16)))
    return folder


def training(work: Path, output: str, *words: str) -> list[str]:
    """Return the words of a command that trains a tiny model."""
    command = ["finetune", str(work / "in"), "--data", str(work / "ids.npy"), "--output", str(work / output)]
    command += ["--sequences", "16", "--sequence-length", "16", "--steps", "6", "--check-every", "2"]
    command += ["--step-sequences", "4", "--learning-rate", "1e-3", "--held-out", "0.25"]
    return [*command, *words]


def killed_at(line: str, processes: list[subprocess.Popen[str]]) -> None:
    """Kill all processes once the first has printed a line."""
    assert processes[0].stderr is not None
    assert any(said.startswith(line) for said in processes[0].stderr)
    for each in processes:
        each.kill()
        each.communicate()


@pytest.mark.timeout(900)
def test_two_processes_that_go_on_give_the_result_of_one(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are killed midway. All weights are trained, and each process stores its half of the state."""
    assert main(training(given, "one", "--full", "--devices", "1")) == 0
    killed_at("step 4/6", together(training(given, "two", "--full")))
    kept = given / ".two.resume"
    assert main(training(given, "two", "--full", "--devices", "1")) == 2
    assert "processes (2, now 1)" in capsys.readouterr().err
    shutil.copytree(kept, given / ".lora.resume")
    results = run_together(training(given, "two", "--full"))
    assert re.search(rf"going on: step [24] of 6 is done, kept in {kept}", results[0][1])
    assert "6 steps, all weights" in results[0][0]
    assert "all weights" not in results[1][0]
    reports = [json.loads((given / name / "spap_finetune.json").read_text()) for name in ("one", "two")]
    looks = [[check["held_out"] for check in report["checks"]] for report in reports]
    assert looks[1] == pytest.approx(looks[0], rel=1e-4)
    before, ours, theirs = (weights(given / name) for name in ("in", "one", "two"))
    assert all(not np.array_equal(before[name], ours[name]) for name in ours)
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], rtol=0, atol=1e-4)


@pytest.mark.timeout(900)
def test_two_processes_that_share_the_weights_give_the_result_of_one(given: Path):
    """Updates are trained. The two discard what an earlier run of the same output left."""
    words = ("--eval", str(given / "ids.npy"), "--model-devices", "2", "--no-resume")
    assert main(training(given, "alone", "--devices", "1")) == 0
    results = run_together(training(given, "lora", *words))
    assert not any("going on" in said for _, said in results)
    assert ["6 steps, LoRA" in said for said, _ in results] == [True, False]
    assert not [path for path in given.iterdir() if path.name.startswith(".")]
    before, ours, theirs = (weights(given / name) for name in ("in", "alone", "lora"))
    assert any(not np.array_equal(before[name], ours[name]) for name in ours)
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], rtol=0, atol=1e-4)
