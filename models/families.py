"""What a family's table says, and the reading of a Hugging Face config through it.

A table is refused rather than guessed at: a field that is set and that nobody reads is an error, for a model that loads
and computes something else is worse than one that does not load.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from spap_jax.errors import UserError, option
from spap_jax.models import decoder
from spap_jax.models.config import DecoderConfig, Rope
from spap_jax.models.kinds import check_config, of_kind
from spap_jax.models.rules import Rule
from spap_jax.models.widths import WIDTHS_FIELD, with_own_widths


def _is_unset(value: Any) -> bool:
    return value in (None, False, [], {}, "")


INERT = frozenset(
    # Names, and settings of training, storage and generation: they do not change what a forward pass computes.
    (
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "_name_or_path",
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dropout",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "hidden_dropout",
        "id2label",
        "init_std",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "layerdrop",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_labels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    )
)


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
        accepted: Hugging Face fields that are understood only with values that pass a test.
        inert: Fields of this family alone that do not change what a forward pass computes.
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
            UserError: a field is missing, is not understood, or has a value that the port does not compute.
        """
        refuse_unknown(theirs, self)
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


def refuse_unknown(theirs: dict[str, Any], family: Family) -> None:
    """Raises UserError listing every set field that the family's table does not know or accept."""
    if theirs.get("quantization_config"):
        raise UserError(
            "this checkpoint is quantised (quantization_config is set), and pruning needs the weights themselves: "
            "start from the unquantised checkpoint."
        )
    known = {field.name for field in family.fields.values()} | INERT | family.inert | {WIDTHS_FIELD}
    if "rope" not in family.constants:
        known |= {"rope_theta", "rope_scaling", "rope_parameters"}
    wrong = [
        f"{name}={value!r}"
        for name, value in sorted(theirs.items())
        if name not in known and not family.accepted.get(name, _is_unset)(value)
    ]
    if wrong:
        raise UserError(
            f"config.json sets {', '.join(wrong)}, which this port of {family.name} does not compute; "
            "pruning it would give a wrong model, so it is refused."
        )


def _field_value(theirs: dict[str, Any], field: Field, values: dict[str, Any], family: str) -> Any:
    value = theirs.get(field.name, None if field.absent or field.default is ... else field.default)
    if value is None and field.absent is not None:
        return field.absent(values)
    if value is None:
        raise UserError(f"config.json has no {field.name}, which every {family} model needs: get the model's own.")
    return of_kind(field.name, value, int if field.default is ... else type(field.default))


_ROPE_FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_positions": "original_max_position_embeddings",
    },
}


def read_rope(theirs: dict[str, Any]) -> Rope:
    """Reads both forms: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters`` with the base inside.

    Raises:
        UserError: the scaling is of a kind that is not implemented, or lacks a number.
    """
    old, new = (of_kind(name, theirs.get(name) or {}, dict) for name in ("rope_scaling", "rope_parameters"))
    given = old | new
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    theta = given.pop("rope_theta", theirs.get("rope_theta", 10000.0))
    if kind not in tuple(_ROPE_FIELDS):
        raise UserError(f"rope scaling {kind!r} is not implemented; the port computes {', '.join(_ROPE_FIELDS)}.")
    names = _ROPE_FIELDS[kind]
    if missing := sorted(set(names.values()) - set(given)):
        raise UserError(f"config.json's rope scaling {kind!r} lacks {', '.join(missing)}.")
    unread = {name: value for name, value in given.items() if name not in names.values() and not _is_unset(value)}
    unread = {name: value for name, value in unread.items() if (name, value) != ("partial_rotary_factor", 1.0)}
    if unread:
        raise UserError(f"config.json's rope scaling {kind!r} sets {unread}, which this port does not compute.")
    numbers = {ours: _positive(name, given[name]) for ours, name in names.items()}
    if kind == "llama3" and numbers["low_freq_factor"] == numbers["high_freq_factor"]:
        raise UserError(
            "config.json gives the same low_freq_factor and high_freq_factor, which llama3 cannot have: correct it."
        )
    return Rope(theta=float(_positive("rope_theta", theta)), scaling=kind, **numbers)


def _positive(name: str, value: Any) -> Any:
    number = of_kind(name, value, float)
    if number == 0:
        raise UserError(f"config.json gives {name} = 0, which must be positive: correct it.")
    return number
