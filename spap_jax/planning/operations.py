"""Floating-point operations of pruning a layer on one device, by phase. Docstrings name the file that is counted.

Matrix products, factorisations and solves are counted, two operations for each multiplication. Work that is linear in
the activations (norms, rotary embedding, softmax) is left out.
"""

import math

from spap_jax.methods import METHODS
from spap_jax.methods.criteria import BATCHES
from spap_jax.models.config import DecoderConfig
from spap_jax.models.cost import attended_pairs
from spap_jax.planning.workload import Chunks, Workload
from spap_jax.solver.penalty import RETURNS
from spap_jax.solver.swap import BLOCK
from spap_jax.solver.tableau import PANEL


def mlp_matrices(config: DecoderConfig) -> int:
    """Number of matrices of an MLP: gate, up and down, or up and down."""
    return 3 if config.gated else 2


def projection_operations(config: DecoderConfig) -> float:
    """Operations per token of a block's query, key, value and output projections."""
    return 4 * config.width * (config.heads + config.kv_heads) * config.head_dim


def score_operations(config: DecoderConfig, length: int) -> float:
    """Operations per token of attention scores and of their product with the values, in sequences of ``length``."""
    return 4 * attended_pairs(length) / length * config.heads * config.head_dim


def attention_operations(config: DecoderConfig, length: int) -> float:
    """Operations per token of a block's attention."""
    return projection_operations(config) + score_operations(config, length)


def mlp_operations(config: DecoderConfig) -> float:
    """Operations per token of a block's MLP."""
    return 2 * mlp_matrices(config) * config.width * config.intermediate


def head_operations(config: DecoderConfig) -> float:
    """Operations per token of the projection to the vocabulary."""
    narrower = config.width * config.embedding if config.embedding != config.width else 0
    return 2 * (config.embedding * config.vocabulary + narrower)


def pivot_operations(f: int, d: int, moved: int, shares: int = 1) -> float:
    """``solver/tableau.py``: a pivot on a block of ``moved`` channels, as on an accelerator.

    The small system is inverted by every device. Its solution, which is corrected once, and the update of the rows,
    whose columns are placed by a second product, are divided.
    """
    return (2 * f * (2 * f + d) * moved + 3 * 2 * moved**2 * (f + d)) / shares + 2 * moved**3


def solution_operations(f: int, d: int, k: int, shares: int = 1) -> float:
    """``solver/tableau.py``: a system solved for k of f channels, in panels."""
    panel = min(PANEL, k)
    return math.ceil(k / panel) * pivot_operations(f, d, panel, shares)


def pivots(load: Workload) -> list[tuple[int, int]]:
    """The eliminations of a selection, as pairs (number of pivots, channels per pivot); none if scores decide."""
    f, k, method = load.dense.intermediate, load.narrow.intermediate, load.settings.method
    if METHODS[method].score is not None:
        return []
    if method == "spap":  # penalty.py
        block = math.ceil((f - k) / load.settings.penalty_stages)
        guests = min(math.ceil(RETURNS * block), k)
        return [(math.ceil((f - k) / block), block + 2 * guests)]
    block = 1 if method == "obs" else math.ceil((f - k) / BATCHES)  # criteria.py
    return [(math.ceil((f - k) / block), block)]


def most_swaps(f: int, k: int) -> int:
    """``solver/swap.py``: maximum number of swaps in one round."""
    return max(1, min(k, f - k) // BLOCK)


def swap_turns(load: Workload) -> int:
    """Maximum number of searches for swaps: one more than the rounds in which swaps may be made."""
    return load.settings.swap_rounds + 1 if METHODS[load.settings.method].swaps else 1


def selection_operations(load: Workload, turns: int) -> float:
    """``solver/problem.py``, ``penalty.py``, ``swap.py``: the selection of channels.

    The system is solved for all channels, then come the pivots; it is solved for the kept channels, and a turn of the
    polish takes a product and a pivot.
    """
    f, d, k = load.dense.intermediate, load.dense.width, load.narrow.intermediate
    shares = 1 if load.in_waves else load.sharing_rows(f)
    eliminations = sum(count * pivot_operations(f, d, moved, shares) for count, moved in pivots(load))
    turn = 2 * f * (f - k) * d / shares + pivot_operations(f, d, 2 * most_swaps(f, k), shares)
    solved = solution_operations(f, d, f, shares) + solution_operations(f, d, k, shares)
    return solved + eliminations + turns * turn


def head_selection_operations(load: Workload, turns: int) -> float:
    """``solver/groups.py``: two solutions of the system; groups removed one by one; turns over all pairs."""
    d, m, k = load.dense.width, load.dense.kv_heads, load.narrow.kv_heads
    f = load.dense.heads * load.dense.head_dim
    size = f // m

    def gain(moved: int) -> float:
        return 2 * moved**3 + 2 * moved**2 * d

    scored = METHODS[load.settings.method].score is not None
    elimination = (m - k) * (pivot_operations(f, d, size) + m * gain(size))
    start = solution_operations(f, d, f) + solution_operations(f, d, k * size)
    turn = k * (m - k) * gain(2 * size) + pivot_operations(f, d, 2 * size)
    return (0 if scored else elimination) + start + turns * turn


def moment_errors_operations(f: int, d: int) -> float:
    """``pruning/moments.py``: the errors of the chosen channels before and after their update."""
    return 2 * 2 * f**2 * d


def streams_operations(load: Workload) -> float:
    """``pruning/streams.py``: both streams through attention, one through the dense and one through the narrow MLP.

    In waves the dense stream of the fitted tokens is computed ahead once more.
    """
    both, length = (load.mine.dense, load.mine.narrow), load.fitted.length
    dense, narrow = (attention_operations(c, length) + mlp_operations(c) for c in both)
    return load.tokens * (dense + narrow) + load.in_waves * load.fitted.tokens * dense


def statistics_operations(load: Workload) -> float:
    """``pruning/moments.py``: the hidden activations of the fitted tokens, H'H and H'Y; the same for heads.

    A correction below 1 needs the product of H'H and the dense projection, once.
    """
    config, mine = load.dense, load.mine.dense
    f, h, all_heads = config.intermediate, mine.heads * config.head_dim, config.heads * config.head_dim
    inner = mlp_operations(mine) + 2 * f * mine.intermediate
    heads = attention_operations(mine, load.fitted.length) + 2 * h * all_heads
    own = 2 * f**2 * config.width / load.sharing_rows(f) if load.aimed and not load.in_waves else 0
    return load.fitted.tokens * (inner + (heads if load.fewer_heads else 0)) + own


def aim_operations(load: Workload) -> float:
    """``layer.aim``: a token's output of the dense MLP, if a correction below 1 needs it."""
    return mlp_operations(load.mine.dense) if load.aimed else 0


def step_operations(load: Workload) -> float:
    """``solver/alternating.py``: a step has a product per matrix forward and per gradient, and one for H's gradient."""
    matrices = mlp_matrices(load.narrow)
    each = mlp_operations(load.mine.narrow) * (2 + 1 / matrices) + aim_operations(load)
    return load.fitted.share(load.batch) * each


def closed_form_operations(load: Workload) -> float:
    """``solver/alternating.py``: H, H V, H'H and H'E over the fitted tokens; the system, and the remaining error."""
    d, k, mine = load.narrow.width, load.narrow.intermediate, load.mine.narrow
    each = 2 * (k + d) * mine.intermediate + mlp_operations(mine) + aim_operations(load)
    passed = load.fitted.tokens * each
    return passed + solution_operations(k, d, k, load.sharing_rows(k)) + 2 * k * mine.intermediate * d


def errors_operations(load: Workload, part: Chunks) -> float:
    """``solver/alternating.py``: one pass of some tokens through the narrow MLP."""
    return part.tokens * (mlp_operations(load.mine.narrow) + aim_operations(load))


def alternating_operations(load: Workload) -> float:
    """All rounds, accepted or not; held-out errors are measured before the first round and after each."""
    if not load.alternates:
        return 0
    judged = errors_operations(load, load.held_out)
    each = load.settings.round_steps * step_operations(load) + closed_form_operations(load) + judged
    return load.settings.rounds * each + judged


def joint_step_operations(load: Workload) -> float:
    """``training/step.py``: one joint step, averaged over the groups of blocks.

    A block whose weights move has a forward pass, a recomputation, and a backward pass for activations and weights;
    attention scores are computed a third time, and their backward pass costs twice as much. Blocks after the group have
    no gradients of weights, and blocks before it have a forward pass alone. The head is applied to both streams, and
    has one backward pass.
    """
    config, length, group = load.mine.narrow, load.fitted.length, load.together
    others = (config.layers - group) / 2
    mlp, projections = mlp_operations(config), projection_operations(config)
    scores = score_operations(config, length)
    attention = 4 if load.settings.joint_weights == "block" else 3
    moved = 4 * mlp + attention * projections + 5 * scores
    after = 3 * mlp + 3 * projections + 5 * scores
    before = mlp + projections + scores
    return load.joint_tokens * (group * moved + others * (after + before) + 3 * head_operations(config))


def training_step_operations(load: Workload) -> float:
    """``training/step.py``: one step of recovery training towards the dense model.

    A block has a forward pass, a recomputation and a backward pass for activations, and one for its weights if they
    move; low-rank updates have all four. The head is applied to both streams, and has one backward pass, or two if it
    moves. The dense model has a forward pass.
    """
    assert load.training
    student, teacher, length, full = load.mine.narrow, load.mine.dense, load.fitted.length, load.training.full
    products = mlp_operations(student) + projection_operations(student)
    updates = 0 if full else 4 * 2 * update_elements(student, load.training.rank)
    block = (4 if full else 3) * products + updates + 5 * score_operations(student, length)
    taught = mlp_operations(teacher) + attention_operations(teacher, length)
    return load.joint_tokens * (student.layers * (block + taught) + (4 if full else 3) * head_operations(student))


def update_elements(config: DecoderConfig, rank: int) -> int:
    """``training/lora.py``: number of elements of a block's low-rank updates, the sum of inputs and outputs."""
    d, queries, keys = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    return rank * (2 * (d + queries) + 2 * (d + keys) + mlp_matrices(config) * (d + config.intermediate))


def sampling_operations(load: Workload) -> float:
    """``pruning/sampling.py``: a layer's share of the dense model's generation; each token passes through it once."""
    config, length = load.mine.dense, load.fitted.length
    each = attention_operations(config, length) + mlp_operations(config) + head_operations(config) / config.layers
    return load.written * length * each


def joint_check_operations(load: Workload) -> float:
    """``training/step.py``: one pass of the judged tokens through the pruned model, and both heads.

    In training, the dense model's stream is computed too.
    """
    mine = load.mine.narrow
    block = attention_operations(mine, load.fitted.length) + mlp_operations(mine)
    tokens = -(-load.judged.count * load.judged.sequences // load.devices) * load.judged.length
    teacher = load.mine.dense
    if load.training:
        block += attention_operations(teacher, load.fitted.length) + mlp_operations(teacher)
    return tokens * (mine.layers * block + 2 * head_operations(mine))


def operations(load: Workload, turns: int | None = None) -> dict[str, float]:
    """Operations by phase, for one layer; of what is done for the whole model, a layer's share.

    Args:
        load: The run.
        turns: Number of searches for swaps. By default the maximum.
    """
    if load.training:
        steps, checks = (
            load.joint_steps * training_step_operations(load),
            load.joint_checks * joint_check_operations(load),
        )
        return {"steps": steps / load.narrow.layers, "checks": checks / load.narrow.layers}
    f, d, k = load.dense.intermediate, load.narrow.width, load.narrow.intermediate
    turns = swap_turns(load) if turns is None else turns
    shares = load.sharing_rows(f)
    solved = solution_operations(f, d, k, shares) + moment_errors_operations(f, d) / shares
    every, kept = (c.heads * c.head_dim for c in (load.dense, load.narrow))
    heads = solution_operations(every, d, kept) + moment_errors_operations(every, d)
    refit = closed_form_operations(load) if load.in_waves else solved
    selection = load.solved_here * selection_operations(load, turns)
    attended = (1 + load.refits) * load.held_out.tokens * attention_operations(load.mine.narrow, load.fitted.length)
    return {
        "streams": streams_operations(load),
        "statistics": statistics_operations(load),
        "selection": selection + (head_selection_operations(load, turns) if load.fewer_heads else 0),
        "refit": refit + (heads if load.fewer_heads else 0) if load.refits else 0,
        "alternating": alternating_operations(load),
        "errors": load.stages * errors_operations(load, load.held_out) + load.fewer_heads * attended,
        "sampling": sampling_operations(load),
        "joint steps": load.joint_steps * joint_step_operations(load) / load.narrow.layers,
        "joint checks": load.joint_checks * joint_check_operations(load) / load.narrow.layers,
    }
