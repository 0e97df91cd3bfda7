"""``spap prune`` killed at any moment, or stopped by SIGTERM: the same command resumes and gives identical bits."""

import json
import random
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SAVING, Said, interrupt, left, process, sentence, spap, succeed, tiny, token_file

from spap_jax.checkpoint.folders import LocalFolder
from spap_jax.checkpoint.store import FolderStore
from spap_jax.cli import main

KILLS = 4


def words(shop: Path, output: Path | str, passes: float = 4) -> tuple[object, ...]:
    """Returns the command that prunes the tiny model of a folder, with its tokens."""
    return (
        "prune", shop / "in", "--data", shop / "ids.npy", "--output", output, "--sequences", 160,
        "--sequence-length", 64, "--method", "magnitude", "--update", "alternate", "--rounds", 0,
        "--joint-passes", passes,
    )  # fmt: skip


def start(shop: Path, output: Path) -> subprocess.Popen[str]:
    return process(*words(shop, output), first=SAVING, JAX_NUM_CPU_DEVICES="1")


def until(run: subprocess.Popen[str], found: Callable[[str], bool]) -> str:
    """Reads a process's standard error up to the first matching line or to the end, and returns the text."""
    assert run.stderr is not None
    said = ""
    for line in run.stderr:
        said += line
        if found(line):
            break
    return said


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and tokens."""
    folder = tmp_path_factory.mktemp("shop")
    tiny(folder / "in")
    token_file(folder / "ids.npy", sequences=160)
    return folder


@pytest.fixture(scope="module")
def whole(shop: Path) -> dict[str, Any]:
    """The output of an uninterrupted run."""
    assert main([str(word) for word in words(shop, shop / "whole")]) == 0
    assert not [name for name in left(shop) if name.startswith(".")]
    return content(shop / "whole")


def content(output: Path) -> dict[str, Any]:
    """Returns the bytes of every file of an output except its manifest, and the report without times and memory."""
    report = json.loads((output / "spap_report.json").read_text())
    for step in (report, *report["layers"], *report["joint"]):
        del step["seconds"]
    del report["extras"]["peak_memory_bytes"]
    files = {
        name: (output / name).read_bytes()
        for name in left(output)
        if name not in ("spap_report.json", "spap_files.json")
    }
    return files | {"spap_report.json": report}


def kept(output: Path) -> Path:
    return output.with_name(f".{output.name}.resume")


STEP = re.compile("layer |step ")
"""Prefix of a progress line about a step."""

STEPPING = r"all 3 layers are done, and (\d+) of \d+ parts of the joint steps"


def fresh(lines: int) -> Callable[[str], bool]:
    """Returns a predicate on successive lines that is true after the given number of newly computed steps."""
    left_over = iter(range(lines))
    return lambda line: STEP.match(line) is not None and not line.endswith("kept\n") and next(left_over, None) is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_moments(shop: Path, whole: dict[str, Any], tmp_path: Path):
    """A run is killed repeatedly until it finishes; if that took too few kills, another one is."""
    chance = random.Random(0)
    kills, went_on = 0, 0
    while kills < KILLS or left(tmp_path):
        run = start(shop, tmp_path / "out")
        said = until(run, fresh(chance.randrange(4)))
        try:
            run.wait(timeout=None if kills >= KILLS else chance.random() * 0.2)
        except subprocess.TimeoutExpired:
            run.kill()
        said += run.communicate()[1]
        went_on += "going on: " in said
        kills += run.returncode == -signal.SIGKILL
        assert run.returncode in (0, -signal.SIGKILL), said
        assert set(left(tmp_path)) <= {".out.resume", "out"}
        if run.returncode == 0:
            assert left(tmp_path) == ["out"]
        if (tmp_path / "out").exists():
            assert content(tmp_path / "out") == whole
            for made in tmp_path.iterdir():
                shutil.rmtree(made)
    assert went_on > KILLS / 2


@pytest.fixture(scope="module")
def told_to_end(shop: Path, whole: dict[str, Any]) -> Said:
    """A run that received SIGTERM in its joint steps; its output was to be `ended`."""
    run = start(shop, shop / "ended")
    said = until(run, lambda line: line.startswith("step ") and not line.startswith(("step 0/", "step 3/")))
    run.terminate()
    out, err = run.communicate()
    return Said(run.returncode, out, said + err)


@pytest.fixture
def ended(shop: Path, told_to_end: Said, tmp_path: Path) -> Path:
    """The output path of that run, with its own copy of what is kept."""
    shutil.copytree(kept(shop / "ended"), kept(tmp_path / "ended"))
    return tmp_path / "ended"


def test_told_to_end(shop: Path, told_to_end: Said):
    assert told_to_end.code == 75
    assert told_to_end.out == ""
    assert re.search(rf"stopped by SIGTERM; {STEPPING}, kept in ", told_to_end.err.splitlines()[-1])
    assert not (shop / "ended").exists()
    assert {"block-00000.safetensors", "block-00002.safetensors", "state"} < {*left(kept(shop / "ended"))}


def test_it_goes_on_where_it_ended(shop: Path, whole: dict[str, Any], ended: Path, capsys):
    said = succeed(capsys, *words(shop, ended))
    found = re.search(rf"^going on: {STEPPING}", said.err, re.MULTILINE)
    assert found
    steps = [line.endswith("  kept") for line in said.err.splitlines() if STEP.match(line)]
    assert steps.count(True) == 3 + 1 + int(found[1])
    assert content(ended) == whole
    assert left(ended.parent) == ["ended"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--seed": 1, "--joint-passes": 1.5}, "seed (0, now 1), joint_passes (4.0, now 1.5)"),
        ({"--sequences": 159}, "in calibration: "),
        ({"--devices": 2}, "in devices (1, now 2): "),
    ],
)
def test_another_command_is_refused(changes: dict, expected: str, shop: Path, ended: Path, capsys):
    command, model, *options = words(shop, ended)
    replaced = dict(zip(options[::2], options[1::2], strict=True)) | changes
    said = sentence(spap(capsys, command, model, *(word for pair in replaced.items() for word in pair)))
    assert expected in said
    assert "--no-resume" in said
    assert left(ended.parent) == [kept(ended).name]


def test_another_model_is_refused(shop: Path, ended: Path, tmp_path: Path, capsys):
    shutil.copytree(shop / "in", tmp_path / "in")
    weights = tmp_path / "in" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    command, _, *options = words(shop, ended)
    assert "in model: repeat" in sentence(spap(capsys, command, tmp_path / "in", *options))


def test_an_output_that_another_run_began_is_refused_before_any_is_made(shop: Path, tmp_path: Path, capsys):
    output = tmp_path / "two"
    begun = words(shop, output / "sparsity-0.35")
    interrupt(capsys, ("layer", 0), *begun, "--sparsity", "0.35")
    said = sentence(spap(capsys, *words(shop, output), "--sparsity", "0.3,0.35", "--seed", "1"))
    assert "sparsity-0.35.resume holds a run that was interrupted and differs from this one in seed (0, now 1)" in said
    assert left(output) == [".sparsity-0.35.resume"]


def test_starting_over(shop: Path, ended: Path, capsys):
    said = succeed(capsys, *words(shop, ended, 0), "--seed", "1", "--no-resume")
    assert "kept" not in said.err
    assert json.loads((ended / "spap_report.json").read_text())["settings"]["seed"] == 1
    assert left(ended.parent) == ["ended"]


def test_widths_are_chosen_once(shop: Path, tmp_path: Path, capsys):
    """The widths that the first process chose are used, whatever the resuming process would choose."""
    widths = ("--allocation", "global")
    interrupt(capsys, ("layer", 0), *words(shop, tmp_path / "out", 0), *widths)
    decided = kept(tmp_path / "out") / "decided.json"
    found = json.loads(decided.read_text())
    assert sum(found["widths"]) <= 3 * 37
    decided.write_text(json.dumps(found | {"widths": [37, 30, 37]}))
    (kept(tmp_path / "out") / "block-00000.safetensors").unlink()  # which has the width chosen first
    said = succeed(capsys, *words(shop, tmp_path / "out", 0), *widths)
    assert "choosing a width" not in said.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["intermediate_size"], config["spap_intermediate_sizes"]) == (37, [37, 30, 37])
    assert left(tmp_path) == ["out"]


def test_what_reaches_a_target_is_looked_for_once(shop: Path, tmp_path: Path, capsys):
    """The shape that the first process found is used, whatever the resuming process would find."""
    target = ("--target", "0.9")
    interrupt(capsys, ("layer", 0), *words(shop, tmp_path / "out", 0), *target)
    decided = kept(tmp_path / "out") / "decided.json"
    found = json.loads(decided.read_text())
    decided.write_text(json.dumps(found | {"sparsity": 0.5, "drop_blocks": [1]}))
    (kept(tmp_path / "out") / "block-00000.safetensors").unlink()  # which has the width found first
    said = succeed(capsys, *words(shop, tmp_path / "out", 0), *target)
    assert "looking for" not in said.err
    report = json.loads((tmp_path / "out" / "spap_report.json").read_text())["settings"]
    assert (report["target"], report["sparsity"], report["drop_blocks"]) == ("0.9", 0.5, [1])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


def test_several_sparsities(shop: Path, tmp_path: Path, capsys):
    """The first output is complete and the second run interrupted: the same command keeps it and resumes the other."""
    several = ("--sparsity", "0.3,0.35")
    output = tmp_path / "out"
    interrupt(capsys, ("layer", 1), *words(shop, output, 0), *several, time=2)
    assert left(output) == [".sparsity-0.3.resume", ".sparsity-0.35.resume", "sparsity-0.3"]
    assert left(output / ".sparsity-0.3.resume") == ["run.json"]
    when = (output / "sparsity-0.3" / "config.json").stat().st_mtime_ns
    again = succeed(capsys, *words(shop, output, 0), *several)
    assert f"{output / 'sparsity-0.3'} was made before the interruption" in again.err
    assert (output / "sparsity-0.3" / "config.json").stat().st_mtime_ns == when
    assert left(output) == ["sparsity-0.3", "sparsity-0.35"]


def test_the_block_that_is_being_written_is_waited_for(shop: Path, tmp_path: Path, capsys, monkeypatch):
    """Without that, an interruption said that nothing is kept, or that a file which was just renamed is missing."""
    waiting, write, settle = threading.Event(), LocalFolder.write, FolderStore.settle

    def write_late(folder: LocalFolder, name: str, content: bytes) -> None:
        if name.startswith("block-"):
            waiting.wait(1)
        write(folder, name, content)

    def settle_at_once(store: FolderStore) -> None:
        waiting.set()
        settle(store)

    monkeypatch.setattr(LocalFolder, "write", write_late)
    monkeypatch.setattr(FolderStore, "settle", settle_at_once)
    said = interrupt(capsys, ("layer", 0), *words(shop, tmp_path / "out", 0))
    assert "1 of 3 layers are done, kept in " in said.err
