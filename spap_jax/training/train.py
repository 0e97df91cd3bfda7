"""The training loop: several optimizer steps in one program, then an evaluation on the held-out sequences."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spap_jax import devices
from spap_jax.errors import NotFiniteError, UserError, option
from spap_jax.evaluation.perplexity import check_length
from spap_jax.model import Model
from spap_jax.models.config import DecoderConfig
from spap_jax.models.decoder import Params
from spap_jax.numerics import full_precision
from spap_jax.placement import placed
from spap_jax.pruning.streams import chunked, largest_divisor
from spap_jax.settings import FinetuneSettings
from spap_jax.training import lora
from spap_jax.training.objective import Decoder, loss_sum
from spap_jax.training.report import Check

_WARM_UP = 0.1
"""Fraction of the steps during which the learning rate warms up."""

_LARGEST_GRADIENT = 1.0
"""Global norm to which larger gradients are clipped."""

Configs = tuple[DecoderConfig, DecoderConfig | None]
"""Configs of the model that is trained and of its teacher."""

Begun = tuple[dict[str, Any], tuple[Check, ...]]
"""The stored state of a run: the leaves of its last stage, and its checks."""


class State(NamedTuple):
    """State between two steps.

    Attributes:
        trained: The parameters that are trained: updates of projections, or all weights in float32.
        optimizer: The optimizer state.
    """

    trained: Params
    optimizer: Any


class Stage(NamedTuple):
    """State of the training after an evaluation on the held-out sequences.

    Attributes:
        state: State from which the next steps start; they donate it, so do not use it once they have begun.
        best: The trained parameters with the lowest loss on the held-out sequences so far.
        checks: All evaluations so far; the first is from before any step.
    """

    state: State
    best: Params
    checks: tuple[Check, ...]

    def leaves(self) -> dict[str, Any]:
        """Returns the arrays of the stage keyed by number, for storage."""
        return {str(number): array for number, array in enumerate(jax.tree.leaves((self.state, self.best)))}

    def with_leaves(self, leaves: dict[str, Any], checks: tuple[Check, ...]) -> "Stage":
        """Returns a stage of the same run with these arrays and checks."""
        mine, tree = jax.tree.flatten((self.state, self.best))
        theirs = [jax.device_put(leaves[str(number)], like.sharding) for number, like in enumerate(mine)]
        state, best = tree.unflatten(theirs)
        return Stage(state, best, checks)

    @property
    def least(self) -> float:
        """The lowest held-out loss so far, which is that of ``best``."""
        return min(check.held_out for check in self.checks if check.taken)


def stages(
    model: Model, tokens: np.ndarray, teacher: Model | None, settings: FinetuneSettings, begun: Begun | None = None
) -> Iterator[Stage]:
    """Trains a model; ``result`` returns the weights of the last stage's best.

    Args:
        model: The model to train.
        tokens: Token blocks [B, T]; the last of them are held out.
        teacher: The dense model whose predictions are the target; None for the next token of the text.
        settings: Settings of the training.
        begun: The state of an interrupted run with the same identity: the leaves of its last stage, and all checks.

    Yields:
        The stage at the start, and after every ``check_every`` steps.

    Raises:
        UserError: sequences are too few, too short or too long, vocabularies differ, or the loss is no longer finite.
    """
    check(model, tokens, teacher, settings)
    fitted, held_out = _split(tokens, settings.held_out)
    order = _order(len(fitted), settings)
    configs = (model.config, teacher and teacher.config)
    params = placed(model.config, model.params)
    guide = placed(teacher.config, teacher.params) if teacher else None
    judged = devices.spread(_chunks(held_out, settings.batch_tokens))

    trained = placed(model.config, _start(settings, params, jax.random.key(settings.seed)))
    stage = Stage(State(trained, _optimizer_state(settings, trained)), jax.tree.map(jnp.copy, trained), ())
    if begun is None:
        first = Check(0, (), float(_held_out_loss(configs, params, guide, judged)), True)
        _check_finite(first.held_out, 0)
        stage = stage._replace(checks=(first,))
    else:
        stage = stage.with_leaves(*begun)
    yield stage

    for start in range(stage.checks[-1].step, settings.steps, settings.check_every):
        batches = fitted[order[start : start + settings.check_every]]  # [K, B, T]
        state, losses = _steps(configs, settings, params, guide, stage.state, devices.spread(batches.swapaxes(0, 1)))
        loss = float(_held_out_loss(configs, written(settings, params, state.trained), guide, judged))
        step = start + len(batches)
        _check_finite(loss, step)
        taken = loss < stage.least
        best = jax.tree.map(jnp.copy, state.trained) if taken else stage.best
        now = Check(step, tuple(np.asarray(losses, np.float64).tolist()), loss, taken)
        stage = Stage(state, best, (*stage.checks, now))
        yield stage


def result(model: Model, stage: Stage, settings: FinetuneSettings) -> Params:
    """Returns the weights that were best on the held-out sequences; the initial ones if no step improved on them."""
    params = devices.everywhere(model.params)
    return written(settings, params, stage.best) if any(check.taken for check in stage.checks[1:]) else params


def check(model: Model, tokens: np.ndarray, teacher: Model | None, settings: FinetuneSettings) -> None:
    """Checks that the model can be trained on the tokens, before any work.

    Raises:
        UserError: sequences are too few, too short or too long, or vocabularies differ.
    """
    if len(tokens) < 2 or tokens.shape[1] < 2:
        raise UserError(
            f"training needs at least two sequences of at least two tokens, one of them to judge by, not "
            f"{len(tokens)} of {tokens.shape[1]}: give more sequences, or longer ones."
        )
    check_length(model.config, tokens.shape[1])
    if not settings.full and settings.rank > model.config.width:
        raise UserError(
            f"updates of rank {settings.rank} are no smaller than the weights of a model of width "
            f"{model.config.width}: lower --lora-rank, or train all weights with --full."
        )
    if teacher is None:
        return
    check_length(teacher.config, tokens.shape[1])
    folders = [each.source.folder and each.source.folder.resolve() for each in (model, teacher)]
    if teacher is model or (folders[0] is not None and folders[0] == folders[1]):
        raise UserError(
            f"the teacher {teacher.source.name} is the model itself, which has nothing to learn from it: name the "
            "dense model that this one was made of."
        )
    if teacher.config.vocabulary != model.config.vocabulary:
        raise UserError(
            f"the teacher has a vocabulary of {teacher.config.vocabulary} tokens and the model one of "
            f"{model.config.vocabulary}: name the dense model that this one was made of."
        )


@functools.partial(jax.jit, static_argnames="settings")
@full_precision
def written(settings: FinetuneSettings, params: Params, trained: Params) -> Params:
    """Returns the weights to write: the trained ones merged into the others, in the data type of the checkpoint."""
    whole = trained
    if not settings.full:
        whole = params | {"layers": lora.merged(params["layers"], trained, settings.lora_alpha / settings.rank)}
    return jax.tree.map(lambda new, old: new.astype(old.dtype), whole, params)


@functools.partial(jax.jit, static_argnames="settings")
def _start(settings: FinetuneSettings, params: Params, key: jax.Array) -> Params:
    """Returns the initial trained parameters, with which the model is unchanged."""
    if settings.full:
        return jax.tree.map(lambda a: a.astype(jnp.float32), params)
    return lora.start(params["layers"], settings.rank, key)


def _optimizer(settings: FinetuneSettings) -> optax.GradientTransformation:
    warm = int(_WARM_UP * settings.steps)
    # The learning rate is above zero in the first step and in the last.
    rise = optax.linear_schedule(settings.rate / (warm + 1), settings.rate, warm)
    fall = optax.cosine_decay_schedule(settings.rate, settings.steps - warm)
    return optax.chain(
        optax.clip_by_global_norm(_LARGEST_GRADIENT),
        optax.adamw(optax.join_schedules([rise, fall], [warm]), weight_decay=settings.weight_decay),
    )


def _optimizer_state(settings: FinetuneSettings, trained: Params) -> Any:
    """Returns the initial optimizer state: sharded as the weight it belongs to, all else replicated."""
    state = _optimizer(settings).init(trained)
    return jax.tree.map(lambda a: a if a.ndim else devices.everywhere(a), state)


@functools.partial(jax.jit, static_argnames=("configs", "settings"), donate_argnames="state")
def _steps(
    configs: Configs,
    settings: FinetuneSettings,
    params: Params,
    guide: Params | None,
    state: State,
    batches: jax.Array,
) -> tuple[State, jax.Array]:
    """Makes K steps on batches [B, K, T], whose first axis is sharded over the devices, and returns their losses [K].

    Matrix products have the device's default precision; the result of the steps is evaluated at full precision.
    """
    optimizer = _optimizer(settings)
    predictions = batches.shape[0] * (batches.shape[2] - 1)

    def sums(own: jax.Array, trained: Params, params: Params, guide: Params | None) -> tuple[jax.Array, Params]:
        def loss(trained: Params, tokens: jax.Array) -> jax.Array:
            student = _student(configs, settings, params, trained)
            return loss_sum(student, _teacher(configs, guide), tokens) / predictions

        passes = _passes(own, settings.batch_tokens)
        return _added_up(lambda tokens: jax.value_and_grad(loss)(trained, tokens), passes)

    def step(state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
        value, gradient = devices.total(sums, tokens, state.trained, params, guide)
        gradient = placed(configs[0], gradient)  # and so what is computed from it: the state keeps its sharding
        changes, optimized = optimizer.update(gradient, state.optimizer, state.trained)
        trained = jax.tree.map(jnp.add, state.trained, changes)
        return State(trained, optimized), value

    return jax.lax.scan(step, state, batches.swapaxes(0, 1))


def _added_up(function: Callable[[jax.Array], Any], passes: jax.Array) -> Any:
    """Sums ``function(tokens)`` over the passes [C, B, T]."""

    def add(sums: Any, tokens: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, function(tokens)), None

    shapes = jax.eval_shape(function, passes[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, passes)[0]


@functools.partial(jax.jit, static_argnames="configs")
@full_precision
def _held_out_loss(configs: Configs, params: Params, guide: Params | None, chunks: jax.Array) -> jax.Array:
    """Computes the mean loss over all predictions of chunks [C, B, T], in nats."""

    def sums(own: jax.Array, params: Params, guide: Params | None) -> jax.Array:
        student, teacher = Decoder(configs[0], params, {}, 0.0), _teacher(configs, guide)
        return _added_up(lambda tokens: loss_sum(student, teacher, tokens), own)

    return devices.total(sums, chunks, params, guide) / (chunks.shape[0] * chunks.shape[1] * (chunks.shape[2] - 1))


def _student(configs: Configs, settings: FinetuneSettings, params: Params, trained: Params) -> Decoder:
    if settings.full:
        return Decoder(configs[0], trained, {}, 0.0)
    return Decoder(configs[0], params, trained, settings.lora_alpha / settings.rank)


def _teacher(configs: Configs, guide: Params | None) -> Decoder | None:
    return None if configs[1] is None or guide is None else Decoder(configs[1], guide, {}, 0.0)


def _split(tokens: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits sequences into training and held-out ones, at least one of each."""
    count = min(len(tokens) - 1, max(1, round(held_out * len(tokens))))
    return tokens[:-count], tokens[-count:]


def _order(count: int, settings: FinetuneSettings) -> np.ndarray:
    """Returns the indices of each step's sequences [steps, B]; every sequence is used once before any is reused."""
    rng = np.random.default_rng(settings.seed)
    needed = settings.steps * settings.step_sequences
    rounds = [rng.permutation(count) for _ in range(-(-needed // count))]
    return np.concatenate(rounds)[:needed].reshape(settings.steps, settings.step_sequences)


def _passes(own: Any, batch_tokens: int) -> Any:
    """Reshapes sequences [B, T] to passes [C, B, T] of at most ``batch_tokens`` tokens."""
    count, length = own.shape
    return own.reshape(-1, largest_divisor(count, max(1, batch_tokens // length)), length)


def _chunks(held_out: np.ndarray, batch_tokens: int) -> np.ndarray:
    """Splits held-out sequences into chunks [C, B, T], evenly over the devices if their number allows."""
    shares = devices.number() if len(held_out) % devices.number() == 0 else 1
    most = max(1, batch_tokens // held_out.shape[1])
    return chunked(held_out, largest_divisor(len(held_out) // shares, most))


def _check_finite(loss: float, step: int) -> None:
    if np.isfinite(loss):
        return
    if step == 0:
        raise NotFiniteError("the model's loss on the held-out sequences is not finite: its weights are damaged.")
    raise NotFiniteError(f"the loss is no longer finite after {step} steps: give a smaller {option('learning_rate')}.")
