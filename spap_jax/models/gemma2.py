"""Family table for Gemma 2: Gemma 3 without norms of queries and keys, and with bounds on scores and logits."""

import dataclasses
from typing import Any

from spap_jax.models.families import Field
from spap_jax.models.gemma3 import GEMMA3
from spap_jax.models.layer_types import read_kinds
from spap_jax.models.qwen3 import QUERY_KEY_NORMS
from spap_jax.models.rope import read_rope


def attention_kinds(theirs: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Reads which layers attend within a window, by default every other one; all have one rotary embedding."""
    rope = read_rope(theirs)
    return read_kinds(theirs, read, (rope, rope), period=2)


GEMMA2 = dataclasses.replace(
    GEMMA3,
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    fields={
        **GEMMA3.fields,
        "vocabulary": Field("vocab_size", 256000),
        "positions": Field("max_position_embeddings", 8192),
        "score_cap": Field("attn_logit_softcapping", 50.0, absent=lambda read: None),
        "logit_cap": Field("final_logit_softcapping", 30.0, absent=lambda read: None),
    },
    constants={name: value for name, value in GEMMA3.constants.items() if name != "query_key_norm"},
    rules=tuple(rule for rule in GEMMA3.rules if rule not in QUERY_KEY_NORMS),
    attention_kinds=attention_kinds,
    inert=frozenset(),
    accepted={name: test for name, test in GEMMA3.accepted.items() if not name.endswith("softcapping")},
)
