"""Answers that a model writes to prompts: conversations to calibrate on, of which only the prompts are given."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from spap_jax.data.conversations import Conversation, check_template, encode_prompt
from spap_jax.data.in_memory import Data
from spap_jax.data.prompts import load_prompts
from spap_jax.data.tokenizing import load_tokenizer
from spap_jax.errors import UserError, option, warn
from spap_jax.evaluation.generation import Sampling, check_sampling, end_tokens
from spap_jax.evaluation.sequences import continuations, replicas_of
from spap_jax.models.model import Model, checked
from spap_jax.numerics import generation_dtype
from spap_jax.settings import is_count

Row = dict[str, list[dict[str, Any]]]
"""A conversation as data sets have it: its "messages"."""


def answer(
    model: Model,
    prompts: Data,
    *,
    tokenizer: str | Path | Any | None = None,
    answers: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 16384,
    devices: int | Sequence[Any] | None = None,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Lets a model answer prompts, which makes conversations of them to calibrate on.

    Every answer has its own random key, so the number of devices and the size of a batch do not change it, up to
    rounding: a GPU or TPU computes in the data type of the weights.

    Args:
        model: A chat model, usually the dense one.
        prompts: The path or address of a .jsonl, .json or .parquet file, a data set of the hub, or rows in any
            iterable: texts, or dicts with a ``prompt`` or with ``messages``. What the assistant says at the end of a
            conversation is left out.
        tokenizer: A model folder, a hub id or a tokenizer object of transformers. By default the model's own.
        answers: Number of answers to each prompt.
        max_new_tokens: Maximum number of tokens of an answer; it is cut off there, and a warning says how many were.
        temperature: Divides the logits; at 1 the model writes by its own distribution, at 0 the likeliest token.
        top_p: Sample from the smallest set of the likeliest tokens whose total probability reaches this value.
        seed: Random seed.
        batch_tokens: Number of tokens that a device processes at once, the prompt's and the new ones together.
        devices: JAX devices among which a batch is split, or how many of the local ones. By default all local
            devices, in groups that share the weights if one device cannot hold them.
        watch: Called with the number of answers written and the total.

    Returns:
        For each prompt in turn its answers, as dicts with the ``messages`` of a conversation, which ``load_tokens``
        takes.

    Raises:
        UserError: The prompts cannot be read or do not fit the model, it has no chat template, or a setting is out of
            its range.
    """
    model, sampling = checked(model), Sampling(float(temperature), top_p=float(top_p))
    _check_settings(sampling, answers=answers, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
    asked = load_prompts(prompts)
    named = (model.source.folder or model.source.name) if tokenizer is None else tokenizer
    writer: Any = load_tokenizer(named) if isinstance(named, str | Path) else named
    once = _encoded(asked, writer, max_new_tokens, model.config.positions)
    encoded = [tokens for tokens in once for _ in range(answers)]
    ends, key = {*end_tokens(model), writer.eos_token_id}, jax.random.key(seed)

    def ended(tokens: list[int]) -> bool:
        return not ends.isdisjoint(tokens)

    replicas, written, dtype = replicas_of(model, devices), {}, generation_dtype(model.params)
    cut_off = 0
    watch(0, len(encoded))
    for found in continuations(replicas, encoded, max_new_tokens, ended, batch_tokens, sampling, key, dtype):
        for index, tokens in found.items():
            own = list(itertools.takewhile(lambda token: token not in ends, tokens))
            cut_off += len(own) == len(tokens)
            written[index] = {"role": "assistant", "content": writer.decode(own, skip_special_tokens=True)}
        watch(len(written), len(encoded))
    if cut_off:
        warn(
            f"{cut_off} of {len(encoded)} answers were cut off after {max_new_tokens} tokens, and the conversations "
            f"read as if they ended there: give a larger {option('max_new_tokens')}."
        )
    return [{"messages": [*asked[index // answers].messages, written[index]]} for index in range(len(encoded))]


def _check_settings(sampling: Sampling, **counts: int) -> None:
    """Checks the settings that the command line and Python share."""
    for name, value in counts.items():
        if not is_count(value):
            raise UserError(f"{option(name)} must be at least 1, not {value!r}: give a positive whole number.")
    check_sampling(sampling, jax.random.key(0))
    if counts["answers"] > 1 and not sampling.temperature:
        raise UserError(f"at temperature 0 all answers to a prompt are the same: give {option('answers', 1)}.")


def _encoded(prompts: list[Conversation], tokenizer: Any, new: int, positions: int) -> list[list[int]]:
    """Returns the token ids of prompts to which ``new`` tokens can be added."""
    check_template(tokenizer)
    encoded = [encode_prompt(tokenizer, each) for each in prompts]
    for each, tokens in zip(prompts, encoded, strict=True):
        if len(tokens) + new > positions:
            raise UserError(
                f"{each.place} has {len(tokens)} tokens, and {new} new ones do not fit the model's {positions} "
                f"positions with them: leave it out, or lower {option('max_new_tokens')}."
            )
    return encoded
