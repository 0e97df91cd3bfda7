"""Layers that differ in width: the channels of zeros that pad them stay zero in training."""

import jax
import jax.numpy as jnp
import pytest
from training_cases import FULL, SETTINGS, counting, tiny

import spap_jax as spap
from spap_jax.models.decoder import CHANNEL_AXES
from spap_jax.settings import FinetuneSettings

WIDTHS = (20, 53, 7)


def beyond(mlp: dict) -> dict:
    """Return the weights beyond each layer's width, with zeros elsewhere."""
    idle = jnp.arange(max(WIDTHS))[None, :] >= jnp.array(WIDTHS)[:, None]  # [L, f]

    def one(array: jax.Array, axis: int) -> jax.Array:
        shape = [array.shape[0], *[1] * (array.ndim - 1)]
        shape[axis] = array.shape[axis]
        return jnp.where(idle.reshape(shape), array, 0)

    return {name: one(mlp[name], axis) for name, axis in CHANNEL_AXES.items() if name in mlp}


@pytest.mark.parametrize(
    ("variant", "settings"), [("llama_two_kv_heads", SETTINGS), ("opt_gelu", FULL)], ids=["lora", "full"]
)
def test_what_fills_up_stays_zero(variant: str, settings: FinetuneSettings):
    """The slope of gelu at zero is not zero, unlike that of relu and of gated MLPs; biases, only the second trains."""
    model = tiny(variant)
    mlp = model.params["layers"]["mlp"]
    mlp = mlp | {name: mlp[name] - idle for name, idle in beyond(mlp).items()}
    params = model.params | {"layers": model.params["layers"] | {"mlp": mlp}}
    narrow = spap.Model(model.config.with_widths(WIDTHS), params, model.source)
    result = spap.finetune(narrow, counting(), settings=settings)
    assert result.report.kept.step > 0
    trained = result.model.params["layers"]["mlp"]
    assert not any(idle.any() for idle in beyond(trained).values())
    assert all((trained[name] != mlp[name]).any() for name in CHANNEL_AXES if name in mlp and settings.full)
    assert (trained["down"] != mlp["down"]).any()
