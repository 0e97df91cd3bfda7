"""``spap bench``."""

from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spap_jax.evaluation.speed import Speed, Workload
    from spap_jax.model import Model


def bench(
    model: str,
    other: str | None = None,
    /,
    *,
    batch: int = 1,
    prompt: int = 512,
    new: int = 32,
    repeats: int = 7,
) -> None:
    """Measure prefill and decode speed, parameters and bytes; two models run in turn, and their ratio is by pairs.

    Beside each measured speed-up stands what the arithmetic allows: prefill is bound by floating-point operations,
    decoding by the bytes that every step reads.

    Args:
        model: Folder or hub id of a checkpoint.
        other: Folder or hub id of a second one, for example the pruned one.
        batch: Sequences at once.
        prompt: Tokens that prefill reads; shortened where the model's positions are fewer.
        new: Tokens that decoding writes.
        repeats: Timed runs; medians are shown.
    """
    from spap_jax import checkpoint
    from spap_jax.cli.console import waiting
    from spap_jax.errors import UserError
    from spap_jax.evaluation.speed import Workload, measure

    if min(batch, prompt, new, repeats) < 1:
        raise UserError("--batch, --prompt, --new and --repeats must be at least 1: give positive numbers.")
    names = [model] + ([other] if other else [])
    with waiting(f"reading {' and '.join(names)}"):
        models = [checkpoint.load(name) for name in names]
    positions = min(loaded.config.positions for loaded in models)
    if new >= positions:
        raise UserError(f"--new {new} leaves no room for a prompt in the {positions} positions: give less.")
    prompt = min(prompt, positions - new)
    work = Workload(batch, prompt, new, repeats)
    with waiting("measuring"):
        speeds = measure(models, work)
    _show(names, models, speeds, work)


def _show(names: list[str], models: "list[Model]", speeds: "list[Speed]", work: "Workload") -> None:
    import jax

    from spap_jax.cli import console
    from spap_jax.evaluation.speed import speed_up
    from spap_jax.models import cost

    counted = [cost.parameters(model.family, model.config) for model in models]
    weights = [sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) for model in models]
    prefills = [work.batch * work.prompt / median(speed.prefill) for speed in speeds]
    decodes = [work.batch / median(speed.decode) for speed in speeds]
    rows = [
        ("parameters", *(console.count_text(count.total) for count in counted)),
        ("MLP parameters", *(console.count_text(count.mlp) for count in counted)),
        ("bytes of weights", *(console.bytes_text(size) for size in weights)),
        ("prefill, tokens/s", *(f"{rate:.1f}" for rate in prefills)),
        ("decode, tokens/s", *(f"{rate:.1f}" for rate in decodes)),
    ]
    columns = ("", *names)
    if len(models) == 2:
        before, after = speeds
        ratios = (
            counted[0].total / counted[1].total,
            counted[0].mlp / counted[1].mlp,
            weights[0] / weights[1],
            speed_up(before.prefill, after.prefill),
            speed_up(before.decode, after.decode),
        )
        bounds = (
            "",
            "",
            "",
            f"{before.prefill_operations / after.prefill_operations:.3f}x",
            f"{before.decode_bytes / after.decode_bytes:.3f}x",
        )
        rows = [(*row, f"{ratio:.3f}x", bound) for row, ratio, bound in zip(rows, ratios, bounds, strict=True)]
        columns += ("ratio", "by arithmetic")
    title = f"batch {work.batch}, prompt {work.prompt}, {work.new} new tokens, median of {work.repeats} runs"
    console.table(title, columns, rows)
