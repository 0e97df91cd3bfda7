"""Whole blocks that are dropped, and the dial that finds blocks and channels for a target."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import hf_model
from pruning_cases import forward, one_layer, random_tokens, tiny

import spap_jax as spap
from spap_jax.errors import UserError
from spap_jax.models import cost
from spap_jax.models.model import Model
from spap_jax.pruning import dial
from spap_jax.pruning.dial import _fewer_heads, decide, dropped_first, reached, target_of
from spap_jax.pruning.run import Dense, kept_blocks, pruned_config
from spap_jax.settings import PruneSettings

QUICK = PruneSettings(rounds=0, joint_passes=0, batch_tokens=64, held_out=0.25)


def without(model: Model, numbers: list[int]) -> Model:
    """The dense model of the blocks that stay."""
    stay = [number for number in range(model.config.layers) if number not in numbers]
    layers = jax.tree.map(lambda a: a[jnp.array(stay)], model.params["layers"])
    return model.replace(config=model.config.of_blocks(stay), params=model.params | {"layers": layers})


def dense_of(model: Model) -> Dense:
    outer = {name: model.params[name] for name in ("embed", "head")}
    return Dense(model.config, outer, lambda index: one_layer(model, index))


def parameters(model: Model) -> int:
    return cost.parameters(model.family, model.config).total


@pytest.mark.filterwarnings("ignore::spap_jax.errors.Notice")
@pytest.mark.parametrize("variant", ["llama", "gemma3", "smollm3", "opt_125m_like"])
def test_a_dropped_block_is_gone_and_transformers_computes_the_same(variant, tmp_path):
    tokens, model = random_tokens(), spap.load(_saved(variant, tmp_path / "dense"))
    pruned = spap.prune(model, tokens, settings=QUICK, drop_blocks=[1], update="none").model
    expected = without(model, [1])
    assert pruned.config == expected.config
    np.testing.assert_allclose(spap.logits(pruned, tokens), spap.logits(expected, tokens), atol=1e-5)

    import torch
    from transformers import AutoModelForCausalLM

    spap.save(pruned, tmp_path / "pruned")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        found = theirs(torch.tensor(np.asarray(tokens[:2]))).logits.numpy()
    np.testing.assert_allclose(found, spap.logits(pruned, tokens[:2]), atol=1e-4)


def _saved(variant, folder):
    hf_model(variant).save_pretrained(folder)
    return folder


def test_the_next_block_makes_up_for_one_that_is_dropped():
    model, tokens = tiny("llama"), random_tokens(sequences=64)
    losses = {
        update: spap.prune(model, tokens, settings=QUICK, drop_blocks=[1], update=update).report.joint[-1].held_out
        for update in ("none", "refit")
    }
    assert losses["refit"] < 0.9 * losses["none"]


def test_blocks_that_cannot_be_dropped_are_refused():
    for number in (0, 2, 7):
        with pytest.raises(UserError, match="block"):
            spap.prune(tiny("llama"), random_tokens(), drop_blocks=[number])


def test_blocks_go_in_the_order_of_what_the_predictions_lose():
    model, tokens = _deep(), random_tokens()
    dense = dense_of(model)
    order = [*dropped_first(dense, tokens, QUICK)]
    assert sorted(order) == [1, 2, 3]
    target = jax.nn.log_softmax(forward(model.config, model.params, jnp.asarray(tokens), None))

    def loss(gone: list[int]) -> float:
        smaller = without(model, gone)
        found = jax.nn.log_softmax(forward(smaller.config, smaller.params, jnp.asarray(tokens), None))
        return float((jnp.exp(target) * (target - found)).sum(-1).mean())

    first = min(range(1, 4), key=lambda number: loss([number]))
    second = min({1, 2, 3} - {first}, key=lambda number: loss([first, number]))
    assert order[:2] == [first, second]


def _deep() -> Model:
    """A model of five blocks that differ in how much they do."""
    model = tiny("llama")
    blocks = jnp.array([0, 1, 2, 1, 2])
    layers = jax.tree.map(lambda a: a[blocks], model.params["layers"])
    scale = jnp.array([1.0, 0.7, 0.2, 0.4, 1.0])
    layers["mlp"]["down"] = layers["mlp"]["down"] * scale[:, None, None]
    layers["attention"]["o"] = layers["attention"]["o"] * scale[:, None, None, None]
    return model.replace(config=model.config.of_blocks([0, 1, 2, 1, 2]), params=model.params | {"layers": layers})


@pytest.mark.parametrize(
    ("text", "measure", "limit"),
    [
        ("0.8", lambda model: parameters(model), 0.8),
        ("params={}", lambda model: parameters(model), 0.9),
        ("bytes={}", lambda model: 4 * parameters(model), 0.85),
        ("speed=1.2x@prefill", lambda m: cost.prefill_operations(m.family, m.config, 1, 512), 1 / 1.2),
        ("speed=1.2x", lambda m: cost.decode_bytes(m.family, m.config, 1, 544, 4, 4), 1 / 1.2),
    ],
)
def test_a_target_is_reached_and_not_by_more_than_one_multiple(text, measure, limit):
    model = _deep()
    text = text.format(int(limit * measure(model)))
    result = spap.prune(model, random_tokens(), settings=QUICK, target=text)
    report = json.loads(result.report.to_json())
    assert report["settings"]["target"] == text
    blocks = result.report.model.blocks
    assert (blocks.before, blocks.after) == (5, result.model.config.layers)
    assert result.model.config.layers == 5 - len(report["settings"]["drop_blocks"])
    found, whole_blocks = measure(result.model) / measure(model), report["settings"]["sparsity"] == 0
    assert limit - (0.2 if whole_blocks else 0.03) < found <= limit


def test_the_shape_with_the_least_divergence_by_a_clear_lead_is_taken():
    model, tokens, said = _deep(), random_tokens(sequences=32), []
    dense = dense_of(model)
    chosen = decide(dense, tokens, QUICK.replace(target="0.7"), 4, said.append)
    shapes = [*reached(model.config, QUICK.replace(target="0.7"), 4)]
    assert sum("heads" not in line for line in said[:-1]) == len(shapes) > 1
    order = [*dropped_first(dense, tokens, QUICK)]
    losses = {}
    for shape in shapes:
        dropped = tuple(sorted(order[: len(shape.drop_blocks)]))
        settings = QUICK.replace(sparsity=shape.sparsity, drop_blocks=dropped)
        losses[dropped] = spap.prune(model, tokens, settings=settings).report.joint[-1].held_out
    best = ()
    for dropped, loss in losses.items():
        best = dropped if loss < 0.95 * losses[best] else best
    assert chosen.drop_blocks == best


@pytest.mark.parametrize(("second", "dropped"), [(0.96, 0), (0.94, 1)])
def test_a_small_lead_does_not_count(second, dropped, monkeypatch):
    measured = itertools.chain([1.0, second], itertools.repeat(2.0))
    monkeypatch.setattr(dial, "_divergence", lambda *_: next(measured))
    model = _deep()
    chosen = decide(dense_of(model), random_tokens(), QUICK.replace(target="0.7"), 4)
    assert len(chosen.drop_blocks) == dropped


@pytest.mark.parametrize("idle", [False, True])
def test_heads_go_if_the_predictions_lose_less_than_by_channels(idle):
    model = tiny("llama_two_kv_heads")
    attention = model.params["layers"]["attention"]
    output = attention["o"].at[:, 2:].set(0) if idle else 30 * attention["o"]  # of the second key/value head's queries
    layers = model.params["layers"] | {"attention": attention | {"o": output}}
    model = model.replace(params=model.params | {"layers": layers})
    result = spap.prune(model, random_tokens(sequences=32), settings=QUICK, target="0.85")
    assert result.model.config.kv_heads == (1 if idle else 2)
    assert 0.82 < parameters(result.model) / parameters(model) <= 0.85


def test_heads_that_servers_could_not_divide_are_not_tried():
    config = dataclasses.replace(tiny("gemma3").config, width=840, heads=8, kv_heads=8)  # which all numbers divide
    settings = PruneSettings(target="0.9")
    shape = next(reached(config, settings, 4))
    assert [pruned_config(config, each).kv_heads for each in _fewer_heads(config, shape, 4)] == [4, 2, 1]


def test_a_model_of_one_block_reaches_a_target_by_its_width():
    model = tiny("llama")
    single = model.replace(
        config=model.config.of_blocks([0]),
        params=model.params | {"layers": jax.tree.map(lambda a: a[:1], model.params["layers"])},
    )
    result = spap.prune(single, random_tokens(), settings=QUICK, target="0.9")
    assert 0.85 < parameters(result.model) / parameters(single) <= 0.9


@pytest.mark.parametrize("given", [PruneSettings(sparsity=0.3), PruneSettings(drop_blocks=(1,))])
def test_what_a_target_decides_is_refused_beside_it(given):
    with pytest.raises(UserError, match="target"):
        spap.prune(tiny("llama"), random_tokens(), settings=given, target="0.9")


@pytest.mark.parametrize("text", ["", "1.2", "0", "speed=0.9x", "speed=1.3", "params=2x", "bytes=-1", "params=9T"])
def test_a_target_that_means_nothing_is_refused(text):
    with pytest.raises(UserError, match="target"):
        target_of(tiny("llama").config, text, 4)


@pytest.mark.parametrize(("variant", "loses_heads"), [("llama", True), ("opt_125m_like", False)])
def test_a_target_out_of_reach_is_refused_with_advice_that_the_family_can_follow(variant, loses_heads):
    with pytest.raises(UserError, match="target") as refusal:
        next(reached(tiny(variant).config, PruneSettings(target="0.01"), 4))
    assert ("attention" in str(refusal.value)) == loses_heads


def test_without_a_target_nothing_is_decided():
    settings = PruneSettings(drop_blocks=(1,))
    assert [*reached(tiny("llama").config, settings, 4)] == [settings]
    assert kept_blocks(tiny("llama").config, settings) == [0, 2]
    assert settings.channel_sparsity == 0
