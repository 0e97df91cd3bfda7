"""A model as an NNX module, for training loops and tools of Flax NNX, and the way back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict

from spap_jax.errors import UserError
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Decoder, Params
from spap_jax.models.model import Model, checked

_DTYPES = ("float32", "bfloat16", "float16")


class NnxDecoder(nnx.Module):
    """A decoder whose weights are ``nnx.Param``; `to_nnx` makes it and describes its attributes."""

    def __init__(
        self, config: DecoderConfig, params: Params, dtype: Any, policy: Callable[..., bool] | None = None
    ) -> None:
        self.config, self.dtype, self.policy = config, dtype, policy
        variables = jax.tree.map(nnx.Param, params)
        self.embed = nnx.data(variables["embed"])
        self.blocks = nnx.data(variables["layers"])
        self.head = nnx.data(variables["head"])

    @property
    def params(self) -> Params:
        """The arrays as the parameter tree of a `Model`."""
        return nnx.as_pure({"embed": self.embed, "layers": self.blocks, "head": self.head})

    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """Computes float32 logits. tokens: [B, T] -> [B, T, v]; ``valid`` [B, T] is False for padding."""
        return Decoder(self.config, self.dtype, self.policy).apply({"params": self.params}, tokens, valid)  # type: ignore[return-value]


def to_nnx(model: Model, dtype: Any = jnp.float32, policy: Callable[..., bool] | None = None) -> NnxDecoder:
    """Returns a model as an ``nnx.Module`` from token ids [B, T] to float32 logits [B, T, v].

    Its attributes ``embed``, ``blocks`` and ``head`` are nested dicts of ``nnx.Param``, named and shaped as the parts
    ``embed``, ``layers`` and ``head`` of the tree in ``docs/architecture.md``. Every array in ``blocks`` is stacked
    over the layers, as ``nnx.scan`` stacks them: ``module.blocks["mlp"]["down"]`` is [L, f, d]. Layers narrower than
    the widest are padded with zeros, whose gradients are 0. A tied embedding is one parameter,
    ``module.embed["tokens"]`` [v, e].

    The parameters are the model's own arrays until a step replaces them: a program that they are donated to takes them
    from the model as well.

    Args:
        dtype: Data type of matrices and activations while it computes; parameters keep theirs.
        policy: What a block keeps for its backward pass, one of ``jax.checkpoint_policies``; None keeps everything.
    """
    model = checked(model)
    return NnxDecoder(model.config, model.params, dtype, policy)


def from_nnx(module: nnx.Module, like: Model) -> Model:
    """Returns the weights of a module of `to_nnx` as a model, bit for bit and in their data types.

    The model has no card and no reports, since those of ``like`` do not describe weights that were trained since.

    Args:
        like: The model that the module was made of, for its config and source.

    Raises:
        UserError: The module is another one, or a weight is missing, unexpected, of another shape or not floating.
    """
    like = checked(like)
    if not isinstance(module, NnxDecoder) or module.config != like.config:
        raise UserError(f"this {type(module).__name__} is not a module of {like!r}: pass what to_nnx returned for it.")
    params = module.params
    given: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    wanted: dict[str, Any] = dict(flatten_dict(like.params, sep="/"))
    fitting = {name for name in given if name in wanted and _fits(given[name], wanted[name].shape)}
    if wrong := sorted((given.keys() | wanted.keys()) - fitting):
        raise UserError(
            f"the module's weights {', '.join(wrong)} do not fit {like!r}: they must be arrays of {', '.join(_DTYPES)} "
            "with the shapes that to_nnx gave them."
        )
    return Model(like.config, params, dataclasses.replace(like.source, accounts=()))


def _fits(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether the value of a parameter, which tools may have replaced by another object, is a weight of the shape."""
    return isinstance(value, jax.Array) and value.shape == shape and value.dtype.name in _DTYPES
