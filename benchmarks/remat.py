"""What the backward pass of a joint step computes again: operations and memory, ``python -m benchmarks.remat``.

The step is compiled, not run, for one device of this machine: a decoder as SmolLM2-135M with 30 % of its MLP channels
removed, whose MLPs alone change, the logits of the whole vocabulary, and one sequence of 2048 tokens. The compiler
counts the body of a loop once, and so one block of the decoder; what it counts in a decoder without blocks is
subtracted.
"""

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from cyclopts import App
from rich.console import Console
from rich.table import Table

from spap_jax.models import decoder, family_of
from spap_jax.pruning import joint
from spap_jax.settings import FloatDtype, PruneSettings, Remat
from spap_jax.training.engine import batch_of
from spap_jax.training.step import Given, Sequences, State, step

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1075,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 30,
    "tie_word_embeddings": True,
}
BLOCKS, TOKENS = SMOLLM2["num_hidden_layers"], 2048

out = Console(highlight=False, width=100)
app = App(name="remat", help=__doc__)


def compiled(blocks: int, remat: Remat, dtype: FloatDtype) -> Any:
    """Compiles a joint step on a number of blocks."""
    config = family_of(SMOLLM2).read_config(SMOLLM2)
    params = decoder.shapes(config)
    cut = jax.tree.map(lambda a: jax.ShapeDtypeStruct((blocks, *a.shape[1:]), a.dtype), params["layers"])
    config, params = dataclasses.replace(config, layers=blocks), params | {"layers": cut}
    settings = PruneSettings(compute_dtype=dtype, remat=remat).resolved(
        BLOCKS, config.width, config.intermediate, TOKENS
    )
    job = joint.job_of(config, settings)
    mlp = {"layers": {"mlp": params["layers"]["mlp"]}}
    rest = params | {"layers": {name: part for name, part in params["layers"].items() if name != "mlp"}}
    tokens: Any = jax.ShapeDtypeStruct((1, 1, TOKENS), jnp.int32)
    kept: Any = jax.ShapeDtypeStruct((1, 1, TOKENS, config.width), jnp.float32)
    given = Given(rest, None, Sequences(tokens, kept), 1)
    state = jax.eval_shape(lambda moved: State(moved, job.optimizer().init(moved)), mlp)
    return step.lower(job, given, state, batch_of(np.arange(1), given, TOKENS), np.float32(0)).compile()


@app.default
def show(dtype: FloatDtype = "float32") -> None:
    """Compiles the step with each setting and prints a table.

    Args:
        dtype: Data type of matrices and activations.
    """
    table = Table("--remat", "GFLOP in a block", "temporaries, GB", title=f"a joint step in {dtype}")
    for remat in get_args(Remat):
        whole, without = (compiled(blocks, remat, dtype) for blocks in (BLOCKS, 0))
        operations = whole.cost_analysis()["flops"] - without.cost_analysis()["flops"]
        memory = whole.memory_analysis().temp_size_in_bytes
        table.add_row(remat, f"{operations / 1e9:.1f}", f"{memory / 1e9:.2f}")
    out.print(table)


if __name__ == "__main__":
    app()
