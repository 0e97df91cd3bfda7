"""Inspection of what pruning sees of a dense model's layer: its second moments."""

from typing import Any

import numpy as np

from spap_jax.data.token_ids import token_blocks
from spap_jax.errors import UserError, option
from spap_jax.models import DecoderConfig, Params
from spap_jax.models.blocks import get_layer
from spap_jax.models.model import Model, checked
from spap_jax.parallel.sequences import chunked
from spap_jax.pruning import streams
from spap_jax.pruning.moments import accumulate
from spap_jax.pruning.reduce import resized
from spap_jax.pruning.streams import Streams
from spap_jax.settings import is_count
from spap_jax.solver.alternating import Tokens
from spap_jax.solver.problem import Problem


def moments(model: Model, tokens: Any, layer: int, batch_tokens: int = 4096) -> Problem:
    """The second moments of one layer's MLP in a dense model, which are the solver's input.

    They are those of ``schedule="parallel"``; with ``schedule="sequential"``, pruning takes them on the activations
    that the already pruned layers produce. If the MLP has an output bias, as in OPT, they are centred. To solve problem
    p, call ``spap.solver.solve(p.gram, p.cross, p.weight, keep, target_power=p.target_power)``.

    Args:
        tokens: Token ids [B, T], or the result of ``load_tokens``.
        layer: Number of the layer, from 0.
        batch_tokens: Tokens that pass through a layer at once.

    Returns:
        ``gram`` [f, f], ``cross`` [f, d], ``target_power`` [] and the dense output projection ``weight`` [f, d].

    Raises:
        UserError: the tokens are unusable for the model, or it has no such layer.
    """
    return accumulate(*_entered(model, tokens, layer, batch_tokens)).problem


def _entered(model: Model, tokens: Any, layer: int, batch_tokens: int) -> tuple[DecoderConfig, Params, Tokens]:
    """Returns a dense layer's config, its parameters, and the streams before and after its MLP, [C, B, T, d] each."""
    model = checked(model)
    if not isinstance(layer, int | np.integer) or not 0 <= layer < model.config.layers:
        raise UserError(f"layer must be a whole number from 0 to {model.config.layers - 1}, not {layer!r}.")
    blocks = token_blocks(tokens, model.config)
    if not is_count(batch_tokens):
        raise UserError(f"{option('batch_tokens')} must be a whole number of at least 1, not {batch_tokens!r}.")

    def enter(index: int, stream: Streams) -> tuple[DecoderConfig, Params, Streams]:
        config = model.config.of_layer(index)
        params = resized(get_layer(model.params["layers"], index), config.intermediate)
        return config, params, streams.enter_mlp(config, params, stream)

    chunks = chunked(blocks, max(1, batch_tokens // blocks.shape[1]))
    entered = enter(0, streams.start(model.config, model.params, chunks))
    for index in range(1, int(layer) + 1):
        entered = enter(index, streams.leave_mlp(*entered))
    config, params, stream = entered
    return config, params, streams.fitting_tokens(stream)
