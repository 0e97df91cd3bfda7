"""The `Model`: a config, parameters, and the source, which is needed to write it back in its original form."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax

from spap_jax.errors import UserError
from spap_jax.models import FAMILIES, DecoderConfig, Family, Params, cost
from spap_jax.numerics import is_concrete
from spap_jax.quantities import count_text, range_text


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        name: The name that the user gave: a folder or a hub id.
        folder: The local folder with its tokenizer and generation files; None for a model made in memory.
        config_text: Its config.json, verbatim. It is written back with only the sizes and biases edited, because
            regenerating a config loses or renames fields that some loader reads.
        head_stored: Whether the checkpoint of a tied model stores the head in addition to the embedding.
        accounts: Names and texts of the card and the reports of weights that were pruned or trained since the folder
            was read; None for the weights of the folder, whose accounts are in it.
    """

    name: str
    folder: Path | None
    config_text: str = dataclasses.field(repr=False)
    head_stored: bool = False
    accounts: tuple[tuple[str, str], ...] | None = dataclasses.field(default=None, repr=False)

    @property
    def weights_folder(self) -> Path | None:
        """The folder whose weights the model has; None if they were made in memory."""
        return self.folder.resolve() if self.folder and self.accounts is None else None


UNKNOWN = Source("a model from a jitted function", None, "{}", accounts=())
"""The source of a model that a jitted function returned, which may have been compiled for another model."""


class _Aside:
    """A value that is kept in a tree's structure but does not take part in comparisons."""

    def __init__(self, value: Source) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Aside)

    def __hash__(self) -> int:
        return 0


class ModelChanges(TypedDict, total=False):
    """The fields of `Model`, for ``Model.replace``."""

    config: DecoderConfig
    params: Params
    source: Source


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A decoder, as ``spap.load`` returns it and ``spap.save`` accepts it.

    A model is a JAX pytree whose leaves are the arrays of ``params``. Only ``config`` is static: a jitted function
    compiles once for all models of a config, and returns a model with the source `UNKNOWN`; ``replace`` gives it
    another. ``jax.tree.map`` keeps the source of its first model, and ``jax.grad`` returns a model that holds the
    gradients. Two models are equal only if they are the same object.

    Attributes:
        params: The parameter tree of ``docs/architecture.md``, in the dtype of the checkpoint.
    """

    config: DecoderConfig
    params: Params
    source: Source

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[DecoderConfig, _Aside]]:
        """Returns the parameters, and what is static."""
        return ((jax.tree_util.GetAttrKey("params"), self.params),), (self.config, _Aside(self.source))

    @classmethod
    def tree_unflatten(cls, static: tuple[DecoderConfig, _Aside], children: tuple[Params]) -> "Model":
        """Inverts `tree_flatten_with_keys`."""
        (params,), (config, source) = children, static
        return cls(config, params, source.value if is_concrete(params) else UNKNOWN)

    @property
    def family(self) -> Family:
        """The model's family: its config mapping and rules."""
        return FAMILIES[self.config.family]

    def replace(self, **changes: Unpack[ModelChanges]) -> "Model":
        """A copy with another ``config``, ``params`` or ``source``; nothing is checked, and arrays are shared."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        c = self.config
        # Under a transformation of JAX a leaf can be anything, and a repr must not fail.
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(self.params) if hasattr(leaf, "dtype")}
        parts = (
            f"{c.layers} layers",
            f"width {c.width}",
            f"{range_text(c.layer_widths)} MLP channels",
            f"{count_text(cost.parameters(self.family, c).total)} parameters",
            *sorted(dtypes),
        )
        return f"Model({c.family}, {', '.join(parts)}, source {self.source.name!r})"


def checked(model: object) -> Model:
    """Returns the argument if it is a `Model`.

    Raises:
        UserError: it is something else; the message says how to get a model from it.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        raise UserError(f"{name!r} is the name of a model, not a model: call spap.load({name!r}) and pass the result.")
    way = "its .model" if isinstance(getattr(model, "model", None), Model) else "what spap.load returns"
    raise UserError(f"{type(model).__name__} is not a model: pass {way}.")
