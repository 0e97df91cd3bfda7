"""End-to-end tests of the commands."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from commands import CALIBRATION, EVALUATION, QUICK, STORIES, apart, left, spap, succeed, tiny, token_file, without
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file

import spap_jax


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stories") / "out [of 2]"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first tenth of the evaluation text."""
    path = tmp_path_factory.mktemp("judged") / "judged.txt"
    path.write_text(EVALUATION.read_text("utf-8")[:28_000], "utf-8")
    return path


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


class TestPruneOfTheBundledModel:
    """Tests that run in order: the first one writes the output that the others inspect."""

    def test_it_prunes_with_settings_of_a_file_that_flags_override(
        self, stories: Path, judged: Path, tmp_path: Path, capsys
    ):
        settings = tmp_path / "settings.toml"
        settings.write_text(
            "round-to = 64\nsparsity = 0.6\nrounds = 1\nsequences = 16\nsequence-length = 64\n"
            'joint-passes = 1\neffort = "low"\n'
        )
        words = ("prune", STORIES, "--output", stories, "--data", CALIBRATION, "--config", settings)
        said = succeed(capsys, *words, "--sparsity", "0.3", "--eval", judged, "--sequences=16")
        lines = said.out.splitlines()
        assert lines[0] == "llama-stories: 20 % of the MLP channels (30 % asked for) removed"
        channels = next(line for line in lines if line.startswith("MLP channels"))
        assert channels.split()[-6:-1] == ["1", "920", "1", "536", "-20.0"]
        for name in ("parameters", "MLP parameters", "weights on disk", "perplexity"):
            assert any(line.startswith(name) for line in lines)
        assert re.search(r"seconds: .*; peak memory .*B", said.out)
        assert "pruning on the CPU ..." in said.err.splitlines()
        assert "layer 6/6  held-out error: chosen " in said.err
        assert "step 2/2  held-out divergence 0." in said.err
        assert said.err.splitlines()[-1] == f"wrote {stories}"

    def test_the_files(self, stories: Path):
        copied = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
        assert left(stories) == sorted(
            [*copied, "README.md", "config.json", "model.safetensors", "spap_files.json", "spap_report.json"]
        )
        for name in copied:
            assert (stories / name).read_bytes() == (STORIES / name).read_bytes()
        before, after = (folder.joinpath("config.json").read_text() for folder in (STORIES, stories))
        assert after == before.replace('"intermediate_size": 320', '"intermediate_size": 256')
        old, new = (load_file(folder / "model.safetensors") for folder in (STORIES, stories))
        assert old.keys() == new.keys()
        for name, tensor in old.items():
            axis = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}.get(name.split(".")[-2])
            assert new[name].shape == tuple(256 if n == axis else s for n, s in enumerate(tensor.shape))
            assert new[name].dtype == tensor.dtype
            assert name.startswith("model.layers.") or np.array_equal(new[name], tensor)

    def test_the_report(self, stories: Path):
        report = json.loads((stories / "spap_report.json").read_text())
        assert (report["settings"]["sparsity"], report["settings"]["round_to"]) == (0.3, 64)
        assert (report["settings"]["rounds"], report["settings"]["joint_passes"]) == (1, 1)
        assert [check["step"] for check in report["joint"]] == [0, 2]
        sizes = [
            sum(t.nbytes for t in load_file(folder / "model.safetensors").values()) for folder in (STORIES, stories)
        ]
        assert report["extras"]["bytes"] == {"before": sizes[0], "after": sizes[1]}
        measured = report["extras"]["perplexity"]
        assert 3 < measured["before"] < measured["after"] < 20
        assert [len(layer["kept"]) for layer in report["layers"]] == [256] * 6

    def test_the_card(self, stories: Path):
        card = (stories / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
        assert "keeps 256 of 320 MLP channels" in card
        assert " Perplexity: " in card

    def test_eval_agrees_with_the_report(self, stories: Path, judged: Path, tmp_path: Path, capsys):
        report = json.loads((stories / "spap_report.json").read_text())
        found = tmp_path / "found.json"
        words = ("--data", judged, "--devices", "4", "--model-devices", "2")  # in windows as the run had them
        said = succeed(capsys, "eval", stories, *words, "--json", found)
        read = json.loads(found.read_text())
        assert read["perplexity"] == pytest.approx(report["extras"]["perplexity"]["after"], rel=1e-5)
        assert "windows of 64 tokens" in said.err
        assert said.out.startswith(f"perplexity {read['perplexity']:.4f}  (")

    def test_eval_against_the_dense_model(self, stories: Path, judged: Path, tmp_path: Path, capsys):
        found = tmp_path / "found.json"
        words = ("eval", stories, "--dense", STORIES, "--data", judged, "--json", found)
        said = succeed(capsys, *words)
        read = json.loads(found.read_text())
        dense, pruned = spap_jax.load(STORIES), spap_jax.load(stories)
        tokens = spap_jax.load_tokens(judged, tokenizer=STORIES, sequence_length=64, sequences=None, role="evaluation")
        assert read["divergence"] == pytest.approx(spap_jax.divergence(dense, pruned, tokens), rel=1e-5)
        assert read["dense_perplexity"] == pytest.approx(spap_jax.perplexity(dense, tokens), rel=1e-5)
        assert f"divergence {read['divergence']:.4f}" in said.out

    def test_bench_of_two_models(self, stories: Path, tmp_path: Path, capsys):
        file = tmp_path / "found.json"
        words = ("--prompt", "16", "--new", "4", "--repeats", "1", "--model-devices", "2")
        said = succeed(capsys, "bench", STORIES, stories, *words, "--json", file)
        rows = {line.split("  ")[0]: line.split() for line in said.out.splitlines()}
        assert rows["MLP parameters"][-1] == "1.250x"
        read = json.loads(file.read_text())
        assert read["workload"] == {"batch": 1, "prompt": 16, "new": 4, "repeats": 1}
        for phase in ("prefill", "decode"):
            (before,), (after,) = (model[f"{phase}_seconds"] for model in read["models"])
            assert read["speed_up"][phase] == pytest.approx(before / after)
            ratios = [f"{read[name][phase]:.3f}x" for name in ("speed_up", "by_arithmetic")]
            assert rows[f"{phase}, tokens/s"][-2:] == ratios

    def test_overwrite(self, stories: Path, capsys):
        said = spap(capsys, "convert", STORIES, "--output", stories, "--to", "huggingface")
        assert said.code == 2
        assert config_of(stories)["intermediate_size"] == 256
        succeed(capsys, "convert", STORIES, "--output", stories, "--to", "huggingface", "--overwrite")
        assert config_of(stories)["intermediate_size"] == 320
        assert left(stories.parent) == [stories.name]


@pytest.mark.parametrize(
    ("variant", "words", "width", "used"),
    [
        ("llama_tied", ("--method", "flap"), 37, {"selection": "flap", "update": "bias"}),
        ("opt_350m_like", ("--round-to", "16"), 32, {"selection": "spap", "update": "alternate"}),
    ],
)
def test_prune_of_other_families(variant: str, words: tuple[str, ...], width: int, used: dict, tmp_path: Path, capsys):
    source = tiny(tmp_path / "in", variant)
    ids = token_file(tmp_path / "ids.npy")
    data = ("--data", ids, "--eval", ids, "--dtype", "bfloat16")
    succeed(capsys, "prune", source, "--output", tmp_path / "out", *data, *QUICK, *words)
    model = spap_jax.load(tmp_path / "out")
    assert model.config.intermediate == width
    assert model.params["layers"]["mlp"]["down"].dtype == model.params["embed"]["tokens"].dtype == "bfloat16"
    assert np.isfinite(spap_jax.logits(model, np.load(ids))).all()
    report = json.loads((tmp_path / "out" / "spap_report.json").read_text())
    windows = np.load(ids).reshape(-1, report["calibration"]["sequence_length"])
    # as it is written, and not as it was pruned
    assert spap_jax.perplexity(model, windows) == pytest.approx(report["extras"]["perplexity"]["after"], rel=1e-6)
    assert report["settings"]["method"] == used["selection"]
    assert report["method"] == used
    assert config_of(tmp_path / "out").get("mlp_bias", False) == (variant == "llama_tied")
    assert (tmp_path / "out" / "README.md").exists()


def test_prune_of_heads(tmp_path: Path, capsys):
    source, ids = tiny(tmp_path / "in", "qwen2_two_kv_heads"), token_file(tmp_path / "ids.npy")
    (tmp_path / "settings.toml").write_text('attention-sparsity = 0.6\nmethod = "wanda"\n')
    words = ("--output", tmp_path / "out", "--data", ids, "--config", tmp_path / "settings.toml")
    said = succeed(capsys, "prune", source, *words, *QUICK)
    lines = said.out.splitlines()
    removed = "30.2 % of the MLP channels and 50 % of the attention heads (60 % asked for)"
    assert lines[0] == f"{source.name}: {removed} removed"
    rows = {line.split("  ")[0]: line.split()[-4:] for line in lines}
    assert rows["attention heads of a layer"] == ["4", "2", "-50.0", "%"]
    assert rows["key/value heads of a layer"] == ["2", "1", "-50.0", "%"]
    assert re.search(
        r"^layer 3/3  attention, held-out error: chosen \S+ %$\nlayer 3/3  held-out", said.err, re.MULTILINE
    )
    report = json.loads((tmp_path / "out" / "spap_report.json").read_text())
    assert report["settings"]["attention_sparsity"] == 0.6
    assert report["method"] == {"selection": "wanda", "update": "none"}
    assert report["sparsity"]["heads"] == {"asked": 0.6, "achieved": 0.5}
    assert config_of(tmp_path / "out")["head_dim"] == 8


def test_prune_of_blocks(tmp_path: Path, capsys):
    words = ("--output", tmp_path / "out", "--data", CALIBRATION, "--drop-blocks", "2,3", "--rounds", "0")
    said = succeed(capsys, "prune", STORIES, *words, *QUICK)
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 4
    assert config_of(tmp_path / "out")["intermediate_size"] == config_of(STORIES)["intermediate_size"]
    assert re.findall(r"^layer (\S+)", said.err, re.MULTILINE) == ["1/4", "2/4", "3/4", "4/4"]


def test_convert_there_and_back(tmp_path: Path, capsys):
    source = tiny(tmp_path / "in", "llama_biases")
    with jax.transfer_guard("disallow_explicit"):  # no weight goes through a device
        succeed(capsys, "convert", source, "--output", tmp_path / "orbax", "--to", "orbax")
        said = spap(capsys, "convert", tmp_path / "orbax", "--output", tmp_path / "out", "--to", "huggingface")
    assert said.code == 0
    assert said.err.splitlines()[-1] == f"wrote {tmp_path / 'out'}"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    old = load_file(source / "model.safetensors")
    spap(capsys, "convert", source, "--output", tmp_path / "half", "--to", "huggingface", "--dtype", "float16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(np.array_equal(half[name], old[name].astype(np.float16)) for name in old)
    assert left(tmp_path) == ["half", "in", "orbax", "out"]


def test_the_doctor_tells_devices_versions_and_why_the_hub_is_silent(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    said = succeed(capsys, "doctor")
    assert [line.split()[-2] for line in said.out.splitlines() if "the machine's" in line] == ["the"] * len(
        jax.devices()
    )
    assert re.search(rf"^jax +{re.escape(jax.__version__)}$", said.out, re.MULTILINE)
    assert re.search(r"^torch +\S", said.out, re.MULTILINE)
    assert re.search(r"the hub cannot be reached: .+; local folders work$", said.out)


def test_commands_keep_compiled_programs_unless_jax_is_told_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = re.search(r"^compiled programs +(.+)$", apart("doctor", SPAP_CACHE=str(tmp_path)).out, re.MULTILINE)
    assert found
    assert tmp_path in Path(found[1]).parents


def test_help_of_the_module_starts_no_jax():
    assert without("jax", "prune", "--help").code == 0
    code, out, err = apart("--help")
    assert (code, err) == (0, "")
    assert all(command in out for command in ("plan", "prune", "finetune", "eval", "bench", "report", "doctor"))
    assert apart("--version").out == f"spap-jax {spap_jax.__version__}\n"


@pytest.mark.slow
def test_a_command_imports_pytorch_for_weights_in_its_format_alone(tmp_path: Path):
    """The tokenizer is loaded by transformers, which imports it where it can."""
    program = "import sys\nfrom spap_jax.cli import main\nassert main() == 0\nprint('torch' in sys.modules)"
    (tmp_path / "text.txt").write_text("Once upon a time there was a little girl. " * 8)
    safe, pickled = (shutil.copytree(STORIES, tmp_path / name) for name in ("safe", "pickled"))
    torch.save(load_torch_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    words = ("--data", tmp_path / "text.txt", "--sequence-length", "32")
    runs = []
    for folder in (safe, pickled):
        command = [sys.executable, "-c", program, "eval", folder, *words]
        runs.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
    assert [run.pop() for run in runs] == ["False", "True"]
    safely, unpickled = ([re.sub(r"[\d.]+ s\)", "", line) for line in run] for run in runs)
    assert safely == unpickled
