"""``spap prune`` as several real processes on one machine."""

import copy
import json
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hf_models import hf_model
from several import finish, free_port, run_together, start, together, weights

from spap_jax.cli import main

pytestmark = pytest.mark.slow

GENTLY = (
    "--method", "wanda", "--update", "alternate", "--rounds", "0",
    "--joint-passes", "3",
)  # fmt: skip
"""Joint steps so small that the order of a sum, which is another on two processes, does not change their result."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens and a tiny model of three blocks, with a vocabulary too large to be used whole in steps."""
    folder = tmp_path_factory.mktemp("given")
    model = copy.deepcopy(hf_model("llama"))
    model.resize_token_embeddings(7000, mean_resizing=False)
    model.save_pretrained(folder / "in")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 97, (160, 64)))
    return folder


@pytest.fixture(scope="module")
def alone(given: Path) -> Path:
    """The output of one process, with gentle steps."""
    return on_one_device(given, given / "alone", *GENTLY)


def pruning(given: Path, output: Path, *words: str) -> list[str]:
    """Return the words of a command that prunes the tiny model."""
    command = ["prune", str(given / "in"), "--output", str(output), "--data", str(given / "ids.npy")]
    command += ["--sequences", "160", "--sequence-length", "64"]
    return [*command, "--held-out", "0.25", *words]  # 120 and 40 sequences, which two devices divide


def on_one_device(given: Path, output: Path, *words: str) -> Path:
    """Run that command in this process; return the output."""
    assert main(pruning(given, output, *words, "--devices", "1")) == 0
    return output


def kill_one_after(line: str, victim: int, processes: list[subprocess.Popen]) -> tuple[int, str]:
    """Kill one of two processes once the first has printed a line; return the other's exit code and standard error."""
    assert processes[0].stderr is not None
    for said in processes[0].stderr:
        if said.startswith(line):
            break
    processes[victim].kill()
    code, _, said = finish(processes[1 - victim])
    processes[victim].communicate()
    return code, said


@pytest.mark.timeout(900)
def test_two_processes_that_go_on_give_the_result_of_one(given: Path, alone: Path, tmp_path: Path):
    """One process is killed in the layers, the other in the joint steps; whichever is left ends and says why."""
    output = tmp_path / "two"
    code, said = kill_one_after("layer 2/", 1, together(pruning(given, output, *GENTLY)))
    assert code == 75, said
    assert "process 0 of 2: it ends because another one is gone" in said
    assert re.search(r"of 3 layers are done.*, kept in", said)
    assert "Traceback" not in said
    assert [each.name for each in tmp_path.iterdir()] == [".two.resume"]
    code, said = kill_one_after("step 6/", 0, together(pruning(given, output, *GENTLY)))
    assert code in (75, -signal.SIGABRT), said  # JAX may notice the loss first: it then aborts the process and says why
    assert "another one is gone" in said or "another task died" in said
    results = run_together(pruning(given, output, *GENTLY))
    assert "layer 3/3" in results[0][1]
    kept = [line.endswith("kept") for line in results[0][1].splitlines() if line.startswith(("layer", "step"))]
    assert 3 <= kept.count(True) < len(kept)
    assert kept == sorted(kept, reverse=True)
    assert "MLP channels removed" in results[0][0]
    assert "MLP channels removed" not in results[1][0]
    one, two = (json.loads((each / "spap_report.json").read_text()) for each in (alone, output))
    assert [layer["kept"] for layer in one["layers"]] == [layer["kept"] for layer in two["layers"]]
    for mine, theirs in zip(one["layers"], two["layers"], strict=True):
        assert theirs["calibration"]["alternating"] == pytest.approx(mine["calibration"]["alternating"], rel=1e-3)
    gains = [run["joint"][0]["held_out"] - run["joint"][-1]["held_out"] for run in (one, two)]
    assert gains[1] == pytest.approx(gains[0], rel=0.02)
    assert abs(gains[0]) > 1e-3  # the steps moved the weights
    assert len({(each / "model.safetensors").stat().st_size for each in (alone, output)}) == 1


def test_each_of_two_processes_chooses_the_channels_of_other_layers(given: Path, tmp_path: Path):
    """Of three layers, two are processed at once, then one, which leaves one process without a layer."""
    words = ("--schedule", "parallel", "--effort", "low", "--rounds", "1")
    words += ("--joint-passes", "0")
    alone = on_one_device(given, tmp_path / "one", *words)
    run_together(pruning(given, tmp_path / "two", *words))
    one, two = (json.loads((each / "spap_report.json").read_text()) for each in (alone, tmp_path / "two"))
    for mine, theirs in zip(one["layers"], two["layers"], strict=True):
        assert mine["kept"] == theirs["kept"]
        assert theirs["calibration"]["alternating"] == pytest.approx(mine["calibration"]["alternating"], rel=1e-3)


@pytest.mark.timeout(900)
def test_two_processes_that_share_the_weights_give_the_result_of_one(given: Path, alone: Path, tmp_path: Path):
    """Each process reads its own shards of the tensors; the first one writes the complete tensors."""
    words = (*GENTLY, "--model-devices", "2")
    run_together(pruning(given, tmp_path / "two", *words))
    one, two = map(weights, (alone, tmp_path / "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():  # a gradient near zero may have either sign, and Adam steps as far
        weight, other = weight.astype(np.float32), two[name].astype(np.float32)
        assert np.linalg.norm(weight - other) <= 1e-3 * np.linalg.norm(weight), name


def test_an_error_of_one_ends_it_at_once(given: Path, tmp_path: Path):
    """The failing process does not wait for the other, which has joined and is suspended so that it cannot answer.

    The failing one is process 0, since the other would need it to be awake while it joins.
    """
    command, place = pruning(given, tmp_path / "out"), f"2@localhost:{free_port()}"
    first, second = (
        start(command, "--process", f"0/{place}", "--eval", "missing.txt"),
        start(command, "--process", f"1/{place}"),
    )
    assert first.stderr is not None
    assert first.stderr.readline().startswith("waiting")
    assert "missing.txt is not there" in first.stderr.readline()
    second.send_signal(signal.SIGSTOP)
    code, _, _ = finish(first, seconds=100)
    second.kill()
    second.communicate()
    assert code == 2
