"""``tpu_scripts/pod.sh``: the commands that it gives to gcloud, which is replaced by one that prints them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tpu_scripts" / "pod.sh"

GCLOUD = """#!/usr/bin/env bash
echo "$*" >> calls
case $4 in
  create) touch slice ;;
  describe) test -e slice && echo ACTIVE ;;
esac
"""


def pod(folder: Path, *words: str) -> subprocess.CompletedProcess:
    fake = folder / "gcloud"
    fake.write_text(GCLOUD)
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([SCRIPT, *words], cwd=folder, capture_output=True, text=True, env=environment, timeout=60)


def test_a_slice_is_created_once_and_the_command_runs_on_all_workers(tmp_path: Path):
    (tmp_path / "spap.whl").touch()
    words = ["--name", "pruner", "--zone", "z", "--type", "v5litepod-16", "--wheel", "spap.whl", "--spot"]
    words += ["--env", "HF_TOKEN=a b", "--fetch", "pruned", "--", "prune", "a model", "--output", "pruned"]
    for _ in range(2):
        assert pod(tmp_path, *words).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    (created,) = (call for call in calls if "queued-resources create" in call)
    assert created.endswith("--runtime-version v2-alpha-tpuv5-lite --spot --zone z")
    copied, installed, ran, fetched = (call for call in calls[-4:])
    assert copied == "compute tpus tpu-vm scp spap.whl pruner: --worker all --zone z"
    assert "jax[tpu]" in installed
    assert r"env HF_TOKEN=a\ b ~/spap/bin/spap prune a\ model --output pruned --process auto --zone z" in ran
    assert fetched == "compute tpus tpu-vm scp --recurse pruner:pruned . --worker 0 --zone z"


@pytest.mark.parametrize("words", [[], ["--name"], ["--size", "4"], ["--name", "pruner", "--", "prune"]])
def test_what_is_wrong_is_refused_before_any_call(words: list[str], tmp_path: Path):
    assert pod(tmp_path, *words).returncode == 2
    assert not (tmp_path / "calls").exists()


def test_help_and_shellcheck(tmp_path: Path):
    assert pod(tmp_path, "--help").stdout.startswith("Usage: ")
    check = subprocess.run([Path(sys.executable).with_name("shellcheck"), SCRIPT], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout
