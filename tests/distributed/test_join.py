"""Processes that wait for each other report it at once, and report at the timeout what is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
from several import free_port

from spap_jax import UserError
from spap_jax.parallel import processes
from spap_jax.parallel.processes import parse_process

IMPATIENT = """
import sys
from spap_jax.parallel import processes
from spap_jax.cli import main
processes._JOINING_SECONDS = 1
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "others"), [(0, "process 1, 2"), (1, "process 0, 2")])
def test_nobody_joins(number: int, others: str, tmp_path: Path):
    words = ["prune", "owner/name", "--data", "c4", "--output", tmp_path / "out"]
    words += ["--process", process := f"{number}/3@localhost:{free_port()}"]
    run = subprocess.run([sys.executable, "-c", IMPATIENT, *map(str, words)], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (75, "")
    first, *_, last = run.stderr.splitlines()
    assert first == f"waiting for the other processes ({process}) ..."
    assert last.startswith(f"spap: this process, {process}, waited 1 s")
    assert f"for {others} as well" in last
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "process",
    ["", "1", "0/2", "2/2@localhost:1234", "0/2@localhost", "0/2@localhost:x", "0/2@:1234", "0/2@h:0", "0/2@h:65536"],
)
def test_what_cannot_be_joined(process: str):
    with pytest.raises(UserError, match="process"):
        parse_process(process)


def test_what_can_be_joined():
    assert parse_process("1/2@[::1]:8476") == ("[::1]:8476", 2, 1)
    assert parse_process("auto") == (None, None, None)


@pytest.mark.slow
def test_under_slurm_a_process_alone_on_its_host_has_all_devices(monkeypatch: pytest.MonkeyPatch):
    program = """
from jax._src import xla_bridge
from spap_jax.parallel.processes import join
join("auto")
print(xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "3"}
    slurm |= {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": str(free_port())}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout.strip() == "all", said.stderr


def test_devices_that_are_for_other_processes_are_left_to_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert processes._own_devices() == []
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "1,2")
    assert processes._own_devices() is None  # JAX then goes by these
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")  # as if there were other processes
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert processes._own_devices() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # the launcher has bound this process to a GPU
    assert processes._own_devices() == []
