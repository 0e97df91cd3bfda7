"""Processes that wait for each other report it at once, and report at the timeout what is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_processes import free_port

from spap_jax import UserError
from spap_jax.parallel import joining
from spap_jax.parallel.joining import check_processes

IMPATIENT = """
import sys
from spap_jax.parallel import joining
from spap_jax.cli import main
joining._JOINING_SECONDS = 1
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "missing"),
    [
        (0, " at {0}, and not all came: start the same command with --process-id 1, 2 as well, and see that those "),
        (1, ", and nothing answers at {0}: start process 0 there, and see that it is reached."),
    ],
)
def test_nobody_joins(number: int, missing: str, tmp_path: Path):
    address = f"localhost:{free_port()}"
    words = ["prune", "owner/name", "--calibration", "c4", "--output", tmp_path / "out"]
    words += ["--coordinator", address, "--processes", 3, "--process-id", number]
    run = subprocess.run([sys.executable, "-c", IMPATIENT, *map(str, words)], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (75, "")
    waiting, *_, last = run.stderr.splitlines()
    assert waiting == f"waiting for 2 other processes at {address}, as process {number} ..."
    assert last.startswith(f"spap: this process waited 1 s for the other processes of the run{missing.format(address)}")
    assert "Traceback" not in run.stderr
    assert "***" not in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("coordinator", "processes", "process_id", "sentence"),
    [
        (None, 2, None, "needs all of coordinator='HOST:PORT', processes and process_id"),
        (None, None, 0, "needs all of coordinator='HOST:PORT', processes and process_id"),
        ("localhost:1234", 2, None, "needs all of"),
        ("localhost:1234", 2, 2, "there is no process 2 of 2: process_id counts from 0"),
        ("localhost:1234", 2, -1, "there is no process -1 of 2"),
        ("localhost:1234", 0, 0, "there is no process 0 of 0"),
        ("localhost", 2, 0, "coordinator localhost is not of the form HOST:PORT"),
        (":1234", 2, 0, "is not of the form HOST:PORT"),
        ("localhost:x", 2, 0, "is not of the form HOST:PORT"),
        ("localhost:65536", 2, 0, "is not of the form HOST:PORT"),
    ],
)
def test_what_cannot_be_joined(coordinator: str | None, processes: int | None, process_id: int | None, sentence: str):
    with pytest.raises(UserError, match=sentence):
        check_processes(coordinator, processes, process_id)


@pytest.mark.parametrize("coordinator", ["localhost:1", "10.0.0.1:65535", "[::1]:8476"])
def test_what_can_be_joined(coordinator: str):
    check_processes(coordinator, 2, 1)
    check_processes("auto", None, None)


def test_under_slurm_a_process_alone_on_its_host_has_all_devices(monkeypatch: pytest.MonkeyPatch):
    program = """
from jax._src import xla_bridge
from spap_jax.parallel.joining import join
join("auto", None, None)
print(xla_bridge.CUDA_VISIBLE_DEVICES.value)
"""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "3"}
    slurm |= {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": str(free_port())}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout.strip() == "all", said.stderr
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "1,2")
    assert joining._own_devices() is None  # JAX then goes by these
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")  # as if there were other processes
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert joining._own_devices() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # the launcher has bound this process to a GPU
    assert joining._own_devices() == []
