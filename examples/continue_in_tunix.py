"""Distils a dense model into a pruned one in Tunix, on whatever devices there are, and writes a checkpoint again.

It needs an environment with Tunix (``pip install google-tunix "safetensors<0.8"``) and nothing of this project:

    python continue_in_tunix.py PRUNED DENSE tokens.npy OUTPUT

PRUNED and DENSE are Hugging Face folders of Qwen2, Qwen2.5 or LLaMA models with a single model.safetensors, and
tokens.npy holds sequences of token ids [B, T], the last eighth of which is held out.
"""

# pyright: reportMissingImports=false

import argparse
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from tunix.distillation.distillation_trainer import DistillationTrainer, TrainingConfig, TrainingInput
from tunix.distillation.strategies.logit import LogitStrategy


def family_of(config: dict[str, Any]) -> tuple[Any, Any]:
    """Returns Tunix's modules with the model and with the names of its weights."""
    if config["model_type"] == "qwen2":
        from tunix.models.qwen2 import model, params
    elif config["model_type"] == "llama":
        from tunix.models.llama3 import model, params
    else:
        raise SystemExit(f"this script is for Qwen2 and LLaMA, not for {config['model_type']}")
    return model, params


def rope_theta(config: dict[str, Any]) -> float:
    """Returns the base of the rotary embedding; Tunix computes no scaling of it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise SystemExit(f"Tunix computes no rotary embedding of the type {kind}, which this model has")
    return rope.get("rope_theta", config.get("rope_theta", 10000.0))


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Returns Tunix's names and values of the fields of config.json; the pruned width is one of them."""
    llama = config["model_type"] == "llama"
    return {
        "num_layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "embed_dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "num_heads": config["num_attention_heads"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "rope_theta": rope_theta(config),
        "norm_eps": config["rms_norm_eps"],
        "weight_tying" if llama else "use_tied_embedding": config.get("tie_word_embeddings", False),
    }


def load(folder: Path, mesh: jax.sharding.Mesh) -> nnx.Module:
    """Loads a checkpoint as Tunix's model, in float32."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    model, params = family_of(config)
    if config["model_type"] == "llama":  # Tunix takes a default and leaves rope_theta in its config unread
        model.apply_rope = functools.partial(
            getattr(model.apply_rope, "func", model.apply_rope), rope_theta=rope_theta(config)
        )
    return params.create_model_from_safe_tensors(
        str(folder), model.ModelConfig(**sizes(config)), mesh, dtype=jnp.float32
    )


def logits(model: Any, input_tokens: jax.Array, input_mask: jax.Array) -> jax.Array:
    """Computes the predictions of all tokens but the first. [B, T] -> [B, T - 1, v]."""
    length = input_tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), input_tokens.shape)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(input_tokens), length, length))
    return model(input_tokens, positions, None, causal & input_mask[:, None, :].astype(bool))[0][:, :-1]


def next_tokens(input_tokens: jax.Array, input_mask: jax.Array, vocabulary: int) -> jax.Array:
    """Returns the tokens to predict as distributions, which Tunix reports its task loss on."""
    return jax.nn.one_hot(input_tokens[:, 1:], vocabulary)


@nnx.jit
def divergence(dense: Any, pruned: Any, tokens: jax.Array) -> jax.Array:
    """Computes the mean KL(dense || pruned) [] in nats per prediction."""
    given = tokens, jnp.ones_like(tokens)
    wanted, own = (jax.nn.log_softmax(logits(model, *given)) for model in (dense, pruned))
    return (jnp.exp(wanted) * (wanted - own)).sum(axis=-1).mean()


def write(model: nnx.Module, source: Path, output: Path) -> None:
    """Writes the weights under their Hugging Face names, with everything else of the source folder.

    Tunix itself writes low-rank updates only. Its loader's table of names, transpositions and shapes is inverted here.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    module, params = family_of(config)
    table = params._get_key_and_transform_mapping(module.ModelConfig(**sizes(config)))
    state = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    tensors = load_file(source / "model.safetensors")
    for name, old in tensors.items():
        pattern = next(pattern for pattern in table if re.fullmatch(pattern, name))
        key, rule = table[pattern]
        order = rule[0] if rule else range(old.ndim)
        new = state[re.sub(pattern, key, name)].reshape([old.shape[axis] for axis in order])
        tensors[name] = np.ascontiguousarray(new.transpose(np.argsort(order)).astype(old.dtype))
    shutil.copytree(source, output, ignore=shutil.ignore_patterns("*.safetensors", "spap_*", "README.md"))
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Trains, measures the divergence before and after, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    asked = parser.parse_args()
    if asked.output.exists():
        raise SystemExit(f"{asked.output} exists: name another folder")

    # Tunix annotates weights and leaves the rest to the compiler, which axes of the type Auto allow.
    mesh = jax.make_mesh((len(jax.devices()), 1), ("fsdp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))
    dense, pruned = load(asked.dense, mesh), load(asked.pruned, mesh)
    tokens = np.load(asked.tokens).astype(np.int32)
    held_out = max(1, len(tokens) // 8)
    judged, tokens = tokens[-held_out:], tokens[:-held_out]
    before = float(divergence(dense, pruned, judged))

    rows = np.random.default_rng(0).integers(0, len(tokens), (asked.steps, asked.batch))
    vocabulary = logits(pruned, judged[:1], judged[:1]).shape[-1]
    trainer = DistillationTrainer(
        student_model=pruned,
        teacher_model=dense,
        strategy=LogitStrategy(
            logits, logits, functools.partial(next_tokens, vocabulary=vocabulary), temperature=1.0, alpha=1.0
        ),
        optimizer=optax.adamw(optax.cosine_decay_schedule(asked.learning_rate, asked.steps)),
        training_config=TrainingConfig(eval_every_n_steps=asked.steps + 1, max_steps=asked.steps),
    )
    with mesh:  # Tunix looks for the mesh in this context, and not yet in that of jax.set_mesh
        trainer.train([TrainingInput(tokens[some], np.ones_like(tokens[some])) for some in rows])
    after = float(divergence(dense, pruned, judged))
    write(pruned, asked.pruned, asked.output)
    print(f"KL(dense || pruned), held out: {before:.4f} before, {after:.4f} after {asked.steps} steps")


if __name__ == "__main__":
    main()
