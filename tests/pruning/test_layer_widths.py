"""Widths by layer: useless channels are removed first, the total is kept, and padding channels stay zero."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruning_cases import SETTINGS, one_layer, prune, random_tokens, resolved, tiny, with_mlp

from spap_jax import api
from spap_jax.errors import UserError
from spap_jax.models.loss import CPU_HEAD_TOKENS
from spap_jax.models.model import Model
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import predictions, streams
from spap_jax.pruning.run import Dense
from spap_jax.pruning.widths import choose_widths
from spap_jax.report.card import model_card
from spap_jax.settings import PruneSettings

GLOBAL = SETTINGS.replace(allocation="global", rounds=0)
TOTAL = 3 * 37


def chosen(model: Model, settings: PruneSettings = GLOBAL) -> tuple[int, ...]:
    dense = Dense(model.config, model.params, lambda i: one_layer(model, i))
    return choose_widths(resolved(model.config, random_tokens(), settings), dense)


def idle(model: Model, layer: int, count: int) -> Model:
    """Return the model with the output weights of the first channels of one layer set to zero."""
    down = np.array(model.params["layers"]["mlp"]["down"])
    down[layer, :count] = 0
    return with_mlp(model, down=jax.numpy.asarray(down))


def beyond(model: Model) -> list[np.ndarray]:
    """Return the weights of padding channels, beyond each layer's width."""
    mlp = model.params["layers"]["mlp"]
    return [
        np.asarray(array[index, width:] if name == "down" else array[index, ..., width:])
        for name, array in mlp.items()
        if name != "down_bias"
        for index, width in enumerate(model.config.layer_widths)
    ]


@pytest.mark.parametrize("layer", [0, 2])
def test_channels_of_no_use_go_first(layer: int):
    widths = chosen(idle(tiny("llama"), layer, 30))
    assert sum(widths) <= TOTAL
    assert widths[layer] == 37 - 3 * 3
    assert min(width for index, width in enumerate(widths) if index != layer) >= 37


def test_a_layer_counts_by_what_it_does_to_the_predictions():
    """A layer's errors do not depend on their effect through later layers, but its width does."""
    quiet = tiny("opt_125m_like")
    mlp = quiet.params["layers"]["mlp"]
    loud = with_mlp(quiet, down=mlp["down"].at[1].multiply(8))
    assert chosen(loud)[1] > chosen(quiet)[1]


def test_the_divergence_is_that_of_the_logits_of_which_few_are_held_at_once():
    model, tokens = tiny("llama"), random_tokens()
    assert tokens.size > CPU_HEAD_TOKENS
    layers = model.params["layers"]
    other = layers["mlp"] | {"down": 0.5 * layers["mlp"]["down"]}
    wanted, got = (
        jax.nn.log_softmax(api.logits(each, tokens)) for each in (model, with_mlp(model, down=other["down"]))
    )
    chunks = streams.start(model.config, model.params, chunked(tokens, len(tokens)))
    last = chunks.dense
    for index in range(model.config.layers):
        last = predictions.advance(model.config, layers, index, jnp.copy(last))
    stack = layers | {"mlp": other}
    given = (model.config, model.params, stack, 0, jax.tree.map(lambda a: a[0], other), chunks._replace(dense=last))
    np.testing.assert_allclose(
        predictions.divergence(*given), (jnp.exp(wanted) * (wanted - got)).sum(-1).mean(), rtol=1e-4
    )
    text = predictions.divergence.lower(*given).compile().as_text() or ""
    rows = [math.prod(map(int, found.split(",")[:-1])) for found in re.findall(r"f32\[([\d,]+,97)\]", text)]
    assert CPU_HEAD_TOKENS in rows
    assert max(rows) == CPU_HEAD_TOKENS, "the logits of a whole chunk"


def test_what_fills_up_stays_zero():
    """Padding channels stay zero through joint steps as well, and where channels have biases."""
    settings = GLOBAL.replace(method="magnitude", update="alternate", joint_passes=4)
    result = prune(idle(tiny("opt_gelu"), 1, 30), random_tokens(), settings, joint_rate=0.0005)
    config = result.model.config
    assert config.widths
    assert config.intermediate == max(config.widths) > min(config.widths)
    assert tuple(len(layer.kept) for layer in result.report.layers) == config.widths
    assert any(check.taken for check in result.report.joint[1:])
    assert sum(array.size for array in beyond(result.model)) > 0
    assert not any(array.any() for array in beyond(result.model))


def test_the_report_and_the_card_tell_the_widths():
    result = prune(idle(tiny("llama"), 1, 30), random_tokens(), settings=GLOBAL, method="wanda")
    widths = result.model.config.layer_widths
    report = json.loads(result.report.to_json())
    assert report["model"]["widths"] == {"before": [53] * 3, "after": list(widths)}
    card = model_card(result.report)
    assert f"{min(widths)} to {max(widths)} of 53 MLP channels" in card
    assert "it loads with spap_jax only: stock transformers needs one width" in card
    assert "transformers import" not in card
    assert "library_name: spap-jax" in card


def test_layers_of_different_widths_are_pruned_again():
    """Each layer loses the same fraction of its own width, which does not count padding channels."""
    once = prune(idle(tiny("llama"), 1, 30), random_tokens(), settings=GLOBAL, method="wanda").model
    again = GLOBAL.replace(allocation="uniform", sparsity=0.5, method="wanda", update="refit")
    twice = prune(once, random_tokens(), settings=again)
    expected = [round(0.5 * width) for width in once.config.layer_widths]
    assert list(twice.model.config.layer_widths) == expected
    for layer, width in zip(twice.report.layers, once.config.layer_widths, strict=True):
        assert max(layer.kept) < width
    with pytest.raises(UserError, match=r"differ in width already, .* use allocation='uniform'"):
        prune(once, random_tokens(), settings=GLOBAL)


def test_one_width_is_no_choice():
    said = r"nothing to choose: of 53 channels, layers that keep \d+ could not be both wider and narrower"
    for settings in (GLOBAL.replace(round_to=32), GLOBAL.replace(sparsity=0.06), GLOBAL.replace(sparsity=0.95)):
        with pytest.raises(UserError, match=said):
            prune(tiny("llama"), random_tokens(), settings=settings)
    with pytest.raises(UserError, match="allocation must be one of uniform, global, not 'best'"):
        GLOBAL.replace(allocation="best")
