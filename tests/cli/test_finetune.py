"""End-to-end tests of ``spap finetune``."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from commands import STORIES, interrupt, left, process, sentence, spap, succeed, tiny, token_file
from hf_models import hf_logits

import spap_jax
from spap_jax.checkpoint.store import FolderStore
from spap_jax.cli import main
from spap_jax.evaluation import perplexity
from spap_jax.parallel import mesh
from spap_jax.quantities import bytes_text

TRAINED = 3 * 16 * (4 * (32 + 32) + 3 * (32 + 26))
"""Layers times rank times inputs and outputs, of four square projections and of three with the 26 channels kept."""
QUICK = ("--sequences", "12", "--sequence-length", "16", "--steps", "4", "--check-every", "2", "--step-sequences", "4")
FULL = (*QUICK, "--full", "--learning-rate", "3e-3")
"""The held-out loss is lowest after two of the four steps."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("dense") / "in [dense]")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("ids") / "ids.npy")


@pytest.fixture(scope="module")
def half(dense: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("half") / "half"
    words = ("--sequences", 8, "--sequence-length", 16, "--method", "magnitude", "--sparsity", 0.5)
    assert main([str(word) for word in ("prune", dense, "--output", output, "--data", ids, *words)]) == 0
    return output


@pytest.fixture
def pruned(half: Path, tmp_path: Path) -> Path:
    """A copy, which a test may change, in a folder of its own."""
    return shutil.copytree(half, tmp_path / "half")


def test_a_pruned_checkpoint_is_trained_towards_the_dense_one(dense: Path, pruned: Path, ids: Path, capsys):
    out = pruned.parent / "out"
    words = ("--data", ids, "--teacher", dense, "--output", out, "--eval", ids, "--learning-rate", "1e-3", *QUICK)
    said = succeed(capsys, "finetune", pruned, *words)
    assert said.out.splitlines()[0] == f"{pruned.name}: 4 steps, LoRA of rank 16 (20 640 numbers)"
    report = json.loads((out / "spap_finetune.json").read_text())
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    assert after < before
    assert f"{before:.4f}" in said.out
    assert f"{report['extras']['perplexity']['before']:.4f}" in said.out
    assert "step 4/4  loss " in said.err
    assert (report["model"], report["teacher"]) == (pruned.name, dense.name)
    assert (report["settings"]["lora_rank"], report["settings"]["seed"], report["trained_parameters"]) == (
        16,
        0,
        TRAINED,
    )
    assert (report["data"]["sequences"], len(report["data"]["sha256"])) == (12, 64)
    assert sum(len(check["losses"]) for check in report["checks"]) == 4

    assert left(out) == sorted([*left(pruned), "spap_finetune.json"])
    for name in ("config.json", "spap_report.json"):
        assert (out / name).read_bytes() == (pruned / name).read_bytes()
    card = (out / "README.md").read_text()
    assert card.startswith((pruned / "README.md").read_text())
    assert "## Trained after pruning\n\nLow-rank updates of the projections (LoRA) were trained for 4 steps" in card
    assert f"| held-out loss (divergence from the teacher) | {before:.4f} | {after:.4f} |" in card

    loader: Any = transformers.AutoModelForCausalLM
    theirs, told = loader.from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    tokens = np.load(ids)[:2]
    np.testing.assert_allclose(
        spap_jax.logits(spap_jax.load(out), tokens), hf_logits(theirs.eval(), tokens), rtol=0, atol=1e-4
    )


def test_orbax_folders_are_trained_like_others(dense: Path, pruned: Path, ids: Path, capsys):
    work = pruned.parent
    succeed(capsys, "convert", pruned, "--to", "orbax", "--output", work / "pruned")
    words = ("--data", ids, "--teacher", dense, "--output", work / "trained", *QUICK)
    succeed(capsys, "finetune", work / "pruned", *words)
    cards = [(work / name / "README.md").read_text() for name in ("pruned", "trained", "half")]
    assert ["\nlibrary_name: spap-jax\n" in card for card in cards] == [True, False, False]
    assert ["spap_jax.load(" in card for card in cards] == [True, False, False]
    assert cards[1].startswith(cards[2])


def test_a_converted_checkpoint_is_described_as_it_is(pruned: Path, capsys):
    half = pruned.parent / "bfloat16"
    words = ("--to", "huggingface", "--dtype", "bfloat16", "--output", half)
    succeed(capsys, "convert", pruned, *words)
    before, after = (json.loads((each / "spap_report.json").read_text()) for each in (pruned, half))
    sizes = [report["extras"].pop("bytes") for report in (before, after)]
    assert sizes[1] == sizes[0] | {"after": sizes[0]["after"] // 2}
    assert after == before
    (pruned / "spap_report.json").write_text("{}")  # as another version may have written it
    succeed(capsys, "convert", pruned, *words[:4], "--output", half.with_name("again"))
    assert (half.with_name("again") / "spap_report.json").read_text() == "{}"
    rows = [line for line in (half / "README.md").read_text().splitlines() if line.startswith("| weights on disk")]
    assert rows[0].split(" | ")[1:3] == [bytes_text(sizes[0]["before"]), bytes_text(sizes[1]["after"])]


def test_every_training_has_its_report(dense: Path, pruned: Path, ids: Path, capsys):
    work = pruned.parent
    words = ("--data", ids, "--teacher", dense, "--learning-rate", "1e-3", *QUICK)
    for before, after in (("half", "one"), ("one", "two"), ("two", "three")):
        succeed(capsys, "finetune", work / before, *words, "--output", work / after)
    files = {name: (work / "three" / f"spap_finetune{name}.json").read_bytes() for name in ("-1", "-2", "")}
    assert files["-1"] == (work / "one" / "spap_finetune.json").read_bytes()
    assert files["-2"] == (work / "two" / "spap_finetune.json").read_bytes()
    told = re.findall(r"the loss of every step are in `(.*?)`", (work / "three" / "README.md").read_text())
    assert told == ["spap_finetune-1.json", "spap_finetune-2.json", "spap_finetune.json"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--full", "--lora-rank", "4"), "--lora-rank"),
        (("--lora-rank", "33"), "rank 33"),
        (("--sequences", "1", "--eval", "IDS"), "two sequences"),  # said before it is measured
        (("--sequences", "65"), "65"),
        (("--teacher", STORIES), "teacher"),
        (("--teacher", "MODEL"), "model itself"),
    ],
)
def test_refusals(words: tuple, expected: str, dense: Path, ids: Path, tmp_path: Path, capsys):
    place = ("--data", ids, "--output", tmp_path / "out", "--sequence-length", "16")
    more = () if "--sequences" in words else ("--sequences", "12")
    named = {"IDS": ids, "MODEL": f"{dense}/."}
    said = spap(capsys, "finetune", dense, *place, *more, *(named.get(word, word) for word in words))
    assert expected in sentence(said)
    assert "measuring" not in said.err
    assert left(tmp_path) == []


def test_perplexity_is_measured_on_the_devices_of_the_run(dense: Path, ids: Path, tmp_path: Path, capsys, monkeypatch):
    sizes, measured = [], perplexity.perplexity

    def watched(*given, **more) -> float:
        sizes.append(mesh.mesh_size())
        return measured(*given, **more)

    monkeypatch.setattr(perplexity, "perplexity", watched)
    shared = ("--devices", "2", "--model-devices", "2", *QUICK)
    words = ("--data", ids, "--eval", ids, "--output", tmp_path / "out")
    said = succeed(capsys, "finetune", dense, *words, *shared)
    assert sizes == [2, 2]
    assert "training on the CPU x 2, of which 2 share the weights ..." in said.err.splitlines()


def test_a_loss_that_is_lost_writes_nothing(dense: Path, ids: Path, tmp_path: Path, capsys):
    words = ("--data", ids, "--output", tmp_path / "out", "--learning-rate", "1e30", *QUICK)
    said = spap(capsys, "finetune", dense, *words)
    assert said.code == 2
    last = said.err.splitlines()[-1]
    assert "kept in" not in said.err
    assert last == "spap: the loss is no longer finite after 2 steps: give a smaller --learning-rate."
    assert left(tmp_path) == []


@pytest.mark.slow
def test_told_to_end_before_training(dense: Path, ids: Path, tmp_path: Path):
    run = process("finetune", dense, "--data", ids, "--output", tmp_path / "out", *QUICK)
    assert run.stderr is not None
    assert any(line.startswith("reading ") for line in run.stderr)
    run.terminate()
    assert run.communicate()[1].splitlines()[-1] == "spap: stopped by SIGTERM; nothing was done since it began."
    assert run.returncode == 75
    assert left(tmp_path) == []


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_result_that_was_complete_before_the_interruption(
    dense: Path, ids: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    words = ["finetune", dense, "--data", ids, "--output", tmp_path / "out", *QUICK]
    with monkeypatch.context() as patched:
        patched.setattr(FolderStore, "remove", interrupted)
        assert spap(capsys, *words).code == 130
    assert left(tmp_path) == [".out.resume", "out"]
    when = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    said = succeed(capsys, *words)
    assert said.err.splitlines()[-1] == f"{tmp_path / 'out'} was made before the interruption"
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == when
    assert left(tmp_path) == ["out"]
    assert "out exists" in sentence(spap(capsys, *words))


def test_a_run_that_is_interrupted_goes_on_to_the_same_bits(dense: Path, ids: Path, tmp_path: Path, capsys):
    words = ("finetune", dense, "--data", ids, *FULL)
    interrupt(capsys, ("step", 2), *words, "--output", tmp_path / "out")
    assert left(tmp_path) == [".out.resume"]

    other = spap(capsys, *words, "--output", tmp_path / "out", "--weight-decay", "0.1")
    assert "differs from this one in weight_decay (0.0, now 0.1): repeat the command as it was" in sentence(other)
    said = succeed(capsys, *words, "--output", tmp_path / "out")
    assert "going on: step 2 of 4 is done" in said.err
    assert re.findall(r"^step (\d)/4  ", said.err, re.MULTILINE) == ["2", "4"]
    assert left(tmp_path) == ["out"]

    whole = spap(capsys, *words, "--output", tmp_path / "whole")
    assert "going on" not in whole.err
    assert "All weights were trained for 4 steps" in (tmp_path / "whole" / "README.md").read_text()
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert ours == theirs
    reports = [json.loads((tmp_path / name / "spap_finetune.json").read_text()) for name in ("out", "whole")]
    for report in reports:
        assert report["seconds"] == pytest.approx(sum(check["seconds"] for check in report["checks"]))
    ours, theirs = ([check | {"seconds": 0} for check in report["checks"]] for report in reports)
    assert ours == theirs
    assert [check["taken"] for check in ours] == [True, True, False]
