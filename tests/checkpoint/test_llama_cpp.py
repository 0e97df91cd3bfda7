"""Pruned checkpoints in llama.cpp: `--llama-cpp-python PATH` is a Python created by `make clients-check`."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers

import spap_jax

SCRIPT = Path(__file__).with_name("llama_cpp_client.py")
EXAMPLES = Path(__file__).parents[2] / "examples"
STORIES = EXAMPLES / "llama-stories"
WIDE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
"""Sizes with which every row, except in the output projections, has 256 values, as the K formats require."""
KEPT = {
    "wide_256": {"sparsity": 0.5, "round_to": 256},
    "wide_224": {"sparsity": 0.5625},
    "wide_200": {"sparsity": 0.61},
    "heads": {"sparsity": 0.5, "attention_sparsity": 0.5},
    "biases": {"sparsity": 0.5, "method": "flap"},
}
WRITING = ("stories", "stories_pruned", "qwen2_pruned", "heads", "biases")


class Client(NamedTuple):
    """The output of llama.cpp for all models."""

    root: Path
    models: dict[str, spap_jax.Model]
    found: dict[str, Any]

    def __call__(self, name: str, kind: str = "F32") -> dict[str, np.ndarray]:
        return dict(np.load(self.root / name / f"{kind}.npz"))

    def down(self, name: str, kind: str) -> set[str]:
        """Returns the data types of the output projections."""
        types = self.found[name][kind]["types"]
        return {types[f"blk.{i}.ffn_down.weight"] for i in range(WIDE["num_hidden_layers"])}


def random_model(family: str, folder: Path, **fields: Any) -> spap_jax.Model:
    """Creates a random model with the tokenizer of the bundled model, since llama.cpp requires a tokenizer."""
    config = transformers.AutoConfig.for_model(family, **WIDE | fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 0.3 * noise + 0.7)
    model.save_pretrained(folder)
    for file in STORIES.glob("tokenizer*"):
        shutil.copy(file, folder)
    return spap_jax.load(folder)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Client:
    python = request.config.getoption("--llama-cpp-python")
    assert python, "--llama-cpp-python is missing: see `make clients-check`"
    root = tmp_path_factory.mktemp("llama-cpp")
    stories = spap_jax.load(STORIES)
    text = {"tokenizer": STORIES, "sequence_length": 64}
    tokens = spap_jax.load_tokens(EXAMPLES / "stories_calibration.txt", sequences=16, role="calibration", **text).tokens
    prompts = spap_jax.load_tokens(EXAMPLES / "stories_evaluation.txt", sequences=3, role="evaluation", **text).tokens
    noise = np.random.default_rng(0).integers(3, WIDE["vocab_size"], (4, 24))
    wide = random_model("llama", root / "wide-in")
    # transformers adds a token to the tokenizer of any Qwen2 model.
    qwen2 = random_model("qwen2", root / "qwen2-in", vocab_size=WIDE["vocab_size"] + 1)
    models = {
        "stories": stories,
        "stories_pruned": spap_jax.prune(stories, tokens, sparsity=0.3, effort="low", rounds=0).model,
        "qwen2_pruned": spap_jax.prune(qwen2, noise, sparsity=0.5, method="magnitude").model,
    }
    models |= {name: spap_jax.prune(wide, noise, **{"method": "magnitude"} | how).model for name, how in KEPT.items()}
    for name, model in models.items():
        spap_jax.save(model, root / name)
        np.save(root / name / "prompts.npy", (prompts if name.startswith("stories") else noise)[:, :16])
    command = [python, str(SCRIPT), *(str(root / name) for name in models)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    return Client(root, models, json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", WRITING)
def test_the_same_tokens_are_written(client: Client, name: str):
    prompts, written = np.load(client.root / name / "prompts.npy"), client(name)
    sequences = np.concatenate([prompts, written["tokens"]], axis=1)
    expected = spap_jax.logits(client.models[name], sequences)[:, prompts.shape[1] - 1 : -1]
    assert expected.std() > 1  # the logits are not trivial
    # By induction these are the tokens of a greedy continuation: each is the most likely one after those before it.
    np.testing.assert_array_equal(written["tokens"], np.asarray(expected).argmax(axis=-1))
    np.testing.assert_allclose(written["logits"], expected, rtol=0, atol=1e-3)


def test_metadata_has_the_pruned_width(client: Client):
    widths = {name: found["F32"]["width"] for name, found in client.found.items()}
    assert widths == {
        "stories": 320,
        "stories_pruned": 224,
        "qwen2_pruned": 256,
        "wide_256": 256,
        "wide_224": 224,
        "wide_200": 200,
        "heads": 256,
        "biases": 256,
    }
    assert client.found["qwen2_pruned"]["F32"]["architecture"] == "qwen2"


class TestQuantisation:
    """Tests of the table in docs/training_and_clients.md."""

    def test_a_multiple_of_256_becomes_what_was_asked_for(self, client: Client):
        assert client.down("wide_256", "Q4_0") == {"Q4_0"}
        assert client.down("wide_256", "Q8_0") == {"Q8_0"}
        assert client.down("wide_256", "Q4_K_M") <= {"Q4_K", "Q6_K"}

    def test_a_multiple_of_32_gets_a_simple_format_in_place_of_a_k_format(self, client: Client):
        assert client.down("wide_224", "Q4_0") == {"Q4_0"}
        assert client.down("wide_224", "Q8_0") == {"Q8_0"}
        assert client.down("wide_224", "Q4_K_M") <= {"Q5_0", "Q8_0"}

    def test_any_other_width_stays_in_f16(self, client: Client):
        assert {kind: client.down("wide_200", kind) for kind in ("Q4_0", "Q8_0", "Q4_K_M")} == {
            "Q4_0": {"F16"},
            "Q8_0": {"F16"},
            "Q4_K_M": {"F16"},
        }
        assert client.found["wide_200"]["Q4_0"]["bytes"] > client.found["wide_256"]["Q4_0"]["bytes"]

    def test_quantised_files_run(self, client: Client):
        """After the same prompt, 8 bits give nearly the same logits, and 4 bits are less close."""
        full, eight, four = (client("stories_pruned", kind)["logits"][:, 0] for kind in ("F32", "Q8_0", "Q4_0"))
        assert 0 < np.abs(eight - full).mean() < 0.03 * full.std()
        assert np.abs(eight - full).mean() < np.abs(four - full).mean() < 0.3 * full.std()
