"""SPAP-JAX: structured pruning of language models, with recovery of their weights in the same run.

>>> import spap_jax as spap
>>> model = spap.load("path/to/checkpoint")
>>> result = spap.prune(model, tokens, sparsity=0.3)
>>> spap.save(result, "path/to/output")

Importing the package starts neither JAX nor transformers: names are loaded when first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spap_jax import solver
    from spap_jax.api import (
        FinetuneResult,
        PruneResult,
        divergence,
        finetune,
        generate,
        load,
        load_tokens,
        logits,
        loss,
        moments,
        perplexity,
        prune,
        save,
        write,
    )
    from spap_jax.data.tokens import TokenBlocks
    from spap_jax.errors import SpapWarning, UserError
    from spap_jax.models.model import Model
    from spap_jax.models.nnx import from_nnx, to_nnx
    from spap_jax.settings import FinetuneSettings, PruneSettings, WriteSettings

__version__ = "0.1.0"

__all__ = [
    "FinetuneResult",
    "FinetuneSettings",
    "Model",
    "PruneResult",
    "PruneSettings",
    "SpapWarning",
    "TokenBlocks",
    "UserError",
    "WriteSettings",
    "divergence",
    "finetune",
    "from_nnx",
    "generate",
    "load",
    "load_tokens",
    "logits",
    "loss",
    "moments",
    "perplexity",
    "prune",
    "save",
    "solver",
    "to_nnx",
    "write",
]

_HOMES = dict.fromkeys(__all__, "spap_jax.api") | {
    "FinetuneSettings": "spap_jax.settings",
    "Model": "spap_jax.models.model",
    "PruneSettings": "spap_jax.settings",
    "SpapWarning": "spap_jax.errors",
    "TokenBlocks": "spap_jax.data.tokens",
    "UserError": "spap_jax.errors",
    "WriteSettings": "spap_jax.settings",
    "from_nnx": "spap_jax.models.nnx",
    "to_nnx": "spap_jax.models.nnx",
}


def __getattr__(name: str):
    """Loads a public name from the module that defines it, on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'spap_jax' has no attribute {name!r}")
    from importlib import import_module

    return import_module("spap_jax.solver") if name == "solver" else getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
