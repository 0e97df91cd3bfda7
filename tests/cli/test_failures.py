"""Unexpected errors, and missing features of the machine, also end in one sentence; ``--debug`` shows a traceback."""

import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import pytest
from commands import EVALUATION, STORIES, Said, apart, sentence, spap

from spap_jax.cli import failures
from spap_jax.errors import naming_flags, option


def test_an_unexpected_error(capsys, monkeypatch: pytest.MonkeyPatch):
    """The name table of `os.sysconf` is replaced by a number, so that a TypeError is raised inside the program."""
    monkeypatch.setattr(os, "sysconf_names", 5)
    for words in (("doctor",), ("--debug", "doctor"), ("doctor", "--debug")):
        said = spap(capsys, *words)
        assert said.code == 1
        assert ("Traceback" in said.err) == ("--debug" in words)
        assert said.err.splitlines()[-1].startswith("spap: something unexpected happened (TypeError: ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "memory (MemoryError): fewer --sequences"),
        (RuntimeError("INTERNAL: CUBLAS_STATUS_ALLOC_FAILED"), "memory (INTERNAL"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of 8 bytes."), "memory (RESOURCE"),
        (PermissionError(13, "Permission denied", "a/b"), "a/b cannot be used (Permission denied): check"),
    ],
)  # fmt: skip
def test_what_the_machine_lacks(error: Exception, expected: str):
    code, said = failures.failure(error)
    assert code == 2
    assert expected in said


@pytest.fixture
def any_platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a TPU VM where JAX_PLATFORMS is not set, for which JAX has a choice of its own."""
    monkeypatch.delenv("JAX_PLATFORMS")
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", "cpu")


def test_a_gpu_that_does_not_start(any_platform: None):
    """JAX says so once: asked again, it has the CPU alone."""
    code, said = failures.failure(RuntimeError("Unable to initialize backend 'cuda': too old."))
    assert code == 2
    assert "too old" in said


@pytest.mark.parametrize(
    ("platform", "words"),
    [
        pytest.param("tpu", ("doctor",), marks=pytest.mark.slow),
        ("gpux", ("doctor",)),
        pytest.param("cuda", ("eval", STORIES, "--data", EVALUATION), marks=pytest.mark.slow),
    ],
)
def test_platforms_that_jax_does_not_find(platform: str, words: tuple):
    assert "JAX_PLATFORMS=cpu" in sentence(apart(*words, JAX_PLATFORMS=platform))


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "spap_jax", "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_full_disk_behind_standard_output():
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "spap_jax", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert sentence(Said(run.returncode, "", run.stderr)).startswith("standard output cannot be written (No space left")


def test_a_process_leaves_at_once_although_its_output_cannot_be_written():
    program = "import sys; from spap_jax.cli.failures import leave; sys.stdout = open('/dev/full', 'w'); print(); "
    program += "leave(3)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (3, "")


def test_names_do_not_reach_the_terminal_as_commands(capsys):
    said = spap(capsys, "plan", "a\nb\x1b[31m")
    assert said.err.splitlines()[-1].startswith(r"spap: there is no folder a\nb\x1b[31m: check the path")


def test_options_are_spelled_as_the_reader_writes_them(capsys):
    def spelled() -> list[str]:
        return [option("round_to"), option("round_to", 64), option("overwrite", True), option("resume", False)]

    assert spelled() == ["round_to", "round_to=64", "overwrite=True", "resume=False"]
    with naming_flags():
        assert spelled() == ["--round-to", "--round-to 64", "--overwrite", "--no-resume"]
    assert option("method", "obs") == "method='obs'"
    assert sentence(spap(capsys, "plan", STORIES, "--round-to", "0")).startswith("--round-to must be a whole number")


def test_an_array_that_cannot_be_read_as_another_process_is_gone() -> None:
    assert failures._is_loss(ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"))
    assert not failures._is_loss(ValueError("shapes differ"))
