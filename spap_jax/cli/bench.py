"""``spap bench``."""

from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

from spap_jax.cli import console
from spap_jax.cli.options import Count, JsonFile, ModelName
from spap_jax.errors import UserError
from spap_jax.quantities import bytes_text, count_text

if TYPE_CHECKING:
    from spap_jax.evaluation.speed import Speed
    from spap_jax.models.model import Model
    from spap_jax.report.schema import GenerationWorkload


def bench(
    model: ModelName,
    other: ModelName | None = None,
    /,
    *,
    batch: Count = 1,
    prompt: Count = 512,
    new: Count = 32,
    repeats: Count = 7,
    devices: int | None = None,
    model_devices: int | None = None,
    json: JsonFile = None,
) -> None:
    """Measure the speed and size of a model, or of two side by side.

    ```
    spap bench meta-llama/Llama-3.2-1B pruned
    spap bench pruned --batch 8 --prompt 2048 --json speed.json
    ```

    Reading a prompt (prefill) and writing token by token (decoding) are timed, of two models in turn. Each speed-up is
    shown beside the one that the arithmetic allows: prefill is bound by floating-point operations, decoding by the
    bytes that are read for each token.

    Args:
        model: Checkpoint to measure: a folder, a hub id or an address.
        other: Second checkpoint, for example the pruned one.
        batch: Number of sequences at once.
        prompt: Tokens that prefill reads, or fewer if the model does not have enough positions.
        new: Tokens that decoding writes.
        repeats: Number of timed runs, of which medians are shown.
        devices: Number of devices to use; groups that share the weights must divide --batch. By default one such group.
        model_devices: Number of devices among which the weights are divided. By default as many as the weights need.
    """
    from spap_jax import checkpoint
    from spap_jax.cli.inputs import fetch
    from spap_jax.cli.options import check_json_place, write_json
    from spap_jax.evaluation.speed import time_generation
    from spap_jax.parallel.mesh import use_mesh
    from spap_jax.parallel.placement import bytes_of
    from spap_jax.report.schema import GenerationWorkload

    check_json_place(json)
    names = [model] + ([other] if other else [])
    fetch(names)
    with console.waiting(f"reading {' and '.join(names)}"):
        models = [checkpoint.load(name, checkpoint.as_stored) for name in names]
    positions = min(loaded.config.positions for loaded in models)
    if new >= positions:
        raise UserError(
            f"--new {new} leaves no room for a prompt in the {positions} positions of the model: give a smaller --new."
        )
    prompt = min(prompt, positions - new)
    work = GenerationWorkload(batch, prompt, new, repeats)
    weights = bytes_of([loaded.params for loaded in models])
    with console.waiting("measuring"), use_mesh(devices, model_devices, weights, groups=1):
        speeds = time_generation(models, work)
    result = _result(names, models, speeds, work)
    _show(result, names)
    if json is not None:
        write_json(json, "spap bench", result)


def _result(
    names: list[str], models: "list[Model]", speeds: "list[Speed]", work: "GenerationWorkload"
) -> dict[str, Any]:
    """Returns the results for the table and the JSON file, with a comparison if there are two models."""
    from spap_jax.evaluation.speed import arithmetic, speed_up
    from spap_jax.report.account import versions

    result: dict[str, Any] = {
        "workload": asdict(work),
        "models": [_measured(*each, work) for each in zip(names, models, speeds, strict=True)],
        "versions": versions(),
    }
    if len(speeds) == 2:
        before, after = speeds
        result["speed_up"] = {
            "prefill": speed_up(before.prefill, after.prefill),
            "decode": speed_up(before.decode, after.decode),
        }
        needs = zip(*(arithmetic(model, work) for model in models), strict=True)
        bounds = (dense / pruned for dense, pruned in needs)
        result["by_arithmetic"] = dict(zip(("prefill", "decode"), bounds, strict=True))
    return result


def _measured(name: str, model: "Model", speed: "Speed", work: "GenerationWorkload") -> dict[str, Any]:
    from spap_jax.checkpoint import weight_bytes
    from spap_jax.models import cost
    from spap_jax.numerics import generation_dtype
    from spap_jax.storage.location import public_name

    count = cost.parameters(model.family, model.config)
    return {
        "model": public_name(name),
        "parameters": count.total,
        "mlp_parameters": count.mlp,
        "bytes": weight_bytes(model),
        "activations": str(generation_dtype(model.params)),
        "prefill_seconds": speed.prefill,
        "decode_seconds": speed.decode,
        "prefill_tokens_per_second": work.batch * work.prompt / median(speed.prefill),
        "decode_tokens_per_second": work.batch / median(speed.decode),
    }


def _headings(names: list[str]) -> list[str]:
    """Returns the last parts of the models' names if they are unique, which leaves more room for the numbers."""
    short = [name.rstrip("/").rpartition("/")[2] for name in names]
    return short if len(set(short)) == len(short) else names


def _show(result: dict[str, Any], names: list[str]) -> None:
    models, work = result["models"], result["workload"]
    sizes = (
        ("parameters", "parameters", count_text),
        ("MLP parameters", "mlp_parameters", count_text),
        ("bytes of weights", "bytes", bytes_text),
    )
    rows = [(name, *(text(model[key]) for model in models)) for name, key, text in sizes]
    rows += [
        (f"{phase}, tokens/s", *(f"{model[f'{phase}_tokens_per_second']:.1f}" for model in models))
        for phase in ("prefill", "decode")
    ]
    columns = ("", *_headings(names))
    if len(models) == 2:
        before, after = models
        ratios = [before[key] / after[key] for _, key, _ in sizes] + list(result["speed_up"].values())
        bounds = [""] * len(sizes) + [f"{bound:.3f}x" for bound in result["by_arithmetic"].values()]
        rows = [(*row, f"{ratio:.3f}x", bound) for row, ratio, bound in zip(rows, ratios, bounds, strict=True)]
        columns += ("ratio", "by arithmetic")
    title = (
        f"batch {work['batch']}, prompt {work['prompt']}, {work['new']} new tokens, median of {work['repeats']} runs"
    )
    console.table(title, columns, rows)
