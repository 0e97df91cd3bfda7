"""Settings by method name, their hashes, the models' texts, and the provenance of the numbers."""

import dataclasses
import hashlib
import itertools
import json
import subprocess
from pathlib import Path

import pytest

import spap_jax as spap
from benchmarks.quality import provenance
from benchmarks.quality.cases import EXAMPLES, cases_of
from benchmarks.quality.methods import ALL, QUICK, settings_hash, settings_of
from benchmarks.quality.results import _read
from benchmarks.quality.runs import Amount, plan
from spap_jax.settings import EFFORTS


def test_settings_are_what_the_names_say() -> None:
    assert settings_of("spap", 0.2, 1) == spap.PruneSettings(sparsity=0.2, seed=1)
    assert settings_of("obs + steps", 0.2, 0).update == "alternate"
    assert settings_of("fasp", 0.2, 0).update == "own"
    assert set(QUICK) - set(ALL) == {"wanda + refit"}
    with pytest.raises(spap.UserError, match="unknown method 'sparsegpt'; the methods are random; "):
        settings_of("sparsegpt", 0.2, 0)


def test_a_method_may_come_with_settings() -> None:
    changed = settings_of("spap, high effort with ridge=0.001 steps=50 method=obs", 0.2, 0)
    assert changed == spap.PruneSettings(sparsity=0.2, effort="high", ridge=0.001, steps=50, method="obs")
    for words, sentence in (
        ("speed=1", "unknown setting speed"),
        ("joint_passes=-1", "joint_passes must be"),
        ("ridge", "ridge must"),
    ):
        with pytest.raises(spap.UserError, match=sentence):
            settings_of(f"spap with {words}", 0.2, 0)


def test_hashes_change_with_every_setting() -> None:
    settings = spap.PruneSettings()
    changed = [settings.replace(**{name: value}) for name, value in (("seed", 1), ("sparsity", 0.2), ("ridge", 1e-3),
               ("update", "refit"), ("held_out", 0.0), ("batch_tokens", 1))]  # fmt: skip
    assert len({settings_hash(each) for each in [settings, *changed]}) == 7
    assert settings_hash(settings) == settings_hash(spap.PruneSettings())


def test_a_newer_setting_changes_hashes_only_where_it_is_used() -> None:
    """Rows recorded before the setting existed keep their hashes."""
    settings = spap.PruneSettings(correction=1.0, ridge=1e-4, moment_dtype="float32")
    older = dataclasses.asdict(settings) | {"joint_passes": settings.passes, "round_to": 1}
    assert [older.pop(name) for name in ("stream_dtype", "correction", "remat")] == ["float32", 1.0, None]
    text = json.dumps(older, sort_keys=True)
    assert settings_hash(settings) == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert settings_hash(settings.replace(stream_dtype="bfloat16")) != settings_hash(settings)


def test_hashes_see_settings_of_steps_only_where_there_are_steps() -> None:
    """Rows of peers keep their hashes when the defaults of our joint steps change."""
    changes = {
        "rounds": 2, "steps": 3, "learning_rate": 0.1, "step_tokens": 64,
        "joint_passes": 2, "joint_blocks": 3, "joint_tokens": 7, "joint_learning_rate": 0.1, "moment_dtype": "float32",
    }  # fmt: skip
    for name, value in changes.items():
        changed = [settings_of(f"{method} with {name}={value}", 0.3, 0) for method in ("fasp", "fasp + steps", "spap")]
        plain = [settings_of(method, 0.3, 0) for method in ("fasp", "fasp + steps", "spap")]
        same = [settings_hash(one) == settings_hash(other) for one, other in zip(plain, changed, strict=True)]
        assert same == [True, False, False], name
    rows = _read(Path("docs/quality/results.csv"))
    peers = [row for row in rows if row.method == "fasp" and row.seed == 0]
    assert {settings_hash(settings_of("fasp", row.sparsity, 0)) for row in peers} == {row.settings for row in peers}


def test_hashes_see_what_an_effort_means(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings_hash(spap.PruneSettings())
    monkeypatch.setitem(EFFORTS, "default", EFFORTS["default"]._replace(passes=2))
    assert settings_hash(spap.PruneSettings()) != before


CELLS = tuple(itertools.product((0.1, 0.3), ("obs", "spap")))


def zoo_of(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "config.json").write_text("{}")
        (folder / "models" / name / "tokenizer.json").write_text("{}")
    (folder / "text").mkdir()
    for name in ("stories_calibration", "stories_evaluation", "english_calibration", "english_wikitext2_test"):
        (folder / "text" / f"{name}.txt").write_text(name)
    return folder


def test_texts_go_by_the_models_name(tmp_path: Path) -> None:
    bundled = cases_of(None)
    assert [case.name for case in bundled] == ["llama-stories"]
    assert bundled[0].evaluation == EXAMPLES / "stories_evaluation.txt"
    zoo = zoo_of(tmp_path, "llama-english", "opt-stories")
    assert [case.calibration.stem for case in cases_of(zoo)] == ["english_calibration", "stories_calibration"]
    one = cases_of(zoo, zoo / "models" / "opt-stories", evaluation=Path("mine.txt"))
    assert [(case.name, case.calibration.stem, case.evaluation.name) for case in one] == [
        ("opt-stories", "stories_calibration", "mine.txt")
    ]
    with pytest.raises(spap.UserError, match="tells no text"):
        cases_of(zoo, tmp_path)
    with pytest.raises(spap.UserError, match="calibrated and judged on"):
        cases_of(zoo, evaluation=zoo / "text" / "stories_calibration.txt")
    with pytest.raises(spap.UserError, match="no models under"):
        cases_of(tmp_path / "models")


def test_runs_go_model_by_model_and_know_their_files(tmp_path: Path) -> None:
    cases = cases_of(zoo_of(tmp_path, "llama-english", "opt-stories"))
    runs = plan(cases, CELLS, (0, 1), Amount(16, None))
    assert len({run.key for run in runs}) == 16
    assert [run.name for run in runs[1:5]] == [
        "llama-english, 10%, spap, seed 0",
        "llama-english, 30%, obs, seed 0",
        "llama-english, 30%, spap, seed 0",
        "llama-english, 10%, obs, seed 1",
    ]
    (tmp_path / "text" / "english_calibration.txt").write_text("another text")
    again = plan(cases_of(tmp_path), CELLS, (0, 1), Amount(16, None))
    assert [run.key == other.key for run, other in zip(runs, again, strict=True)] == [False] * 8 + [True] * 8
    (tmp_path / "text" / "english_calibration.txt").unlink()
    with pytest.raises(spap.UserError, match=r"english_calibration\.txt cannot be read"):
        _ = plan(cases_of(tmp_path), CELLS, (0,), Amount(16, None))[0].key
    with pytest.raises(spap.UserError, match="told apart"):
        plan([cases[0], cases[0]], CELLS, (0,), Amount(16, None))


def test_a_changed_checkout_is_marked(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True
        ).stdout

    assert provenance.commit(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "spap_jax").mkdir()
    (tmp_path / "spap_jax" / "code.py").write_text("1")
    git("add", "-A")
    git("commit", "-qm", "first")
    name = git("rev-parse", "HEAD")[:12]
    assert provenance.commit(tmp_path) == name
    (tmp_path / "results.csv").write_text("the numbers themselves")
    assert provenance.commit(tmp_path) == name
    (tmp_path / "spap_jax" / "more.py").write_text("2")
    assert provenance.commit(tmp_path) == f"{name}-dirty"


def test_the_command_names_no_folder_of_this_machine() -> None:
    words = ["--zoo", "/somewhere/else/zoo", "--output", str(Path.cwd() / "docs" / "x"), "--method", "spap, refit only"]
    expected = "python -m benchmarks.quality --zoo zoo --output docs/x --method 'spap, refit only'"
    assert provenance.command(words) == expected
