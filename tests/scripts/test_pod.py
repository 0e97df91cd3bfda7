"""``tpu_scripts/pod.sh``: the exact commands of a dry run, and what a worker makes of them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tpu_scripts" / "pod.sh"
PLACE = ["--name", "pruner", "--zone", "us-west4-a"]


def pod(*words: str, path: str | None = None, home: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | ({"PATH": path} if path else {}) | ({"HOME": str(home)} if home else {})
    return subprocess.run([SCRIPT, *words], capture_output=True, text=True, env=environment, timeout=60, check=False)


def dry(command: str, *words: str) -> list[list[str]]:
    """The commands that would be run, as words."""
    done = pod(command, *PLACE, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


TPUS = ["gcloud", "compute", "tpus"]
ZONE = ["--zone", "us-west4-a"]


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-64", "v2-alpha-tpuv5"), ("v4-8", "tpu-ubuntu2204-base")],
)
def test_create_asks_for_the_type_and_its_usual_runtime(kind: str, runtime: str):
    wanted = ["--node-id", "pruner", "--accelerator-type", kind, "--runtime-version", runtime]
    assert dry("create", "--type", kind) == [[*TPUS, "queued-resources", "create", "pruner", *wanted, *ZONE]]


def test_create_takes_spot_capacity_another_runtime_and_a_project():
    (words,) = dry("create", "--type", "v5p-64", "--spot", "--runtime", "special", "--project", "lab")
    assert "--spot" in words
    assert words[words.index("--runtime-version") + 1] == "special"
    assert words[-2:] == ["--project", "lab"]


def test_wait_fetch_and_delete():
    state = ["describe", "pruner", "--format", "value(state.state)"]
    assert dry("wait") == [[*TPUS, "queued-resources", *state, *ZONE]]
    copy = ["scp", "--recurse", "pruner:out dir", "here", "--worker", "0"]
    assert dry("fetch", "--from", "out dir", "--to", "here") == [[*TPUS, "tpu-vm", *copy, *ZONE]]
    assert dry("delete") == [[*TPUS, "queued-resources", "delete", "pruner", "--force", "--quiet", *ZONE]]


def test_install_copies_a_wheel_first_and_no_repository():
    copy, install = dry("install", "--source", "dist/spap_jax-1.whl")
    assert copy[3:] == ["tpu-vm", "scp", "dist/spap_jax-1.whl", "pruner:", "--worker", "all", *ZONE]
    assert "'jax[tpu]' ./spap_jax-1.whl" in install[install.index("--command") + 1]
    (install,) = dry("install", "--source", "git+https://example.org/spap")
    assert "git+https://example.org/spap" in install[install.index("--command") + 1]


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    """The home of a worker whose spap writes down its words; a gcloud that runs its --command there at once."""
    tools, home = tmp_path / "tools", tmp_path / "home"
    (home / "spap" / "bin").mkdir(parents=True)
    tools.mkdir()
    for path, text in (
        (home / "spap" / "bin" / "spap", '#!/bin/bash\nprintf "%s\\n" "$@"\nexit ${#1}\n'),
        (tools / "gcloud", '#!/bin/bash\nwhile [[ $1 != --command ]]; do shift; done\nbash -c "$2"\n'),
    ):
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    return home


def on_worker(home: Path, command: str, *words: str) -> subprocess.CompletedProcess:
    return pod(command, *PLACE, *words, path=f"{home.parent / 'tools'}:{os.environ['PATH']}", home=home)


def test_words_arrive_whole_and_the_exit_code_comes_back(worker: Path):
    words = ["prune", "a model", "--output", 'it\'s $HOME; "x" *']
    started = on_worker(worker, "run", "--", *words)
    assert started.returncode == 0, started.stderr
    followed = on_worker(worker, "logs")
    assert followed.stdout.splitlines() == [*words, "--coordinator", "auto"]
    assert followed.returncode == len("prune")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", *PLACE, "--dry-run"], "--type"),
        (["run", *PLACE, "--dry-run"], "after --"),
        (["install", *PLACE, "--dry-run"], "--source"),
        (["fetch", *PLACE, "--dry-run", "--from", "x"], "--to"),
        (["create", "--name", "pruner", "--dry-run"], "--zone are needed"),
        (["create", *PLACE, "--dry-run", "--size", "8"], "--size is no option"),
        (["create", *PLACE, "--dry-run", "--type"], "--type needs a value"),
        (["start", *PLACE, "--dry-run"], "start is no command"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], said: str):
    done = pod(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout


def test_it_asks_for_gcloud_where_there_is_none(tmp_path: Path):
    for tool in ("bash", "env"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    done = pod("delete", *PLACE, path=str(tmp_path))
    assert done.returncode == 2
    assert "gcloud is not installed" in done.stderr


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
