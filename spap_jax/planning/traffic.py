"""Bytes that pruning one layer moves between a device and its memory, and between devices, by phase.

The operands and results of matrix products are counted once each, and so are the factors of systems, the streams, and
the arrays that the selection traverses repeatedly. All are float32 except the stored weights, which are cast for every
chunk.
"""

import math
from collections import Counter
from collections.abc import Callable

from spap_jax.methods import METHODS
from spap_jax.models.config import DecoderConfig
from spap_jax.models.cost import attended_pairs
from spap_jax.planning import memory, operations
from spap_jax.planning.workload import Chunks, Workload
from spap_jax.solver.penalty import POOL
from spap_jax.solver.swap import POOL as SWAP_POOL
from spap_jax.solver.tableau import PANEL

_SCORE_PASSES = 4
"""Attention's scores are written, read and written by the softmax, and read."""

_SOFTMAX_PASSES = 6
"""Logits of both streams are written, read for their sums, and read for the divergence."""

_UPDATE_PASSES = 10
"""A step reads and writes weights, gradients and both of Adam's moments, and the sizes of weights and updates."""

_POOL_PASSES = 6
"""A choice within the pool reads and writes two small matrices, and reads their outer products."""


def product(rows: int, inner: int, columns: int) -> int:
    """Bytes of a matrix product's operands and result."""
    return 4 * (rows * inner + inner * columns + rows * columns)


def attention_bytes(config: DecoderConfig, tokens: int, length: int) -> float:
    """Bytes of a block's attention for ``tokens`` tokens at once."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    scores = 4 * _SCORE_PASSES * config.heads * attended_pairs(length) * tokens / length
    return 2 * product(tokens, config.width, queries) + 2 * product(tokens, config.width, keys) + scores


def mlp_bytes(config: DecoderConfig, tokens: int) -> float:
    """Bytes of a block's MLP for ``tokens`` tokens at once."""
    return operations.mlp_matrices(config) * product(tokens, config.width, config.intermediate)


def block_bytes(config: DecoderConfig, tokens: int, length: int) -> float:
    """Bytes of a block for ``tokens`` tokens at once."""
    return attention_bytes(config, tokens, length) + mlp_bytes(config, tokens)


def head_bytes(config: DecoderConfig, tokens: int) -> float:
    """Bytes of the logits of ``tokens`` tokens at once."""
    return product(tokens, config.width, config.vocabulary)


def over_chunks(load: Workload, cost: Callable[[int], float]) -> float:
    """Sums a cost, given as a function of a chunk's tokens, over all chunks on a device."""
    return sum(part.here * cost(part.size) for part in load.parts)


def streams_bytes(load: Workload) -> float:
    """Weights and activations, and the streams, which two programs read and write; in waves two others do so too."""
    both, length = (load.mine.dense, load.mine.narrow), load.fitted.length
    passed = over_chunks(load, lambda tokens: sum(block_bytes(c, tokens, length) for c in both))
    ahead = load.fitted.here * block_bytes(load.mine.dense, load.fitted.size, length)
    written = (
        2 * 2 * load.streams * load.stream_bytes * (load.tokens + load.in_waves * load.fitted.tokens) * load.dense.width
    )
    return passed + load.in_waves * ahead + written


def statistics_bytes(load: Workload) -> float:
    """Hidden activations, their transpose, and the sums, which every chunk updates."""

    def sums(f: int, mine: int, inner: float) -> float:
        d, tokens = load.dense.width, load.fitted.size
        added = 2 * 4 * mine * (f + d) + 8 * tokens * mine
        return load.fitted.here * (inner + product(mine, tokens, f) + product(mine, tokens, d) + added)

    matrices = operations.mlp_matrices(load.dense)
    whole, mine, width = load.dense, load.mine.dense, load.dense.head_dim
    passed = mlp_bytes(mine, load.fitted.size) * (1 - 1 / matrices)
    attended = attention_bytes(mine, load.fitted.size, load.fitted.length)
    heads = sums(whole.heads * width, mine.heads * width, attended) if load.fewer_heads else 0
    own = product(whole.intermediate, whole.intermediate, whole.width) if load.aimed else 0
    return sums(whole.intermediate, mine.intermediate, passed) + heads + own


def _pivot_bytes(f: int, d: int, moved: int) -> float:
    """Bytes of a pivot: matrix and rows are read and written, and so are the block's columns and rows."""
    return 2 * 4 * f * (f + d) + product(f, moved, f + d)


def _pool_bytes(load: Workload) -> float:
    """``solver/penalty.py``: each step chooses channels one at a time within its pool."""
    [(steps, moved)] = operations.pivots(load)
    pool = min(load.dense.intermediate, POOL * moved)
    return steps * moved * _POOL_PASSES * 4 * pool**2


def _solution_bytes(f: int, d: int, k: int) -> float:
    """A system is scaled, and solved for k of f channels in panels."""
    panel = min(PANEL, k)
    return 2 * 4 * f * (f + d) + math.ceil(k / panel) * _pivot_bytes(f, d, panel)


def selection_bytes(load: Workload) -> float:
    """Solutions and pivots for one layer; passes over the gains of all pairs, and for each swap over a pool."""
    f, d, k = load.dense.intermediate, load.dense.width, load.narrow.intermediate
    shares = 1 if load.in_waves else load.sharing_rows(f)
    eliminations = sum(count * _pivot_bytes(f, d, moved) for count, moved in operations.pivots(load))
    swaps = operations.most_swaps(f, k)
    turn = _pivot_bytes(f, d, 2 * swaps) + 4 * 4 * (f - k) * f
    solved = _solution_bytes(f, d, f) + _solution_bytes(f, d, k)
    pools = swaps * 4 * 2 * (SWAP_POOL * swaps) ** 2 * operations.swap_turns(load)
    pools += _pool_bytes(load) if load.settings.method == "spap" else 0
    return (solved + eliminations + operations.swap_turns(load) * turn) / shares + pools


def _head_selection_bytes(load: Workload) -> float:
    """``solver/groups.py``: two solutions, and a pivot for every removed group and every turn."""
    f, d = load.dense.heads * load.dense.head_dim, load.dense.width
    gone = load.dense.kv_heads - load.narrow.kv_heads
    scored = METHODS[load.settings.method].score is not None
    pivots = (0 if scored else gone) + operations.swap_turns(load)
    size = f // load.dense.kv_heads
    solved = _solution_bytes(f, d, f) + _solution_bytes(f, d, load.narrow.kv_heads * size)
    return solved + pivots * _pivot_bytes(f, d, size)


def refit_bytes(f: int, d: int, k: int) -> float:
    """``problem.refit``, and two products of the Gram matrix for the errors of the chosen channels."""
    return _solution_bytes(f, d, k) + 2 * product(f, f, d)


def closed_form_bytes(load: Workload) -> float:
    """Hidden activations and their transpose, the sums, which every chunk updates, and the system."""
    d, k, size, narrow = load.narrow.width, load.narrow.intermediate, load.fitted.size, load.mine.narrow
    mine = narrow.intermediate
    sums = product(mine, size, k) + product(mine, size, d) + 2 * 4 * mine * (k + d) + 8 * size * mine
    return load.fitted.here * (sums + mlp_bytes(narrow, size) + aim_bytes(load, size)) + _solution_bytes(k, d, k)


def aim_bytes(load: Workload, tokens: int) -> float:
    """``layer.aim``: the dense MLP, if a correction below 1 needs its output, which is mixed with the target."""
    return mlp_bytes(load.mine.dense, tokens) + 4 * 4 * tokens * load.dense.width if load.aimed else 0


def alternating_bytes(load: Workload) -> float:
    """Steps, closed forms and errors of all rounds."""
    if not load.alternates:
        return 0
    s, d, narrow = load.settings, load.narrow.width, load.mine.narrow
    matrices, drawn = operations.mlp_matrices(narrow), load.fitted.share(load.batch)
    passed = mlp_bytes(narrow, drawn) * (2 + 1 / matrices) + aim_bytes(load, drawn)
    step = passed + _UPDATE_PASSES * 4 * matrices * narrow.intermediate * d
    judged = errors_bytes(load, load.held_out)
    return s.rounds * (s.round_steps * step + closed_form_bytes(load) + judged) + judged


def errors_bytes(load: Workload, part: Chunks) -> float:
    """One pass of some tokens through the narrow MLP, and both streams."""
    each = mlp_bytes(load.mine.narrow, part.size) + aim_bytes(load, part.size)
    return part.here * (each + 8 * part.size * load.narrow.width)


def sampling_bytes(load: Workload) -> float:
    """A layer's share of the dense model's generation: for every token the weights, and the keys and values before."""
    config, length = load.mine.dense, load.fitted.length
    size = load.written_at_once
    weights = load.weight_bytes * (memory.block_elements(config) + config.vocabulary * config.embedding / config.layers)
    cache = load.weight_bytes * size * length * config.kv_heads * config.head_dim  # half full, keys and values
    return load.written / size * length * (weights + cache)


def joint_step_bytes(load: Workload) -> float:
    """Blocks in four passes, logits, and the update of a device's share of the weights; see `joint_step_operations`."""
    config, tokens, length = load.mine.narrow, load.joint_at_once, load.fitted.length
    scale = load.compute_bytes / 4
    logits = 3 * head_bytes(config, tokens) + 4 * _SOFTMAX_PASSES * tokens * config.vocabulary
    weights = 3 * load.compute_bytes * (config.layers * memory.block_elements(config) + memory.outer_elements(config))
    once = scale * config.layers * 4 * block_bytes(config, tokens, length) + logits + weights
    own = memory.moved_elements(load) * load.together / config.layers / load.devices
    if load.training:
        once += scale * config.layers * block_bytes(load.mine.dense, tokens, length)
    return load.joint_tokens / tokens * once + _UPDATE_PASSES * 4 * own


def joint_check_bytes(load: Workload) -> float:
    """The judged tokens through all blocks and both heads."""
    config, size = load.mine.narrow, load.judged.size
    logits = 2 * head_bytes(config, size) + 4 * _SOFTMAX_PASSES * size * config.vocabulary
    return load.judged.here * (config.layers * block_bytes(config, size, load.fitted.length) + logits)


def memory_bytes(load: Workload) -> dict[str, float]:
    """Bytes by phase, as in `operations.operations`: of one layer, or a layer's share."""
    length, layers = load.fitted.length, load.narrow.layers
    if load.training:
        steps, checks = load.joint_steps * joint_step_bytes(load), load.joint_checks * joint_check_bytes(load)
        return {"steps": steps / layers, "checks": checks / layers}
    f, d, k = load.dense.intermediate, load.narrow.width, load.narrow.intermediate
    every, kept = (c.heads * c.head_dim for c in (load.dense, load.narrow))
    heads = int(load.fewer_heads)
    judged = load.held_out
    attended = (1 + load.refits) * judged.here * attention_bytes(load.mine.narrow, judged.size, length)
    refit = closed_form_bytes(load) if load.in_waves else refit_bytes(f, d, k) / load.sharing_rows(f)
    selection = load.solved_here * selection_bytes(load)
    return {
        "streams": streams_bytes(load),
        "statistics": statistics_bytes(load),
        "selection": selection + (_head_selection_bytes(load) if heads else 0),
        "refit": (refit + heads * refit_bytes(every, d, kept)) if load.refits else 0,
        "alternating": alternating_bytes(load),
        "errors": load.stages * errors_bytes(load, judged) + heads * attended,
        "sampling": sampling_bytes(load),
        "joint steps": load.joint_steps * joint_step_bytes(load) / layers,
        "joint checks": load.joint_checks * joint_check_bytes(load) / layers,
    }


def statistics_collectives(load: Workload) -> Counter[str]:
    """``pruning/moments.py``: the sums; of second moments every device keeps its rows, if they can be divided."""
    whole, mine = load.dense, load.mine.dense
    if not load.fitted.divided:
        return Counter()
    found: Counter[str] = Counter()
    heads = [(whole.heads * whole.head_dim, mine.heads * whole.head_dim)] if load.fewer_heads else []
    for f, own in [(whole.intermediate, mine.intermediate), *heads]:
        apart = load.sharing_rows(f) == load.devices * load.sharers
        found["reduce-scatter" if apart else "all-reduce"] += 4 * own * (f + whole.width)
        found["all-reduce"] += 4 * (own + whole.width + 1 + f * apart)  # the variances are on the diagonal
        if apart and whole.mlp_bias:  # centring needs the means of all channels where the rows are
            found["all-gather"] += 4 * f
    if load.aimed and load.sharing_rows(whole.intermediate) == load.devices * load.sharers:
        # The projection is divided when it is cast, and gathered for its product with the divided rows.
        found["all-gather"] += 4 * whole.intermediate * whole.width * (load.weight_bytes < 4)
        found["all-reduce"] += 4 * (whole.width + 2)
    return found


def solver_collectives(load: Workload) -> dict[str, Counter[str]]:
    """Bytes that all devices together exchange for the solver (``solver/tableau.py``), by phase.

    They are the rows of every panel, of the removed channels in every turn of the polish, and of pools; in waves, a
    layer's moments instead, which its own device gathers.
    """
    f, d, k = load.dense.intermediate, load.dense.width, load.narrow.intermediate
    if load.sharing_rows(f) == 1:
        return {}
    if load.in_waves:
        return {"statistics": Counter({"all-gather": 4 * f * (f + 2 * d)})}
    moved = sum(count * channels for count, channels in operations.pivots(load))
    turn = f - k + 2 * (1 + 2 * SWAP_POOL) * operations.most_swaps(f, k)
    rows = f + (1 + POOL) * moved + k + operations.swap_turns(load) * turn
    return {
        "selection": Counter({"all-reduce": 4 * (f + d) * rows}),
        "refit": Counter({"all-reduce": 4 * (f + d) * k * load.refits}),
    }


def _drawn(load: Workload, picked: int, size: int) -> Counter[str]:
    """``devices.take_from_chunks``: both streams of the picked minibatch, reduce-scattered if it can be divided."""
    even = load.fitted.share(picked) < picked
    return Counter({"reduce-scatter" if even else "all-reduce": 2 * 4 * picked * size})


def _gradients(load: Workload) -> Counter[str]:
    """One all-reduce of the gradients of the narrow MLP's weights."""
    config = load.mine.narrow
    return Counter({"all-reduce": 4 * operations.mlp_matrices(config) * config.width * config.intermediate})


def step_collectives(load: Workload) -> Counter[str]:
    """``solver/alternating.py``: the minibatch of a step, and its gradients."""
    if not load.fitted.divided:
        return Counter()
    even = load.fitted.share(load.batch) < load.batch
    return _drawn(load, load.batch, load.narrow.width) + (_gradients(load) if even else Counter())


def closed_form_collectives(load: Workload) -> Counter[str]:
    """``solver/alternating.py``: one all-reduce of all sums."""
    d, k, mine = load.narrow.width, load.narrow.intermediate, load.mine.narrow.intermediate
    sums = 4 * (mine * (k + d) + (mine + d) * load.narrow.mlp_bias + 2)
    return Counter({"all-reduce": sums * load.fitted.divided})


def joint_step_collectives(load: Workload) -> Counter[str]:
    """``training/step.py``: the weights of each block, gathered twice, its gradients, and the sequences drawn."""
    if load.devices == 1:
        return Counter()
    passes, config, size = load.joint_tokens // load.joint_at_once, load.mine.narrow, load.compute_bytes
    stored = config.layers * memory.block_elements(config) + memory.outer_elements(config)
    if load.training:  # the dense model's blocks are gathered once
        stored += load.mine.dense.layers * memory.block_elements(load.mine.dense) / 2
    moved = memory.moved_elements(load) * load.together / config.layers
    drawn = 0 if load.training else 4 * load.devices * load.joint_tokens * config.width * load.fitted.divided
    return Counter({"all-gather": 2 * size * passes * stored, "reduce-scatter": size * passes * moved + drawn})  # type: ignore[dict-item]


def collectives(load: Workload) -> dict[str, Counter[str]]:
    """Bytes that enter reductions, by phase, for a layer or its share; a few numbers per channel are left out."""
    if load.training:
        return {"steps": _times(joint_step_collectives(load), load.joint_steps / load.narrow.layers)}
    s = load.settings
    rounds = _times(step_collectives(load), s.round_steps) + closed_form_collectives(load)
    return {
        "statistics": statistics_collectives(load),
        "refit": closed_form_collectives(load) if load.in_waves and load.refits else Counter(),
        "alternating": _times(rounds, s.rounds) if load.alternates else Counter(),
        "joint steps": _times(joint_step_collectives(load), load.joint_steps / load.narrow.layers),
    }


def _times(found: Counter[str], count: float) -> Counter[str]:
    return Counter({kind: count * size for kind, size in found.items()})  # type: ignore[dict-item]


def sent(found: Counter[str], devices: int) -> float:
    """Bytes that each device sends in a ring (Patarasuk and Yuan 2009): an all-reduce goes round twice."""
    rounds = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
    return math.fsum(rounds[kind] * size for kind, size in found.items()) * (devices - 1) / devices
