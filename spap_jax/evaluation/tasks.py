"""Tasks of EleutherAI's lm-evaluation-harness: finds them by name, loads them from cache, hub or folder, runs them.

Importing this file requires ``lm_eval``.
"""

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from spap_jax.errors import UserError, first_line, option
from spap_jax.storage.files import is_uncached, offline, require_hub

BOOTSTRAP = 1000
"""Bootstrap resamples for standard errors without a formula; the harness's default of 100 000 takes minutes."""


class Chosen(NamedTuple):
    """The tasks chosen.

    Attributes:
        names: Names of the tasks.
        manager: The manager that loads them.
    """

    names: list[str]
    manager: TaskManager


def choose_tasks(asked: Sequence[str], task_path: Path | None = None) -> Chosen:
    """Finds tasks, groups and tags by name.

    Args:
        asked: Their names; ``*`` matches anything.
        task_path: A folder with further tasks (YAML), which override the harness's own tasks of the same name.

    Raises:
        UserError: the folder or a task does not exist.
    """
    manager = _manager(asked, task_path)
    names = [name for each in asked for name in _matches(each, manager, task_path)]
    return Chosen(list(dict.fromkeys(names)), manager)


def run_tasks(model: LM, tasks: Chosen, limit: int | None = None) -> dict[str, Any]:
    """Runs tasks with ``lm_eval.simple_evaluate`` and returns its results without the samples.

    Args:
        model: The model.
        tasks: The tasks that ``choose_tasks`` found.
        limit: Maximum number of examples of each task, from its start. By default all.

    Raises:
        UserError: a task or its data cannot be loaded.
    """
    with _one_process(), redirect_stdout(sys.stderr):
        results = simple_evaluate(
            model=model,
            tasks=[*tasks.names],
            task_manager=tasks.manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    return dict(results or {})


class _Tasks(TaskManager):
    """The harness's task manager, with loading errors reported as a ``UserError``."""

    def load(self, task_list: Any) -> Any:
        """Builds tasks and reads their data, from the cache if possible, else from the hub."""
        names = ", ".join(task_list)
        try:
            try:
                with offline():
                    loaded = super().load(task_list)
            except (ConnectionError, ValueError) as error:
                if not is_uncached(error):
                    raise
                require_hub(f"the data of {names}", _remedy())
                loaded = super().load(task_list)
        except UserError:
            raise
        except Exception as error:  # a task is third-party configuration, code and data: anything may be raised
            raise UserError(
                f"{names} cannot be loaded ({first_line(error)}): correct the task, or {_remedy()}"
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"the task {name} runs what the model writes, which is not safe: leave it out.")
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"the task {name} has images or sound, and the models here read text: leave it out.")
        return loaded


def _remedy() -> str:
    return f"name tasks whose data are local, with {option('task_path')}."


def _manager(names: Sequence[str], task_path: Path | None) -> TaskManager:
    """Returns a manager of all tasks, or only of the folder's if it has all names: reading the others takes seconds."""
    if task_path is None:
        return _Tasks()
    if not task_path.is_dir():
        raise UserError(f"there is no folder {task_path}: give {option('task_path')} a folder with tasks (YAML).")
    own = _Tasks(include_path=str(task_path), include_defaults=False)
    return own if {*names} <= {*own.all_subtasks} else _Tasks(include_path=str(task_path))


def _matches(name: str, manager: TaskManager, task_path: Path | None) -> list[str]:
    """Returns the tasks that match a name or a pattern."""
    found = manager.match_tasks([name])
    if not found:
        _check_syntax(task_path)
        near = difflib.get_close_matches(name, manager.all_tasks, n=5)
        help = (
            f"near it are {', '.join(near)}."
            if near
            else f"check the name, or give {option('task_path')} the folder it is in."
        )
        raise UserError(f"there is no task {name}: {help}")
    return found


def _check_syntax(task_path: Path | None) -> None:
    """Raises an error that names a file that is not YAML: the harness skips the file, so its task is missing."""
    for file in sorted(task_path.rglob("*.yaml")) if task_path else ():
        try:
            yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)  # builds no values: !function may occur
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise UserError(f"{file} cannot be read as YAML ({' '.join(str(error).split())}): correct it.") from error


@contextmanager
def _one_process() -> Iterator[None]:
    """Keeps the harness from forking to compute standard errors: JAX's threads do not survive a fork."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
