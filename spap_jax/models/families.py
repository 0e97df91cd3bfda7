"""The table of a model family, and how it reads a Hugging Face config.

Each field is either read by the family's table, known to have no effect, or accepted with certain values only; another
value is refused: a model that loads and computes something else is worse than one that does not load.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from spap_jax.errors import UserError, option
from spap_jax.models import decoder
from spap_jax.models.config import AttentionKind, DecoderConfig
from spap_jax.models.kinds import check_config, of_kind
from spap_jax.models.published import ACCEPTED, INERT, REASONS
from spap_jax.models.rope import ROPE_FIELDS, read_rope
from spap_jax.models.rules import Rule
from spap_jax.models.widths import WIDTHS_FIELD, with_own_widths


@dataclasses.dataclass(frozen=True)
class Field:
    """Source of a field of ``DecoderConfig``.

    Attributes:
        default: Value if config.json lacks the field; ``...`` if there is no fixed default.
        absent: Computes the value from the fields read so far if the field is null, or missing without a default.
    """

    name: str
    default: Any = ...
    absent: Callable[[dict[str, Any]], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: ``model_type`` in config.json.
        architecture: The class that stock loaders instantiate.
        fields: Field of ``DecoderConfig`` -> its source, in the order of reading.
        constants: Fields of ``DecoderConfig`` that are the same for the entire family.
        rules: Every tensor that a model of the family may have; the config decides which of them exist.
        attention_kinds: Computes ``attention_kinds`` and ``layer_kinds`` from config.json and the fields read from it;
            by default one rotary embedding, and one window if there is such a field.
        kind_fields: Computes the fields of config.json that say the kind of each block, from ``layer_kinds``.
        derived: Computes additional or changed fields from those read.
        accepted: Hugging Face fields specific to this family, each with a test for the values that the port supports.
        inert: Fields specific to this family that never change what a forward pass computes.
        recomputed: Pattern of buffers that old checkpoints store and that are recomputed from the config.
        fused: Name of a tensor that holds others, one below another -> their names, which are those of rules.
        heads_divide_width: Whether transformers requires a multiple of the number of heads as width despite head_dim.
    """

    name: str
    architecture: str
    fields: Mapping[str, Field]
    constants: Mapping[str, Any]
    rules: tuple[Rule, ...]
    attention_kinds: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda theirs, read: {
        "attention_kinds": (AttentionKind(read_rope(theirs), read.get("window")),)
    }
    kind_fields: Callable[[tuple[int, ...]], dict[str, Any]] = lambda kinds: {}
    derived: Callable[[dict[str, Any]], dict[str, Any]] = lambda read: {}
    accepted: Mapping[str, Callable[[Any], bool]] = dataclasses.field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    recomputed: str = r"\.rotary_emb\.inv_freq$"
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    heads_divide_width: bool = False

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """Fields of config.json that transformers reads for this family, whether or not they have an effect."""
        rope = set() if "attention_kinds" in self.constants else ROPE_FIELDS
        own = {field.name for field in self.fields.values()}
        return frozenset(own | rope | INERT | ACCEPTED.keys() | self.inert | self.accepted.keys() | {WIDTHS_FIELD})

    def ignored(self, theirs: dict[str, Any]) -> list[str]:
        """Lists the fields of a parsed config.json that transformers does not read, sorted; they have no effect."""
        return sorted(theirs.keys() - self.known)

    @property
    def width_field(self) -> str:
        """The field of config.json that stores the MLP width."""
        return self.fields["intermediate"].name

    @property
    def mlp_bias_field(self) -> str | None:
        """The field of config.json that controls the MLP's biases and nothing else; None if there is none."""
        field = self.fields.get("mlp_bias")
        return field.name if field else None

    def read_config(self, theirs: dict[str, Any]) -> DecoderConfig:
        """Reads a parsed config.json.

        Raises:
            UserError: a field is missing, or has a value that the port does not support.
        """
        refuse_uncomputed(theirs, self)
        values = dict(self.constants)
        for ours, field in self.fields.items():
            values[ours] = _field_value(theirs, field, values, self.name)
        if "attention_kinds" not in values:
            values |= self.attention_kinds(theirs, values)
        values |= self.derived(values)
        names = {field.name for field in dataclasses.fields(DecoderConfig)}
        config = DecoderConfig(family=self.name, **{k: v for k, v in values.items() if k in names})
        check_config(config)
        return with_own_widths(config, theirs.get(WIDTHS_FIELD))

    def check_heads(self, dense: DecoderConfig, kv_heads: int) -> None:
        """Raises UserError if no stock loader would accept the model with ``kv_heads`` heads at the same head width."""
        if "head_dim" not in self.fields:
            raise UserError(
                f"stock loaders of {self.architecture} compute the width of a head from the number of heads, since its "
                "projections are square, so no heads can be removed from its attention: leave "
                f"{option('attention_sparsity')} out."
            )
        if dense.query_key_norm == "all":
            raise UserError(
                f"{self.architecture} normalises the queries and keys of all heads together, so removing heads would "
                f"change those that stay: leave {option('attention_sparsity')} out."
            )
        heads = {k: dense.with_kv_heads(k).heads for k in range(1, dense.kv_heads + 1)}
        if self.heads_divide_width and dense.width % heads[kv_heads]:
            fits = [f"{1 - k / dense.kv_heads:.3g}" for k in reversed(heads) if dense.width % heads[k] == 0]
            raise UserError(
                f"stock loaders of {self.architecture} take a width of {dense.width} only with a number of heads that "
                f"divides it, and {heads[kv_heads]} does not: set "
                f"{option('attention_sparsity')} to {' or '.join(fits)}."
            )

    def rules_for(self, config: DecoderConfig) -> tuple[Rule, ...]:
        """Returns the rules of the tensors that a model with this config has."""
        present = parameter_paths(config)
        rules = (rule for rule in self.rules if rule.ours in present)
        return tuple(rule.named(config.prefix, config.head_name) for rule in rules)

    def letters(self, path: str) -> list[str]:
        """Returns the axis letters of a parameter, without the stacking axis; empty if no rule matches."""
        return next((rule.letters for rule in self.rules if rule.ours == path), [])

    def canonical(self, name: str, config: DecoderConfig) -> str | None:
        """Returns the full name of a checkpoint's tensor; None for a buffer that is recomputed, or what is not ours.

        A checkpoint that was saved without the head has names without the first part, which transformers adds too.
        """
        if re.search(self.recomputed, name):
            return None
        if config.in_tower:
            return name if name.startswith((config.prefix, config.head_name)) else None
        return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def parameter_paths(config: DecoderConfig) -> frozenset[str]:
    """Returns the paths ("layers/mlp/up") of the parameters that the modules declare for a config of any size."""
    sizes = {"vocabulary": 1, "layers": 1, "intermediate": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "positions": 1}
    sizes |= {"width": 1, "embedding": 1 if config.embedding == config.width else 2, "widths": None}
    one = dataclasses.replace(config.attending_like(0), **sizes)
    return frozenset(flatten_dict(decoder.shapes(one), sep="/"))


def refuse_uncomputed(theirs: dict[str, Any], family: Family) -> None:
    """Raises UserError listing every field that transformers reads with a value that the port does not support."""
    tests = {**ACCEPTED, **family.accepted}
    computed = family.inert | {field.name for field in family.fields.values()}
    read = sorted(theirs.keys() & tests.keys() - computed)
    wrong = [name for name in read if not tests[name](theirs[name])]
    for name in wrong:
        if name in REASONS:
            raise UserError(REASONS[name])
    if wrong:
        raise UserError(
            f"config.json sets {', '.join(f'{name}={theirs[name]!r}' for name in wrong)}, which this port of "
            f"{family.name} does not compute; pruning it would give a wrong model, so it is refused."
        )


def _field_value(theirs: dict[str, Any], field: Field, values: dict[str, Any], family: str) -> Any:
    value = theirs.get(field.name, None if field.default is ... else field.default)
    if value is None and field.absent is not None:
        return field.absent(values)
    if value is None:
        raise UserError(f"config.json has no {field.name}, which every {family} model needs: get the model's own.")
    return of_kind(field.name, value, int if field.default is ... else type(field.default))
