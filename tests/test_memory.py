"""The peak memory that a process reports."""

import subprocess
import sys

import numpy as np

from spap_jax import memory

PEAK = f"import runpy; print(runpy.run_path({memory.__file__!r})['peak']())"


def peak_of_a_child(first: str = "") -> int:
    command = [sys.executable, "-c", f"{first}\n{PEAK}"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_peak_is_that_of_the_process_itself():
    ballast = np.ones(40_000_000)
    assert memory.peak() > ballast.nbytes
    assert peak_of_a_child() < ballast.nbytes / 2


def test_the_peak_stays_when_memory_is_given_back():
    assert peak_of_a_child("big = bytearray(200_000_000); big[::4096] = big[::4096]; del big") > 200_000_000
