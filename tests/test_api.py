"""The Python API as a notebook uses it: load, prune, measure and save; stock loaders read the result."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hf_models import hf_logits

import spap_jax as spap
from spap_jax.api import PruneResult
from spap_jax.cli import main
from spap_jax.data.tokens import TokenBlocks
from spap_jax.parallel.sequences import fitted_of
from spap_jax.report.card import model_card
from spap_jax.report.schema import Change

pytestmark = pytest.mark.usefixtures("optimized")
EXAMPLES = Path(__file__).parents[1] / "examples"
STORIES = EXAMPLES / "llama-stories"
QUICK = spap.PruneSettings(round_to=64, rounds=1, joint_passes=0)
CHOSEN = QUICK.replace(method="magnitude", sparsity=0.2)
"""Channels are removed and no weights fitted, with programs that `pruned` has compiled."""


@functools.cache
def stories() -> spap.Model:
    return spap.load(STORIES)


@functools.cache
def evaluation() -> np.ndarray:
    data = EXAMPLES / "stories_evaluation.txt"
    return spap.load_tokens(data, tokenizer=STORIES, sequence_length=64, sequences=8, role="evaluation").tokens


@functools.cache
def calibration() -> TokenBlocks:
    data = EXAMPLES / "stories_calibration.txt"
    return spap.load_tokens(data, tokenizer=STORIES, sequence_length=64, sequences=16, role="calibration")


@functools.cache
def pruned() -> PruneResult:
    return spap.prune(stories(), calibration(), settings=QUICK, sparsity=0.2)


def torch_model(folder: Path) -> Any:
    loader: Any = transformers.AutoModelForCausalLM
    model, told = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_logits_are_those_of_transformers():
    theirs = hf_logits(torch_model(STORIES), evaluation())
    np.testing.assert_allclose(spap.logits(stories(), evaluation()), theirs, rtol=0, atol=1e-4)


def test_padding_is_masked():
    tokens = evaluation()[:2].copy()
    mask = np.ones_like(tokens)
    mask[0, :9] = 0
    expected = np.asarray(spap.logits(stories(), tokens, mask))
    tokens[0, :9] = 7
    np.testing.assert_array_equal(np.asarray(spap.logits(stories(), tokens, mask))[0, 9:], expected[0, 9:])
    assert np.abs(np.asarray(spap.logits(stories(), tokens))[0, 9:] - expected[0, 9:]).max() > 1e-2


def test_perplexity_is_that_of_torch():
    tokens = torch.tensor(evaluation(), dtype=torch.long)
    with torch.no_grad():
        logits = torch_model(STORIES)(tokens).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
    expected = float(loss.exp())
    assert spap.perplexity(stories(), evaluation()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["../notes.txt", "/tmp/notes.txt", "notes/mine.txt", "..", ""])
def test_no_file_is_written_outside_the_output(name: str, tmp_path: Path):
    with pytest.raises(spap.UserError, match="name"):
        spap.save(stories(), tmp_path / "out", files={name: "mine"})
    assert not [*tmp_path.iterdir()]


def test_a_notebook(tmp_path: Path):
    """Load, prune, measure, save, and load the result with stock tools."""
    model, result = stories(), pruned()
    assert model.config.intermediate == 320
    assert result.model.config.intermediate == 256
    assert result.report.model.intermediate == Change(320, 256)
    assert result.report.calibration.description.endswith("seed 0")
    sizes = [sum(array.size for array in jax.tree.leaves(m.params)) for m in (model, result.model)]
    assert sizes[0] - sizes[1] == 6 * 3 * 96 * 64
    before, after = (spap.perplexity(m, evaluation()) for m in (model, result.model))
    assert before < after < 2 * before

    spap.save(result, tmp_path / "out", files={"notes.txt": "mine"})
    assert {"README.md", "notes.txt", "spap_report.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    with pytest.raises(spap.UserError, match="out exists"):
        spap.save(result.model, tmp_path / "out")
    theirs = torch_model(tmp_path / "out")
    assert theirs.config.intermediate_size == 256
    ours = spap.logits(result.model, evaluation())
    np.testing.assert_allclose(ours, hf_logits(theirs, evaluation()), rtol=0, atol=1e-4)
    prompt = torch.tensor(evaluation()[:1, :8], dtype=torch.long)
    written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert written.shape[1] > 8
    assert int(written[0, 8]) == int(np.asarray(ours)[0, 7].argmax())
    reloaded = spap.load(tmp_path / "out")
    np.testing.assert_array_equal(spap.logits(reloaded, evaluation()), ours)


BAD_TOKENS = {
    "fractions": (np.zeros((2, 8)), "must be whole numbers"),
    "one sequence": (np.zeros(8, int), r"whole numbers \[B, T\], not int64 \[8\]"),
    "none": (np.zeros((0, 8), int), "must be whole numbers"),
    "another mask": (TokenBlocks(np.zeros((2, 8), int), "", 2, np.ones((2, 7), bool)), "mask of tokens"),
    "ragged": ([[1, 2], [3]], "must be whole numbers"),
    "the vocabulary's size": (np.full((2, 8), 512), "from 512 to 512, outside"),
    "too long": (np.zeros((2, 513), int), "sequences of 513 tokens do not fit the model's 512 positions"),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_tokens_that_are_none(case: str):
    tokens, sentence = BAD_TOKENS[case]
    for use in (spap.prune, spap.logits, spap.perplexity):
        with pytest.raises(spap.UserError, match=sentence):
            use(stories(), tokens)


def test_the_last_id_and_the_last_position_are_allowed():
    assert np.isfinite(spap.logits(stories(), np.full((1, 512), 511))).all()


def test_perplexity_takes_blocks_and_needs_a_prediction():
    blocks = spap.load_tokens(evaluation(), tokenizer=None, sequence_length=64, sequences=8, role="evaluation")
    assert spap.perplexity(stories(), blocks) == spap.perplexity(stories(), evaluation())
    with pytest.raises(spap.UserError, match="at least two tokens"):
        spap.perplexity(stories(), np.zeros((2, 1), int))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sparsty": 0.2}, "unknown setting sparsty; the settings are sparsity, "),
        ({"sparsity": "0.3"}, "sparsity must be"),
        ({"rounds": -1, "joint_last": 0}, "rounds must be .*; joint_last must be"),
        ({"update": "tune"}, "update must be one of own, none, bias, refit, alternate, not 'tune'"),
        ({"round_to": 512}, "nothing to remove"),
    ],
)
def test_settings_that_are_none(changes: dict, sentence: str):
    with pytest.raises(spap.UserError, match=sentence):
        spap.prune(stories(), evaluation(), **changes)


@pytest.mark.parametrize(
    "use",
    [
        spap.prune,
        spap.finetune,
        spap.logits,
        spap.loss,
        spap.perplexity,
        spap.generate,
        lambda model, tokens: spap.divergence(stories(), model, tokens),
        lambda model, tokens: spap.finetune(stories(), tokens, teacher=model),
        lambda model, tokens: spap.moments(model, tokens, 0),
    ],
)
def test_what_is_no_model(use):
    result: Any = PruneResult(stories(), report=None)  # type: ignore
    for model, word in (
        (str(STORIES), "name of a model"),
        (STORIES, "name of a model"),
        (result, "its .model"),
        (3, "int"),
    ):
        with pytest.raises(spap.UserError, match=word):
            use(model, evaluation())


def test_a_model_is_not_saved_to_the_hub():
    with pytest.raises(spap.UserError, match="spap push"):
        spap.save(stories(), "hf://owner/name")


def test_a_text_is_not_tokens():
    with pytest.raises(spap.UserError, match=r"not the text 'stories.txt': spap.load_tokens makes them"):
        spap.prune(stories(), "stories.txt")


def test_a_saved_result_is_what_the_command_writes(tmp_path: Path):
    """Weights, report and card agree, except for measurements (seconds, memory) and the hash of the command's run."""
    text, by_command = EXAMPLES / "stories_calibration.txt", tmp_path / "command"
    words = ("--sequences", "16", "--sequence-length", "64", "--method", "fasp")
    narrow = ("--sparsity", "0.2", "--round-to", "64")  # as `pruned`
    assert main(["prune", str(STORIES), "--data", str(text), "--output", str(by_command), *words, *narrow]) == 0
    blocks = spap.load_tokens(text, tokenizer=STORIES, sequence_length=64, sequences=16, role="calibration")
    result = spap.prune(spap.load(str(STORIES)), blocks, method="fasp", sparsity=0.2, round_to=64)
    spap.save(result, tmp_path / "python")
    names = sorted(file.name for file in by_command.iterdir())
    assert sorted(file.name for file in (tmp_path / "python").iterdir()) == names
    for name in set(names) - {"spap_report.json", "spap_files.json"}:  # the second has a hash of the first
        assert (tmp_path / "python" / name).read_bytes() == (by_command / name).read_bytes(), name
    reports = [json.loads((folder / "spap_report.json").read_text()) for folder in (by_command, tmp_path / "python")]
    for report in reports:
        for part in (report, *report["layers"], *report["joint"]):
            assert part.pop("seconds")
        assert report["extras"].pop("peak_memory_bytes") > 0
    assert reports[0] == reports[1]


def test_without_tokens_the_model_writes_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spap.api, "SEQUENCES", 8)  # fewer, since 128 take a while
    calibration = spap.prune(stories(), method="magnitude").report.calibration
    assert (calibration.sequences, calibration.sequence_length) == (8, 512)


class Loader:
    """An iterable that is no generator, as a Grain loader is: it can begin anew."""

    def __init__(self, *arrays: Any) -> None:
        self.arrays = arrays

    def __iter__(self) -> Iterator[Any]:
        return iter(self.arrays)


BLOCKS: dict[str, Any] = {"rounds": 0, "joint_passes": 2, "joint_last": 1, "sparsity": 0.2, "round_to": 64}
"""A run that reads 15 sequences if 8 are asked for: joint steps read twice the 7 that are fitted."""


@pytest.mark.parametrize("kind", [iter, list, lambda arrays: Loader(*arrays)])
def test_tokens_are_drawn_from_an_iterable_of_arrays(kind: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spap.api, "SEQUENCES", 8)
    ids = calibration().tokens.reshape(32, 32)
    arrays = [ids[:5], jnp.asarray(ids[5:14]), ids[14:20], "not asked for"]
    result = spap.prune(stories(), kind(arrays), **BLOCKS)
    own = TokenBlocks(ids[:8], "", 8, None, TokenBlocks(ids[8:15], "", 7))
    told, expected = result.report.calibration, spap.prune(stories(), own, **BLOCKS)
    assert (told.sequences, told.further_sequences) == (8, 7)
    assert (told.sha256, told.further_sha256) == (own.sha256, own.further and own.further.sha256)
    for a, b in zip(jax.tree.leaves(result.model), jax.tree.leaves(expected.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_joint_steps_read_the_further_sequences_that_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spap.api, "SEQUENCES", 8)
    told = spap.prune(stories(), Loader(calibration().tokens.reshape(32, 32)[:9]), **BLOCKS).report.calibration
    assert (told.sequences, told.further_sequences) == (8, 1)


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ([], "0 of 128"),
        ([np.zeros((100, 8), int)], "100 of 128"),
        ([np.zeros((2, 7), int), np.zeros((2, 8), int)], "7 and of 8"),
        ([np.zeros((2, 8))], "float64"),
        ([np.zeros(8, int)], r"\[8\]"),
        ([np.zeros((2, 8, 1), int)], r"\[2, 8, 1\]"),
        ([np.full((2, 8), 512)], "vocabulary"),
        ([np.zeros((2, 513), int)], "positions"),
        ([{"text": "a"}], "whole numbers"),
    ],
)
def test_iterables_that_are_refused(arrays: list, word: str):
    with pytest.raises(spap.UserError, match=word):
        spap.prune(stories(), Loader(*arrays))


def test_settings_are_refused_before_anything_is_drawn():
    def unread() -> Iterator[np.ndarray]:
        raise AssertionError
        yield

    with pytest.raises(spap.UserError, match="nothing to remove"):
        spap.prune(stories(), unread(), round_to=512)


def test_pruning_is_silent_unless_it_is_watched_or_asked(capsys: pytest.CaptureFixture[str]):
    seen = []
    for progress, lines in ((None, 0), (True, 6), (seen.append, 0)):
        capsys.readouterr()
        result = spap.prune(stories(), calibration(), settings=CHOSEN, progress=progress)
        said = capsys.readouterr()
        assert said.out == ""
        assert [line.partition("  ")[0] for line in said.err.splitlines() if line.startswith("layer ")] == [
            f"layer {number}/6" for number in range(1, lines + 1)
        ]
        assert bool(said.err) == bool(lines)
    assert seen == [*result.report.layers, *result.report.joint]


def test_a_pruned_model_in_memory_is_taught_by_the_dense_one_and_keeps_its_accounts(tmp_path: Path):
    """The folder that both came from tells of the dense weights alone."""
    quick: dict[str, Any] = {"teacher": stories(), "steps": 1, "step_sequences": 2, "lora_rank": 2}
    once = spap.finetune(pruned().model, evaluation(), **quick)
    twice = spap.finetune(once.model, evaluation(), **quick)
    spap.save(twice, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"spap_report.json", "spap_finetune-1.json", "spap_finetune.json"} <= names
    assert json.loads((tmp_path / "out" / "spap_report.json").read_text())["model"]["intermediate"]["after"] == 256
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(model_card(pruned().report))
    assert card.count("## Trained after pruning") == 2
    spap.save(twice, tmp_path / "half", dtype="bfloat16")
    whole, half = (json.loads((tmp_path / name / "spap_report.json").read_text()) for name in ("out", "half"))
    assert whole["extras"]["bytes"]["after"] == 2 * half["extras"]["bytes"]["after"]
    with pytest.raises(spap.UserError, match="is the model itself"):
        spap.finetune(spap.load(STORIES), evaluation(), **quick)


def test_a_session_of_64_bits_changes_nothing():
    def used() -> tuple[list, np.ndarray]:
        smaller = spap.prune(stories(), calibration(), settings=CHOSEN).model
        return jax.tree.leaves(smaller.params), spap.generate(stories(), evaluation()[:1, :8], 3)

    weights, written = used()
    with jax.enable_x64(True):
        others, same = used()
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(weights, others, strict=True))
    np.testing.assert_array_equal(written, same)


def test_a_model_is_a_pytree():
    model = stories()
    leaves, tree = jax.tree.flatten(model)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert len(leaves) == len(jax.tree.leaves(model.params))
    assert hash(tree) == hash(jax.tree.structure(spap.load(STORIES)))
    assert tree == jax.tree.structure(spap.load(STORIES))
    assert tree != jax.tree.structure(pruned().model)
    doubled = jax.tree.map(lambda array: 2 * array, model)
    assert isinstance(doubled, spap.Model)
    assert doubled.config == model.config
    traces = []

    @jax.jit
    def norm(model: spap.Model) -> jax.Array:
        traces.append(model)
        return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(model)), jnp.float32(0))

    assert norm(doubled) == pytest.approx(4 * float(norm(model)), rel=1e-5)
    assert len(traces) == 1
    assert "750 816 parameters, float32" in repr(traces[0])


def test_models_of_several_folders_are_one_kind_of_tree(tmp_path: Path):
    model, traces = stories(), []
    other = model.replace(source=dataclasses.replace(model.source, name="another", folder=tmp_path))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, other, model)
    assert mean.source == other.source

    @jax.jit
    def halved(model: spap.Model) -> spap.Model:
        traces.append(model)
        return jax.tree.map(lambda array: array / 2, model)

    for each in (model, other):
        result = halved(each)
        with pytest.raises(spap.UserError, match="source"):  # it could be that of another model
            spap.save(result, tmp_path / "out")
        spap.save(result.replace(source=model.source), tmp_path / "out", overwrite=True)
    assert len(traces) == 1
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_model_is_replaced_in_part():
    model = stories()
    source = dataclasses.replace(model.source, name="mine")
    other = model.replace(source=source)
    assert other.source.name == "mine"
    assert other.params is model.params
    assert model.source.name == str(STORIES)
    assert other != model
    with pytest.raises(TypeError, match="parameters"):
        model.replace(parameters={})  # type: ignore


def test_logits_are_the_same_under_jit():
    """Check with the model as an argument, and with its parameters alone."""
    model, tokens = stories(), evaluation()[:2]
    expected = spap.logits(model, tokens)
    mask = np.ones_like(tokens)
    np.testing.assert_allclose(jax.jit(spap.logits)(model, tokens, mask), expected, atol=1e-4)
    alone = jax.jit(lambda params, tokens: spap.logits(model.replace(params=params), tokens))
    np.testing.assert_allclose(alone(model.params, jnp.asarray(tokens)), expected, atol=1e-4)
    with pytest.raises(spap.UserError, match=r"whole numbers \[B, T\], not float32 \[2, 64\]"):
        alone(model.params, jnp.zeros((2, 64)))
    with pytest.raises(spap.UserError, match="513 tokens do not fit"):
        alone(model.params, jnp.zeros((2, 513), int))


def test_gradients_are_those_of_the_loss():
    """Compare with a difference of two losses, along a direction in which all parameters change."""
    model, tokens = stories(), evaluation()[:2]
    assert float(spap.loss(model, tokens)) == pytest.approx(np.log(spap.perplexity(model, tokens)), rel=1e-5)
    gradients = jax.jit(jax.grad(spap.loss))(model, tokens)
    assert isinstance(gradients, spap.Model)
    slope = sum(float(jnp.vdot(g, w)) for g, w in zip(*map(jax.tree.leaves, (gradients, model)), strict=True))
    up, down = (spap.loss(jax.tree.map(lambda w, s=s: s * w, model), tokens) for s in (1.01, 0.99))
    assert slope == pytest.approx(float(up - down) / 0.02, rel=2e-2)
    other = jax.jit(jax.grad(lambda m: jnp.sum(jax.nn.log_softmax(spap.logits(m, tokens))[:, 0, 0])))(model)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(other))
    with pytest.raises(spap.UserError, match="at least two tokens"):
        spap.loss(model, tokens[:, :1])


UNSEEN = np.pad(np.zeros((16, 63), bool), [(0, 0), (1, 0)], constant_values=True)
"""A mask of the first tokens only, which nothing predicts."""


@pytest.mark.parametrize(
    ("use", "which"),
    [
        (spap.loss, "the sequences"),
        (functools.partial(spap.finetune, steps=1, full=True), "the sequences that are held out"),
        (
            functools.partial(spap.prune, settings=QUICK, sparsity=0.2, joint_passes=1),
            "the calibration sequences that are held out",
        ),
    ],
)
def test_something_has_to_count(use, which: str):
    mask = UNSEEN if use is spap.loss else UNSEEN | (np.arange(16) < 12)[:, None]
    with pytest.raises(spap.UserError, match=f"the mask lets no prediction of {which} count"):
        use(stories(), dataclasses.replace(calibration(), mask=mask, further=None))


def test_windows_that_were_cut_and_those_that_follow_them():
    cut = dataclasses.replace(calibration(), tokens=calibration().tokens[:, :32])
    with pytest.raises(spap.UserError, match=r"the tokens are windows of 32, and those that follow them .* of 64: cut"):
        spap.prune(stories(), cut)
    further = TokenBlocks(np.full((4, 64), 512), "", 4)
    with pytest.raises(spap.UserError, match="from 512 to 512, outside the model's vocabulary of 512"):
        spap.prune(stories(), dataclasses.replace(calibration(), further=further))
    other = dataclasses.replace(calibration(), tokens=calibration().tokens[::-1], further=None)
    report = spap.prune(stories(), other, settings=CHOSEN).report
    assert report.calibration.sha256 == other.sha256 != calibration().sha256


@pytest.mark.parametrize(("axes", "kind"), [(("rows",), "Auto"), (("data", "model"), "Explicit")])
@pytest.mark.parametrize("use", [spap.perplexity, spap.prune])
def test_a_mesh_of_ones_own_is_refused(axes: tuple[str, ...], kind: str, use):
    types = (jax.sharding.AxisType[kind],) * len(axes)
    with (
        jax.set_mesh(jax.make_mesh((8, 1)[: len(axes)], axes, axis_types=types)),
        pytest.raises(spap.UserError, match="is set around this call, which makes its own: call"),
    ):
        use(stories(), evaluation())


def test_moments_are_of_the_hidden_channels():
    layer = 5
    model, tokens = stories(), evaluation()[:5]
    problem = spap.moments(model, tokens, layer, batch_tokens=64)
    seen: list[Any] = []
    theirs = torch_model(STORIES)
    theirs.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        theirs(torch.tensor(tokens, dtype=torch.int64))
    channels = np.asarray(seen[0], np.float64).reshape(-1, 320)
    weight = np.asarray(model.params["layers"]["mlp"]["down"][layer], np.float64)
    target = channels @ weight
    np.testing.assert_array_equal(problem.weight, weight)
    expected = (channels.T @ channels / 320, channels.T @ target / 320, (target**2).sum() / 320)
    for array, one in zip((problem.gram, problem.cross, problem.target_power), expected, strict=True):
        np.testing.assert_allclose(array, one, rtol=1e-3, atol=1e-4 * np.abs(one).max())


def test_moments_of_the_first_layer_are_what_pruning_sees():
    made = pruned().report.layers[0]
    p = spap.moments(stories(), calibration().tokens[: fitted_of(16, QUICK.held_out)], 0)
    solution = spap.solver.solve(p.gram, p.cross, p.weight, 256, target_power=p.target_power, ridge=1e-2)
    assert tuple(solution.kept.tolist()) == made.kept
    assert float(solution.error) == pytest.approx(made.calibration.refit, rel=1e-2)


def test_a_layer_that_is_not_there():
    for layer in (-1, 6, 1.0):
        with pytest.raises(spap.UserError, match="layer"):
            spap.moments(stories(), evaluation(), layer)  # type: ignore
