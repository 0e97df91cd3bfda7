"""Commands as several real processes on one machine, and what they write."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

SAVING = """
import sys
from spap_jax.checkpoint import states
from spap_jax.cli import main
states.SECONDS = 0
sys.exit(main())
"""
"""A program that runs a command and saves the state of steps at every check."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(command: list[str], *words: str) -> subprocess.Popen[str]:
    """Start a command in a separate process with one device."""
    environment, pipe = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, subprocess.PIPE
    words = (sys.executable, "-c", SAVING, *command, *words)
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)


def together(command: list[str]) -> list[subprocess.Popen[str]]:
    """Start a command as two processes."""
    port = free_port()
    return [start(command, "--process", f"{number}/2@localhost:{port}") for number in range(2)]


def finish(process: subprocess.Popen[str], seconds: int = 600) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def run_together(command: list[str]) -> list[tuple[str, str]]:
    """Run a command as two processes, to a good end; return what each said on standard output and standard error."""
    results = [finish(each) for each in together(command)]
    assert [code for code, _, _ in results] == [0, 0], results
    return [(out, err) for _, out, err in results]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")
