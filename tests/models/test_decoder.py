"""The decoder as a Flax module: initialised, rematerialised, and sharded by the names of its axes."""

from typing import Any

import flax.linen as nn
import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from spap_jax.models import Decoder, logical_axes

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9)).astype(np.int32)
VARIANTS = ("llama_two_kv_heads", "gemma3", "opt_350m_like")


@pytest.mark.parametrize("variant", VARIANTS)
def test_init_makes_the_tree_of_a_checkpoint(variant: str) -> None:
    config, params = hf_models.port(hf_models.hf_model(variant))
    made = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), TOKENS))["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, {name: params[name] for name in made})
    assert not any(jax.tree.leaves(params[name]) for name in set(params) - set(made))


def test_what_is_computed_again_changes_no_gradient() -> None:
    config, params = hf_models.port(hf_models.hf_model("gemma3"))

    def gradient(policy: Any) -> Any:
        module = Decoder(config, policy=policy)
        return jax.jit(jax.grad(lambda params: module.apply({"params": params}, TOKENS).sum()))(params)  # type: ignore[union-attr]

    kept, again = gradient(None), gradient(jax.checkpoint_policies.nothing_saveable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), kept, again)


def test_matrices_and_activations_in_bfloat16() -> None:
    config, params = hf_models.port(hf_models.hf_model("llama_two_kv_heads"))
    exact, rounded = (Decoder(config, dtype).apply({"params": params}, TOKENS) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.float32  # type: ignore[union-attr]
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()  # type: ignore[operator]


def test_parameters_are_sharded_by_the_names_of_their_axes() -> None:
    config, params = hf_models.port(hf_models.hf_model("llama_two_kv_heads"))
    axes = logical_axes(config)
    assert axes["layers"]["mlp"]["down"] == PartitionSpec("L", "f", "d")
    assert axes["embed"]["tokens"] == PartitionSpec("v", "e")
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    rules = [("n", "model"), ("d", "data"), *((letter, None) for letter in "Lvefmh")]
    shardings = nn.logical_to_mesh_sharding(axes, mesh, rules)  # pyright: ignore[reportPrivateImportUsage]
    sharded = jax.device_put(params["layers"]["attention"], shardings["layers"]["attention"])
    shape = (1, config.width, config.heads, config.head_dim)
    assert sharded["q"].sharding.shard_shape(shape) == (1, config.width // 2, config.heads // 4, config.head_dim)
