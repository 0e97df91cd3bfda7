"""The half of ``spap eval`` that runs tasks of the lm-evaluation-harness."""

import time
from pathlib import Path
from typing import Any


def measure_tasks(model: str, names: list[str], task_path: Path | None, limit: int | None) -> dict[str, Any]:
    """Runs tasks, prints the table, and returns what goes into a JSON file: the harness's results and our settings.

    Raises:
        UserError: lm_eval is not installed, or the tasks or the model cannot be loaded.
    """
    tasks, harness = _modules()
    from spap_jax import checkpoint
    from spap_jax.cli.console import request_progress, waiting
    from spap_jax.pruning.report import versions

    with waiting(f"looking up {', '.join(names)}"):
        chosen = tasks.choose_tasks(names, task_path)
    with waiting(f"reading {model}"):
        loaded = checkpoint.load(model)
    start = time.perf_counter()
    with request_progress() as watch:
        results = tasks.run_tasks(harness.HarnessModel(loaded, watch=watch), chosen, limit)
    seconds = time.perf_counter() - start
    _show(model, results, limit, seconds)
    ours = {"model": model, "tasks": names, "task_path": task_path, "limit": limit, "seconds": seconds}
    dropped = ("pretty_env_info", "git_hash", "upper_git_hash")  # of the machine and the working folder
    kept = {name: value for name, value in results.items() if name not in dropped}
    return kept | {"spap": ours | {"versions": versions()}}


def _modules() -> tuple[Any, Any]:
    """The modules that need ``lm_eval``, an extra."""
    from spap_jax.errors import UserError

    try:
        from spap_jax.evaluation import harness, tasks
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError("--tasks needs lm_eval, which is not installed: pip install 'spap-jax[eval]'.") from error
    return tasks, harness


def _show(model: str, results: dict[str, Any], limit: int | None, seconds: float) -> None:
    from spap_jax.cli import console

    rows = []
    for name, found in results["results"].items():
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            rows.append((
                name,
                metric if filtered == "none" else f"{metric} ({filtered})",
                f"{value:.4f}" if isinstance(value, float) else str(value),
                f"{error:.4f}" if isinstance(error, float) else "",
            ))  # fmt: skip
    few = "" if limit is None else f", the first {limit} examples of each"
    console.table(f"{model}{few}; {seconds:.1f} s", ("task", "metric", "value", "stderr"), rows)
