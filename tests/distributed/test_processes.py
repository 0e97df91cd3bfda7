"""``spap prune`` as several real processes on one machine."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(output: Path, *words: str) -> subprocess.Popen:
    """Start a separate process, with one device, that prunes the bundled model."""
    command = [sys.executable, "-m", "spap_jax", "prune", str(EXAMPLES / "llama-stories"), "--output", str(output)]
    command += ["--data", str(EXAMPLES / "stories_calibration.txt"), "--sequences", "64"]
    command += ["--sequence-length", "64", "--rounds", "1", "--steps", "3", "--joint-passes", "1", "--swap-rounds", "1"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process: subprocess.Popen, seconds: int = 540) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def together(output: Path, count: int, *words: str) -> list[subprocess.Popen]:
    place = ["--coordinator", f"localhost:{free_port()}", "--processes", str(count)]
    return [start(output, *words, *place, "--process-id", str(i)) for i in range(count)]


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
def test_two_processes_that_go_on_give_the_result_of_one(tmp_path: Path):
    """One process is killed midway, which ends the other; only the first one has saved the finished steps."""
    code, _, said = finish(start(tmp_path / "one"))
    assert code == 0, said
    code, said = kill_one_after("layer 4/", 1, together(tmp_path / "two", 2))
    assert code == 75, said
    assert "process 0 of 2: it ends because another one is gone" in said
    assert "of 6 layers are done, kept in" in said
    assert "Traceback" not in said
    assert [each.name for each in tmp_path.iterdir() if each.name != "one"] == [".two.resume"]
    results = [finish(each) for each in together(tmp_path / "two", 2)]
    assert [code for code, _, _ in results] == [0, 0], results
    assert "layer 3/6" in results[0][2]
    kept = [line.endswith("kept") for line in results[0][2].splitlines() if line.startswith(("layer", "step"))]
    assert kept.count(True) in (3, 4)
    assert kept == sorted(kept, reverse=True)
    assert "MLP channels removed" in results[0][1]
    assert "MLP channels removed" not in results[1][1]
    one, two = (json.loads((tmp_path / name / "spap_report.json").read_text()) for name in ("one", "two"))
    assert [layer["kept"] for layer in one["layers"]] == [layer["kept"] for layer in two["layers"]]
    for mine, theirs in zip(one["layers"], two["layers"], strict=True):
        assert theirs["calibration"]["alternating"] == pytest.approx(mine["calibration"]["alternating"], rel=1e-3)
    assert two["joint"][-1]["held_out"] == pytest.approx(one["joint"][-1]["held_out"], rel=0.02)
    sizes = {(tmp_path / name / "model.safetensors").stat().st_size for name in ("one", "two")}
    assert len(sizes) == 1


@pytest.mark.timeout(600)
def test_each_of_four_processes_chooses_the_channels_of_other_layers(tmp_path: Path):
    """Of six layers, four are processed at once, then two, which leaves two processes without a layer."""
    words = ("--schedule", "parallel", "--effort", "low")
    alone = start(tmp_path / "one", *words)
    results = [finish(each) for each in (alone, *together(tmp_path / "four", 4, *words))]
    assert [code for code, _, _ in results] == [0] * 5, results
    one, four = (json.loads((tmp_path / name / "spap_report.json").read_text()) for name in ("one", "four"))
    for mine, theirs in zip(one["layers"], four["layers"], strict=True):
        assert mine["kept"] == theirs["kept"]
        assert theirs["calibration"]["alternating"] == pytest.approx(mine["calibration"]["alternating"], rel=1e-3)


@pytest.mark.timeout(900)
def test_two_processes_that_share_the_weights_give_the_result_of_one(tmp_path: Path):
    """Each process reads its own shards of the tensors; the first one writes the complete tensors."""
    quick = ("--effort", "low", "--learning-rate", "0.001", "--eval", str(EXAMPLES / "stories_evaluation.txt"))
    code, _, said = finish(start(tmp_path / "one", *quick))
    assert code == 0, said
    results = [finish(each) for each in together(tmp_path / "two", 2, *quick, "--model-devices", "2")]
    assert [code for code, _, _ in results] == [0, 0], results
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        np.testing.assert_allclose(weight.astype(np.float32), two[name].astype(np.float32), atol=5e-4, err_msg=name)


def test_some_of_the_options_are_not_enough(tmp_path: Path):
    code, _, said = finish(start(tmp_path / "out", "--processes", "2"))
    assert code == 2
    assert "--coordinator HOST:PORT" in said
    assert not list(tmp_path.iterdir())


def test_who_follows_ends_with_the_one_that_leads(tmp_path: Path):
    """JAX may notice the loss first; it then aborts the process and says why."""
    code, said = kill_one_after("layer 1/", 0, together(tmp_path / "out", 2, "--effort", "low"))
    assert code in (75, -signal.SIGABRT), said
    assert "another one is gone" in said or "another task died" in said


def test_an_error_of_one_ends_it_at_once(tmp_path: Path):
    """The failing process does not wait for the other, which has joined and is suspended so that it cannot answer."""
    place = ("--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process-id")
    first, second = start(tmp_path / "out", *place, "0"), start(tmp_path / "out", *place, "1", "--eval", "missing.txt")
    assert first.stderr is not None
    assert [first.stderr.readline().split()[0] for _ in range(2)] == ["waiting", "reading"]
    first.send_signal(signal.SIGSTOP)
    code, _, said = finish(second, seconds=100)
    first.kill()
    first.communicate()
    assert code == 2
    assert said.splitlines()[1].startswith("spap: missing.txt is not there")
