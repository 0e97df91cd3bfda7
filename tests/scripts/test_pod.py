"""``tpu_scripts/pod.sh``: the exact commands of a dry run, and their effect on a worker."""

import os
import re
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
    """Return the commands that would be run, split into words."""
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
    assert "'jax[tpu]' gcsfs ./spap_jax-1.whl" in install[install.index("--command") + 1]
    (install,) = dry("install", "--source", "git+https://example.org/spap")
    assert "git+https://example.org/spap" in install[install.index("--command") + 1]


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    """The home of a worker whose spap prints its arguments, with a gcloud that runs its --command there at once."""
    tools, home = tmp_path / "tools", tmp_path / "home"
    (home / "spap" / "bin").mkdir(parents=True)
    tools.mkdir()
    for path, text in (
        (home / "spap" / "bin" / "spap", '#!/bin/bash\nprintf "%s\\n" "$@" ${FOLDER:+"$FOLDER"}\nexit ${#1}\n'),
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
    on_worker(worker, "run", "--env", "OTHER=1", "--env", "FOLDER=a disk's", "--", *words)
    assert on_worker(worker, "logs").stdout.splitlines() == [*words, "--coordinator", "auto", "a disk's"]


KEPT = ["prune", "gs://lab/a model", "--output", "gs://lab/out"]


def test_keep_is_the_commands_of_a_run_in_their_order():
    slice_words, source = ["--type", "v5p-64", "--spot"], ["--source", "dist/spap_jax-1.whl"]
    logs, look = dry("logs"), [*TPUS, "tpu-vm", "ssh", "pruner", "--worker", "0", "--command", "cat ~/spap.code", *ZONE]
    expected = [*dry("create", *slice_words), *dry("wait"), *dry("install", *source), *dry("run", "--", *KEPT)]
    expected += [*logs, look, *dry("delete")]
    kept = dry("keep", *slice_words, *source, "--", *KEPT)
    assert [[re.sub("--exclude-newer [^ ]+ ", "", word) for word in words] for words in kept] == expected
    time = ["--before", "2026-12-01T00:00:00Z"]
    assert dry("install", *time, *source)[1] == dry("keep", *time, *slice_words, *source, "--", *KEPT)[3]


GCLOUD = """#!/bin/bash
echo "$@" >> ~/said
case "$*" in
  *" create "*) echo ACTIVE > ~/state ;;
  *" delete "*)
    [[ -e ~/state ]] || { echo "NOT_FOUND: it is gone" >&2; exit 1; }
    [[ ! -e ~/busy ]] || { rm ~/busy; exit 1; }
    rm -rf ~/state ~/spap.code ~/spap.log ;;
  *" describe "*) cat ~/state 2> /dev/null || { echo "NOT_FOUND: it is gone" >&2; exit 1; } ;;
  *" ssh "*)
    [[ $(cat ~/state) == ACTIVE ]] || exit 255
    while [[ $1 != --command ]]; do shift; done
    case "$2" in
      *pip*) [[ ! -e ~/no-index ]] ;;
      rm*) bash -c "${2%&}" ;;
      cat*) [[ "$*" == *"--worker all"* && -e ~/spap.code-1 ]] && cat ~/spap.code-1; bash -c "$2" ;;
      *) bash -c "$2" ;;
    esac ;;
esac
"""
SPAP = """#!/bin/bash
runs=$(( $(cat ~/runs 2> /dev/null || echo 0) + 1 ))
echo "$runs" > ~/runs
echo "run $runs: $*"
fate=$(sed -n "${runs}p" ~/fates)
[[ $fate == other ]] && echo 2 > ~/spap.code-1 && exit 75
[[ $fate == taken ]] && echo SUSPENDED > ~/state
[[ $fate == gone ]] && rm ~/state && exit 137
[[ $fate == taken ]] && exit 75
exit "$fate"
"""


def kept_going(worker: Path, *fates: str) -> tuple[int, str, list[str]]:
    """Run ``keep`` with runs that end in the given ways; return its exit code, its output and gcloud's verbs.

    Args:
        worker: Home of the worker, and of the user.
        fates: The exit code of each run, or "taken" or "gone" if its slice is lost, after a warning or without one, or
            "other" if another worker fails.
    """
    for path, text in (
        (worker / "spap" / "bin" / "spap", SPAP),
        (worker.parent / "tools" / "gcloud", GCLOUD),
        (worker.parent / "tools" / "sleep", "#!/bin/bash\n"),
        (worker.parent / "tools" / "date", '#!/bin/bash\necho . >> ~/asked && echo "time-$(wc -l < ~/asked)"\n'),
    ):
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    (worker / "fates").write_text("\n".join(fates) + "\n", encoding="utf-8")
    done = on_worker(worker, "keep", "--type", "v5p-64", "--spot", "--source", "x.whl", "--", *KEPT)
    lines = (worker / "said").read_text(encoding="utf-8").splitlines()
    return done.returncode, done.stdout + done.stderr, [line.split()[3] for line in lines if "queued-resources" in line]


def test_keep_goes_on_with_another_slice_until_the_run_has_ended(worker: Path):
    code, said, verbs = kept_going(worker, "taken", "75", "gone", "0")
    assert code == 0
    told = [line for line in said.splitlines() if line.startswith("run ")]
    assert [line.partition(":")[0] for line in told if line.startswith("run 4")] == ["run 4"]
    assert told[-1] == f"run 4: {' '.join(KEPT)} --coordinator auto"
    assert (worker / "runs").read_text() == "4\n"
    slices = [verb for verb in verbs if verb != "describe"]
    assert slices == ["create", "delete", "create", "delete", "create", "delete"]
    asked = (worker / "said").read_text(encoding="utf-8")
    assert re.findall("--exclude-newer ([^ ]+)", asked) == ["time-1"] * 3, "later slices install the same versions"


def test_keep_ends_with_a_run_that_fails_by_itself(worker: Path):
    (worker / "busy").touch()
    code, _, verbs = kept_going(worker, "2")
    assert code == 2
    assert verbs == ["create", "describe", "delete", "describe", "delete"]  # the first of which fails
    assert (worker / "runs").read_text() == "1\n"


def test_keep_says_that_a_slice_is_left_on_which_no_run_began(worker: Path):
    (worker / "no-index").touch()
    code, said, verbs = kept_going(worker, "0")
    assert code == 2
    assert "no run has begun: see above, delete pruner if it is there, and try again." in said
    assert verbs == ["create", "describe"]


def test_keep_ends_with_the_error_of_another_worker(worker: Path):
    code, _, verbs = kept_going(worker, "75", "other")
    assert code == 2
    assert verbs[-1] == "delete"


def test_keep_gives_up_a_run_that_ends_again_and_again(worker: Path):
    code, _, verbs = kept_going(worker, *["134"] * 3, "gone", *["134"] * 7)
    assert code == 2
    assert (worker / "runs").read_text() == "10\n"
    assert verbs[-1] == "describe"  # the slice is left, with its logs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", *PLACE, "--dry-run"], "--type"),
        (["run", *PLACE, "--dry-run"], "after --"),
        (["install", *PLACE, "--dry-run"], "--source"),
        (["fetch", *PLACE, "--dry-run", "--from", "x"], "--to"),
        (["keep", *PLACE, "--dry-run", "--source", "x"], "after --"),
        (["keep", *PLACE, "--dry-run", "--source", "x", "--", "prune", "m", "--output", "out"], "--output gs://"),
        (["keep", *PLACE, "--dry-run", "--", "prune", "m", "--output=gs://b/out"], "--source"),
        (["create", "--name", "pruner", "--dry-run"], "--zone are needed"),
        (["create", *PLACE, "--dry-run", "--size", "8"], "--size is not an option"),
        (["create", *PLACE, "--dry-run", "--type"], "--type needs a value"),
        (["start", *PLACE, "--dry-run"], "start is not a command"),
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
