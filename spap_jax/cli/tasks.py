"""The half of ``spap eval`` that runs tasks of the lm-evaluation-harness."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spap_jax.cli import console
from spap_jax.errors import UserError

if TYPE_CHECKING:
    from spap_jax.models.model import Model


def measure_tasks(
    model: str,
    read: "Callable[[], Model]",
    listed: str,
    task_path: Path | None,
    limit: int | None,
    batch_tokens: int,
) -> dict[str, Any]:
    """Runs tasks and prints their table.

    Args:
        model: Folder or hub id of the checkpoint.
        read: Reads it, once the tasks are known.
        listed: Names of tasks, separated by commas.
        task_path: Folder with further tasks.
        limit: Number of examples of each task, from its start. By default all.
        batch_tokens: Number of tokens that a device processes at once.

    Returns:
        Values for a JSON file: the harness's results, and under ``spap`` the settings and versions of this run.

    Raises:
        UserError: lm_eval is not installed, or the tasks or the model cannot be loaded.
    """
    try:
        from spap_jax.evaluation import harness, tasks
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise UserError(
            "--tasks needs lm_eval, which is not installed: install it with pip install 'spap-jax[eval]'."
        ) from error
    from spap_jax.pruning.prune_report import versions
    from spap_jax.storage.location import public_name

    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks names no task: give names with commas between them, for example arc_easy,piqa.")
    with console.waiting(f"looking up {', '.join(names)}"):
        chosen = tasks.choose_tasks(names, task_path)
    loaded = read()
    start = time.perf_counter()
    with console.counting() as watch:
        adapted = harness.HarnessModel(loaded, batch_tokens=batch_tokens, watch=watch)
        results = tasks.run_tasks(adapted, chosen, limit)
    seconds = time.perf_counter() - start
    _show(model, results, limit, seconds)
    ours = {
        "model": public_name(model),
        "tasks": names,
        "task_path": task_path and public_name(task_path),
        "limit": limit,
        "seconds": seconds,
    }
    dropped = ("pretty_env_info", "git_hash", "upper_git_hash")  # they describe the machine and the working folder
    kept = {name: value for name, value in results.items() if name not in dropped}
    return kept | {"spap": ours | {"versions": versions()}}


def _show(model: str, results: dict[str, Any], limit: int | None, seconds: float) -> None:
    rows = []
    for name, found in results["results"].items():
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            rows.append((name, shown, _number(value), _number(error)))
    few = "" if limit is None else f", the first {limit} examples of each"
    console.table(f"{model}{few}; {seconds:.1f} s", ("task", "metric", "value", "stderr"), rows)


def _number(value: Any) -> str:
    """Formats a number with four decimals, or in scientific notation if huge; empty for a missing standard error."""
    if not isinstance(value, float):
        return "" if value in (None, "N/A") else str(value)
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"
