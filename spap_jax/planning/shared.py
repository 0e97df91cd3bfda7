"""Bytes exchanged by the devices that share a model's weights (``placement.py``), by phase.

Read from the programs that XLA partitions: a projection whose input is sharded ends in an all-reduce of the stream
[.., d], and so do gradients at the input of a block's halves; products of channels with channels all-gather those of a
chunk. Transfers of a few numbers per token or channel are left out.
"""

from collections import Counter

from spap_jax.models.config import DecoderConfig
from spap_jax.planning.operations import mlp_matrices
from spap_jax.planning.workload import Workload

Traffic = Counter[str]


def exchanged(load: Workload) -> dict[str, Traffic]:
    """Bytes that enter reductions and result from gathers on one device, by phase.

    They are for one layer, or a layer's share.
    """
    if load.sharers == 1:
        return {}
    s, d, layers = load.settings, load.narrow.width, load.narrow.layers
    if load.training:
        taught = _reduced(load, layers * (_heads(load) + _mlp(load, load.dense)), load.joint_tokens)
        step = joint_step(load) + _times(taught, load.compute_bytes / 4)
        return {"steps": _times(step, load.joint_steps / layers)}
    k = load.narrow.intermediate
    channels = _gathered(load, k, load.fitted.tokens + 2 * k + 3 * d)  # the system is resharded for its panels
    panels = Counter({"all-reduce": 4 * (k + d) * k})
    outputs = _mlp(load, load.narrow) + load.aimed * _mlp(load, load.dense)
    errors = _reduced(load, outputs, load.held_out.tokens)
    step = _reduced(load, outputs, load.fitted.share(load.batch))
    closed = channels + panels + _reduced(load, outputs, load.fitted.tokens)
    alternating = _times(step, s.rounds * s.round_steps) + _times(closed, s.rounds) + _times(errors, s.rounds + 1)
    return {
        "streams": _reduced(load, 2 * _heads(load) + 2 * _mlp(load, load.dense) - _lost(load), load.tokens),
        "statistics": _gathered(load, load.dense.intermediate, load.fitted.tokens),
        "alternating": alternating if load.alternates else Counter(),
        "errors": _times(errors, load.stages),
        "sampling": _times(
            _reduced(load, _heads(load) + _mlp(load, load.dense), load.written * load.fitted.length),
            load.weight_bytes / 4,
        ),
        "joint steps": _times(joint_step(load), load.joint_steps / layers),
        "joint checks": _reduced(load, load.joint_checks * _block(load), load.judged.tokens),
    }


def joint_step(load: Workload) -> Traffic:
    """``training/step.py``: one joint step on all blocks.

    A block has a forward pass, one more of its attention, and a backward pass, in which every projection of a half's
    input yields a gradient to reduce; so does the head.
    """
    each = _heads(load) * (2 + 3) + _mlp(load, load.narrow) * (1 + mlp_matrices(load.narrow))
    head = int(load.narrow.vocabulary % load.sharers == 0)
    return _times(_reduced(load, load.narrow.layers * each + head, load.joint_tokens), load.compute_bytes / 4)


def _heads(load: Workload) -> int:
    """1 if attention is sharded, else 0."""
    return int(load.narrow.heads % load.sharers == 0)


def _mlp(load: Workload, config: DecoderConfig) -> int:
    """1 if the MLP is sharded, else 0."""
    return int(config.intermediate % load.sharers == 0)


def _lost(load: Workload) -> int:
    """Number of reductions that the dense MLP needs and the narrow one does not."""
    return _mlp(load, load.dense) - _mlp(load, load.narrow)


def _block(load: Workload) -> int:
    return _heads(load) + _mlp(load, load.narrow)


def _reduced(load: Workload, times: float, tokens: float) -> Traffic:
    """Traffic of ``times`` all-reduces of the stream of ``tokens`` tokens, in float32."""
    return Counter({"all-reduce": 4 * times * tokens * load.dense.width})  # type: ignore[dict-item]


def _gathered(load: Workload, channels: int, columns: int) -> Traffic:
    """Traffic of gathering arrays [channels, columns]: the channels of all tokens, or a system that is factorised."""
    divided = channels % load.sharers == 0
    return Counter({"all-gather": 4 * channels * columns * divided})


def _times(found: Traffic, count: float) -> Traffic:
    return Counter({kind: count * size for kind, size in found.items()})  # type: ignore[dict-item]
