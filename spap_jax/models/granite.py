"""Family table for dense Granite models: LLaMA's, with factors of embeddings, scores, additions and logits."""

import dataclasses
import math

from spap_jax.models.families import Field
from spap_jax.models.llama import LLAMA


def derived(read: dict) -> dict:
    """Derives the factors that config.json gives in other terms."""
    return {
        "query_scale": read["score_scale"] * math.sqrt(read["head_dim"]),
        "logit_scale": 1 / read["logit_divisor"],
    }


GRANITE = dataclasses.replace(
    LLAMA,
    name="granite",
    architecture="GraniteForCausalLM",
    fields={
        **LLAMA.fields,
        "embedding_scale": Field("embedding_multiplier", 1.0),
        "residual_scale": Field("residual_multiplier", 1.0),
        "score_scale": Field("attention_multiplier", 1.0),
        "logit_divisor": Field("logits_scaling", 1.0),
    },
    derived=derived,
    heads_divide_width=False,
)
