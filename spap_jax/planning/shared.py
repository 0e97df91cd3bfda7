"""Bytes between the devices that share a model's weights (``placement.py``), by phase.

Read from the programs that XLA partitions: a projection whose input is divided ends in a reduction of the stream
[.., d], and so do gradients where they enter a block's halves; products of channels with channels gather those of a
chunk. A few numbers for each token or channel are left out.
"""

from collections import Counter

from spap_jax.models.config import DecoderConfig
from spap_jax.planning.operations import mlp_matrices
from spap_jax.planning.workload import Workload

Traffic = Counter[str]


def exchanged(load: Workload) -> dict[str, Traffic]:
    """Bytes that go into reductions and come of gathers on one device, of one layer by phase.

    In the sweeps of the average block of one sweep.
    """
    if load.sharers == 1:
        return {}
    s, after, d, several = load.settings, load.after, load.narrow.width, load.together
    channels = _gathered(load, load.narrow.intermediate, load.fitted.tokens, load.narrow.intermediate + 2 * d)
    errors = _reduced(load, _mlp(load, load.narrow), load.held_out.tokens)
    step = _reduced(load, _mlp(load, load.narrow), load.fitted.share(load.batch))
    closed = channels + _reduced(load, _mlp(load, load.narrow), load.fitted.tokens)
    alternating = _times(step, s.rounds * s.steps) + _times(closed, s.rounds) + _times(errors, s.rounds + 1)
    steps = sweep_step(load, after, several - 1)
    judged = load.judged.tokens * (several + after) / several
    return {
        "streams": _reduced(load, 2 * (_heads(load) + _mlp(load, load.dense)) - _lost(load), load.tokens),
        "statistics": _gathered(load, load.dense.intermediate, load.fitted.tokens, load.dense.intermediate + 2 * d),
        "alternating": alternating if load.alternates else Counter(),
        "errors": _times(errors, load.stages),
        "sweep steps": _times(steps, s.decided.sweep_steps) if load.sweeps else Counter(),
        "sweep checks": _reduced(load, _block(load), judged + load.tokens * (1 - several / load.narrow.layers)),
    }


def sweep_step(load: Workload, after: float, more: int = 0) -> Traffic:
    """``pruning/sweeps.py``: one minibatch step on a block and so many more, with so many after them.

    All but the first are passed, their attention once more, and passed back, where every projection of a half's input
    gives a gradient; so does the head.
    """
    heads, mlp = _heads(load), _mlp(load, load.narrow)
    each = heads * (2 + 3) + mlp * mlp_matrices(load.narrow)
    head = int(load.narrow.vocabulary % load.sharers == 0)
    tokens = load.fitted.share(load.step_sequences) * load.fitted.length
    return _reduced(load, heads + mlp + (more + after) * each + head, tokens)


def _heads(load: Workload) -> int:
    """Whether attention is divided."""
    return int(load.narrow.heads % load.sharers == 0)


def _mlp(load: Workload, config: DecoderConfig) -> int:
    """Whether the MLP is."""
    return int(config.intermediate % load.sharers == 0)


def _lost(load: Workload) -> int:
    """Reductions at the end of the dense MLP that the narrow one does without."""
    return _mlp(load, load.dense) - _mlp(load, load.narrow)


def _block(load: Workload) -> int:
    return _heads(load) + _mlp(load, load.narrow)


def _reduced(load: Workload, times: float, tokens: float) -> Traffic:
    """The stream of so many tokens, float32."""
    return Counter({"all-reduce": 4 * times * tokens * load.dense.width})  # type: ignore[dict-item]


def _gathered(load: Workload, channels: int, tokens: int, columns: int) -> Traffic:
    """Channels of tokens [tokens, channels] and, once, what factorises them [channels, columns]."""
    divided = channels % load.sharers == 0
    return Counter({"all-gather": 4 * channels * (tokens + columns) * divided})


def _times(found: Traffic, count: float) -> Traffic:
    return Counter({kind: count * size for kind, size in found.items()})  # type: ignore[dict-item]
