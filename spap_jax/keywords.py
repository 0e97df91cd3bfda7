"""Settings as keyword arguments of `prune` and `finetune`, beside their own parameters.

Type checkers read the names and types from a ``TypedDict``, which they understand only if it is written out. Users read
them, with defaults and descriptions, in the signature and the help of the function, which are made from the settings. A
test checks that the two agree.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar, get_type_hints

from spap_jax.settings import Allocation, EffortName, FloatDtype, JointWeights, Method, Remat, Schedule, Update

Function = TypeVar("Function", bound=Callable[..., Any])


class PruneChanges(TypedDict, total=False):
    """The fields of ``PruneSettings``, as keyword arguments."""

    sparsity: float
    attention_sparsity: float
    allocation: Allocation
    round_to: int | None
    method: Method
    update: Update
    schedule: Schedule
    seed: int
    ridge: float | None
    correction: float | None
    penalty: float
    penalty_stages: int
    swap_rounds: int
    held_out: float
    effort: EffortName
    sampled: int
    rounds: int
    steps: int | None
    step_tokens: int
    learning_rate: float
    joint_passes: float | None
    joint_text_weight: float | None
    joint_weights: JointWeights
    joint_last: int | None
    joint_blocks: int | None
    joint_tokens: int | None
    joint_learning_rate: float | None
    batch_tokens: int
    stream_dtype: FloatDtype
    moment_dtype: FloatDtype
    compute_dtype: FloatDtype | None
    remat: Remat | None


class FinetuneChanges(TypedDict, total=False):
    """The fields of ``FinetuneSettings``, as keyword arguments."""

    full: bool
    lora_rank: int | None
    lora_alpha: float
    steps: int
    learning_rate: float | None
    weight_decay: float
    step_sequences: int
    batch_tokens: int
    held_out: float
    check_every: int
    seed: int
    moment_dtype: FloatDtype
    compute_dtype: FloatDtype | None
    remat: Remat


def showing(settings: type, changes: type) -> Callable[[Function], Function]:
    """Shows the fields of a dataclass in the signature and the help of a function, in place of its ``**changes``.

    Args:
        settings: The dataclass; its docstring describes the fields under ``Attributes:``.
        changes: The ``TypedDict`` of the same fields.
    """
    shown = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(settings, name), annotation=kind)
        for name, kind in get_type_hints(changes).items()
    ]
    meanings = inspect.cleandoc(settings.__doc__ or "").partition("Attributes:\n")[2]

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        before, changes, after = inspect.cleandoc(function.__doc__ or "").partition("    **changes:")
        if changes:
            function.__doc__ = before + meanings + "\n\n" + after.partition("\n\n")[2]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return decorate
