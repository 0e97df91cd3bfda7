"""Memory of a run, by phase and part: on each device while a layer is in that phase, and on the host.

The arrays held (weights, streams, moments, system) follow from the code. The workspace of a compiled program depends on
XLA: the multiples below were read from compiled programs, and ``tests/planning/test_planned_memory.py`` compares them
with XLA's own memory analysis.
"""

import dataclasses
import math

from spap_jax.models import FAMILIES, DecoderConfig
from spap_jax.models.attention import query_blocks
from spap_jax.models.loss import HEAD_TOKENS
from spap_jax.planning.workload import Workload
from spap_jax.solver.swap import BLOCK
from spap_jax.solver.tableau import PANEL

Parts = dict[str, float]
"""Bytes by part: weights, streams, moments, solver, gradients, activations."""


def block_elements(config: DecoderConfig) -> int:
    """Number of weights of one block."""
    return _elements(config, "layers/")


def outer_elements(config: DecoderConfig) -> int:
    """Number of weights outside the blocks."""
    return _elements(config, "embed/") + _elements(config, "head/")


def decoder_elements(config: DecoderConfig) -> int:
    """Number of weights of all blocks and outside them."""
    return config.layers * block_elements(config) + outer_elements(config)


def _elements(config: DecoderConfig, beginning: str) -> int:
    rules = FAMILIES[config.family].rules_for(config)
    return sum(math.prod(rule.shapes(config.axes)[1]) for rule in rules if rule.ours.startswith(beginning))


def mlp_matrices(config: DecoderConfig) -> int:
    """Number of matrices of an MLP: gate, up and down, or up and down."""
    return 3 if config.gated else 2


def update_elements(config: DecoderConfig, rank: int) -> int:
    """``training/lora.py``: number of elements of a block's low-rank updates, the sum of inputs and outputs."""
    d, queries, keys = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    return rank * (2 * (d + queries) + 2 * (d + keys) + mlp_matrices(config) * (d + config.intermediate))


def _mlp_elements(config: DecoderConfig) -> int:
    return mlp_matrices(config) * config.width * config.intermediate


def _cast(load: Workload, elements: float) -> float:
    """Bytes of float32 copies of weights stored at lower precision; accelerators convert as they multiply."""
    return 4 * elements if load.weight_bytes < 4 and load.platform == "cpu" else 0


def streams_bytes(load: Workload) -> float:
    """Bytes of the dense and the pruned stream, and of the third where a norm follows the output."""
    return load.streams * load.stream_bytes * load.tokens * load.dense.width


def _kept_bytes(load: Workload) -> float:
    """Bytes of one stream that joint steps read: in bfloat16 for the steps, as it was stored for the measurements."""
    return (2 * load.fitted.tokens + load.stream_bytes * load.judged.tokens) * load.dense.width


def moments_bytes(f: int, d: int) -> float:
    """Bytes of the moments in ``pruning/moments.py``: G, C and the dense projection."""
    return 4 * (f**2 + 2 * f * d)


def _attending(load: Workload, config: DecoderConfig, tokens: int) -> float:
    """Number of elements that ``tokens`` tokens need inside attention."""
    heads = (config.heads + config.kv_heads) * config.head_dim
    scores = max((last - first) * last for first, last in query_blocks(load.fitted.length)) * load.heads_at_once
    return tokens * (4 * config.width + 4 * heads) + 3 * scores


def passing_bytes(load: Workload) -> float:
    """Workspace of ``streams.enter_mlp``: cast weights, and a chunk's activations in attention or in the MLP."""
    load = load.mine
    config, tokens = load.dense, max(part.size for part in load.parts)
    mlp = tokens * (config.width + mlp_matrices(config) * config.intermediate)
    return _cast(load, block_elements(config)) + 4 * max(_attending(load, config, tokens), mlp)


def summing_bytes(load: Workload) -> float:
    """Workspace of ``moments.accumulate``: a chunk's sums, hidden channels and their transpose; the total beside it.

    The total is the result, unless devices that divide the tokens add theirs up and keep a share of the rows each.
    Devices that share the weights all-gather the channels of a chunk; each computes its own rows of the sums.
    """
    d, f, mine, tokens = load.dense.width, load.dense.intermediate, load.mine.dense.intermediate, load.fitted.size
    inner = _cast(load, _mlp_elements(load.mine.dense) - mine * d)
    totals = 1.4 if load.platform == "tpu" else 1  # a TPU lays some of their parts out anew
    sums = (mine * f + mine * d) * (1 + totals * load.fitted.divided)
    return 4 * (sums + tokens * (2 * mine + d + f * (mine < f))) + inner


def solving_bytes(f: int, d: int, shares: int = 1, *, swapped: int = 0, scaled: bool = True) -> float:
    """Workspace of ``solver/tableau.py``, with rows divided among ``shares`` devices.

    The scaled G and C and the tableau; then the product that updates it, or what a panel needs, which is not divided,
    or what a round of swaps needs, in which ``swapped`` channels change sides together.
    A TPU that selects on its own scales G and C as it reads them, and holds no copies (``scaled``).
    """
    copies, across = scaled * (f**2 + 4 * f * d), max(4 * min(PANEL, f), 4 * swapped)
    return 4 * ((f**2 + copies) / shares + max(f**2 / shares, across * (f + d)))


def closing_bytes(load: Workload) -> float:
    """Workspace of ``alternating.closed_form``: sums beside the total; hidden channels and transpose, or ``aim``.

    Devices that share the weights compute the sums of their own rows. Accelerators add to the total in place, and copy
    a part of the sums, and the channels of a chunk, once more.
    """
    d, k, tokens, dense = load.narrow.width, load.narrow.intermediate, load.fitted.size, load.mine.dense
    if load.platform != "cpu":
        return 4 * (1.5 * load.mine.narrow.intermediate * (k + d) + 3 * tokens * k)
    aimed = _cast(load, _mlp_elements(dense)) + 4 * tokens * 2 * (dense.intermediate + d) if load.aimed else 0
    return 4 * 2 * (k**2 + k * d) + max(4 * tokens * (2 * k + d), aimed)


def recovering_bytes(load: Workload) -> tuple[float, float]:
    """Workspace of ``alternating.recover``: for gradients, and for activations with the sums of the closed form.

    Current, tried and new weights, gradients and both of Adam's moments, not quite all at the same time; the hidden
    channels of a chunk, and those of a step with what its gradients need. An accelerator's program holds five copies of
    the inner projections in the steps, and lets three of them go before the closed form, but not if devices share the
    weights.
    """
    weights, k, mine = _mlp_elements(load.mine.narrow), load.narrow.intermediate, load.mine.narrow.intermediate
    if load.platform != "cpu":
        steps, closing = 4 * 5 * (weights - mine * load.narrow.width), closing_bytes(load)
        return steps, closing if mine < k else max(0, closing - 3 / 5 * steps)
    hidden = load.fitted.size + (mlp_matrices(load.narrow) + 1) * load.fitted.share(load.settings.step_tokens)
    gathered = load.fitted.size * k * (mine < k)
    return 4 * weights * 16 / 3, 4 * (k**2 * (1 + (mine < k)) + hidden * mine + gathered)


def moved_elements(load: Workload) -> int:
    """Number of weights that joint steps or training change, of all groups, on the devices that share the weights."""
    config = load.mine.tail
    if load.training and not load.training.full:
        return config.layers * update_elements(load.narrow, load.training.rank)  # not divided along ``model``
    if load.training:
        return decoder_elements(config)
    own = block_elements(config) if load.settings.joint_weights == "block" else _mlp_elements(config)
    return config.layers * own


def _looked_up(config: DecoderConfig) -> int:
    """Number of weights outside the blocks that are gathered: all but tables of which only some rows are used."""
    positions = 0 if config.position_offset is None else config.axes["p"] * config.width
    return outer_elements(config) - positions - (0 if config.tied else config.vocabulary * config.embedding)


_UNROLLED = 3
"""Number of blocks up to which the TPU compiler was seen to hold no gradients of a whole block (docs/compiled)."""


def _predicting(load: Workload) -> DecoderConfig:
    """The part of the decoder that one device holds, with the head that makes the logits of steps."""
    predicted = load.predicted
    return dataclasses.replace(
        load.mine.tail, vocabulary=predicted // (1 if predicted % load.sharers else load.sharers)
    )


def _moved_at_once(load: Workload) -> float:
    """Number of weights on one device that joint steps of one group of blocks, or training, change."""
    return moved_elements(load) * load.together / load.tail.layers / load.devices


def joint_bytes(load: Workload) -> tuple[float, float]:
    """Workspace of ``training/step.py``: for weights, gradients and moments; and for activations.

    Weights that move are float32, with gradients and both of Adam's moments, all divided among the devices. A block's
    weights are gathered; the stream before each block is held, divided among the devices that share the weights, and
    the outputs of its projections if they are not computed again; then the largest of what the gradients of a block and
    of the logits of some tokens need.
    """
    c, few, tokens, size = load.mine.tail, _predicting(load), load.joint_at_once, load.compute_bytes
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    scores = sum((last - first) * last for first, last in query_blocks(load.fitted.length)) * load.mine.heads_at_once
    attention = size * tokens * (9 * c.width + 8 * (queries + keys)) + 4 * 2.5 * scores
    mlp = size * tokens * (2 * c.width + (3 * mlp_matrices(c) - 2) * c.intermediate)
    head = 4 * 6 * min(HEAD_TOKENS, tokens) * few.vocabulary
    copied = load.devices > 1 or size != load.weight_bytes  # outside the blocks: gathered or converted
    gathered = size * (block_elements(c) + copied * _looked_up(few))
    if load.platform != "tpu" or c.layers > _UNROLLED:
        gathered += 4 * _mlp_elements(c)  # a block's gradients, before they are divided among the devices
    divided = load.sharers if load.fitted.length % load.sharers == 0 else 1
    held = size * c.layers * tokens * c.width / divided + 4 * tokens * c.width
    if load.tail.layers < load.narrow.layers:  # of the last projection, nothing is computed again
        inner = queries + 2 * keys + c.width + (mlp_matrices(c) - 1) * c.intermediate
        held += size * c.layers * tokens * inner
    if load.training:
        held += size * (copied * _looked_up(load.mine.dense) + tokens * c.width)
    return _moved_at_once(load) * 2 * (4 + load.moment_bytes), gathered + held + max(attention, mlp, head)


def checking_bytes(load: Workload) -> tuple[float, float]:
    """Workspace of ``step.measure``: gathered float32 weights, and a pass of a chunk through a block or the head.

    The weights outside the blocks are held throughout; those of a block are gathered when it
    begins, or by a TPU one after the other.
    """
    c, length = load.mine.tail, load.fitted.length
    tokens = max(length, min(load.settings.batch_tokens // length * length, load.judged.tokens))
    inner = tokens * (c.width + mlp_matrices(c) * c.intermediate)
    if load.mine.heads_at_once:  # a fused kernel needs less than the MLP
        inner = max(inner, _attending(load.mine, c, tokens))
    gathered = 4 * _looked_up(c)
    if load.training:
        gathered += 4 * (_looked_up(load.mine.dense) + tokens * c.width)
    head = 4 * 4 * min(HEAD_TOKENS, tokens) * c.vocabulary
    block = 4 * (_mlp_elements(c) / mlp_matrices(c) if load.platform == "tpu" else block_elements(c))
    moving = _moved_at_once(load) * (4 + 2 * load.moment_bytes + load.weight_bytes)
    return moving, gathered + 4 * 2 * tokens * c.width + max(block + 4 * inner, head)


def sampling_memory(load: Workload) -> Parts:
    """Memory of ``pruning/sampling.py``: the dense model, and the key/value cache of a batch of sequences."""
    c, length = load.mine.dense, load.fitted.length
    cache = 2 * c.layers * load.written[1] * length * c.kv_heads * c.head_dim
    return {"weights": load.weight_bytes * decoder_elements(c), "activations": load.weight_bytes * cache}


def device_memory(load: Workload) -> dict[str, Parts]:
    """Peak memory of each device in each phase, in bytes by part."""
    if load.training:  # both models as they are stored
        both = decoder_elements(load.mine.narrow) + decoder_elements(load.mine.dense)
        return _with_workspaces(load, ("steps", "checks"), {"weights": load.weight_bytes * both / load.devices})
    held = {"weights": _held_weights(load), "streams": streams_bytes(load) + load.entered * _kept_bytes(load)}
    phases = _wave_phases(load, held) if load.in_waves else _layer_phases(load, held)
    if load.rounds:
        gradients, activations = recovering_bytes(load)
        # The selected, refitted and recovered weights are held beside the workspace.
        gradients += 3 * 4 * _mlp_elements(load.mine.narrow)
        phases["alternating"] = held | {"gradients": gradients, "activations": activations}
    if load.samples:
        phases["sampling"] = sampling_memory(load)
    return phases | _joint_phases(load, held) if load.groups else phases


def _held_weights(load: Workload) -> float:
    """Bytes of a dense block, and of the pruned blocks that joint steps will change, from the first of them on."""
    pruned = load.tail.layers * block_elements(load.mine.narrow) / load.devices if load.groups else 0
    return load.weight_bytes * (block_elements(load.mine.dense) + pruned)


def _layer_phases(load: Workload, held: Parts) -> dict[str, Parts]:
    """The phases of a block, on which all devices work together."""
    f, d, k = _channels(load), load.dense.width, load.narrow.intermediate
    shares, solving = load.sharing_rows(f), _solving(load, held, scaled=True)
    phases: dict[str, Parts] = {
        "streams": held | {"activations": passing_bytes(load)},
        "statistics": held | {"moments": solving["moments"], "activations": summing_bytes(load)},
        "selection": solving,
    }
    if load.refits:
        gathered = (
            4.0 * k * d * (load.mine.narrow.intermediate < k)
        )  # before each device has its rows of the projection
        solver = 4 * f**2 / shares + gathered
        phases["refit"] = solving | {"solver": solver, "gradients": 2 * 4 * _mlp_elements(load.mine.narrow)}
    return phases


def _wave_phases(load: Workload, held: Parts) -> dict[str, Parts]:
    """The phases of a wave: the fitted tokens have as many streams again, and a device has rows of all layers' moments.

    No block is held while all groups of devices select.
    """
    f, d = _channels(load), load.dense.width
    shares = load.sharing_rows(f)
    solving = _solving(load, held, scaled=shares > 1 or load.platform != "tpu")
    solving["weights"] -= load.weight_bytes * block_elements(load.mine.dense)
    further = load.streams * load.stream_bytes * load.fitted.tokens * d
    ahead = held | {"streams": held["streams"] + further, "moments": solving["moments"]}
    # The exchange of the rows holds the larger matrix twice, and neither a block nor a copy.
    exchanged = solving | {"moments": solving["moments"] + 4 * f * max(f, d) / shares, "solver": 0.0}
    phases: dict[str, Parts] = {
        "streams": ahead | {"activations": passing_bytes(load)},
        "statistics": _larger(ahead | {"activations": summing_bytes(load)}, exchanged),
        "selection": solving,
    }
    if load.refits:
        gradients = 2 * 4 * _mlp_elements(load.mine.narrow)
        phases["refit"] = held | {"gradients": gradients, "activations": closing_bytes(load)}
    return phases


def _channels(load: Workload) -> int:
    """Number of channels of the largest selection: those of an MLP, or of attention."""
    return max(load.dense.intermediate, load.dense.heads * load.dense.head_dim if load.fewer_heads else 0)


def _solving(load: Workload, held: Parts, scaled: bool) -> Parts:
    """What a selection holds; ``scaled`` as for ``solving_bytes``."""
    f, d = _channels(load), load.dense.width
    shares, keep = load.sharing_rows(f), load.narrow.intermediate
    solver = solving_bytes(f, d, shares, swapped=2 * (min(keep, f - keep) // BLOCK), scaled=scaled)
    return held | {"moments": moments_bytes(f, d) / shares, "solver": solver}


def _joint_phases(load: Workload, held: Parts) -> dict[str, Parts]:
    """The phases of joint steps, before the first of which blocks are collected, and all streams are there."""
    narrow = load.mine.narrow
    stack = load.tail.layers * block_elements(narrow) + outer_elements(narrow)
    stack += _looked_up(_predicting(load)) * (load.predicted < load.narrow.vocabulary)
    stack -= moved_elements(load) if load.together == load.tail.layers else 0  # the best so far wait on the host
    final = {"weights": load.weight_bytes * stack / load.devices, "streams": (1 + load.entered) * _kept_bytes(load)}
    phases = _with_workspaces(load, ("joint steps", "joint checks"), final)
    collecting = held | {"weights": held["weights"] + load.weight_bytes * block_elements(narrow)}
    return phases | {"joint steps": _larger(phases["joint steps"], collecting)}


def _larger(*parts: Parts) -> Parts:
    """The parts with the largest sum."""
    return max(parts, key=lambda each: sum(each.values()))


def _with_workspaces(load: Workload, names: tuple[str, str], held: Parts) -> dict[str, Parts]:
    """The phases of steps and of their measurements: what is held, and the workspace of each."""
    spaces = zip(names, (joint_bytes(load), checking_bytes(load)), strict=True)
    return {name: held | {"gradients": moving, "activations": passing} for name, (moving, passing) in spaces}


def host_memory(load: Workload, host_devices: int) -> Parts:
    """Bytes on each host, besides the programs themselves; JAX's staging buffers are not counted.

    Args:
        load: The run.
        host_devices: Number of devices of a host, whose part of the state of optimizer steps it stores.
    """
    parts = {"token ids": 4.0 * sum(part.count * part.size for part in load.parts)}
    if load.training or load.groups:
        parts["the state, to be stored"] = host_devices * _state_bytes(load)
    if not load.training:
        parts["the next block, read ahead"] = load.weight_bytes * block_elements(load.mine.dense)
        parts["a block written"] = load.weight_bytes * block_elements(load.narrow)
    return parts


def disk_space(load: Workload, host_devices: int) -> Parts:
    """Bytes on the disk of the first host until the result is complete; states are left out where they do not fit.

    Args:
        load: The run.
        host_devices: See ``host_memory``.
    """
    blocks = load.weight_bytes * load.narrow.layers * block_elements(load.narrow)
    parts: Parts = {"the result": blocks + load.weight_bytes * outer_elements(load.narrow)}
    if not load.training:
        parts["its finished blocks"] = blocks
    if load.training or load.groups:
        parts["the state of steps, old and new"] = 2 * host_devices * _state_bytes(load)
    return parts


def _state_bytes(load: Workload) -> float:
    """Bytes of one device's part of the state of joint steps or training, with the best moving weights so far."""
    moments = 4 + 2 * load.moment_bytes
    if load.training:
        best = load.weight_bytes if load.training.full else 4  # as they will be written
        return moved_elements(load) * (moments + best) / load.devices
    share = load.together / load.tail.layers
    settled = load.weight_bytes * (share < 1)
    return moved_elements(load) * (share * (moments + load.weight_bytes) + settled) / load.devices
