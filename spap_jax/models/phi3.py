"""Family table for Phi-3 and Phi-4: LLaMA's, with projections of the same input stored as one tensor.

Longer contexts by longrope and rotary embeddings of a part of a head (Phi-4 mini) are refused.
"""

import dataclasses

from spap_jax.models.families import Field
from spap_jax.models.llama import FIELDS, LLAMA
from spap_jax.models.published import absent

_PARTS = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}

PHI3 = dataclasses.replace(
    LLAMA,
    name="phi3",
    architecture="Phi3ForCausalLM",
    fields={
        **FIELDS,
        "positions": Field("max_position_embeddings", 4096),
        "norm_eps": Field("rms_norm_eps", 1e-5),
        "window": Field("sliding_window", absent=lambda read: None),
    },
    constants={**LLAMA.constants, "qkv_bias": False, "output_bias": False, "mlp_bias": False},
    fused={
        f"model.layers.{{i}}.{whole}.weight": tuple(
            f"model.layers.{{i}}.{whole.partition('.')[0]}.{part}.weight" for part in parts
        )
        for whole, parts in _PARTS.items()
    },
    inert=frozenset({"embd_pdrop", "resid_pdrop"}),
    accepted={"rope_scaling": absent},
    heads_divide_width=False,
)
