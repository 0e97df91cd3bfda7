"""The peak memory that a process reports, and the memory that it may use."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def test_a_system_that_does_not_say_the_peak_says_the_memory_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO("VmSize: 9 kB\nVmRSS: 8 kB\n"))
    assert memory.peak() > 10_000_000


@pytest.mark.parametrize(("said", "limit"), [("1000000\n", 1_000_000), ("max\n", memory.of_machine())])
def test_a_container_may_have_less_than_the_machine(
    said: str, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "memory.max").write_text(said)
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "memory.max", tmp_path / "missing"))
    assert memory.of_machine() == limit


@pytest.mark.parametrize(("machine", "left"), [(4_096_000, 1_024_000), (9_999_999, 5_120_000)])
def test_what_is_left_of_a_container_or_of_the_machine(machine: int, left: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "of_machine", lambda: machine)
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO("MemAvailable: 5000 kB\nVmRSS: 3000 kB\n"))
    assert memory.left() == left
