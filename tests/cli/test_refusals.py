"""Every user error is reported in one line on standard error, with exit code 2, and nothing is written."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import CALIBRATION, EVALUATION, QUICK, STORIES, Said, left, sentence, spap, succeed, tiny, token_file
from safetensors.numpy import load_file, save_file

from spap_jax.checkpoint import output


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder for the output, which must stay empty."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def edited(folder: Path, **changes) -> Path:
    """Writes a tiny checkpoint with other tensors (double underscores stand for dots); None removes one."""
    tensors = load_file(tiny(folder) / "model.safetensors") | {n.replace("__", "."): v for n, v in changes.items()}
    save_file({n: v for n, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})
    return folder


def unreadable(folder: Path) -> Path:
    """Writes a file that is no text, as is seen once it is read; what is refused before was not read."""
    (folder / "unreadable.txt").write_bytes(b"\xff")
    return folder / "unreadable.txt"


OPTIONS = [
    (("--sparsity", "nan"), "sparsity"),
    (("--attention-sparsity", "0.1"), "nothing to remove"),
    (("--allocation", "best"), "--allocation"),
    (("--allocation", "global", "--schedule", "parallel"), "--schedule"),
    (("--allocation", "global", "--model-devices", "2"), "--model-devices"),
    (("--allocation", "global", "--round-to", "160"), "nothing to choose"),
    (("--devices", "0", *QUICK), "0 devices"),
    (("--dtype", "int8"), "--dtype"),
    (("--sparsty", "0.3"), "--sparsty"),
    (("surplus",), "surplus"),
    (("--sequence-length", "513"), "512 positions"),
    (("--sequences", "9999"), "9999"),
    (("--config", "no.toml"), "no.toml"),
]


@pytest.mark.parametrize(("words", "expected"), OPTIONS)
def test_options(words: tuple[str, ...], expected: str, place: Path, capsys):
    said = spap(capsys, "prune", STORIES, "--output", place / "out", "--data", CALIBRATION, *words)
    assert expected in sentence(said)
    assert left(place) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sparsty = 0.3\n", "sparsty"),
        ("sparsity = 2.0\n", "sparsity"),
        ("sparsity = [\n", "settings.toml"),
        ("output = 3\n", "5.0"),  # the command line takes precedence
    ],
)
def test_files_of_settings(text: str, expected: str, tmp_path: Path, place: Path, capsys):
    (tmp_path / "settings.toml").write_text(text)
    more = ("--sparsity", "5") if "output" in text else ()
    words = ("--output", place / "out", "--data", CALIBRATION, "--config", tmp_path / "settings.toml")
    assert expected in sentence(spap(capsys, "prune", STORIES, *words, *more))
    assert left(place) == []


def refused(capsys: pytest.CaptureFixture[str], model: Path, place: Path, calibration: Path) -> str:
    """Returns the sentence with which pruning a model is refused, and checks that nothing was written."""
    words = ("--output", place / "out", "--data", calibration, *QUICK)
    said = sentence(spap(capsys, "prune", model, *words))
    assert left(place) == []
    return said


@pytest.mark.parametrize("command", ["eval", "teacher"])
def test_a_weight_that_is_not_finite_is_named_by_every_command(command: str, tmp_path: Path, place: Path, capsys):
    wrong = edited(tmp_path / "in", model__layers__2__mlp__down_proj__weight=np.full((32, 53), np.inf, np.float32))
    train = ("--output", place / "out", "--sequence-length", "64", "--data", token_file(tmp_path / "ids.npy"))
    words = {
        "eval": ("eval", wrong, *train[2:]),
        "teacher": ("finetune", tiny(tmp_path / "good"), "--teacher", wrong, *train),
    }
    said = sentence(spap(capsys, *words[command]))
    assert "model.layers.2.mlp.down_proj.weight" in said
    assert left(place) == []


def test_a_perplexity_that_is_none(tmp_path: Path, place: Path, capsys):
    loud = edited(tmp_path / "in", model__layers__1__mlp__up_proj__weight=np.full((53, 32), 3e38, np.float32))
    words = ("--data", token_file(tmp_path / "ids.npy"), "--sequence-length", "64", "--json", place / "x.json")
    assert "overflow" in sentence(spap(capsys, "eval", loud, *words))
    assert left(place) == []


def test_nothing_goes_on_from_numbers_that_overflow_in_a_later_layer(tmp_path: Path, place: Path, capsys):
    loud = edited(tmp_path / "in", model__layers__1__mlp__up_proj__weight=np.full((53, 32), 3e38, np.float32))
    words = ("--output", place / "out", "--data", token_file(tmp_path / "ids.npy"), *QUICK)
    said = spap(capsys, "prune", loud, *words)
    assert said.code == 2
    assert "\nlayer 1/3" in said.err
    assert said.err.splitlines()[-1].startswith("spap: the activations of layer 1 are not finite: they overflow in ")
    assert "goes on" not in said.err
    assert left(place) == []


@pytest.mark.parametrize(
    ("variant", "words", "expected"),
    [
        ("qwen2", ("--method", "flap"), "--update none"),  # there is no place for biases
        ("opt_125m_like", ("--attention-sparsity", "0.25"), "are square"),
    ],
)
def test_what_no_loader_would_take(variant: str, words: tuple, expected: str, tmp_path: Path, place: Path, capsys):
    data = ("--output", place / "out", "--data", unreadable(tmp_path))
    assert expected in sentence(spap(capsys, "prune", tiny(tmp_path / "in", variant), *data, *words))
    assert left(place) == []


def test_a_value_that_transformers_refuses_is_not_blamed_on_the_tokenizer(tmp_path: Path, place: Path, capsys):
    model = shutil.copytree(STORIES, tmp_path / "in")
    config = json.loads((model / "config.json").read_bytes()) | {"eos_token_id": "abc"}
    (model / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused(capsys, model, place, CALIBRATION)


def test_weights_that_cannot_be_opened(tmp_path: Path, place: Path, capsys):
    """A kernel file stands in for a file without read permission, since the superuser gets an error for it too."""
    model = tiny(tmp_path / "in")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("/proc/self/mem")
    assert "model.safetensors cannot be read" in refused(capsys, model, place, token_file(tmp_path / "ids.npy"))


def test_an_orbax_folder_is_not_pruned_but_said_how(tmp_path: Path, place: Path, capsys):
    source = tiny(tmp_path / "in")
    succeed(capsys, "convert", source, "--output", tmp_path / "orbax", "--to", "orbax")
    refused(capsys, tmp_path / "orbax", place, token_file(tmp_path / "ids.npy"))


def test_data(tmp_path: Path, place: Path, capsys):
    model = tiny(tmp_path / "in")
    (tmp_path / "short.txt").write_text("Once upon a time")
    (tmp_path / "odd.bin").write_bytes(b"\0")
    np.save(tmp_path / "floats.npy", np.zeros((16, 64)))
    assert "the tokenizer" in refused(capsys, model, place, CALIBRATION)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, model)
    for data, expected in (
        (CALIBRATION, "vocabulary of 97"),  # the tokenizer is another model's
        (token_file(tmp_path / "ids.npy", top=98), "vocabulary of 97"),
        (tmp_path / "floats.npy", "token ids"),
        (tmp_path / "odd.bin", "odd.bin"),
    ):
        assert expected in refused(capsys, model, place, data)
    assert "16 asked for" in refused(capsys, STORIES, place, tmp_path / "short.txt")


@pytest.mark.parametrize("role", ["--data", "--eval"])
def test_files_are_looked_for_before_the_model_is_read(role: str, tmp_path: Path, place: Path, capsys):
    files = {"--data": unreadable(tmp_path), "--eval": unreadable(tmp_path), role: tmp_path / "none.txt"}
    words = [word for pair in files.items() for word in pair]
    said = sentence(spap(capsys, "prune", tmp_path / "no-model", *words, "--output", place / "out"))
    assert said == f"{tmp_path / 'none.txt'} is not there: check the path"
    assert left(place) == []


@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache")
def test_a_disk_that_fills_up_midway(place: Path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        words = ("--output", place / "out", "--data", CALIBRATION, "--round-to", "64", *QUICK)
        said = spap(capsys, "prune", STORIES, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = [line for line in said.err.splitlines() if not line.startswith("layer ")]
    assert "filled up, or a limit of it was reached" in sentence(Said(said.code, said.out, "\n".join(lines)))
    assert left(place) == []


@pytest.mark.parametrize("command", ["prune", "finetune"])
def test_a_disk_without_room(command: str, place: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    words = ("--output", place / "out", "--data", CALIBRATION, "--sequences", "4", "--sequence-length", "64")
    assert "free some space" in sentence(spap(capsys, command, STORIES, *words))
    assert left(place) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("dance",), "dance"),
        (("eval", STORIES), "neither"),
        (("eval", STORIES, "--data", EVALUATION, "--tasks", "piqa"), "both"),
        (("eval", STORIES, "--data", EVALUATION, "--limit", "5"), "--limit"),
        (("eval", STORIES, "--tasks", "piqa", "--sequences", "5"), "--sequences"),
        (("eval", STORIES, "--tasks", "piqa", "--task-path", "no"), "no folder no"),
        (("convert", STORIES, "--output", "x", "--to", "orbax", "--dtype", "float16"), "--dtype"),
        (("bench", STORIES, "--new", "512"), "--new"),
    ],
)
def test_the_other_commands(words: tuple, expected: str, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert expected in sentence(spap(capsys, *words))
    assert left(tmp_path) == []
