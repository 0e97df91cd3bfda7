"""Low-rank updates: merged into the weights, and applied next to those of transformers' own models."""

import copy

import jax
import numpy as np
import pytest
import torch
from hf_models import hf_logits, hf_model
from training_cases import SETTINGS, counting, same, tiny

import spap_jax as spap
from spap_jax.models.rules import Rule
from spap_jax.parallel.sequences import Sequences
from spap_jax.training import lora, step
from spap_jax.training.finetune import merged
from spap_jax.training.step import Frozen, Job, measure

RANK, SCALE = SETTINGS.rank, SETTINGS.lora_alpha / SETTINGS.rank


def updates_of(model: spap.Model) -> dict:
    """Return random updates, none of which is zero."""
    started = lora.start(model.params["layers"], RANK, jax.random.key(0))
    leaves, tree = jax.tree.flatten(started)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([jax.random.normal(k, a.shape) * 0.03 for k, a in zip(keys, leaves, strict=True)])


def with_adapters(variant: str, rules: list[Rule], updates: dict) -> torch.nn.Module:
    """Return transformers' model, with the output of its low-rank pair for the same input added to each projection."""
    model = copy.deepcopy(hf_model(variant))
    for rule in rules:
        _, part, name = f"{rule.ours}//".split("/")[:3]
        if name not in updates.get(part, {}):
            continue
        for layer in range(model.config.num_hidden_layers):
            a, b = (torch.from_numpy(np.array(updates[part][name][which][layer])) for which in "ab")
            module = model.get_submodule(rule.theirs.format(i=layer).removesuffix(".weight"))
            module.register_forward_hook(lambda _, given, out, a=a, b=b: out + SCALE * ((given[0] @ a) @ b))
    return model


@pytest.mark.parametrize("variant", ["llama_two_kv_heads", "qwen2", "opt_125m_like"])
def test_merged_is_as_if_applied_beside_the_weights(variant: str):
    model, tokens = tiny(variant), counting(2)
    updates = updates_of(model)
    params = model.params | merged(model.config, model.params, {"updates": updates}, SCALE)
    theirs = hf_logits(with_adapters(variant, model.family.rules_for(model.config), updates), tokens)  # type: ignore
    assert np.abs(theirs - hf_logits(hf_model(variant), tokens)).max() > 0.1
    np.testing.assert_allclose(spap.logits(model.replace(params=params), tokens), theirs, rtol=0, atol=2e-4)
    frozen = Frozen(model.params)
    sequences, rows = Sequences(tokens[:, None], 2).sharded(), np.arange(2, dtype=np.int32)[None]
    job, moved = Job(model.config, None, "float32", SCALE), {"updates": updates}
    beside = jax.jit(lambda: step._sum(job, frozen, sequences, moved, rows[0], "float32"))() / tokens[:, 1:].size
    expected = np.log(spap.perplexity(model.replace(params=params), tokens))
    assert float(beside) == pytest.approx(expected, rel=1e-5)
    assert float(measure(job, frozen, sequences, moved, rows).loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "mlp"), [("llama_biases", {"gate", "up", "down"}), ("opt_125m_like", {"up", "down"})]
)
def test_at_first_there_is_an_update_of_every_projection_and_none_changes_anything(variant: str, mlp: set[str]):
    model = tiny(variant)
    started = lora.start(model.params["layers"], RANK, jax.random.key(0))
    assert {part: set(pairs) for part, pairs in started.items()} == {"attention": set("qkvo"), "mlp": mlp}
    assert all(np.std(pair["a"]) > 0 for pairs in started.values() for pair in pairs.values())
    assert same(merged(model.config, model.params, {"updates": started}, SCALE)["layers"], model.params["layers"])
