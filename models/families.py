"""What a family's table says, and the reading of a Hugging Face config through it.

A field is read by the family's table, is known to change nothing, or is accepted with some values only; a config with
another value is refused, for a model that loads and computes something else is worse than one that does not load. What
transformers does not read either is ignored: it cannot change what the model computes.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from spap_jax.errors import UserError, option
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig
from spap_jax.models.kinds import check_config, of_kind
from spap_jax.models.published import ACCEPTED, INERT, REASONS
from spap_jax.models.rope import ROPE_FIELDS, read_rope
from spap_jax.models.rules import Rule
from spap_jax.models.widths import WIDTHS_FIELD, with_own_widths


@dataclasses.dataclass(frozen=True)
class Field:
    """Where a field of ``DecoderConfig`` comes from.

    Attributes:
        name: The Hugging Face name.
        default: Its value where config.json does not have it; ``...`` where it must.
        absent: Takes the fields read so far and gives the value where the name is missing or null.
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
        fields: Field of ``DecoderConfig`` -> where it comes from, in the order of reading.
        constants: Fields of ``DecoderConfig`` that are the same for the whole family.
        derived: Takes the fields read and gives more of them (or changes them).
        accepted: Hugging Face fields of this family alone that the port computes only with values that pass a test.
        inert: Fields of this family alone that do not change what a forward pass computes, whatever their value.
        rules: Every tensor that a member may have; the config decides which of them it has.
        bare_prefix: What names of tensors start with in checkpoints saved without the head, and its full form.
        recomputed: Pattern of buffers that old checkpoints store and that are computed from the config.
        heads_divide_width: Whether transformers refuses a width that is no multiple of the heads, head_dim or not.
    """

    name: str
    architecture: str
    fields: Mapping[str, Field]
    constants: Mapping[str, Any]
    rules: tuple[Rule, ...]
    derived: Callable[[dict[str, Any]], dict[str, Any]] = lambda read: {}
    accepted: Mapping[str, Callable[[Any], bool]] = dataclasses.field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    bare_prefix: tuple[str, str] = ("", "")
    recomputed: str = r"(?!)"
    heads_divide_width: bool = False

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """The fields of config.json that transformers reads in this family, whether or not they change anything."""
        rope = set() if "rope" in self.constants else ROPE_FIELDS
        own = {field.name for field in self.fields.values()}
        return frozenset(own | rope | INERT | ACCEPTED.keys() | self.inert | self.accepted.keys() | {WIDTHS_FIELD})

    def ignored(self, theirs: dict[str, Any]) -> list[str]:
        """The fields of a parsed config.json that transformers does not read, sorted: they cannot change anything."""
        return sorted(theirs.keys() - self.known)

    @property
    def width_field(self) -> str:
        """The field of config.json that holds the MLP width."""
        return self.fields["intermediate"].name

    @property
    def mlp_bias_field(self) -> str | None:
        """The field of config.json that gives the MLP its biases and decides nothing else; None where there is none."""
        field = self.fields.get("mlp_bias")
        return field.name if field else None

    def read_config(self, theirs: dict[str, Any]) -> DecoderConfig:
        """Reads a parsed config.json.

        Raises:
            UserError: a field is missing, or has a value that the port does not compute.
        """
        refuse_uncomputed(theirs, self)
        values = dict(self.constants)
        for ours, field in self.fields.items():
            values[ours] = _field_value(theirs, field, values, self.name)
        if "rope" not in values:
            values["rope"] = read_rope(theirs)
        values |= self.derived(values)
        names = {field.name for field in dataclasses.fields(DecoderConfig)}
        config = DecoderConfig(family=self.name, **{k: v for k, v in values.items() if k in names})
        check_config(config)
        return with_own_widths(config, theirs.get(WIDTHS_FIELD))

    def check_heads(self, dense: DecoderConfig, kv_heads: int) -> None:
        """Raises UserError if no stock loader would take the model with fewer key/value heads, and heads as wide."""
        if "head_dim" not in self.fields:
            raise UserError(
                f"stock loaders of {self.architecture} compute the width of a head from the number of heads, since its "
                "projections are square, so no heads can be removed from its attention: leave "
                f"{option('attention_sparsity')} out."
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
        """The rules of the tensors that this member has."""
        present = parameter_paths(config)
        return tuple(rule for rule in self.rules if rule.ours in present)

    def letters(self, path: str) -> list[str]:
        """The axis letters of one parameter, of one layer where it is stacked; none if no rule has it."""
        return next((rule.letters for rule in self.rules if rule.ours == path), [])

    def canonical(self, name: str) -> str | None:
        """The full name of a checkpoint's tensor; None for a buffer that is recomputed."""
        if re.search(self.recomputed, name):
            return None
        bare, full = self.bare_prefix
        return full + name[len(bare) :] if bare and name.startswith(bare) else name


@functools.lru_cache(maxsize=64)
def parameter_paths(config: DecoderConfig) -> frozenset[str]:
    """Paths ("layers/mlp/up") of the parameters that the modules declare for a config, whatever its sizes."""
    sizes = {"vocabulary": 1, "layers": 1, "intermediate": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "positions": 1}
    sizes |= {"width": 1, "embedding": 1 if config.embedding == config.width else 2, "widths": None}
    tree = jax.eval_shape(lambda: decoder.init(dataclasses.replace(config, **sizes), jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return frozenset(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)


def refuse_uncomputed(theirs: dict[str, Any], family: Family) -> None:
    """Raises UserError listing every field that transformers reads and whose value the port does not compute."""
    tests = {**ACCEPTED, **family.accepted}
    read = sorted(theirs.keys() & tests.keys() - family.inert)
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
    value = theirs.get(field.name, None if field.absent or field.default is ... else field.default)
    if value is None and field.absent is not None:
        return field.absent(values)
    if value is None:
        raise UserError(f"config.json has no {field.name}, which every {family} model needs: get the model's own.")
    return of_kind(field.name, value, int if field.default is ... else type(field.default))
