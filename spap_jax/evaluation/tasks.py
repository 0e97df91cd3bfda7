"""Tasks of EleutherAI's lm-evaluation-harness: finds them by name, loads their data, and runs them.

Importing this file requires ``lm_eval``.
"""

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from spap_jax.errors import UserError, first_line, option
from spap_jax.storage.files import is_uncached, offline, require_hub

BOOTSTRAP = 1000
"""Bootstrap resamples for standard errors without a formula; the harness's default of 100 000 takes minutes."""

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def choose_tasks(asked: Sequence[str], task_path: Path | None = None, task_data: Path | None = None) -> "Tasks":
    """Finds tasks, groups and tags by name.

    Args:
        asked: Their names; ``*`` matches anything.
        task_path: A folder with further tasks (YAML), which override the harness's own tasks of the same name.
        task_data: A folder with data sets, which are read in place of those of the hub; see `read_data_set`.

    Raises:
        UserError: a folder or a task does not exist.
    """
    for name, folder in (("task_path", task_path), ("task_data", task_data)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"there is no folder {folder}: give {option(name)} one that exists.")
    tasks = Tasks(include_path=str(task_path), include_defaults=False) if task_path else None
    if tasks is None or not {*asked} <= {*tasks.all_subtasks}:  # reading the other tasks takes seconds
        tasks = Tasks(include_path=task_path and str(task_path))
    tasks.data, tasks.names = task_data, []
    for name in asked:
        matching = tasks.match_tasks([name])
        if not matching:
            near = ", ".join(difflib.get_close_matches(name, tasks.all_tasks, n=5))
            raise UserError(f"there is no readable task {name}: check its name{f' (near it: {near})' if near else ''}.")
        tasks.names += matching
    tasks.names = list(dict.fromkeys(tasks.names))
    return tasks


def run_tasks(model: LM, tasks: "Tasks", limit: int | None = None, samples: bool = False) -> dict[str, Any]:
    """Runs tasks with ``lm_eval.simple_evaluate`` and returns its results.

    Args:
        limit: Maximum number of examples of each task, from its start. By default all.
        samples: Whether the results hold every example with its answers.

    Raises:
        UserError: a task or its data cannot be loaded.
    """
    # The harness forks to compute standard errors, unless told not to: JAX's threads do not survive a fork.
    with mock.patch.dict("os.environ", DISABLE_MULTIPROC="1"), redirect_stdout(sys.stderr):
        results = simple_evaluate(
            model=model,
            tasks=[*tasks.names],
            task_manager=tasks,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=samples,
        )
    return dict(results or {})


def split_of(results: dict[str, Any], task: str) -> str:
    """Returns the split of its data on which a task was run; "" for a group of tasks."""
    config = results["configs"].get(task, {})
    return config.get("test_split") or config.get("validation_split") or ""


def read_data_set(folder: Path, path: str, config: str | None) -> Any:
    """Returns the splits of a data set that lies in a folder, by name.

    It is ``[OWNER/]NAME/[CONFIG/]SPLIT``, as ``save_to_disk`` of the library ``datasets`` writes it; without a config,
    CONFIG may be anything. Or ``[OWNER/]NAME`` is a copy of the hub's repository. ``path`` is its name on the hub.

    Raises:
        UserError: It is not there.
    """
    places = [place for name in (path, path.rpartition("/")[2]) if (place := folder / name).is_dir()]
    for place in places:
        saved = [*place.glob(f"{config or '*'}/*/dataset_info.json")] or [*place.glob("*/dataset_info.json")]
        if saved:  # in memory, since what a task makes of them would be cached beside them
            return {info.parent.name: datasets.load_from_disk(str(info.parent), keep_in_memory=True) for info in saved}
    if not places:
        raise UserError(f"{folder} has no data set {path}: add it as {folder / path}, or leave its task out.")
    return datasets.load_dataset(str(places[0]), config)


@contextmanager
def _data_in(folder: Path | None) -> Iterator[None]:
    """Lets tasks read their data from a folder; splits that it lacks count as splits that do not exist."""

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        if folder is None or "data_files" in (dataset_kwargs or {}):  # files that the task itself names
            own(task, dataset_kwargs)
            return
        task.dataset = read_data_set(folder, task.DATASET_PATH, task.DATASET_NAME)
        for split in _SPLITS:
            if getattr(task.config, split) not in task.dataset:
                setattr(task.config, split, None)

    own: Callable[..., None] = ConfigurableTask.download
    with mock.patch.object(ConfigurableTask, "download", download):
        yield


class Tasks(TaskManager):
    """The tasks that were chosen, by ``names``, in the harness's manager; loading errors are a ``UserError``."""

    names: list[str]
    data: Path | None

    def load(self, task_list: Any) -> Any:
        """Builds tasks and reads their data: from the folder, else from the cache if possible, else from the hub."""
        names = ", ".join(task_list)
        remedy = f"give {option('task_data')} a folder that holds them."
        try:
            with _data_in(self.data):
                try:
                    with offline():
                        loaded = super().load(task_list)
                except (ConnectionError, ValueError) as error:
                    if not is_uncached(error):
                        raise
                    require_hub(f"the data of {names}", remedy)
                    loaded = super().load(task_list)
        except UserError:
            raise
        except Exception as error:  # a task is third-party configuration, code and data: anything may be raised
            raise UserError(f"{names} cannot be loaded ({first_line(error)}): correct the task, or {remedy}") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"the task {name} runs what the model writes, which is not safe: leave it out.")
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"the task {name} has images or sound, and the models here read text: leave it out.")
        return loaded
